"""Fuses trained parents into one model: `python fuse.py --parents runs/vit-digits/seed-1 runs/vit-digits/seed-2`."""

import sys

from fusionpl.cli.common import main

if __name__ == "__main__":
    from fusionpl.cli.fuse import run

    sys.exit(main(run))
