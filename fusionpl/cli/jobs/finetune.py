"""Finetunes a model and, beside it, what it is compared with."""

import json
from pathlib import Path
from typing import Any

import lightning as L

from fusionpl.cli.finetune import Asked
from fusionpl.cli.jobs.candidates import Candidate, candidates
from fusionpl.cli.jobs.cards import MadeOf, made_of
from fusionpl.cli.jobs.data import data_module, follow
from fusionpl.cli.jobs.finetuned import Tested, loggers_of
from fusionpl.cli.running import is_main_process, quiet
from fusionpl.datamodules.base import FixedSplits
from fusionpl.evaluation.cost import flops, parameters
from fusionpl.evaluation.outcomes import load_outcomes, save_outcomes
from fusionpl.evaluation.rows import PARENT, Row, readable
from fusionpl.files import write_json
from fusionpl.models.heads import with_classifier
from fusionpl.models.save import save_model
from fusionpl.models.tokenizers import load_tokenizer
from fusionpl.options import write_settings
from fusionpl.paths import public
from fusionpl.training.dashboard import log_models
from fusionpl.training.fit import FitResult, fit
from fusionpl.training.loggers import finish_loggers
from fusionpl.training.module import shrunk
from fusionpl.training.tasks import TASKS

DONE, SAMPLES = "metrics.json", "samples.safetensors"


def finetune(asked: Asked) -> tuple[MadeOf, list[Tested]]:
    """The same finetuning for every candidate; finished ones are not repeated when a run resumes.

    Returns:
        What the model is made of, and what was measured of every candidate; nothing but in the main process.

    Raises:
        FusionError: a user's mistake.
    """
    quiet()
    origins = made_of(asked.options.model, asked.origin) if is_main_process() else ("", {})
    compared = candidates(asked)
    if is_main_process():
        write_settings(asked.folder, asked.settings)
    rows = []
    for index, candidate in enumerate(compared):
        name = candidate.name
        place = asked.folder if index == 0 else asked.folder / "baselines" / name.replace(PARENT, "")
        done = place / DONE
        if not (asked.options.resume and done.is_file()):
            _finetune(asked, candidate, place)
        if is_main_process():
            rows.append((Row(**json.loads(done.read_text())), load_outcomes(place / SAMPLES).get(name)))
    return origins, rows


def _finetune(asked: Asked, candidate: Candidate, place: Path) -> None:
    options = asked.options
    if is_main_process():
        place.mkdir(parents=True, exist_ok=True)
        print(f"finetuning {candidate.name} for {options.trainer.max_epochs} epochs")
    L.seed_everything(options.seed, workers=True, verbose=False)
    task = TASKS[options.task]
    data = data_module(options.task, options.data, options.seed, load_tokenizer(options.model), [options.model])
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
        _write(result, data, candidate.name, options.model, place)
        log_models(loggers, used=candidate.sources, made=place)
    finish_loggers(loggers)


def _write(result: FitResult, data: FixedSplits, name: str, source: str, place: Path) -> None:
    """Writes the model and what was measured of it; metrics.json last, which says that all is there."""
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
    card = f"# {name}, finetuned from {public(source)}\n\non the test split: {figures}"
    save_model(result.model, place / "model", card=card, tokenizer=data.tokenizer, processing=data.processing)
    if result.outcomes is not None:
        save_outcomes(place / SAMPLES, {name: result.outcomes})
    write_json(place / DONE, row.as_dict())
