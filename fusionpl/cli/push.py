"""`fusionpl push RUN --to org/name`: puts a finished model on the hub, with its card and its report's pictures."""

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import huggingface_hub
from jsonargparse import ArgumentParser

from fusionpl.cli.common import main, new_parser, parse_options, quiet, settings_in
from fusionpl.cli.outputs import is_main_process, staged
from fusionpl.errors import FusionError
from fusionpl.evaluation import CAPTIONS
from fusionpl.models.push import check_push, push

PICTURES = "## Pictures"


def build_parser() -> ArgumentParser:
    """The options."""
    parser = new_parser("Puts a finished model on the hub, with its card and its report's pictures.", presets=False)
    parser.add_argument("run", type=str, help="what fuse or finetune wrote")
    parser.add_argument("--to", type=str | None, help="the repository, org/name; made where there is none")
    parser.add_argument("--private", type=bool, default=True, help="whether a new repository is for its members alone")
    parser.add_argument("--dry-run", type=str | None, help="a folder to write what would be pushed to; pushes nothing")
    return parser


def run(argv: Sequence[str]) -> None:
    """The command; see `--help`.

    Raises:
        FusionError: a user's mistake.
        KeyboardInterrupt: the user stopped it; the message says how to push later.
    """
    quiet()
    options = parse_options(build_parser(), argv)
    folder = Path(options.run)
    if not (folder / "model" / "README.md").is_file():
        raise FusionError(f"no model with a card at {folder / 'model'}; give a folder that fuse or finetune wrote")
    if options.dry_run is not None:
        if Path(options.dry_run).exists():
            raise FusionError(f"{options.dry_run} exists; give --dry-run a folder that is not there yet")
        with staged(Path(options.dry_run)) as new:
            write_published(folder, new, (options.to or folder.resolve().name).rpartition("/")[2], shutil.copy)
        print(f"{options.dry_run}: what would be pushed; nothing was")
    elif options.to is None:
        raise FusionError(f"push where? give --to org/name, or --dry-run {folder}-on-the-hub to see it first")
    else:
        check_push(options.to, private=options.private)
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


def push_run(folder: Path, repo: str, *, private: bool) -> None:
    """Pushes what a command has finished, and prints where it is.

    Args:
        folder: the run folder.
        repo, private: see `check_push`.

    Raises:
        FusionError: it did not work out; the message says how to push later.
        KeyboardInterrupt: likewise.
    """
    words = ["fusionpl", "push", str(folder), "--to", repo, *([] if private else ["--private", "false"])]
    again = f"{folder} is complete; push it with: {shlex.join(words)}"
    with tempfile.TemporaryDirectory() as temporary:
        write_published(folder, Path(temporary), repo.rpartition("/")[2], _link)
        try:
            address = push(Path(temporary), repo, private=private, message=f"{folder.name}, by fusionpl")
        except FusionError as error:
            raise FusionError(f"{error}; {again}") from error
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(again) from stop
    print(f"pushed: {address}")


def write_published(folder: Path, new: Path, name: str, put: Callable[[Path, Path], object]) -> None:
    """Writes what is pushed: the files of model/, the report's pictures, and the card that shows them.

    Args:
        folder: the run folder.
        new: an empty folder.
        name: that the card gives the model's figures.
        put: makes a file of `new` of one of the run's.
    """
    for file in sorted((folder / "model").iterdir()):
        if file.is_file():
            put(file, new / file.name)
    card = huggingface_hub.ModelCard.load(folder / "model" / "README.md")
    if "model_name" in card.data:
        card.data["model_name"] = name
    pictures = [file for file in sorted(_report_of(folder).glob("*.png")) if file.name in CAPTIONS]
    if pictures:
        (new / "report").mkdir()
        shown = [PICTURES]
        for file in pictures:
            put(file, new / "report" / file.name)
            shown += [f"![{file.stem}](report/{file.name})", CAPTIONS[file.name]]
        card.text = f"{card.text.rstrip()}\n\n" + "\n\n".join(shown) + "\n"
    (new / "README.md").unlink()
    card.save(new / "README.md")


def _report_of(folder: Path) -> Path:
    """A run's report, which for a finetuned model is often that of the fused one."""
    own = folder / "report"
    return own if own.is_dir() else Path(settings_in(folder).get("model", folder)) / "report"


def _link(file: Path, new: Path) -> None:
    os.symlink(file.resolve(), new)


if __name__ == "__main__":
    sys.exit(main(run))
