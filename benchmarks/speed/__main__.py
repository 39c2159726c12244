"""`python -m benchmarks.speed [TABLE ...]`: measures what is missing of the tables and writes them."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

import benchmarks.speed
from benchmarks.paper.cells import known, measure
from benchmarks.speed.report import PICTURE, draw, measured_of, write
from benchmarks.speed.tables import FULL, QUICK, TABLES, Table
from fusionpl.cli.running import main as run_command
from fusionpl.cli.running import quiet
from fusionpl.errors import FusionError


def run(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.speed",
        description=benchmarks.speed.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)}; default all")
    parser.add_argument("--output", type=Path, help="folder for TABLE.md, TABLE.csv and the picture")
    parser.add_argument("--runs", type=Path, help="folder for cells and parents in files; default runs/speed")
    parser.add_argument("--render", action="store_true", help="measure nothing: write what is known")
    parser.add_argument("--quick", action="store_true", help="tiny models in one process: whether it works at all")
    args = parser.parse_args(argv)
    for name in args.tables:
        if name not in TABLES:
            parser.error(f"there is no table {name}; choose from {', '.join(TABLES)}")
    sizes = QUICK if args.quick else FULL
    runs = args.runs or Path("runs/speed-quick" if args.quick else "runs/speed")
    output = args.output or (runs / "tables" if args.quick else Path("docs/results/speed"))
    quiet()
    tables = {name: make(sizes, runs) for name, make in TABLES.items()}
    folders = {name: runs / "cells" / name for name in TABLES}
    asked = args.tables or list(TABLES)
    command = shlex.join(["python", "-m", "benchmarks.speed", *(word for word in argv if word != "--render")])
    try:
        for name in asked:
            try:
                if not args.render:
                    measure_missing(name, tables[name], folders[name])
            finally:
                if measured_of(tables[name], folders[name]):
                    print(write(name, tables[name], folders[name], output, command))
                elif args.render:
                    raise FusionError(f"no cell of {name} is in {folders[name]}; leave out --render to measure them")
    finally:
        found = {name: measured_of(table, folders[name]) for name, table in tables.items()}
        if any(found[name] for name in asked):
            draw(found, output / PICTURE)


def measure_missing(name: str, table: Table, folder: Path) -> None:
    """Measures the cells of a table that are not known."""
    bar = tqdm([one.cell for one in table.entries if not known(one.cell, folder)], desc=name, unit="cell")
    for cell in bar:
        bar.set_postfix_str(f"{cell.row} ({cell.repeat})")
        measure(cell, folder)


if __name__ == "__main__":
    sys.exit(run_command(run))
