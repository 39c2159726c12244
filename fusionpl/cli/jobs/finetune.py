"""Finetunes a model and, beside it, what it is compared with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L

from fusionpl.cli.finetune import Asked
from fusionpl.cli.jobs.candidates import Candidate, candidates, data_for, device_of_run
from fusionpl.cli.jobs.cards import MadeOf, made_of, metadata
from fusionpl.cli.jobs.data import follow
from fusionpl.cli.jobs.finetuned import DONE, SAMPLES, Tested, loggers_of
from fusionpl.cli.jobs.heads import finetune_heads
from fusionpl.cli.running import is_main_process, quiet
from fusionpl.datamodules.base import FixedSplits
from fusionpl.datamodules.joint import JointSplits
from fusionpl.evaluation.cost import flops, parameters
from fusionpl.evaluation.joint import JointBench
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import FIGURES, PARENT, Row, readable
from fusionpl.models.heads import with_classifier
from fusionpl.models.save import save_model
from fusionpl.options import write_settings
from fusionpl.paths import public
from fusionpl.training.dashboard import log_models
from fusionpl.training.fit import FitResult, fit
from fusionpl.training.loggers import finish_loggers
from fusionpl.training.module import shrunk
from fusionpl.training.tasks import TASKS


def finetune(asked: Asked) -> tuple[dict[str, MadeOf], list[Tested]]:
    """The same finetuning for every candidate; finished ones are not repeated when a run resumes.

    Returns:
        Name of a model's folder -> what its card says of where it comes from, and what was measured of every candidate;
        nothing but in the main process.

    Raises:
        FusionError: a user's mistake.
    """
    quiet()
    if asked.heads:
        return finetune_heads(asked)
    section, inherited = made_of(asked.options.model, asked.origin) if is_main_process() else ("", {})
    compared = candidates(asked)
    if is_main_process():
        write_settings(asked.folder, asked.settings)
    rows = []
    for index, candidate in enumerate(compared):
        name = candidate.name
        own = asked.folder / "baselines" / name.replace(PARENT, "").replace(" ", "-")
        place = asked.folder if index == 0 else own
        done = place / DONE
        if not (asked.options.resume and done.is_file()):
            _finetune(asked, candidate, place)
        if is_main_process():
            rows.append(Tested.read(done, place / SAMPLES))
    if not rows:
        return {}, []
    data = metadata(asked.settings, rows[0].row.as_dict(), asked.folder.name)
    return {"model": (section, inherited | data)}, rows


def _finetune(asked: Asked, candidate: Candidate, place: Path) -> None:
    options = asked.options
    if is_main_process():
        place.mkdir(parents=True, exist_ok=True)
        print(f"finetuning {candidate.name} for {options.trainer.max_epochs} epochs")
    L.seed_everything(options.seed, workers=True, verbose=False)
    task = TASKS[options.task]
    data = data_for(asked)
    resume = options.resume and (place / "checkpoints" / "last.ckpt").is_file()
    follow(data, candidate.model, options.model)
    model = shrunk(candidate.model, options.shrink)
    if task.new_head:
        model = with_classifier(model, data.num_classes, data.class_names, seed=options.seed, kind=data.kind)
    loggers = loggers_of(asked, candidate.name, place, resume=resume)
    result = fit(
        model, data, options.optim, options.trainer.as_dict(), place, seed=options.seed, loggers=loggers, resume=resume,
        monitor=task.monitor, mode=task.mode,
    )  # fmt: skip
    if is_main_process():
        _write(asked, result, data, candidate.name, place)
        log_models(loggers, used=candidate.sources, made=place)
    finish_loggers(loggers)


def _write(asked: Asked, result: FitResult, data: FixedSplits, name: str, place: Path) -> None:
    """Writes the model and what was measured of it; metrics.json last, which says that all is there."""
    tested = _tested(asked, result, data, name)
    shown = {key: value for key, value in tested.row.as_dict().items() if key in FIGURES}
    figures = ", ".join(f"{key} {readable(key, value)}" for key, value in shown.items())
    card = f"# {name}, finetuned from {public(asked.options.model)}\n\non the test split: {figures}"
    save_model(result.model, place / "model", card=card, tokenizer=data.tokenizer, processing=data.processing)
    tested.write(place / DONE, place / SAMPLES)


def _tested(asked: Asked, result: FitResult, data: FixedSplits, name: str) -> Tested:
    """What was measured of a model: on the data of each parent as in the report of the fusion."""
    took: dict[str, Any] = {"epochs": result.epochs, "seconds": round(result.seconds, 1)}
    if isinstance(data, JointSplits):
        data.alone()
        bench = JointBench(Report(), data, device_of_run(asked))
        bench.add(name, [result.model])
        result.model.cpu()
        (row,) = bench.report.rows
        key = row.name, row.stage
        tasks = bench.report.tasks.get(key, {})
        return Tested(replace(row, stage="finetuned", **took), bench.report.outcomes[key], tasks)
    figures: dict[str, Any] = {**result.figures, **data.derived(result.figures)}
    cost = flops(result.model, next(iter(data.test_dataloader())))
    row = Row(name, "finetuned", **figures, parameters=parameters(result.model), flops=cost, **took)
    return Tested(row, result.outcomes, {})
