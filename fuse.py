"""Fuses parents: `python fuse.py --parents runs/vit-digits/seed-1 runs/vit-digits/seed-2`."""

import sys
from collections.abc import Sequence

from fusionpl.cli.running import main


def run(argv: Sequence[str]) -> None:
    """Hands over to fusionpl.cli.fuse; `main` is there first, to make one line of a mistake."""
    from fusionpl.cli import fuse

    fuse.run(argv)


if __name__ == "__main__":
    sys.exit(main(run))
