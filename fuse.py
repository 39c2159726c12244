"""Fuses parents: `python fuse.py --parents runs/vit-digits/seed-1 runs/vit-digits/seed-2`."""

import sys

from fusionpl.cli.common import main

if __name__ == "__main__":

    def run(argv: list[str]) -> None:
        from fusionpl.cli import fuse

        fuse.run(argv)

    sys.exit(main(run))
