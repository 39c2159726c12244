"""The options of commands that fuse parents, and what is read from them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt

from fusionpl.cli.alternatives import DISTILLED, TRAINED_ON
from fusionpl.cli.options import add_logger_option, add_reading_options, add_trainer_options
from fusionpl.cli.parsing import new_parser, parse, with_presets
from fusionpl.cli.tasks import parser_for
from fusionpl.errors import FusionError
from fusionpl.fusion.config import FuseConfig, mixing_weights, resolve_anchor
from fusionpl.presets import CONF
from fusionpl.training.tasks import TASKS, TaskName, task_named

PRESET = CONF / "fuse" / "default.yaml"
Depth = Literal["full", "rows", "none"]


def fusing_parser(task: TaskName) -> ArgumentParser:
    """The options of all commands that fuse parents of a task."""
    parser = new_parser(f"Aligns parents and averages them. Without --config the preset {PRESET.name} is used.")
    parser.add_argument("--parents", nargs="+", type=str, default=[], help="run folders, model folders or hub ids, "
                        "org/name or org/name@revision")  # fmt: skip
    parser.add_argument("--task", type=task_named, default=task, help="what the parents were trained for")
    parser.add_argument("--output", type=str | None, help="where the fused model goes")
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="decides what learned refinement draws")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    add_logger_option(parser)
    parser.add_argument("--compare", nargs="+", type=str, default=[], help=f"""more rows in the report: other presets;
                        {DISTILLED}, the ensemble distilled into the best parent by learned refinement; {TRAINED_ON},
                        the best parent trained on labels; both as long as the fusion took""")  # fmt: skip
    parser.add_argument("--report", type=Depth, default="full", help="rows: no curves and aligned average, which hold "
                        "several models in memory at once; none: measure nothing")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="prove the family on the parents; fuse nothing")
    parser.add_argument("--advise", action="store_true", help="look at the parents on a few hundred samples, say what "
                        "they are and what a minute is best spent on; fuse nothing")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, with time and memory")
    parser.add_argument("--family", type=str | None, help="a YAML file that says what the parents are, in place of the "
                        "library's; python -m fusionpl.cli.family drafts one")  # fmt: skip
    add_reading_options(parser)
    parser.add_class_arguments(FuseConfig)
    parser.add_class_arguments(TASKS[task].data, "data")
    add_trainer_options(parser)
    return parser


def arguments(argv: Sequence[str], build: Callable[[TaskName], ArgumentParser]) -> tuple[ArgumentParser, Namespace]:
    """The parser and what it read: task and data set are the parents' own unless the command line names others.

    Args:
        argv: the arguments.
        build: makes the parser for a task.
    """
    argv = with_presets(argv, "fuse")
    parser = parser_for(argv, "--parents", build)
    args = parse(parser, argv, PRESET)
    if len(args.parents) < 2:
        raise FusionError(f"fusion needs at least two parents, not {len(args.parents)}; give --parents RUN_A RUN_B")
    return parser, args


def fuse_config(options: Namespace) -> FuseConfig:
    """The FuseConfig among instantiated options."""
    return FuseConfig(**{field.name: options[field.name] for field in fields(FuseConfig)})


def check_configs(configs: Iterable[FuseConfig], parents: int) -> None:
    """Raises FusionError for a configuration that does not fit so many parents."""
    for config in configs:
        mixing_weights(config.weights, parents)
        resolve_anchor(config, parents)
