"""Finetunes a model and, beside it, what it is compared with."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.loggers import Logger
from torch import nn

from fusionpl.cli.finetune import PRESET
from fusionpl.cli.jobs.cards import command_section, metadata
from fusionpl.cli.jobs.data import data_module, follow
from fusionpl.cli.running import is_main_process, quiet
from fusionpl.datamodules.config import AUTO
from fusionpl.errors import FusionError
from fusionpl.evaluation.cost import flops, parameters
from fusionpl.evaluation.outcomes import Outcomes, load_outcomes, save_outcomes
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import Row, best_parent, readable
from fusionpl.families.family import read_family
from fusionpl.files import write_json
from fusionpl.fusion.average import vanilla
from fusionpl.fusion.config import mixing_weights
from fusionpl.models.heads import with_classifier
from fusionpl.models.hub import short_name
from fusionpl.models.images import grid_of
from fusionpl.models.lineage import ancestor, inherited, lineage, parents_section
from fusionpl.models.load import load_model
from fusionpl.models.processors import image_processing
from fusionpl.models.save import add_to_card, save_model
from fusionpl.models.tokenizers import load_tokenizer
from fusionpl.models.vocabulary import Vocabulary, load_parent
from fusionpl.options import settings_in, write_settings
from fusionpl.paths import public
from fusionpl.training.dashboard import log_models, log_report
from fusionpl.training.fit import fit
from fusionpl.training.loggers import finish_loggers, make_loggers
from fusionpl.training.module import shrunk
from fusionpl.training.tasks import TASKS, task_named
from fusionpl.training.weights_and_biases import group_of

DONE, SAMPLES = "metrics.json", "samples.safetensors"
MadeOf = tuple[str, dict[str, Any]]  # a section of the card, and metadata
Tested = tuple[Row, Outcomes | None]


@dataclass(frozen=True)
class Candidate:
    """A model to finetune.

    Attributes:
        model: which is trained in place.
        sources: where its weights came from.
    """

    model: nn.Module
    sources: Sequence[str]


def _made_of(model: str, origin: dict[str, Any]) -> MadeOf:
    """What a finetuned model's card says of where it comes from, as a section and metadata: of a fused model's parents
    what was known when it was fused."""
    if "parents" in origin:
        section, data = inherited(Path(model) / "model")
        return section, data | {"tags": ["fusionpl", "merge"]}
    ancestors = [ancestor(short_name(model), model)]
    return parents_section(ancestors), lineage(ancestors, "finetune")


def _candidates(source: str, origin: dict[str, Any], options: Namespace, *, every_parent: bool) -> dict[str, Candidate]:
    """Report name -> model: the model itself and, for a fused one, its best parent and the vanilla average.

    For another task than the parents' nobody knows which parent is the best: then all of them.
    """
    if "parents" not in origin:
        return {short_name(source): Candidate(load_model(source, allow_pickle=options.allow_pickle), [source])}
    fused = load_model(source)
    candidates = {"fused": Candidate(fused, [source])}
    if not options.baselines:
        return candidates
    allowed = options.allow_pickle or origin.get("allow_pickle", False)
    family = read_family(origin.get("family"))
    vocabulary = Vocabulary.of(source, fused, family)
    paths, decreed = origin["parents"], getattr(options.data, "normalize", AUTO) != AUTO
    processing = None if decreed or grid_of(fused) is None else image_processing(source)
    reading = {"processing": processing, "allow_pickle": allowed, "family": family}
    parents = [load_parent(path, vocabulary, fused, **reading) for path in paths]
    plain = vanilla(parents, mixing_weights(origin.get("weights"), len(parents)))
    report = Report.load(Path(source) / "report").rows
    rows = [row for row in report if row.name.startswith("parent ") and row.stage == "one-shot"]
    best = best_parent(report)
    if best is None:
        raise FusionError(
            f"nothing was measured when {source} was fused, so nobody knows its best parent; add --baselines false"
        )
    candidates |= {
        row.name: Candidate(parent, [path])
        for row, parent, path in zip(rows, parents, paths, strict=True)
        if every_parent or row is best[0]
    }
    return candidates | ({"vanilla": Candidate(plain, paths)} if plain is not None else {})


def finetune(
    options: Namespace, settings: dict[str, Any], origin: dict[str, Any], folder: Path
) -> tuple[MadeOf, list[Tested]]:
    """The same finetuning for every candidate; finished ones are not repeated when a run resumes.

    Args:
        options: of finetune.py, those of data and optimiser as their classes.
        settings: the same as plain values.
        origin: those of the run that made the model.
        folder: of this run.

    Returns:
        What the model is made of, and what was measured of every candidate.

    Raises:
        FusionError: a user's mistake.
    """
    quiet()
    made_of = _made_of(options.model, origin) if is_main_process() else ("", {})
    candidates = _candidates(options.model, origin, options, every_parent=_elsewhere(options, origin))
    if is_main_process():
        write_settings(folder, settings)
    rows = []
    for index, (name, candidate) in enumerate(candidates.items()):
        place = folder if index == 0 else folder / "baselines" / name.replace("parent ", "")
        done = place / DONE
        if not (options.resume and done.is_file()):
            _finetune(options, settings, name, candidate, place)
        if is_main_process():
            row = Row(**json.loads(done.read_text()))
            rows.append((row, load_outcomes(place / SAMPLES).get(name)))
    return made_of, rows


def _finetune(options: Namespace, settings: dict[str, Any], name: str, candidate: Candidate, place: Path) -> None:
    if is_main_process():
        place.mkdir(parents=True, exist_ok=True)
        print(f"finetuning {name} for {options.trainer.max_epochs} epochs")
    L.seed_everything(options.seed, workers=True, verbose=False)
    task = TASKS[options.task]
    data = data_module(options.task, options.data, options.seed, load_tokenizer(options.model), [options.model])
    resume = options.resume and (place / "checkpoints" / "last.ckpt").is_file()
    follow(data, candidate.model, options.model)
    model = shrunk(candidate.model, options.shrink)
    if task.new_head:
        model = with_classifier(model, data.num_classes, data.class_names, seed=options.seed, kind=data.kind)
    loggers = _loggers(options, settings, name, place, resume)
    result = fit(
        model, data, options.optim, options.trainer.as_dict(), place, seed=options.seed, loggers=loggers, resume=resume,
        monitor=task.monitor, mode=task.mode,
    )  # fmt: skip
    if is_main_process():
        tested: dict[str, Any] = {**result.figures, **data.derived(result.figures)}
        row = Row(
            name,
            "finetuned",
            **tested,
            parameters=parameters(result.model),
            flops=flops(result.model, next(iter(data.test_dataloader()))),
            epochs=result.epochs,
            seconds=round(result.seconds, 1),
        )
        figures = ", ".join(f"{key} {readable(key, value)}" for key, value in tested.items())
        card = f"# {name}, finetuned from {public(options.model)}\n\non the test split: {figures}"
        extras = {"tokenizer": data.tokenizer, "processing": data.processing}
        save_model(result.model, place / "model", card=card, **extras)
        if result.outcomes is not None:
            save_outcomes(place / SAMPLES, {name: result.outcomes})
        write_json(place / DONE, row.as_dict())
        log_models(loggers, used=candidate.sources, made=place)
    finish_loggers(loggers)


def _loggers(options: Namespace, settings: dict[str, Any], name: str, place: Path, resume: bool) -> list[Logger]:
    """The loggers of a candidate's run."""
    return make_loggers(
        options.logger,
        place,
        name=f"finetune {name}",
        job="finetune",
        group=group_of([options.model]),
        config={**settings, "origin": settings_in(options.model)},
        resume=resume,
    )


