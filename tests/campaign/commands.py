"""Tiny commands in processes of their own, what they leave behind, and how one that was stopped goes on."""

import csv
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fusionpl.cli.main import run
from fusionpl.cli.running import main
from tests.integration.runs import DATA, make_run

ROOT = Path(__file__).parents[2]
TRAIN = {
    "model": {
        "architecture": "vit_tiny_patch16_224",
        "args": {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2},
        "initializer_range": 0.2,
    },
    "data": {**DATA, "batch_size": 25, "shift": 1},
    "optim": {"lr": 0.01},
    "trainer": {"max_epochs": 3},
}
QUIETLY = ("--logger", "csv", "--trainer.accelerator", "cpu")
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
TUNED = ("finetune", "--model", "fused", "--output", "out", "--trainer.max_epochs", "2", "--baselines", "false")
LAST = "checkpoints/last.ckpt"
TEMPORARY = "temporary"  # $TMPDIR of the commands: the system's to empty
# Times, and what Lightning logs of an epoch after its checkpoint is written: a run that is stopped in between lacks it.
VARY = ("seconds", "train/loss", "train/accuracy", "lr")


@dataclass(frozen=True)
class Command:
    """A command that writes `out`.

    Attributes:
        words: the command line.
        resumable: whether what was stopped goes on with --resume from a checkpoint.
    """

    words: tuple[str, ...]
    resumable: bool = False

    def again(self, home: Path) -> tuple[str, ...]:
        """The command line that a user goes on with."""
        if self.resumable:
            return (*self.words, "--resume") if (home / "out" / LAST).is_file() else self.words
        return (*self.words, "--overwrite") if (home / "out").exists() else self.words


COMMANDS = {
    "train": Command(("train", "--config", "tiny.yaml", "--output", "out", *QUIETLY), resumable=True),
    "train, 2 processes": Command(
        ("train", "--config", "tiny.yaml", "--output", "out", *QUIETLY, *TWO), resumable=True
    ),
    "fuse": Command(("fuse", "--parents", "seed-1", "seed-2", "--output", "out", *QUIETLY)),
    "fuse, 2 processes": Command(("fuse", "--parents", "seed-1", "seed-2", "--output", "out", *QUIETLY, *TWO)),
    "finetune": Command((*TUNED, *QUIETLY), resumable=True),
    "finetune, 2 processes": Command((*TUNED, *QUIETLY, *TWO), resumable=True),
    "sweep": Command(
        ("sweep", "--parents", "seed-1", "seed-2", "--output", "out", "--sweep", "align.reg=0.02,0.08", *QUIETLY)
    ),
    "evaluate": Command(("evaluate", "--models", "seed-1", "seed-2", "--output", "out", "--logger", "csv")),
}


class Running:
    """A command in `home` that runs in a process group of its own.

    It starts from a server that has imported what commands import: most moments at which it can be killed are then
    moments of its work.
    """

    def __init__(self, home: Path, words: Sequence[str], **environment: str) -> None:
        (home / TEMPORARY).mkdir(exist_ok=True)
        self.output = home.with_name(f"{home.name}.said")
        self.process = FORKS.Process(target=_command, args=(home, tuple(words), environment, self.output))
        self.process.start()
        pid = self.process.pid
        while self.process.is_alive() and os.getpgid(pid) != pid:  # until it has its group
            time.sleep(0.001)

    def kill(self, number: int = signal.SIGKILL, *, everyone: bool = True) -> None:
        """Sends a signal to all processes of the command that are still there, or to the first alone."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError):
            (os.killpg if everyone else os.kill)(self.process.pid, number)

    def wait(self, seconds: float) -> int | None:
        """The exit code, minus the number of the signal that killed it; None if it still runs."""
        self.process.join(seconds)
        return self.process.exitcode

    def said(self) -> str:
        """What it has written to its terminal."""
        return self.output.read_text()


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [*(f"fusionpl.cli.jobs.{name}" for name in ("train", "fuse", "finetune", "sweep", "evaluate")), "matplotlib.pyplot",
     "sklearn.datasets"]
)  # fmt: skip


def _command(home: Path, words: tuple[str, ...], environment: Mapping[str, str], output: Path) -> None:
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the campaign may have been started with nohup, which ignores it
    os.chdir(home)
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    os.close(0)
    if environment.get("clock") == "jumps":
        now, late = time.time, itertools.cycle((0, 3600))
        time.time = lambda: now() - next(late)
    tempfile.tempdir = str(home / TEMPORARY)
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": tempfile.tempdir, **environment}
    sys.argv = [str(ROOT / "fusionpl/cli/main.py"), *words]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # the server has read its own
    sys.modules["__main__"].__spec__ = None  # Lightning starts further processes from it, or else from argv
    sys.exit(main(run, words))


def finished(home: Path, words: Sequence[str], **environment: str) -> str:
    """Runs a command to its end, which must be a good one; returns what it said."""
    running = Running(home, words, **environment)
    try:
        assert running.wait(300) == 0, running.said()
    finally:
        running.kill()
    return running.said()


def has_checkpoint(path: Path) -> None:
    """Waits for a checkpoint."""
    deadline = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.05)


def make_home(home: Path) -> Path:
    """A folder in which every command can be run."""
    for seed in (1, 2):
        make_run(home / f"seed-{seed}", seed)
    (home / "tiny.yaml").write_text(yaml.safe_dump(TRAIN))
    finished(home, [word if word != "out" else "fused" for word in COMMANDS["fuse"].words])
    return home


def left_in(home: Path) -> dict[str, Any]:
    """What can be compared in every file of a folder: figures, hashes of tensors; other files are there or not."""
    return {
        str(path.relative_to(home)): _content(path)
        for path in sorted(home.rglob("*"))
        if not path.is_dir() and path.relative_to(home).parts[0] != TEMPORARY
    }


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        return _comparable(json.loads(path.read_text()))
    if path.suffix == ".csv":
        return [_comparable(row) for row in csv.DictReader(path.read_text().splitlines())]
    if path.suffix == ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return None


def _comparable(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _comparable(value) for key, value in tree.items() if key not in VARY}
    return [_comparable(one) for one in tree] if isinstance(tree, list) else tree
