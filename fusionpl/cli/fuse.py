"""`python fuse.py --parents A B`: align, average, evaluate, report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from fusionpl.cli.alternatives import DISTILLED, TRAINED_ON, compared
from fusionpl.cli.fusing import PRESET, arguments, check_configs, fuse_config, fusing_parser
from fusionpl.cli.outputs import check_output, in_sweep
from fusionpl.cli.own_data import of_all_classes, one_path, own_data
from fusionpl.cli.parsing import changed_settings, settings_of, with_presets
from fusionpl.cli.push import add_push_options, check_push_options
from fusionpl.cli.running import quiet
from fusionpl.cli.tasks import check_trains
from fusionpl.errors import FusionError
from fusionpl.fusion.config import FuseConfig
from fusionpl.models.folders import check_there
from fusionpl.models.hub import named
from fusionpl.training.tasks import TaskName


@dataclass(frozen=True)
class Asked:
    """What a command line asks for, checked as far as that needs no model.

    Attributes:
        argv: the command line.
        args: its options, those of data as their class.
        settings: those that decide the result, as plain values.
        changed: those of them that are not as in the preset.
        config: how to fuse.
        parents: short name -> where the parent comes from.
        presets: row -> another configuration to compare with.
        alternatives: what else to compare with, of ALTERNATIVES.
        output: where the fused model goes.
    """

    argv: Sequence[str]
    args: Namespace
    settings: dict[str, Any]
    changed: dict[str, Any]
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
        words, paths = one_path(with_presets(argv, "fuse"))
        parser, args = arguments(words, build_parser)
        args.own_data = own_data(words, paths, args)
        if args.own_data:
            args.data.update(Namespace(args.own_data[args.anchor % len(args.parents)]))
        elif of_all_classes(words, args):
            args.data.classes = None
        chosen = parser.instantiate(args)
        config, parents = fuse_config(chosen), named(args.parents)
        presets, alternatives = compared(args.compare)
        if config.labels == "separate":
            presets = {name: replace(other, labels=config.labels) for name, other in presets.items()}
            _check_apart(args, alternatives)
        if args.compare and args.report == "none":
            raise FusionError("--compare adds rows to the report, and --report none makes none; leave one of them out")
        if alternatives:
            check_trains(args.task)
        check_configs((config, *presets.values()), len(parents))
        check_there(args.parents)
        output = Path(args.output or in_sweep(_default_output(args.parents)))
        if not (args.dry_run or args.check or args.advise):
            check_output(output, args.overwrite)
            check_push_options(args.push_to, args.push_private)
        settings = settings_of(parser, args)
        changed = changed_settings(settings, words, parser, PRESET)
        return cls(argv, chosen, settings, changed, config, parents, presets, alternatives, output)


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
    own = """options of data of each parent, as config.yaml of a fused run has them; by default what their runs say,
    where these differ"""
    parser.add_argument("--own-data", type=list[dict[str, Any]] | None, help=own)
    add_push_options(parser)
    return parser


def _check_apart(args: Namespace, alternatives: Sequence[str]) -> None:
    """Raises FusionError for what has no meaning where heads are kept apart."""
    if args.push_to is not None:
        raise FusionError(
            "--push-to pushes one model, and labels separate makes one for each parent; leave it out, and upload each: "
            "hf upload ORG/NAME FUSED/model-NAME"
        )
    if args.advise:
        raise FusionError(
            "--advise asks what parents disagree about, and with labels separate they say different things; leave it "
            "out: the report says what their trunks are worth to each other"
        )
    if TRAINED_ON in alternatives:
        raise FusionError(f"--compare {TRAINED_ON} trains one head on labels, and labels separate has several; compare "
                          f"with {DISTILLED}, or finetune model-NAME")  # fmt: skip


def _default_output(parents: Sequence[str]) -> Path:
    folders = {Path(path).resolve().parent if Path(path).is_dir() else None for path in parents}
    return (Path(parents[0]).parent if len(folders) == 1 and None not in folders else Path("runs")) / "fused"
