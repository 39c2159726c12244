import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from safetensors import SafetensorError

from fusionpl.cli import train
from fusionpl.cli.outputs import resumed, run_folder, staged
from fusionpl.cli.running import main
from fusionpl.datamodules.config import DataConfig
from fusionpl.datamodules.images import ImageDataModule
from fusionpl.errors import FusionError
from fusionpl.evaluation.metrics import evaluate
from fusionpl.models.load import load_model
from fusionpl.models.save import class_names
from tests.integration.runs import hears_ctrl_c

ROOT = Path(__file__).parents[2]
TINY = {
    "name": "tiny",
    "model": {
        "architecture": "vit_tiny_patch16_224",
        "args": {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2},
        "initializer_range": 0.2,
    },
    "data": {"path": "digits", "image_size": 8, "batch_size": 25, "train_limit": 100, "shift": 1},
    "optim": {"lr": 0.01},
    "trainer": {"max_epochs": 2, "accelerator": "cpu"},
    "logger": ["csv"],
}


@pytest.fixture
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A preset that trains in a moment, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path / "tiny.yaml"


def run(*words: object) -> int:
    return main(train.run, [str(word) for word in words])


def start(preset: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(preset), "--seed", "1", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=preset.parent,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears_ctrl_c,
    )


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_model_of_some_classes(preset: Path) -> None:
    words = ("--data.train_limit", "null", "--trainer.max_epochs", 6, "--data.classes", "[4,0,7]")
    assert run("--config", preset, "--seed", 1, *words) == 0
    folder = Path("runs/tiny/seed-1")
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["data"]["classes"] == [4, 0, 7]
    model = load_model(folder / "model")
    assert class_names(model) == ("4", "0", "7")
    data = ImageDataModule(DataConfig(image_size=8, channels=1, classes=[4, 0, 7]))
    figures = evaluate(model, data.test_dataloader())
    assert figures["accuracy"] > 0.6  # a third by chance
    other = ImageDataModule(DataConfig(image_size=8, channels=1, classes=[0, 4, 7]))
    other.check_model(model)  # numbers classes as the model does
    assert evaluate(model, other.test_dataloader()) == figures


