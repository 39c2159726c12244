"""`python finetune.py --model runs/vit-digits/fused`: finetunes a model and, beside it, what it is compared with."""

import argparse
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, restricted_number_type
from lightning.pytorch.loggers import Logger
from torch import nn

from fusionpl.cli.cards import command_section, metadata
from fusionpl.cli.common import (
    add_logger_option,
    add_reading_options,
    add_trainer_options,
    check_trains,
    data_module,
    follow,
    new_parser,
    parse,
    parser_like,
    quiet,
    settings_in,
    settings_of,
    task_of,
    with_presets,
)
from fusionpl.cli.outputs import is_main_process, resumed, run_folder, write_json
from fusionpl.cli.push import add_push_options, check_push_options, push_run
from fusionpl.datamodules.images import AUTO
from fusionpl.errors import FusionError
from fusionpl.evaluation import (
    Outcomes,
    Report,
    Row,
    best_parent,
    flops,
    load_outcomes,
    parameters,
    readable,
    save_outcomes,
)
from fusionpl.families import read_family
from fusionpl.fusion.average import mixing_weights, vanilla
from fusionpl.models.heads import with_classifier
from fusionpl.models.hub import short_name
from fusionpl.models.images import grid_of
from fusionpl.models.lineage import ancestor, inherited, lineage, parents_section
from fusionpl.models.load import load_model
from fusionpl.models.processors import image_processing
from fusionpl.models.save import add_to_card, save_model
from fusionpl.models.tokenizers import load_tokenizer
from fusionpl.models.vocabulary import Vocabulary, load_parent
from fusionpl.paths import public
from fusionpl.presets import CONF
from fusionpl.training.dashboard import log_models, log_report
from fusionpl.training.fit import fit
from fusionpl.training.loggers import finish_loggers, make_loggers
from fusionpl.training.module import OptimConfig, shrunk
from fusionpl.training.tasks import TASKS, TaskName, task_named
from fusionpl.training.weights_and_biases import group_of, in_sweep

PRESET = CONF / "finetune" / "default.yaml"
Shrink = restricted_number_type("Shrink", float, [(">", 0), ("<=", 1)])
DONE, SAMPLES = "metrics.json", "samples.safetensors"


@dataclass(frozen=True)
class Candidate:
    """A model to finetune.

    Attributes:
        model: which is trained in place.
        sources: where its weights came from.
    """

    model: nn.Module
    sources: Sequence[str]


def build_parser(task: TaskName = "image-classification") -> ArgumentParser:
    """The options of finetune.py for a task."""
    parser = new_parser(f"Finetunes a model. Without --config the preset {PRESET.name} is used.")
    parser.add_argument("--task", type=task_named, default=task, help="what is learned; decides the options of data")
    parser.add_argument("--model", type=str | None, help="a fused model, or any run folder, model folder or "
                        "hub id (org/name or org/name@revision)")  # fmt: skip
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="decides data order and augmentation")
    parser.add_argument("--baselines", type=bool, default=True, help="finetune best parent and vanilla average too")
    parser.add_argument("--shrink", type=Shrink, default=1.0, help="multiply weights by this first, those "
                        "that weight decay acts on; 0.7 for parents that have converged")  # fmt: skip
    parser.add_argument("--output", type=str | None, help="where the finetuned model goes")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    parser.add_argument("--resume", action="store_true", help="continue a finetuning that was stopped")
    add_logger_option(parser)
    add_push_options(parser)
    add_reading_options(parser)
    parser.add_class_arguments(TASKS[task].data, "data")
    parser.add_class_arguments(OptimConfig, "optim")
    add_trainer_options(parser)
    return parser


def run(argv: Sequence[str]) -> None:
    """Finetunes, from `argv` to the exported models and the longer report.

    Raises:
        FusionError: a user's mistake.
        KeyboardInterrupt: the user stopped it; the message says how to continue.
    """
    quiet()
    given, argv = argv, with_presets(argv, "finetune")
    model = _model_in(argv)
    source = Path(model)
    origin = settings_in(source)
    parser = parser_like(argv, origin, [model], build_parser)
    options = parse(parser, argv, PRESET)
    check_trains(options.task)
    elsewhere = bool(origin) and options.task != task_named(origin.get("task", "image-classification"))
    home = source.parent if source.is_dir() else Path("runs")
    folder = Path(options.output or in_sweep(home / f"{short_name(model)}-finetuned"))
    check_push_options(options.push_to, options.push_private)
    made_of = _made_of(model, origin) if is_main_process() else ("", {})
    candidates = _candidates(model, origin, options, every_parent=elsewhere)
    started = time.monotonic()
    try:
        if options.resume:
            with resumed(folder):
                if not (folder / "config.yaml").is_file():
                    raise FusionError(f"there is no finetuning to resume in {folder}; start one without --resume")
                _check_sharding(folder, options)
                rows = _finetune_all(parser, options, candidates, folder)
        else:
            with run_folder(folder, options.overwrite, keep="checkpoints/last.ckpt"):
                rows = _finetune_all(parser, options, candidates, folder)
    except KeyboardInterrupt as stop:
        words = [word for word in argv if word not in ("--resume", "--overwrite")]
        raise KeyboardInterrupt(f"continue with: python finetune.py {shlex.join([*words, '--resume'])}") from stop
    if is_main_process():
        settings = settings_of(parser, options)
        _finish(folder if elsewhere else source, origin, options, rows, folder, settings)
        parents, data = made_of
        command = command_section("finetune", [word for word in given if word != "--resume"], PRESET)
        data |= metadata(settings, rows[0][0].as_dict(), folder.name)
        add_to_card(folder / "model", f"{parents}\n\n{command}".lstrip(), data)
        print(f"{folder}: model/, baselines/; {time.monotonic() - started:.0f} s")
        if options.push_to is not None:
            push_run(folder, options.push_to, private=options.push_private)


