"""The same command twice gives the same files; on another number of threads, the same up to rounding."""

import shutil
from pathlib import Path

import pytest
import torch

from fusionpl import load_model
from tests.campaign.commands import COMMANDS, finished, left_in

pytestmark = pytest.mark.campaign


def run(home: Path, place: Path, name: str, threads: int) -> Path:
    shutil.copytree(home, place)
    finished(place, COMMANDS[name].words, OMP_NUM_THREADS=str(threads))
    return place


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_command_twice(name: str, threads: int, home: Path, tmp_path: Path) -> None:
    assert left_in(run(home, tmp_path / "one", name, threads)) == left_in(run(home, tmp_path / "two", name, threads))


@pytest.mark.parametrize(("name", "tolerance"), [("train", 1e-5), ("finetune", 1e-5), ("fuse", 1e-3)])
def test_other_threads_change_the_rounding_alone(name: str, tolerance: float, home: Path, tmp_path: Path) -> None:
    """What decides no output may differ more: biases of keys, directions in which a refit's inputs hardly vary."""
    images = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        one, two = (load_model(run(home, tmp_path / str(threads), name, threads) / "out")(images) for threads in (1, 2))
    assert float((one - two).norm()) < tolerance * float(one.norm())