def test_classes_that_are_none(preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, words in {
        "[3]": "data.classes is [3]; a classifier needs two or more classes",
        "[3,3]": "data.classes has '3' twice; give each class once",
        "[3,10]": "data.classes: 'digits' has no class 10; its classes are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9; "
        "null is all of them",
    }.items():
        assert run("--config", preset, "--data.classes", given) == 2
        assert capsys.readouterr().err == f"error: {words}\n"


def test_a_run_folder_holds_all_of_a_run(preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--config", preset, "--seed", 1) == 0
    folder = Path("runs/tiny/seed-1")
    assert files(folder) == {
        "config.yaml",
        "metrics.csv",
        "metrics.json",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "model/config.json",
        "model/model.safetensors",
        "model/README.md",
    }
    figures = json.loads((folder / "metrics.json").read_text())
    model = load_model(folder)
    data = ImageDataModule(DataConfig(image_size=8))
    assert evaluate(model, data.test_dataloader())["accuracy"] == pytest.approx(figures["accuracy"], abs=1e-6)
    assert class_names(model) == tuple("0123456789")
    said = capsys.readouterr().out
    assert f"test accuracy {100 * figures['accuracy']:.2f} %" in said
    assert "epoch 2/2: train loss" in said
    card = (folder / "model" / "README.md").read_text()
    assert f"of epoch {figures['best_epoch']} of 2, the best in validation" in card
    facts = huggingface_hub.ModelCard(card).data
    assert facts["pipeline_tag"] == "image-classification"
    measured = {one.metric_type: one.metric_value for one in facts.eval_results}
    assert measured["accuracy"] == figures["accuracy"]
    assert [path.name for path in folder.parent.iterdir()] == ["seed-1"]


def test_the_kept_config_repeats_the_run(preset: Path) -> None:
    assert run("--config", preset, "--seed", 3, "--optim.lr", 0.02, "--output", "first") == 0
    assert run("--config", "first/config.yaml", "--output", "again") == 0
    assert (Path("again/model/model.safetensors")).read_bytes() == Path("first/model/model.safetensors").read_bytes()
    assert Path("again/config.yaml").read_text() == Path("first/config.yaml").read_text()
    assert yaml.safe_load(Path("first/config.yaml").read_text())["optim"]["lr"] == 0.02


def test_an_existing_run_is_refused_then_replaced(preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--config", preset, "--output", "mine") == 0
    before = Path("mine/model/model.safetensors").read_bytes()
    capsys.readouterr()
    assert run("--config", preset, "--output", "mine", "--seed", 2) == 2
    assert capsys.readouterr().err == (
        "error: mine exists; replace it with --overwrite, or choose another folder with --output\n"
    )
    assert Path("mine/model/model.safetensors").read_bytes() == before
    assert run("--config", preset, "--output", "mine", "--seed", 2, "--overwrite") == 0
    assert Path("mine/model/model.safetensors").read_bytes() != before


def test_a_failing_replacement_leaves_the_old_run(preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--config", preset, "--output", "mine") == 0
    before = {name: Path("mine", name).read_bytes() for name in files(Path("mine"))}
    assert run("--config", preset, "--output", "mine", "--overwrite", "--optim.lr", 1e30) == 2
    assert "the training loss became" in capsys.readouterr().err
    assert {name: Path("mine", name).read_bytes() for name in files(Path("mine"))} == before
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["mine", "tiny.yaml"]


def test_overwrite_spares_what_is_not_ours(preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("thesis").mkdir()
    Path("thesis/chapter.txt").write_text("years of work")
    assert run("--config", preset, "--output", "thesis", "--overwrite") == 2
    assert "thesis is not an output of fusionpl (no config.yaml)" in capsys.readouterr().err
    assert files(Path("thesis")) == {"chapter.txt"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--seed", "x"], "seed: .*x"),
        (["--seed", "-1"], "seed: .*-1"),
        (["--optim.lrr", "3"], r"unknown option --optim\.lrr; did you mean 'optim\.lr'\?"),
        (["--trainer.max_epoch", "3"], r"unknown option --trainer\.max_epoch; did you mean 'trainer\.max_epochs'\?"),
        (["--data.shift", "much"], r"data\.shift: 'much' is not int"),
        (["--logger", "csv", "paper"], "logger: 'paper' is not wandb or tensorboard or csv or none"),
        (["--config", "nowhere.yaml"], "there is no configuration file nowhere.yaml"),
        (["--model.architecture", "vit_tiny_patch16_22"], "did you mean 'vit_tiny_patch16_224'"),
        (["--data.path", "./nowhere"], "no data set at nowhere"),
        (["--trainer.accelerator", "abacus"], "Lightning's Trainer refuses its options: .*abacus"),
        (["--trainer.strategy", "fsdp_cpu_offload"], "fsdp_cpu_offload is not supported; use fsdp"),
        (["--resume"], r"there is no run to resume in runs/tiny/seed-0 \(no config\.yaml\)"),
    ],
)
def test_a_mistake_is_one_line(
    preset: Path, capsys: pytest.CaptureFixture[str], words: Sequence[str], line: str
) -> None:
    assert run("--config", preset, *words) == 2
    said = capsys.readouterr()
    assert re.fullmatch(rf"error: .*{line}.*\n", said.err), said.err
    assert files(Path.cwd()) == {"tiny.yaml"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optim: {learning_rate: 3}", "unknown key optim.learning_rate"),
        ("data: {path: digits, batchsize: 3}", "unknown key data.batchsize; did you mean 'data.batch_size'?"),
        ("sed: 1", "unknown key sed; did you mean 'seed'?"),
        ("seed: [1", "expected ',' or ']'"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(
    preset: Path, capsys: pytest.CaptureFixture[str], text: str, line: str
) -> None:
    preset.write_text(text)
    assert run("--config", preset) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1


def test_resuming_with_other_settings_is_refused(preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--config", preset, "--output", "mine") == 0
    assert run("--config", preset, "--output", "mine", "--resume", "--optim.lr", 0.5) == 2
    assert "mine was started with optim.lr 0.01, not 0.5" in capsys.readouterr().err
    assert run("--config", preset, "--output", "mine", "--resume") == 0


def test_resuming_from_a_truncated_checkpoint(preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--config", preset, "--output", "mine") == 0
    last = Path("mine/checkpoints/last.ckpt")
    last.write_bytes(last.read_bytes()[:1000])
    capsys.readouterr()
    assert run("--config", preset, "--output", "mine", "--resume") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: mine/checkpoints/last.ckpt is truncated or damaged")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.slow),
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
    ],
)
def test_a_stopped_run_says_how_to_go_on(preset: Path, number: int, code: int, word: str) -> None:
    """By Ctrl-C or by a scheduler that wants the machine back."""
    process = start(preset, "--trainer.max_epochs", "100000", "--overwrite")
    folder = preset.parent / "runs/tiny/seed-1"
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors == (
        f"{word}; continue with: python train.py --config {preset} --seed 1 --trainer.max_epochs 100000 --resume\n"
    )
    assert not (folder / "model").exists()
    with pytest.raises(FusionError, match="the run did not finish, continue it with --resume"):
        load_model(folder)


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes_train_one_model(preset: Path, strategy: str) -> None:
    process = start(preset, "--trainer.devices", "2", "--trainer.strategy", strategy)
    said, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    folder = preset.parent / "runs/tiny/seed-1"
    figures = json.loads((folder / "metrics.json").read_text())
    measured = evaluate(load_model(folder), ImageDataModule(DataConfig(image_size=8)).test_dataloader())
    assert measured["accuracy"] == pytest.approx(figures["accuracy"], abs=1e-6)
    assert measured["loss"] == pytest.approx(figures["loss"], rel=1e-5)
    assert said.count("test accuracy") == 1
    # 100 images, 2 processes, 25 a batch and process: 2 steps an epoch
    assert [row.split(",")[1] for row in (folder / "metrics.csv").read_text().splitlines()[1:3]] == ["1", "3"]


@pytest.mark.slow
def test_a_sharded_run_goes_on_after_ctrl_c(preset: Path) -> None:
    words = ["--trainer.devices", "2", "--trainer.strategy", "fsdp", "--trainer.max_epochs", "20"]
    stopped, whole = (Path("stopped/checkpoints/last.ckpt"), Path("whole/checkpoints/last.ckpt"))
    process = start(preset, *words, "--output", "stopped")
    deadline = time.monotonic() + 120
    while not stopped.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert torch.load(stopped, weights_only=True)["epoch"] < 19
    for more in (["--output", "stopped", "--resume"], ["--output", "whole"]):
        process = start(preset, *words, *more)
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    one, two = (torch.load(file, weights_only=True)["state_dict"] for file in (stopped, whole))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_staged_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged(target) as folder:
        (folder / "config.yaml").write_text("first")
        assert not target.exists()

    def fail() -> None:
        with staged(target, overwrite=True) as folder:
            (folder / "config.yaml").write_text("second")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (target / "config.yaml").read_text() == "first"
    with staged(target, overwrite=True) as folder:
        (folder / "config.yaml").write_text("third")
    assert (target / "config.yaml").read_text() == "third"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("resumable", [True, False])
def test_a_stopped_run_stays_if_it_can_go_on(tmp_path: Path, resumable: bool) -> None:
    target = tmp_path / "run"

    def stop() -> None:
        with run_folder(target, overwrite=False, keep="last.ckpt") as folder:
            (folder / "config.yaml").write_text("")
            if resumable:
                (folder / "last.ckpt").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert target.exists() == resumable


# what was killed


def left_behind(target: Path, *, moved: bool, keep: str | None = None) -> Path:
    """What a process leaves that was killed while it wrote, where it stays if `keep` makes that of use."""
    left = target.parent / f".{target.name}.killed"
    (left / "new").mkdir(parents=True)
    (left / "lock").touch()
    if keep is not None:
        (left / "keep").write_text(keep)
    if moved:
        (left / "old").mkdir()
        (left / "old/config.yaml").write_text("name: before")
    return left


@pytest.mark.parametrize("moved", [False, True])
def test_what_a_killed_command_left_is_removed(tmp_path: Path, *, moved: bool) -> None:
    """Killed between moving the old output away and the new one there, it is put back first."""
    target = tmp_path / "out"
    left = left_behind(target, moved=moved)
    with staged(target, overwrite=True) as folder:
        assert not left.exists()
        assert target.exists() == moved
        (folder / "config.yaml").write_text("name: after")
    assert (target / "config.yaml").read_text() == "name: after"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("resumable", [False, True])
def test_a_run_that_was_killed_before_its_first_epoch_is_no_output(tmp_path: Path, *, resumable: bool) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.yaml").write_text("name: killed")
    if resumable:
        (target / "last.ckpt").touch()
    left_behind(target, moved=False, keep="last.ckpt")
    if resumable:
        with pytest.raises(FusionError, match="out exists; replace it"), run_folder(target, False, keep="last.ckpt"):
            pass
        assert (target / "last.ckpt").exists()
    else:
        with run_folder(target, False, keep="last.ckpt") as folder:
            assert not any(folder.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_another_command_left_is_no_reason_to_remove_an_output(tmp_path: Path) -> None:
    """A fusion was killed that would have replaced a complete output; then a training has the same output."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.yaml").write_text("name: whole")
    left_behind(target, moved=False)
    with pytest.raises(FusionError, match="out exists; replace it"), run_folder(target, False, keep="last.ckpt"):
        pass
    assert (target / "config.yaml").read_text() == "name: whole"


def test_an_output_whose_name_goes_on_is_another(tmp_path: Path) -> None:
    with staged(tmp_path / "out.2"), staged(tmp_path / "out") as folder:
        (folder / "config.yaml").write_text("name: mine")
    assert (tmp_path / "out/config.yaml").read_text() == "name: mine"
    left = left_behind(tmp_path / "out.3", moved=True)
    with staged(tmp_path / "out", overwrite=True) as folder:
        (folder / "config.yaml").touch()
    assert (left / "old/config.yaml").read_text() == "name: before"


def test_a_run_that_goes_on_is_alone_and_removes_what_was_killed(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "last.ckpt").touch()
    left = left_behind(target, moved=True, keep="last.ckpt")
    with resumed(target):
        assert not left.exists()
        with pytest.raises(FusionError, match="another run is writing"), resumed(target):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with resumed(tmp_path / "nowhere"):
        assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("whole", [False, True], ids=["dangling", "an output"])
def test_an_output_may_be_a_symbolic_link(tmp_path: Path, *, whole: bool) -> None:
    link, target = tmp_path / "mein Ordner é", tmp_path / "large disk/融合"
    link.symlink_to(target)
    if whole:
        target.mkdir(parents=True)
        (target / "config.yaml").touch()
    for place in (staged(link, whole), run_folder(link, True, keep="last.ckpt")):
        with place as folder:
            (folder / "config.yaml").write_text("name: after")
        assert link.is_symlink()
        assert (target / "config.yaml").read_text() == "name: after"
        assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """nohup ignores SIGHUP so that a command outlives its terminal."""
    seen = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(lambda _: seen.append(signal.getsignal(signal.SIGHUP)), []) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen == [signal.SIG_IGN]


def test_two_runs_into_one_output(tmp_path: Path) -> None:
    target = tmp_path / "out"
    words = (
        "import sys; from pathlib import Path; from fusionpl.cli.outputs import staged\n"
        "with staged(Path(sys.argv[1])): print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", words, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(FusionError, match=r"another run is writing .*out; wait for it"), staged(target):
            pass
        other.kill()
    with staged(target) as folder:  # its process is gone
        (folder / "config.yaml").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_of_runs_that_begin_at_once_one_gets_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, count = tempfile.TemporaryDirectory, 4

    def slowly(**options: Any) -> Any:
        time.sleep(0.1)  # time for the others to look, if they may
        return make(**options)

    monkeypatch.setattr(tempfile, "TemporaryDirectory", slowly)
    start, end = threading.Barrier(count), threading.Barrier(count)

    def write(number: int) -> bool:
        start.wait()
        try:
            with staged(tmp_path / "out", overwrite=True) as folder:
                end.wait()
                (folder / "config.yaml").write_text(str(number))
        except FusionError:
            end.wait()
            return False
        return True

    with ThreadPoolExecutor(count) as pool:
        for _ in range(2):
            assert sum(pool.map(write, range(count))) == 1
            assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied", "/there"), "error: Permission denied: /there; choose another folder"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "error: No space left on device; choose another folder",
        ),
        (OSError(28, "No space left on device"), "error: No space left on device; choose another folder"),
        (MemoryError(), "error: out of memory: MemoryError; use smaller"),
        (
            RuntimeError("[enforce fail at x] can't allocate memory: you tried to allocate 88 bytes. Error"),
            "allocate 88 b",
        ),
        (
            RuntimeError("[pair.cc:537] Connection closed by peer [127.0.0.1]:9"),
            "error: another process of this run ended",
        ),
        (FusionError("many\n lines of a library"), "error: many lines of a library"),
    ],
)
def test_what_the_machine_lacks_is_one_line(error: Exception, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> None:
        raise error

    assert main(fail, []) == 2
    line = capsys.readouterr().err
    assert words in line
    assert line.count("\n") == 1
