"""As many processes as one likes fuse the same model, and none waits for one that is gone."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fusionpl import load_model
from tests.campaign.commands import COMMANDS, LAST, TEMPORARY, Running, finished, has_checkpoint

pytestmark = pytest.mark.campaign
FUSE = COMMANDS["fuse"].words
# What never ends of itself.
ENDLESS = {
    "train, 2 processes": ("--trainer.max_epochs", "100000"),
    "fuse, 2 processes": ("--refine.method", "gradient", "--refine.steps", "1000000"),
}


@pytest.mark.parametrize("batch_size", [10, 16, 24], ids=["even", "an uneven last", "a rank without"])
def test_any_number_of_ranks(home: Path, tmp_path: Path, batch_size: int) -> None:
    """40 samples: 4 batches, 3 of which the last is half as large, or 2, which leave the third rank none."""
    shutil.copytree(home, tmp_path / "place")
    place = tmp_path / "place"
    options = ("--calibration.samples", "40", "--calibration.batch_size", str(batch_size))
    for ranks in (1, 2, 3):
        several = ("--trainer.devices", str(ranks), "--trainer.strategy", "ddp") if ranks > 1 else ()
        finished(place, [*FUSE, *options, *several])
        (place / "out").rename(place / f"{ranks}")
    images = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    maps = [safetensors.torch.load_file(place / f"{ranks}/maps.safetensors") for ranks in (1, 2, 3)]
    with torch.inference_mode():
        outputs = [load_model(place / f"{ranks}")(images) for ranks in (1, 2, 3)]
    for found, output in zip(maps[1:], outputs[1:], strict=True):
        for name, plan in maps[0].items():
            torch.testing.assert_close(found[name], plan, rtol=0, atol=1e-6, msg=name)
        assert float((output - outputs[0]).norm()) < 1e-3 * float(outputs[0].norm())


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("first", [False, True], ids=["the second rank", "the first rank"])
def test_a_rank_that_dies_ends_the_others(home: Path, tmp_path: Path, name: str, *, first: bool) -> None:
    shutil.copytree(home, tmp_path / "place")
    before = set((tmp_path / "place").iterdir())
    running = Running(tmp_path / "place", [*COMMANDS[name].words, *ENDLESS[name]])
    try:
        pid = running.process.pid
        assert pid is not None
        second = _work_together(pid)
        if COMMANDS[name].resumable:
            has_checkpoint(tmp_path / "place/out" / LAST)
        os.kill(pid if first else second, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while _lives(second if first else pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not _lives(second if first else pid)
    finally:
        running.kill()
    assert running.wait(10) == (-signal.SIGKILL if first else 2)
    lines = [line for line in running.said().splitlines() if not line.startswith(("training", "epoch", "parents:"))]
    assert len(lines) == 1
    assert "another process of this run ended; what it said stands above" in lines[0]
    if not first and not COMMANDS[name].resumable:
        assert set((tmp_path / "place").iterdir()) - before <= {tmp_path / "place" / TEMPORARY}


def _work_together(pid: int) -> int:
    """Waits until a process and its only child compute, who wait for each other before; returns the child."""
    deadline, rounds = time.monotonic() + 200, 0
    while rounds < 4:
        assert time.monotonic() < deadline
        before = {one: _ticks(one) for one in (pid, *_children(pid))}
        time.sleep(0.5)
        busy = len(before) == 2 and all(_ticks(one) > ticks for one, ticks in before.items())
        rounds = rounds + 1 if busy else 0
    (child,) = _children(pid)
    return child


def _children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _ticks(pid: int) -> int:
    """Of the CPU that a process has used."""
    return int(_stat(pid)[11])


def _lives(pid: int) -> bool:
    try:
        return _stat(pid)[0] != "Z"
    except FileNotFoundError:
        return False


def _stat(pid: int) -> list[str]:
    """What the system says of a process, behind its name."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
