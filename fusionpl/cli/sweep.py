"""`python -m fusionpl.cli.sweep --parents A B --sweep align.residual=average,skip`: a grid of fusions, one table."""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from fusionpl.cli.fusing import PRESET, arguments, check_configs, fuse_config, fusing_parser
from fusionpl.cli.outputs import check_output
from fusionpl.cli.own_data import one_path, own_data
from fusionpl.cli.parsing import changed_settings, settings_of, with_presets
from fusionpl.cli.running import main, quiet
from fusionpl.errors import FusionError, flattened
from fusionpl.fusion.config import load_config
from fusionpl.models.folders import check_there
from fusionpl.training.tasks import TaskName

Cell = dict[str, Any]


def run(argv: Sequence[str]) -> None:
    """Fuses with every combination of the swept values, and evaluates each on the test split.

    Raises:
        FusionError: a user's mistake.
    """
    quiet()
    words, paths = one_path(with_presets(argv, "fuse"))
    parser, args = arguments(words, build_parser)
    if len(paths) > 1 or own_data(words, paths, args):
        raise FusionError(
            "a sweep measures all cells on one set of data, and the parents have data of their own; name one that all "
            "know with --data.path, or run fuse.py with each setting"
        )
    chosen, settings = parser.instantiate(args), settings_of(parser, args)
    base = asdict(fuse_config(chosen))
    cells = grid(args.sweep)
    if base["strategy"] == "auto" and any(key.startswith("align.") for key in cells[0]):
        base["strategy"] = "transport"
    configs = {label(cell): load_config(None, {**flattened(base), **cell}) for cell in cells}
    check_configs(configs.values(), len(args.parents))
    if any(config.labels == "separate" for config in configs.values()):
        raise FusionError(
            "a sweep measures one model a cell, and labels separate makes one for each parent; use fuse.py for each"
        )
    first = Path(args.parents[0])
    output = Path(args.output or (first.parent if first.is_dir() else Path("runs")) / "sweep")
    check_output(output, args.overwrite)
    check_there(args.parents)
    from fusionpl.cli.jobs.sweep import sweep

    changed = changed_settings(settings, words, parser, PRESET)
    best = {
        name: ["fuse", *_without(argv, "--sweep", "--output", "--overwrite"), *_flags(cell, base["strategy"])]
        for name, cell in zip(configs, cells, strict=True)
    }
    sweep(chosen, settings, changed, configs, best, output)


def build_parser(task: TaskName = "image-classification") -> ArgumentParser:
    """The options of the command for parents of a task: those of fuse.py, and what is swept."""
    parser = fusing_parser(task)
    parser.add_argument("--sweep", nargs="+", type=str, default=[], help="KEY=VALUE,VALUE,... of fuse options")
    return parser


def grid(sweeps: Sequence[str]) -> list[Cell]:
    """Every combination of `KEY=v1,v2` strings; values are read as YAML.

    Raises:
        FusionError: a string without a key or values.
    """
    if not sweeps:
        raise FusionError("nothing to sweep; give --sweep KEY=V1,V2, for example --sweep align.reg=0.02,0.08")
    axes = []
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        if not (key and equals and values):
            raise FusionError(f"--sweep '{sweep}': write KEY=V1,V2, for example align.reg=0.02,0.08")
        axes.append([(key, yaml.safe_load(value)) for value in values.split(",")])
    return [dict(combination) for combination in itertools.product(*axes)]


def _without(argv: Sequence[str], *options: str) -> list[str]:
    """A command line without some options and their values."""
    words, left_out = [], False
    for word in argv:
        if word.startswith("--"):
            left_out = word.partition("=")[0] in options
        words += [word] * (not left_out)
    return words


def _flags(cell: Cell, strategy: str) -> list[str]:
    """The options of a cell as words, with the strategy under which they were swept."""
    return [f"--{key}={yaml.safe_dump(value, default_flow_style=True).partition(chr(10))[0]}"
            for key, value in ({"strategy": strategy} | cell).items()]  # fmt: skip


def label(cell: Cell) -> str:
    """`residual=skip reg=0.02`: the cell's name in tables."""
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in cell.items())


if __name__ == "__main__":
    sys.exit(main(run))
