"""`python fuse.py --parents A B`: align, average, evaluate, report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt

from fusionpl.cli.alternatives import DISTILLED, TRAINED_ON, compared
from fusionpl.cli.options import add_logger_option, add_reading_options, add_trainer_options
from fusionpl.cli.outputs import check_output, in_sweep
from fusionpl.cli.parsing import new_parser, parse, settings_of, with_presets
from fusionpl.cli.push import add_push_options, check_push_options
from fusionpl.cli.running import quiet
from fusionpl.cli.tasks import check_trains, parser_for
from fusionpl.errors import FusionError
from fusionpl.fusion.config import FuseConfig, mixing_weights, resolve_anchor
from fusionpl.models.folders import check_there
from fusionpl.models.hub import short_name
from fusionpl.presets import CONF
from fusionpl.training.tasks import TASKS, TaskName, task_named

PRESET = CONF / "fuse" / "default.yaml"
Depth = Literal["full", "rows", "none"]


@dataclass(frozen=True)
class Asked:
    """What a command line asks for, checked as far as that needs no model.

    Attributes:
        argv: the command line.
        args: its options, those of data as their class.
        settings: those that decide the result, as plain values.
        config: how to fuse.
        parents: short name -> where the parent comes from.
        presets: row -> another configuration to compare with.
        alternatives: what else to compare with, of ALTERNATIVES.
        output: where the fused model goes.
    """

    argv: Sequence[str]
    args: Namespace
    settings: dict[str, Any]
    config: FuseConfig
    parents: Mapping[str, str]
    presets: Mapping[str, FuseConfig]
    alternatives: Sequence[str]
    output: Path

    @classmethod
    def of(cls, argv: Sequence[str]) -> "Asked":
        """Reads a command line.

        Raises:
            FusionError: a user's mistake.
        """
        parser, args = arguments(argv, build_parser)
        settings = {
            key: value for key, value in settings_of(parser, args).items() if key not in ("advise", "check", "dry_run")
        }
        chosen = parser.instantiate(args)
        config, parents = fuse_config(chosen), named(args.parents)
        presets, alternatives = compared(args.compare)
        if args.compare and args.report == "none":
            raise FusionError("--compare adds rows to the report, and --report none makes none; leave one of them out")
        if alternatives:
            check_trains(args.task)
        for candidate in (config, *presets.values()):
            mixing_weights(candidate.weights, len(parents))
            resolve_anchor(candidate, len(parents))
        check_there(args.parents)
        output = Path(args.output or in_sweep(_default_output(args.parents)))
        if not (args.dry_run or args.check or args.advise):
            check_output(output, args.overwrite)
            check_push_options(args.push_to, args.push_private)
        return cls(argv, chosen, settings, config, parents, presets, alternatives, output)


def run(argv: Sequence[str]) -> None:
    """Runs the command; see `--help`.

    Raises:
        FusionError: a user's mistake.
    """
    quiet()
    asked = Asked.of(argv)
    from fusionpl.cli.jobs.fuse import fuse

    fuse(asked)


def build_parser(task: TaskName = "image-classification") -> ArgumentParser:
    """The options of fuse.py for parents of a task."""
    parser = fusing_parser(task)
    add_push_options(parser)
    return parser


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
    parser.add_argument(
        "--advise",
        action="store_true",
        help="look at the parents on a few hundred samples, say what "
        "they are and what a minute is best spent on; fuse nothing",
    )
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


def named(paths: Sequence[str]) -> dict[str, str]:
    """Gives each parent the shortest name that tells it from the others: name -> path."""
    names = [short_name(path) for path in paths]
    if len(set(names)) < len(names):
        names = [f"{name}#{index + 1}" for index, name in enumerate(names)]
    return dict(zip(names, paths, strict=True))


def _default_output(parents: Sequence[str]) -> Path:
    folders = {Path(path).resolve().parent if Path(path).is_dir() else None for path in parents}
    return (Path(parents[0]).parent if len(folders) == 1 and None not in folders else Path("runs")) / "fused"