def _model_in(argv: Sequence[str]) -> str:
    """The value of --model, which decides what the other options are."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--model")
    model = peek.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0].model
    if model is None:
        if "-h" in argv or "--help" in argv:
            parse(build_parser(task_of(argv)), argv, PRESET)
        raise FusionError("which model? give --model, for example --model runs/vit-digits/fused")
    return str(model)


def _made_of(model: str, origin: dict[str, Any]) -> tuple[str, dict[str, Any]]:
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
    paths, decreed = origin["parents"], options.data.get("normalize", AUTO) != AUTO
    processing = None if decreed or grid_of(fused) is None else image_processing(source)
    reading = {"processing": processing, "allow_pickle": allowed, "family": family}
    parents = [load_parent(path, vocabulary, fused, **reading) for path in paths]
    plain = vanilla(parents, mixing_weights(origin.get("weights"), len(parents)))
    report = Report.load(Path(source) / "report").rows
    rows = [row for row in report if row.name.startswith("parent ") and row.stage == "one-shot"]
    found = best_parent(report)
    if found is None:
        raise FusionError(
            f"nothing was measured when {source} was fused, so nobody knows its best parent; add --baselines false"
        )
    candidates |= {
        row.name: Candidate(parent, [path])
        for row, parent, path in zip(rows, parents, paths, strict=True)
        if every_parent or row is found[0]
    }
    return candidates | ({"vanilla": Candidate(plain, paths)} if plain is not None else {})


def _check_sharding(folder: Path, options: Namespace) -> None:
    """Refuses to resume with FSDP what was started without it, or the reverse: they number parameters differently."""
    before, now = settings_in(folder).get("trainer", {}).get("strategy", "auto"), options.trainer.strategy
    if (before == "fsdp") != (now == "fsdp"):
        raise FusionError(
            f"{folder} was started with trainer.strategy {before}, not {now}; give --resume the options of the start"
        )


def _finetune_all(
    parser: ArgumentParser, options: Namespace, candidates: Mapping[str, Candidate], folder: Path
) -> list[tuple[Row, Outcomes | None]]:
    """The same finetuning for every candidate; finished ones are not repeated when a run resumes."""
    chosen, settings = parser.instantiate(options), settings_of(parser, options)
    if is_main_process():
        (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    rows = []
    for index, (name, candidate) in enumerate(candidates.items()):
        place = folder if index == 0 else folder / "baselines" / name.replace("parent ", "")
        done = place / DONE
        if not (options.resume and done.is_file()):
            _finetune(options, chosen, settings, name, candidate, place)
        if is_main_process():
            row = Row(**json.loads(done.read_text()))
            rows.append((row, load_outcomes(place / SAMPLES).get(name)))
    return rows


def _finetune(
    options: Namespace, chosen: Namespace, settings: dict[str, Any], name: str, candidate: Candidate, place: Path
) -> None:
    if is_main_process():
        place.mkdir(parents=True, exist_ok=True)
        print(f"finetuning {name} for {options.trainer.max_epochs} epochs")
    L.seed_everything(options.seed, workers=True, verbose=False)
    task = TASKS[options.task]
    data = data_module(options.task, chosen.data, options.seed, load_tokenizer(options.model), [options.model])
    resume = options.resume and (place / "checkpoints" / "last.ckpt").is_file()
    follow(data, candidate.model, options.model)
    model = shrunk(candidate.model, options.shrink)
    if task.new_head:
        model = with_classifier(model, data.num_classes, data.class_names, seed=options.seed, kind=data.kind)
    loggers = _loggers(options, settings, name, place, resume)
    result = fit(
        model, data, chosen.optim, options.trainer.as_dict(), place, seed=options.seed, loggers=loggers, resume=resume,
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
        kept = {"tokenizer": data.tokenizer, "processing": data.processing}
        save_model(result.model, place / "model", card=card, **kept)
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


def _finish(
    source: Path,
    origin: dict[str, Any],
    options: Namespace,
    rows: list[tuple[Row, Outcomes | None]],
    folder: Path,
    settings: dict[str, Any],
) -> None:
    """Adds the rows to the report of the fused model, and prints it."""
    known = (source / "report" / "report.json").is_file()
    report = Report.load(source / "report") if known else Report()
    # Rows of an earlier finetuning may stay; what was finetuned otherwise is not compared.
    report.outcomes = {key: one for key, one in report.outcomes.items() if key[1] != "finetuned"}
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
