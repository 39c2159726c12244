"""Finetunes a model: `python finetune.py --model runs/vit-digits/fused`."""

import sys
from collections.abc import Sequence

from fusionpl.cli.running import main


def run(argv: Sequence[str]) -> None:
    """Hands over to fusionpl.cli.finetune; `main` is there first, to make one line of a mistake."""
    from fusionpl.cli import finetune

    finetune.run(argv)


if __name__ == "__main__":
    sys.exit(main(run))
