"""`fusionpl evaluate --models A B`: figures of models, of their ensemble and plain average, without fusing."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from jsonargparse import ArgumentParser

from fusionpl.calibration.forward import device_named
from fusionpl.cli.common import (
    add_logger_option,
    add_reading_options,
    data_module,
    follow,
    main,
    new_parser,
    parse_options,
    parser_for,
    quiet,
    settings_of,
)
from fusionpl.cli.fuse import common_tokenizer, named
from fusionpl.cli.measuring import measure_models
from fusionpl.cli.outputs import check_output, staged
from fusionpl.datamodules.base import PIXELS
from fusionpl.datamodules.images import AUTO
from fusionpl.errors import FusionError
from fusionpl.models.load import load_model
from fusionpl.models.pipelines import check_tokenizers
from fusionpl.models.pixels import told_differences, with_pixels
from fusionpl.models.processors import image_processing
from fusionpl.models.tokenizers import load_tokenizer
from fusionpl.training.dashboard import log_models, log_report
from fusionpl.training.loggers import finish_loggers, make_loggers
from fusionpl.training.tasks import TASKS, TaskName, task_named
from fusionpl.training.weights_and_biases import group_of


def build_parser(task: TaskName = "image-classification") -> ArgumentParser:
    """The options for models of a task."""
    parser = new_parser("Evaluates models on one test set, with their ensemble and plain average.", presets=False)
    parser.add_argument("--models", nargs="+", type=str, default=[], help="run folders, model folders or hub ids, "
                        "org/name or org/name@revision")  # fmt: skip
    parser.add_argument("--task", type=task_named, default=task, help="what the models were trained for")
    parser.add_argument("--output", type=str | None, help="where the report goes; none is written without it")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    add_logger_option(parser, "none")
    parser.add_argument("--device", type=str | None, help="where models are run; a GPU if there is one")
    add_reading_options(parser)
    parser.add_class_arguments(TASKS[task].data, "data")
    return parser


def run(argv: Sequence[str]) -> None:
    """The command; see `--help`.

    Raises:
        FusionError: a user's mistake.
    """
    quiet()
    parser = parser_for(argv, "--models", build_parser)
    options = parse_options(parser, argv)
    if not options.models:
        raise FusionError("nothing to evaluate; give --models RUN_A RUN_B")
    settings, chosen = settings_of(parser, options), parser.instantiate(options)
    models = named(options.models)
    tokenizers = {name: load_tokenizer(path) for name, path in models.items()}
    data = data_module(options.task, chosen.data, 0, common_tokenizer(tokenizers, 0, renumbered=False), options.models)
    device = device_named(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.output is not None:
        check_output(Path(options.output), options.overwrite)

    for line in check_tokenizers(tokenizers, renumbered=False, texts=data.texts()):
        print(f"warning: {line}")

    def load(name: str) -> torch.nn.Module:
        model = load_model(models[name], allow_pickle=options.allow_pickle)
        follow(data, model, options.models[0])
        model = with_pixels(model, models[name], data.processing)
        data.check_model(model)
        return model

    if data.reads == PIXELS and chosen.data.normalize == AUTO:
        said = {name: image_processing(path) for name, path in models.items()}
        for line in told_differences(said, next(iter(said))):
            print(f"warning: {line}")

    report = measure_models(list(models), load, data, device, settings)
    print(report.table())
    if options.output is None:
        return
    output = Path(options.output)
    with staged(output, options.overwrite) as folder:
        (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
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
    finish_loggers(loggers)
    print(f"\n{output}: report/report.html, report/report.md")


if __name__ == "__main__":
    sys.exit(main(run))
