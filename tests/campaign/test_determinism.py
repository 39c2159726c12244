"""The same command twice gives the same files; on another number of threads, the same up to rounding."""

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

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


@pytest.mark.parametrize("name", ["train", "fuse", "finetune"])
def test_other_threads_change_the_rounding_alone(name: str, home: Path, tmp_path: Path) -> None:
    one, two = (
        safetensors.torch.load_file(run(home, tmp_path / str(threads), name, threads) / "out/model/model.safetensors")
        for threads in (1, 2)
    )
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-5, atol=1e-5, msg=key)
