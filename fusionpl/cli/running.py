"""Running a command: what went wrong becomes one line and an exit code, signals stop it as Ctrl-C does."""

import errno
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from huggingface_hub.utils.tqdm import disable_progress_bars
from safetensors import SafetensorError

from fusionpl.errors import FusionError, reason

MISTAKE, INTERRUPT = 2, 130
# What is wrong with where something is written, not with how.
_OF_THE_PLACE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST,
}  # fmt: skip
_ELSEWHERE = "choose another folder with --output, or make room"
# What gloo and NCCL say to a process whose partner is gone.
_LOST = re.compile(r"[Cc]onnection (was )?(closed|reset)|Broken pipe|remote process exited", re.ASCII)


def main(run: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Runs a command and turns what went wrong into an exit code.

    Args:
        run: the command; takes its arguments.
        argv: the arguments, by default those of the process.

    Returns:
        0, 2 after a user's mistake (one line on stderr), 130 after Ctrl-C (one line that says how to go on, if
        the KeyboardInterrupt has a message), 143 and 129 likewise after SIGTERM, a scheduler's, and SIGHUP.
    """
    before = _open_run()
    with _stopping() as signals:
        code = _exit_code(run, sys.argv[1:] if argv is None else argv, signals)
        if (left := _open_run()) is not before:  # the next command in this process would log to it
            left.finish(exit_code=code)
    return code


def is_main_process() -> bool:
    """Whether this is the process the user started: under DDP, Lightning starts the others."""
    return _rank() == "0"


def quiet() -> None:
    """Silences what libraries tell their developers; errors still show. What is loaded later sets its own levels and
    filters, so jobs call this again."""
    for name in ("lightning.pytorch", "lightning.fabric", "torch.distributed", "huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|torch|timm|transformers|datasets")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # before it is loaded: those of map, filter, splits
    if loaded := sys.modules.get("transformers"):
        loaded.utils.logging.disable_progress_bar()  # of the weights it loads, which takes no time
    warnings.formatwarning = lambda message, *where, **more: f"warning: {message}\n"
    if not sys.stderr.isatty():
        disable_progress_bars()


def _open_run() -> Any:
    """The run of Weights & Biases that this process logs to, if it has one."""
    return getattr(sys.modules.get("wandb"), "run", None)


def _rank() -> str:
    return os.environ.get("LOCAL_RANK", "0")


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """Lets SIGTERM and SIGHUP stop a command as Ctrl-C does; the list has those that came. What is ignored stays so:
    nohup is there to survive a SIGHUP."""
    came: list[int] = []

    def stop(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(run: Callable[[Sequence[str]], None], argv: Sequence[str], signals: Sequence[int]) -> int:
    try:
        run(argv)
    except BrokenPipeError:  # `fuse.py --dry-run | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as stop:
        if is_main_process():
            print(_stopped(signals) + (f"; {stop}" if str(stop) else ""), file=sys.stderr)
        return 128 + signals[0] if signals else INTERRUPT
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):  # Lightning makes an exit of Ctrl-C
            raise
        print(_stopped(signals), file=sys.stderr)
        return 128 + signals[0] if signals else INTERRUPT
    except Exception as error:
        line = _mistake(error)
        if line is None:
            raise
        print(f"error{'' if is_main_process() else f' (process {_rank()})'}: {line}", file=sys.stderr)
        return MISTAKE
    return 0


def _stopped(signals: Sequence[int]) -> str:
    return f"stopped by {signal.Signals(signals[0]).name}" if signals else "interrupted"


def _mistake(error: Exception) -> str | None:
    """What a user can mend, in a line; None for a mistake of this program."""
    match error:
        case FusionError():
            return " ".join(str(error).split())
        case RuntimeError() | MemoryError():
            return _of_the_machine(error)
        case OSError():
            place = f": {error.filename}" if error.filename else ""
            return f"{error.strerror}{place}; {_ELSEWHERE}" if error.errno in _OF_THE_PLACE else None
        case SafetensorError():  # has no errno of its own
            number_in = re.search(r"\(os error (\d+)\)", str(error))
            number = int(number_in[1]) if number_in else 0
            return f"{os.strerror(number)}; {_ELSEWHERE}" if number in _OF_THE_PLACE else None
    return None


def _of_the_machine(error: RuntimeError | MemoryError) -> str | None:
    """Of a process that is gone and of memory that is full; None for another error."""
    words = str(error)
    if _LOST.search(words):
        return (
            "another process of this run ended; what it said stands above; "
            "run the command again, a training with --resume"
        )
    if not (isinstance(error, MemoryError) or "allocate memory" in words or "out of memory" in words):
        return None
    asked = re.search(r"[Tt]ried to allocate [\d.]+ ?\w+", words)  # without where in the library
    return f"out of memory: {asked[0] if asked else reason(error)}; use smaller batches, samples or images"
