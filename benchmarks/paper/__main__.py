"""`python -m benchmarks.paper TABLE`: measures what is missing of a table and writes it."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

import benchmarks.paper
from benchmarks.paper.cells import known, measure, write
from benchmarks.paper.scales import SCALES, Lab
from benchmarks.paper.tables import TABLES
from fusionpl.cli.running import main as run_command
from fusionpl.cli.running import quiet
from fusionpl.errors import FusionError

DATA_SETS = {
    "images": "the images", "cifar10": "CIFAR-10, for two domains", "corpus": "the text corpus", "sst2": "SST-2",
    "trec": "TREC",
}  # fmt: skip


def run(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.paper",
        description=benchmarks.paper.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", choices=TABLES, metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--output", type=Path, required=True, help="folder for TABLE.md, TABLE.csv and TABLE.png")
    parser.add_argument("--runs", type=Path, help="folder for parents and cells; default runs/paper-SCALE")
    parser.add_argument("--render", action="store_true", help="measure nothing: write what is known")
    for name, words in DATA_SETS.items():
        parser.add_argument(f"--{name}", help=f"{words}: a local folder or a hub id")
    args = parser.parse_args(argv)
    runs = args.runs or Path(f"runs/paper-{args.scale}")
    paths = {name: getattr(args, name) for name in DATA_SETS if getattr(args, name)}
    quiet()
    table = TABLES[args.table](Lab(SCALES[args.scale], runs, paths))
    folder = runs / "cells" / args.table
    try:
        if not args.render:
            bar = tqdm([cell for cell in table.cells if not known(cell, folder)], desc=args.table, unit="cell")
            for cell in bar:
                bar.set_postfix_str(f"{cell.row} ({cell.repeat})")
                measure(cell, folder)
    finally:
        if any(known(cell, folder) for cell in table.cells):
            command = shlex.join(["python", "-m", "benchmarks.paper", *(word for word in argv if word != "--render")])
            print(write(args.table, table, folder, args.output, command))
        elif args.render:
            raise FusionError(f"no cell of {args.table} is in {folder}; leave out --render to measure them")


if __name__ == "__main__":
    sys.exit(run_command(run))
