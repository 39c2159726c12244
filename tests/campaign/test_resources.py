"""What a machine lacks or does: one line and nothing half written, or a run that goes on to the same end."""

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaign.commands import (
    COMMANDS,
    LAST,
    TEMPORARY,
    Command,
    Running,
    finished,
    has_checkpoint,
    left_in,
)

pytestmark = pytest.mark.campaign
LONGER = ("--trainer.max_epochs", "30")
ENOUGH = {"sweep": 90}  # kilobytes that hold the output; the rest writes report.html or checkpoints, of megabytes


@pytest.fixture
def place(home: Path, tmp_path: Path) -> Path:
    shutil.copytree(home, tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of no size yet."""
    where = tmp_path / "disk"
    where.mkdir()
    try:
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", where], check=False, capture_output=True).returncode:
            pytest.skip("may not mount a tmpfs here")
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    yield where
    subprocess.run(["umount", "--lazy", where], check=True)


def refused(place: Path, words: tuple[str, ...]) -> str:
    """The one line of a command that ends with a user's mistake."""
    running = Running(place, words)
    try:
        assert running.wait(300) == 2, running.said()
    finally:
        running.kill()
    (line,) = (line for line in running.said().splitlines() if "error" in line)
    assert "Traceback" not in running.said()
    return line


@pytest.mark.parametrize("kilobytes", [8, 24, 48, 96, 144])
@pytest.mark.parametrize("name", [name for name in COMMANDS if "processes" not in name])
def test_a_full_disk(name: str, kilobytes: int, place: Path, disk: Path) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", disk], check=True)
    (place / "out").symlink_to(disk / "out")
    if kilobytes > ENOUGH.get(name, 1000):
        finished(place, COMMANDS[name].words)
        return
    assert "No space left on device" in refused(place, COMMANDS[name].words)
    if COMMANDS[name].resumable and (disk / "out" / LAST).is_file():
        subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
        finished(place, COMMANDS[name].again(place))
    else:
        assert list(disk.iterdir()) == [] or (disk / "out/report/report.json").is_file()  # no room for metrics.csv


@pytest.mark.parametrize("name", [name for name in COMMANDS if "processes" not in name])
def test_an_output_that_can_only_be_read(name: str, place: Path, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    (place / "out").symlink_to(disk / "out")
    assert "Read-only file system" in refused(place, COMMANDS[name].words)


def test_no_room_for_kept_streams(place: Path, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=8k", disk], check=True)
    shutil.rmtree(place / TEMPORARY)
    (place / TEMPORARY).symlink_to(disk)
    line = refused(place, (*COMMANDS["fuse"].words, "--calibration.memory", "0"))
    assert "too little for the" in line
    assert "set TMPDIR" in line
    assert not (place / "out").exists()


@pytest.mark.parametrize("resumed", [False, True])
def test_two_runs_into_one_output(place: Path, *, resumed: bool) -> None:
    train = Command(COMMANDS["train"].words, resumable=resumed)
    first = Running(place, (*train.words, "--trainer.max_epochs", "100000"))
    try:
        has_checkpoint(place / "out" / LAST)
        line = refused(place, (*train.again(place), "--trainer.max_epochs", "100000"))
        assert "another run is writing" in line or "exists; replace it" in line
    finally:
        first.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("everyone", [False, True], ids=["the first process", "all processes"])
@pytest.mark.parametrize("name", ["train", "train, 2 processes", "finetune"])
def test_a_scheduler_wants_the_machine_back(name: str, number: int, everyone: bool, place: Path) -> None:
    shutil.copytree(place, place.with_name("whole"))
    command = Command((*COMMANDS[name].words, *LONGER), resumable=True)
    finished(place.with_name("whole"), command.words)
    running = Running(place, command.words)
    try:
        has_checkpoint(place / "out" / LAST)
        running.kill(number, everyone=everyone)
        assert running.wait(60) == 128 + number
    finally:
        running.kill()
    said = [line for line in running.said().splitlines() if "stopped by" in line]
    assert len(said) == 1
    assert "continue with: python" in said[0]
    assert "Traceback" not in running.said()
    finished(place, command.again(place))
    assert left_in(place) == left_in(place.with_name("whole"))


def test_a_closed_input_and_a_clock_that_jumps(place: Path) -> None:
    """The wall clock is an hour late at every second look."""
    for name in ("train", "fuse"):
        finished(place, COMMANDS[name].words, clock="jumps")
        shutil.rmtree(place / "out")
