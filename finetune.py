"""Finetunes a model: `python finetune.py --model runs/vit-digits/fused`."""

import sys

from fusionpl.cli.common import main

if __name__ == "__main__":

    def run(argv: list[str]) -> None:
        from fusionpl.cli import finetune

        finetune.run(argv)

    sys.exit(main(run))
