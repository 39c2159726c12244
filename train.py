"""Trains a parent: `python train.py --seed 1`."""

import sys
from collections.abc import Sequence

from fusionpl.cli.running import main


def run(argv: Sequence[str]) -> None:
    """Hands over to fusionpl.cli.train; `main` is there first, to make one line of a mistake."""
    from fusionpl.cli import train

    train.run(argv)


if __name__ == "__main__":
    sys.exit(main(run))
