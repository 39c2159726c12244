import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fusionpl import load_model
from fusionpl.cli import train
from fusionpl.cli.common import main

ROOT = Path(__file__).parents[2]
TINY = [
    "--data.image_size", "16", "--data.train_limit", "100", "--data.batch_size", "25",
    "--model.args", '{"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}',
    "--trainer.accelerator", "cpu", "--logger", "csv",
]  # fmt: skip


def trained(folder: Path, *argv: str) -> dict[str, torch.Tensor]:
    assert main(train.run, [*TINY, "--output", str(folder), *argv]) == 0
    return safetensors.torch.load_file(folder / "model/model.safetensors")


def started(folder: Path, *argv: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "train.py", *TINY, "--output", str(folder), *argv],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def epochs(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_folder_and_the_same_seed(tmp_path: Path) -> None:
    one = trained(tmp_path / "one", "--seed", "1", "--trainer.max_epochs", "2")
    two = trained(tmp_path / "two", "--seed", "1", "--trainer.max_epochs", "2")
    other = trained(tmp_path / "other", "--seed", "2", "--trainer.max_epochs", "2")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["blocks.0.mlp.fc1.weight"], other["blocks.0.mlp.fc1.weight"])
    folder = tmp_path / "one"
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert 0 <= json.loads((folder / "metrics.json").read_text())["accuracy"] <= 1
    assert [row["epoch"] for row in epochs(folder)] == ["0", "1", "2"]
    assert load_model(folder) is not None
    # the run's config.yaml repeats the run
    argv = ["--config", str(folder / "config.yaml"), "--output", str(tmp_path / "again"), "--logger", "csv"]
    assert main(train.run, argv) == 0
    again = safetensors.torch.load_file(tmp_path / "again/model/model.safetensors")
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_ctrl_c_and_resume_end_with_the_numbers_of_an_uninterrupted_run(tmp_path: Path) -> None:
    argv = ["--seed", "1", "--trainer.max_epochs", "60"]
    process = started(tmp_path / "cut", *argv)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error.strip().splitlines()[-1].startswith("interrupted; continue with: python train.py")
    assert not (tmp_path / "cut/model").exists()
    done = len(epochs(tmp_path / "cut"))
    assert 2 <= done < 60
    resumed = trained(tmp_path / "cut", *argv, "--resume")
    whole = trained(tmp_path / "whole", *argv)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert epochs(tmp_path / "cut") == epochs(tmp_path / "whole")


def test_two_processes(tmp_path: Path) -> None:
    ddp = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "1"]
    process = started(tmp_path / "run", *ddp)
    out, error = process.communicate(timeout=280)
    assert process.returncode == 0, error
    assert out.count("test accuracy") == 1
    assert load_model(tmp_path / "run") is not None


def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*argv: str) -> str:
        assert main(train.run, [*TINY, "--output", str(tmp_path / "run"), *argv]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    assert "seed" in refused("--seed", "one")
    assert "did you mean 'optim.lr'" in refused("--optim.lrr", "1")
    assert "did you mean 'trainer.max_epochs'" in refused("--trainer.max_epoch", "1")
    assert "loss became" in refused(
        "--optim.lr", "1e30", "--trainer.max_epochs", "3", "--trainer.gradient_clip_val", "0"
    )
    assert "no run to resume" in refused("--resume")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_and_other_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    trained(folder, "--trainer.max_epochs", "1")
    argv = [*TINY, "--output", str(folder)]
    assert main(train.run, [*argv, "--trainer.max_epochs", "1"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(train.run, [*argv, "--trainer.max_epochs", "1", "--optim.lr", "0.5", "--resume"]) == 2
    assert "optim.lr" in capsys.readouterr().err
    last = folder / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    assert main(train.run, [*argv, "--trainer.max_epochs", "1", "--resume"]) == 2
    assert "last.ckpt is truncated or damaged" in capsys.readouterr().err
