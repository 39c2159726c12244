"""`fusionpl evaluate --models A B`: figures of models, of their ensemble and plain average, without fusing."""

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from fusionpl.cli.again import own_again
from fusionpl.cli.options import add_logger_option, add_reading_options
from fusionpl.cli.outputs import check_output
from fusionpl.cli.own_data import Own
from fusionpl.cli.parsing import changed_settings, new_parser, parse_options, said, settings_of
from fusionpl.cli.running import main, quiet
from fusionpl.cli.tasks import parser_like
from fusionpl.errors import FusionError
from fusionpl.models.folders import check_there
from fusionpl.options import settings_in
from fusionpl.training.tasks import TASKS, TaskName, task_named


def build_parser(task: TaskName = "image-classification") -> ArgumentParser:
    """The options for models of a task."""
    parser = new_parser("Evaluates models on one test set, with their ensemble and plain average.", presets=False)
    parser.add_argument("--models", nargs="+", type=str, default=[], help="run folders, model folders or hub ids, "
                        "org/name or org/name@revision")  # fmt: skip
    parser.add_argument("--task", type=task_named, default=task, help="what the models were trained for")
    parser.add_argument("--output", type=str | None, help="where the report goes; none is written without it")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    parser.add_argument("--own-data", type=Own | None, help="options of data of each parent of a fused model; "
                        "by default those of the first one that has some")  # fmt: skip
    add_logger_option(parser, "none")
    parser.add_argument("--device", type=str | None, help="where models are run; a GPU if there is one")
    add_reading_options(parser)
    parser.add_class_arguments(TASKS[task].data, "data")
    return parser


def run(argv: Sequence[str]) -> None:
    """Runs the command; see `--help`.

    Raises:
        FusionError: a user's mistake.
    """
    quiet()
    runs = {model: settings_in(model) for model in said(argv, "--models", "+") or []}
    # One whose parents had data of their own knows the classes of all, which the others are measured over, too.
    joint = next((model for model, run in runs.items() if run.get("own_data")), None)
    origin = runs[joint] if joint else next(filter(None, runs.values()), {})
    parser = parser_like(argv, origin, [*runs][:1], build_parser)
    options = parse_options(parser, argv)
    if not options.models:
        raise FusionError("nothing to evaluate; give --models RUN_A RUN_B")
    options.own_data = own_again(argv, origin, options)
    chosen, settings = parser.instantiate(options), settings_of(parser, options)
    check_there(options.models)
    if options.output is not None:
        check_output(Path(options.output), options.overwrite)
    from fusionpl.cli.jobs.evaluate import evaluate

    changed = changed_settings(settings, argv, parser, None)
    evaluate(chosen, settings, changed, joint if options.own_data else None)


if __name__ == "__main__":
    sys.exit(main(run))
