"""`python -m fusionpl.cli.family MODEL --output my.yaml`: drafts the family of an architecture that none describes.

The draft is bound to the model and put to the proof, so that a person only mends what is wrong;
`--family my.yaml` puts a mended one to the proof.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from fusionpl.cli.options import add_reading_options
from fusionpl.cli.parsing import parse_options
from fusionpl.cli.running import main, quiet
from fusionpl.errors import FusionError
from fusionpl.models.folders import check_there


def run(argv: Sequence[str]) -> None:
    """Drafts the family of a model, or reads a given one, and checks it; see `--help`.

    Raises:
        FusionError: a user's mistake, or what is wrong with the family.
    """
    quiet()
    args = parse_options(build_parser(), argv)
    output = Path(args.output) if args.output else None
    if output is not None and output.exists() and not args.overwrite:
        raise FusionError(f"{output} exists; replace it with --overwrite, or choose another file with --output")
    check_there([args.model])
    from fusionpl.cli.jobs.family import draft_and_prove

    draft_and_prove(args, output)


def build_parser() -> ArgumentParser:
    """The options of the command."""
    parser = ArgumentParser(description="Drafts the family file of a model and proves it.", exit_on_error=False)
    parser.add_argument("model", type=str, help="a run folder, a model folder or a hub id")
    parser.add_argument("--output", type=str | None, help="where the draft goes; by default it is printed")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    parser.add_argument("--family", type=str | None, help="prove this file, and draft nothing")
    add_reading_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(run))
