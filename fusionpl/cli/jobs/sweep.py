"""A grid of fusions, one table."""

import csv
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from torch import nn

from fusionpl.cli.jobs.data import data_of, follow
from fusionpl.cli.jobs.fuse import progress_bar
from fusionpl.cli.jobs.next_steps import after_sweep
from fusionpl.cli.jobs.summary import print_summary
from fusionpl.cli.outputs import staged
from fusionpl.cli.running import quiet
from fusionpl.datamodules.base import FixedSplits
from fusionpl.errors import FusionError
from fusionpl.evaluation.metrics import evaluate
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import PARENT, Row
from fusionpl.families.family import Family, read_family
from fusionpl.fusion.config import FuseConfig
from fusionpl.fusion.fuse import fuse
from fusionpl.models.channels import with_channels_of
from fusionpl.models.hub import named
from fusionpl.models.images import with_image_size
from fusionpl.models.load import load_model
from fusionpl.models.pixels import with_pixels
from fusionpl.models.processors import image_processing
from fusionpl.models.save import class_names
from fusionpl.options import write_settings
from fusionpl.training.dashboard import log_models, log_report
from fusionpl.training.loggers import finish_loggers, make_loggers


def sweep(
    args: Namespace,
    settings: dict[str, Any],
    changed: dict[str, Any],
    configs: Mapping[str, FuseConfig],
    commands: Mapping[str, Sequence[str]],
    output: Path,
) -> None:
    """Fuses once for every cell, and writes the table.

    Args:
        args: of the command, those of data as their class.
        settings: the same as plain values.
        changed: those of them that are not as in the preset.
        configs: cell -> how to fuse.
        commands: cell -> the command that makes its model, in words.
        output: where the table goes.

    Raises:
        FusionError: a user's mistake.
    """
    quiet()
    begun = time.monotonic()
    parents, family = named(args.parents), read_family(args.family)
    models, data = _opened(args, parents, family)
    test = list(data.test_dataloader())
    report = Report(config=settings, changed=changed)
    for name, model in zip(parents, models, strict=True):
        report.add(Row(f"{PARENT}{name}", **_scores(evaluate(model, test))))
    # Drawn once: a loader with workers would start them again for each cell.
    calibration = list(data.calibration_dataloader())
    for name, config in progress_bar(configs.items(), f"sweep, {len(configs)} cells"):
        started = time.monotonic()
        result = fuse(
            models, calibration, config, names=list(parents), augment=data.augmented, seed=args.seed, family=family
        )
        seconds = round(time.monotonic() - started, 2)
        report.add(Row(name, **_scores(evaluate(result.model, test)), seconds=seconds))
    report.steps = after_sweep(report, commands)
    dashboard = _write(report, args, output)
    made = f"{output}: sweep.csv, report/report.html, report/report.md"
    print_summary(made, time.monotonic() - begun, dashboard, report.steps)


def _opened(args: Namespace, parents: Mapping[str, str], family: Family | None) -> tuple[list[nn.Module], FixedSplits]:
    """The parents and the data. Cells may have other anchors, but the data are cut into tokens, and images prepared,
    once."""
    models = [load_model(path, allow_pickle=args.allow_pickle) for path in parents.values()]
    for name, model in zip(parents, models, strict=True):
        own, first = class_names(model), class_names(models[0])
        if own and first and {*own} != {*first}:
            raise FusionError(
                f"a sweep measures parents that know the same classes, and {name} knows others than "
                f"{next(iter(parents))}; run fuse.py with each setting"
            )
    data = data_of(args, parents)
    follow(data, models[0], args.parents[0])
    brought = []
    for model, path in zip(models, args.parents, strict=True):
        model = with_channels_of(model, models[0], partial(image_processing, path))
        brought.append(with_pixels(with_image_size(model, models[0], family), path, data.processing, family))
    models = brought
    for model in models:
        data.follow(model)
    data.check_model(models[0])
    return models, data


def _write(report: Report, args: Namespace, output: Path) -> str:
    """Writes the report, the table and the settings to the output folder, prints and logs them; returns where, see
    `finish_loggers`."""
    settings = report.config
    with staged(output, args.overwrite) as folder:
        write_settings(folder, settings)
        report.save(folder / "report")
        columns, rows = report.rows_as_table()
        with (folder / "sweep.csv").open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    print(report.table())
    loggers = make_loggers(args.logger, output, name=f"sweep {output.name}", job="sweep", config=settings)
    log_report(loggers, report, output / "report")
    log_models(loggers, used=args.parents)
    return finish_loggers(loggers)


def _scores(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: metrics[key] for key in ("accuracy", "loss", "perplexity") if key in metrics}
