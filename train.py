"""Trains a parent: `python train.py --seed 1`."""

import sys

from fusionpl.cli.common import main

if __name__ == "__main__":
    from fusionpl.cli.train import run

    sys.exit(main(run))
