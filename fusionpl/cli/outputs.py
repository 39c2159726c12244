"""Where commands write: one at a time, whole or not at all, whatever killed the command before."""

import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

from fusionpl.errors import FusionError
from fusionpl.files import whole


def is_main_process() -> bool:
    """Whether this is the process the user started: under DDP, Lightning starts the others."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def in_sweep(folder: Path) -> Path:
    """A default output, with the run's id in its name under `wandb agent`: every run of a sweep has its own."""
    run = os.environ.get("WANDB_RUN_ID")
    return folder.with_name(f"{folder.name}-{run}") if run and "WANDB_SWEEP_ID" in os.environ else folder


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuses an output folder that is taken.

    Raises:
        FusionError: it exists and `overwrite` is off, or it is nothing this project wrote.
    """
    if not is_main_process() or not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise FusionError(f"{folder} exists; replace it with --overwrite, or choose another folder with --output")
    if not (folder / "config.yaml").is_file():
        raise FusionError(f"{folder} is not an output of fusionpl (no config.yaml), so --overwrite leaves it alone")


@contextmanager
def staged(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write to, which becomes `folder` at the end; after an error `folder` is as it was.

    Raises:
        FusionError: see `check_output`; another run is writing there.
    """
    target = folder.resolve()  # where a symbolic link leads
    with _beside(target) as temporary:
        check_output(folder, overwrite)
        written = temporary / "new"
        written.mkdir()
        yield written
        if target.exists():
            target.rename(temporary / _OLD)
        written.rename(target)


@contextmanager
def run_folder(folder: Path, overwrite: bool, keep: str) -> Iterator[Path]:
    """A folder for a run that takes long: what is in it at an error stays, if the run can be resumed from it.

    Args:
        folder: the run folder.
        overwrite: whether to replace one that is there.
        keep: the file that makes a run resumable; without it the folder is as it was before.

    Raises:
        FusionError: see `check_output`; another run is writing there.
    """
    if not is_main_process():
        yield folder
        return
    target = folder.resolve()  # where a symbolic link leads
    with _beside(target) as temporary:
        check_output(folder, overwrite)
        if target.exists():
            target.rename(temporary / _OLD)
        (temporary / _KEEP).write_text(keep)
        target.mkdir()
        try:
            yield folder
        except BaseException:
            if not (target / keep).exists():
                _restore(target, temporary)
            raise


@contextmanager
def resumed(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a run folder while its run goes on, and removes what lies beside it of one that was
    killed.

    Raises:
        FusionError: another run is writing there.
    """
    with _beside(folder.resolve()) if is_main_process() and folder.is_dir() else nullcontext():
        yield


# In a temporary folder: held while its process lives, what stood in the output's place, and the name of the file that
# makes an output of use which is written where it stays.
_LOCK, _OLD, _KEEP = "lock", "old", "keep"


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A temporary folder beside an output, which is this process's while it lives.

    What processes that were killed have left there is removed, and what they had moved aside is put back, unless their
    own output is of use.

    Raises:
        FusionError: a process that lives has one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with _alone_in(folder.parent):
            _clear(folder)
            temporary = Path(
                held.enter_context(tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent))
            )
            _locked(held.enter_context((temporary / _LOCK).open("w")))
        yield temporary


def _clear(folder: Path) -> None:
    """Removes what processes that are gone have left beside an output, or puts it back: see `_beside`."""
    prefix = f".{folder.name}."
    for left in folder.parent.glob(f"{glob.escape(prefix)}*"):
        if "." in left.name.removeprefix(prefix) or not (left / _LOCK).is_file():
            continue  # it belongs to an output whose name goes on
        with (left / _LOCK).open() as lock:
            free = _locked(lock)
            if free is None:
                continue
            if not free:
                raise FusionError(f"another run is writing {folder}; wait for it, or choose another folder")
            began = (left / _KEEP).is_file()
            if not folder.exists() or (began and not (folder / (left / _KEEP).read_text()).exists()):
                _restore(folder, left)
            shutil.rmtree(left)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Commands that begin at once look after one another, so that the second sees the first."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # no locks on this file system
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _restore(folder: Path, temporary: Path) -> None:
    """Puts back what stood in a folder's place."""
    if folder.exists():
        shutil.rmtree(folder)
    if (temporary / _OLD).exists():
        (temporary / _OLD).rename(folder)


def _locked(file: TextIO) -> bool | None:
    """Takes the lock of a file, which goes with the process; False where another has it, None where there are none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system
        return None
    return True


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Writes a file that is never half there."""
    with whole(path) as new:
        new.write_text(json.dumps(tree, indent=2) + "\n")
