"""Figures of models, of their ensemble and plain average, without fusing."""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from fusionpl.calibration.forward import device_named
from fusionpl.cli.jobs.again import data_again
from fusionpl.cli.jobs.data import common_tokenizer, data_of, follow
from fusionpl.cli.jobs.next_steps import after_evaluation
from fusionpl.cli.jobs.summary import print_summary
from fusionpl.cli.outputs import staged
from fusionpl.cli.running import quiet
from fusionpl.datamodules.base import PIXELS, FixedSplits
from fusionpl.datamodules.config import AUTO
from fusionpl.evaluation.encoders import bench_for
from fusionpl.evaluation.measuring import measure_models
from fusionpl.evaluation.report import Report
from fusionpl.models.classes import with_classes_of
from fusionpl.models.hub import named
from fusionpl.models.load import load_model
from fusionpl.models.pipelines import check_tokenizers
from fusionpl.models.pixels import describe_differences, with_pixels
from fusionpl.models.processors import image_processing
from fusionpl.models.tokenizers import load_tokenizer
from fusionpl.options import write_settings
from fusionpl.training.dashboard import log_models, log_report
from fusionpl.training.loggers import finish_loggers, make_loggers
from fusionpl.training.weights_and_biases import group_of


def evaluate(options: Namespace, settings: dict[str, Any], changed: dict[str, Any], joint: str | None = None) -> None:
    """Measures models, and prints and writes the report.

    Args:
        options: of the command, those of data as their class.
        settings: the same as plain values.
        changed: those that are not the built-in ones.
        joint: the fused model whose parents' data they are measured on, and whose classes they are brought to.

    Raises:
        FusionError: a user's mistake.
    """
    quiet()
    started = time.monotonic()
    models = named(options.models)
    device = device_named(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    data = _joint(options, models, joint) if joint else data_of(options, models)
    every = None if joint is None else load_model(joint, allow_pickle=options.allow_pickle)

    def load(path: str) -> torch.nn.Module:
        model = load_model(path, allow_pickle=options.allow_pickle)
        model = model if every is None else with_classes_of(model, every)
        follow(data, model, options.models[0])
        model = with_pixels(model, path, data.processing)
        data.check_model(model)
        return model

    if data.reads == PIXELS and options.data.normalize == AUTO:
        said = {name: image_processing(path) for name, path in models.items()}
        for line in describe_differences(said, next(iter(said))):
            print(f"warning: {line}")

    report = Report(config=settings, changed=changed)
    measure_models(bench_for(report, data, device), {name: partial(load, path) for name, path in models.items()})
    report.steps = after_evaluation(report, options)
    print(report.table())
    made, dashboard = "", ""
    if options.output is not None:
        made = f"{options.output}: report/report.html, report/report.md"
        dashboard = _write(report, options, Path(options.output))
    print_summary(made, time.monotonic() - started, dashboard, report.steps)


def _joint(options: Namespace, models: Mapping[str, str], joint: str) -> FixedSplits:
    """The data of each parent of a fused model, among models that read text alike."""
    tokenizers = {name: load_tokenizer(path) for name, path in models.items()}
    data = data_again(options, joint, common_tokenizer(tokenizers, 0, renumbered=False))
    for line in check_tokenizers(tokenizers, renumbered=False, texts=data.texts()):
        print(f"warning: {line}")
    return data


def _write(report: Report, options: Namespace, output: Path) -> str:
    """Writes the report and its settings to the output folder, and logs it; returns where, see `finish_loggers`."""
    settings = report.config
    with staged(output, options.overwrite) as folder:
        write_settings(folder, settings)
        report.save(folder / "report")
    loggers = make_loggers(
        options.logger,
        output,
        name=f"evaluate {output.name}",
        job="evaluate",
        group=group_of(options.models),
        config=settings,
    )
    log_report(loggers, report, output / "report")
    log_models(loggers, used=options.models)
    return finish_loggers(loggers)
