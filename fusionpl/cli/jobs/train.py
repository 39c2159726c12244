"""Trains one parent."""

import functools
import time
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace

from fusionpl.cli.jobs.cards import metadata
from fusionpl.cli.jobs.next_steps import after_training
from fusionpl.cli.jobs.summary import print_summary
from fusionpl.cli.running import is_main_process, quiet
from fusionpl.datamodules.base import FixedSplits
from fusionpl.evaluation.rows import readable
from fusionpl.files import write_json
from fusionpl.models.build import build_model
from fusionpl.models.save import save_model
from fusionpl.options import write_settings
from fusionpl.paths import public_settings
from fusionpl.training.dashboard import log_models
from fusionpl.training.data import DATA_MODULES
from fusionpl.training.fit import FitResult, fit
from fusionpl.training.loggers import finish_loggers, make_loggers
from fusionpl.training.module import ClassificationModule
from fusionpl.training.tasks import TASKS


def train(options: Namespace, settings: dict[str, Any], folder: Path) -> None:
    """Trains a parent and exports the model.

    Args:
        options: of train.py, those of model, data and optimiser as their classes.
        settings: the same as plain values.
        folder: of the run.

    Raises:
        FusionError: a user's mistake.
    """
    quiet()
    started = time.monotonic()
    L.seed_everything(options.seed, workers=True, verbose=False)
    task = TASKS[options.task]
    data = DATA_MODULES[options.task](options.data, options.seed, None)
    model = build_model(
        options.model, num_classes=data.num_classes, class_names=data.class_names, args=data.model_args()
    )
    name = f"{options.name}/seed-{options.seed}"
    loggers = make_loggers(options.logger, folder, name=name, job="train", config=settings, resume=options.resume)
    if is_main_process():
        write_settings(folder, settings)
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(
            f"training {options.model.architecture} ({size:.2f} M parameters) on {data.describe()} of"
            f" {options.data.path}, seed {options.seed}, into {folder}"
        )
    result = fit(
        model,
        data,
        options.optim,
        options.trainer.as_dict(),
        folder,
        seed=options.seed,
        loggers=loggers,
        resume=options.resume,
        monitor=task.monitor,
        mode=task.mode,
        module=functools.partial(ClassificationModule, compiled=options.compile),
    )
    if is_main_process():
        _export(result, data, settings, folder)
        log_models(loggers, made=folder)
    dashboard = finish_loggers(loggers)
    if is_main_process():
        print_summary(f"{folder}: model/, metrics.json", time.monotonic() - started, dashboard, after_training(folder))


def _export(result: FitResult, data: FixedSplits, settings: dict[str, Any], folder: Path) -> None:
    """Writes metrics.json and model/, and prints the result."""
    tested = {**result.figures, **data.derived(result.figures), **data.baseline()}
    figures = {
        **tested,
        "best_epoch": result.best_epoch,
        "epochs": result.epochs,
        "seconds": round(result.seconds, 1),
    }
    write_json(folder / "metrics.json", figures)
    save_model(
        result.model,
        folder / "model",
        tokenizer=data.tokenizer,
        processing=data.processing,
        card=_card(result, tested, public_settings(settings)),
        metadata=metadata(settings, tested, f"{settings['name']}-seed-{settings['seed']}"),
    )
    print(
        f"test {', '.join(f'{name} {readable(name, value)}' for name, value in tested.items())}"
        f" (epoch {result.best_epoch} of {result.epochs}, the best in validation)"
    )


def _card(result: FitResult, tested: dict[str, float], settings: dict[str, Any]) -> str:
    figures = "\n".join(f"| {name} | {value:.4f} |" for name, value in tested.items())
    return f"""# {settings["name"]}, seed {settings["seed"]}

{settings["model"]["architecture"]} trained from random weights on `{settings["data"]["path"]}`. The weights are those
of epoch {result.best_epoch} of {result.epochs}, the best in validation.

| on the test split | |
|---|---|
{figures}

The run's settings:

```yaml
{yaml.safe_dump(settings, sort_keys=False).strip()}
```"""
