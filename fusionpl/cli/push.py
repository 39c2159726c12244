"""`fusionpl push RUN --to org/name`: puts a finished model on the hub, with its card and its report's pictures."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from fusionpl.cli.outputs import staged
from fusionpl.cli.parsing import new_parser, parse_options
from fusionpl.cli.running import is_main_process, main, quiet
from fusionpl.errors import FusionError
from fusionpl.models.folders import heads_in
from fusionpl.models.push import check_push


def build_parser() -> ArgumentParser:
    """The options of the command."""
    parser = new_parser("Puts a finished model on the hub, with its card and its report's pictures.", presets=False)
    parser.add_argument("run", type=str, help="what fuse or finetune wrote")
    parser.add_argument("--to", type=str | None, help="the repository, org/name; made where there is none")
    parser.add_argument("--private", type=bool, default=True, help="whether a new repository is for its members alone")
    parser.add_argument("--dry-run", type=str | None, help="a folder to write what would be pushed to; pushes nothing")
    return parser


def run(argv: Sequence[str]) -> None:
    """Runs the command; see `--help`.

    Raises:
        FusionError: a user's mistake.
        KeyboardInterrupt: the user stopped it; the message says how to push later.
    """
    quiet()
    options = parse_options(build_parser(), argv)
    folder = Path(options.run)
    if heads := list(heads_in(folder).values()):
        raise FusionError(
            f"{folder} holds a model for each parent, and push takes one; upload each: hf upload ORG/NAME {heads[0]}"
        )
    if not (folder / "model" / "README.md").is_file():
        raise FusionError(f"no model with a card at {folder / 'model'}; give a folder that fuse or finetune wrote")
    if options.dry_run is not None:
        if Path(options.dry_run).exists():
            raise FusionError(f"{options.dry_run} exists; give --dry-run a folder that is not there yet")
        from fusionpl.cli.jobs.push import write_published

        with staged(Path(options.dry_run)) as new:
            write_published(folder, new, (options.to or folder.resolve().name).rpartition("/")[2], shutil.copy)
        print(f"{options.dry_run}: what would be pushed; nothing was")
    elif options.to is None:
        raise FusionError(f"push where? give --to org/name, or --dry-run {folder}-on-the-hub to see it first")
    else:
        check_push(options.to, private=options.private)
        from fusionpl.cli.jobs.push import push_run

        push_run(folder, options.to, private=options.private)


def add_push_options(parser: ArgumentParser) -> None:
    """Adds the options of commands that push what they made."""
    parser.add_argument("--push-to", type=str | None, help="a repository of the hub for the model, org/name")
    parser.add_argument("--push-private", type=bool, default=True, help="whether a new repository is for its members "
                        "alone")  # fmt: skip


def check_push_options(repo: str | None, private: bool) -> None:
    """Refuses options of `add_push_options` that can't work out, before anything runs: see `check_push`."""
    if repo is not None and is_main_process():
        check_push(repo, private=private)


if __name__ == "__main__":
    sys.exit(main(run))
