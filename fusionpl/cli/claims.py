"""A place beside an output that belongs to the process that writes it: one writes at a time, and what a killed one left
is cleared away."""

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from fusionpl.errors import FusionError

# Held while its process lives, what stood in the output's place, and the name of the file that makes an output of use
# which is written where it stays.
_LOCK, _OLD, _KEEP = "lock", "old", "keep"


@dataclass(frozen=True)
class Claim:
    """What a process has that writes an output.

    Attributes:
        output: the folder that is written, where a symbolic link leads.
        place: a temporary folder beside it, with `new` free for what takes its place.
    """

    output: Path
    place: Path

    def set_aside(self) -> None:
        """Moves away what stands in the output's place; a later run puts it back if this process is killed now."""
        if self.output.exists():
            self.output.rename(self.place / _OLD)

    def keep_with(self, name: str) -> None:
        """Says which file in the output makes it of use, so that it stays even if this process is killed."""
        (self.place / _KEEP).write_text(name)

    @property
    def of_no_use(self) -> bool:
        """Whether the output is not there, or was begun and is of no use yet."""
        began = (self.place / _KEEP).is_file()
        return not self.output.exists() or (began and not (self.output / (self.place / _KEEP).read_text()).exists())

    def put_back(self) -> None:
        """Puts what stood in the output's place there again."""
        if self.output.exists():
            shutil.rmtree(self.output)
        if (self.place / _OLD).exists():
            (self.place / _OLD).rename(self.output)


@contextmanager
def claimed(output: Path) -> Iterator[Claim]:
    """An output, which is this process's alone until the end.

    What processes that were killed have left there is removed, and what they had moved aside is put back, unless their
    own output is of use.

    Raises:
        FusionError: a process that lives has it.
    """
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with _alone_in(output.parent):
            _clear(output)
            place = held.enter_context(tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent))
            _locked(held.enter_context((Path(place) / _LOCK).open("w")))
        yield Claim(output, Path(place))


def _clear(output: Path) -> None:
    """Removes what processes that are gone have left beside an output, or puts it back: see `claimed`."""
    prefix = f".{output.name}."
    for left in output.parent.glob(f"{glob.escape(prefix)}*"):
        if "." in left.name.removeprefix(prefix) or not (left / _LOCK).is_file():
            continue  # it belongs to an output whose name goes on
        with (left / _LOCK).open() as lock:
            free = _locked(lock)
            if free is None:
                continue
            if not free:
                raise FusionError(f"another run is writing {output}; wait for it, or choose another folder")
            claim = Claim(output, left)
            if claim.of_no_use:
                claim.put_back()
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


def _locked(file: TextIO) -> bool | None:
    """Takes the lock of a file, which goes with the process; False where another has it, None where there are none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system
        return None
    return True