def finish(
    options: Namespace,
    settings: dict[str, Any],
    origin: dict[str, Any],
    folder: Path,
    rows: list[Tested],
    made_of: MadeOf,
    argv: Sequence[str],
) -> None:
    """Adds the rows to the report of the fused model, prints it, and completes the model's card.

    Args:
        options, settings, origin, folder: see `finetune`.
        rows, made_of: what it returned.
        argv: the command's arguments, as they were given.
    """
    _report(folder if _elsewhere(options, origin) else Path(options.model), origin, options, rows, folder, settings)
    parents, data = made_of
    data |= metadata(settings, rows[0][0].as_dict(), folder.name)
    add_to_card(folder / "model", f"{parents}\n\n{command_section('finetune', argv, PRESET)}".lstrip(), data)


def _elsewhere(options: Namespace, origin: dict[str, Any]) -> bool:
    """Whether the task is another than the parents'."""
    return bool(origin) and options.task != task_named(origin.get("task", "image-classification"))


def _report(
    source: Path,
    origin: dict[str, Any],
    options: Namespace,
    rows: list[Tested],
    folder: Path,
    settings: dict[str, Any],
) -> None:
    """Adds the rows to the report of the fused model, and prints it."""
    known = (source / "report" / "report.json").is_file()
    report = Report.load(source / "report") if known else Report()
    # Rows of an earlier finetuning may stay; what was finetuned otherwise is not compared.
    report.outcomes = {key: outcome for key, outcome in report.outcomes.items() if key[1] != "finetuned"}
    for row, outcomes in rows:
        report.add(row, outcomes)
    report.config["finetune"] = settings
    home = (source if known else folder) / "report"
    report.save(home)
    for verdict in report.verdicts:
        if verdict.stage == "finetuned":
            add_to_card(folder / "model", f"**{verdict.words}**")
    loggers = _loggers(options, settings, rows[0][0].name, folder, resume=True)  # the first candidate's run goes on
    log_report(loggers, report, home)
    finish_loggers(loggers)
    print(f"\n{report.table()}\n")
    parent = settings_in(Path(origin["parents"][0])) if origin.get("parents") else origin
    whole, epochs = parent.get("trainer", {}).get("max_epochs"), rows[0][0].epochs
    if whole and epochs:
        print(f"finetuning took {epochs:g} epochs, {100 * epochs / whole:.0f} % of a parent's {whole}")
