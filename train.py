"""Trains a parent: `python train.py --seed 1`."""

import sys

from fusionpl.cli.common import main

if __name__ == "__main__":

    def run(argv: list[str]) -> None:
        from fusionpl.cli import train

        train.run(argv)

    sys.exit(main(run))
