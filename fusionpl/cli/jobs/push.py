"""Puts a finished model on the hub, with its card and its report's pictures."""

import os
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path

import huggingface_hub

from fusionpl.errors import FusionError
from fusionpl.evaluation.plots import CAPTIONS
from fusionpl.models.push import push
from fusionpl.options import settings_in

PICTURES = "## Pictures"


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
