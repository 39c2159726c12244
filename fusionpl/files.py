"""Files and folders that are there whole or not at all, whatever kills the process that writes them."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place for a new file or folder, which takes the place of `path` at the end; after an error all is as it was."""
    with beside(path) as folder:
        yield folder / "new"
        put_in_place(folder / "new", path)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """An empty folder beside a file or folder, or above where there is no folder for it yet.

    It has one name always: what a process that was killed left in it goes.
    """
    path = path.absolute()
    home = next(parent for parent in path.parents if parent.is_dir())
    temporary = home / f".{'.'.join(path.relative_to(home).parts)}.new"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary)


def put_in_place(new: Path, path: Path) -> None:
    """Moves a finished file or folder, inside one that is `beside` its place, to where it goes; what is there is
    replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replaced = new.with_name("replaced")
    if new.is_dir() and path.exists():
        path.rename(replaced)
    try:
        new.rename(path)
    except BaseException:
        if replaced.exists():
            replaced.rename(path)
        raise


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Writes a file that is never half there."""
    with whole(path) as new:
        new.write_text(json.dumps(tree, indent=2) + "\n")
