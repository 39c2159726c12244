"""The resident memory of this process, or what it has of a GPU."""

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PAUSE = 0.005  # seconds between samples


def resident(field: str = "VmRSS") -> int:
    """Bytes: what is resident now, or with `VmHWM` at most since the process began or the peak was reset."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _settle() -> None:
    """Gives back to the system what was freed, so that it isn't mistaken for memory that is in use."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Peak:
    """What `watched` found.

    Attributes:
        before: bytes resident, or allocated on the GPU, at its start.
        most: the most until its end.
    """

    def __init__(self, before: int) -> None:
        self.before = self.most = before

    @property
    def extra(self) -> int:
        """Bytes that were needed beyond those at the start."""
        return self.most - self.before


@contextlib.contextmanager
def watched(device: str = "cpu") -> Iterator[Peak]:
    """Measures the peak of the resident memory inside the `with` block, on a GPU of what PyTorch has allocated there.

    The kernel keeps the first where its mark may be reset; else a thread looks every 5 ms.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        found = Peak(torch.cuda.memory_allocated())
        yield found
        found.most = torch.cuda.max_memory_allocated()
        return
    _settle()
    found = Peak(resident())
    try:
        _RESET.write_text("5")
    except OSError:
        with _sampled(found):
            yield found
    else:
        yield found
        found.most = max(found.most, resident("VmHWM"))


@contextlib.contextmanager
def _sampled(found: Peak) -> Iterator[None]:
    done = threading.Event()

    def sample() -> None:
        while not done.wait(_PAUSE):
            found.most = max(found.most, resident())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        found.most = max(found.most, resident())
