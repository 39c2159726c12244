import csv
import dataclasses
import errno
import functools
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from fusionpl.datamodules.config import DataConfig
from fusionpl.datamodules.images import ImageDataModule
from fusionpl.errors import FusionError
from fusionpl.evaluation.metrics import evaluate
from fusionpl.models.build import build_model
from fusionpl.models.config import ModelConfig
from fusionpl.training.callbacks import SeedEpochs
from fusionpl.training.checkpoints import WholeCheckpoints
from fusionpl.training.config import OptimConfig
from fusionpl.training.fit import FitResult, fit, read_checkpoint
from fusionpl.training.loggers import MetricsFile, finish_loggers, make_loggers
from fusionpl.training.module import ClassificationModule
from fusionpl.training.weights_and_biases import has_wandb_key

MODEL = ModelConfig(
    args={
        "img_size": 8,
        "patch_size": 4,
        "in_chans": 1,
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "mlp_ratio": 2,
        "proj_drop_rate": 0.2,  # so that a run depends on the RNG in training
    },
    initializer_range=0.2,
)
DATA = DataConfig(image_size=8, batch_size=20, train_limit=100, shift=1)


class Stop(Callback):
    """Presses Ctrl-C in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.current_epoch == self.epoch and trainer.global_step % 5 == 3:
            raise KeyboardInterrupt


def trained(
    folder: Path,
    *,
    lr: float = 1e-2,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    data: DataConfig = DATA,
    compiled: bool = False,
    **args: Any,
) -> FitResult:
    torch.manual_seed(0)
    return fit(
        build_model(MODEL, num_classes=10),
        ImageDataModule(data, seed=5),
        OptimConfig(lr=lr),
        {"max_epochs": 4, "accelerator": "cpu", **args},
        folder,
        seed=5,
        loggers=make_loggers(["csv"], folder, name="test", job="train", resume=resume),
        callbacks=callbacks,
        resume=resume,
        module=functools.partial(ClassificationModule, compiled=compiled),
    )


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[FitResult, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return trained(folder), folder


def test_a_result_is_what_the_returned_model_does(whole: tuple[FitResult, Path]) -> None:
    result, folder = whole
    data = ImageDataModule(DATA)
    measured = evaluate(result.model, data.test_dataloader())
    assert measured["accuracy"] == pytest.approx(result.figures["accuracy"], abs=1e-6)
    assert measured["loss"] == pytest.approx(result.figures["loss"], rel=1e-5)
    rows = table(folder)
    assert evaluate(result.model, data.val_dataloader())["loss"] == pytest.approx(
        float(rows[result.best_epoch - 1]["val/loss"]), rel=1e-5
    )
    accuracies = [float(row["val/accuracy"]) for row in rows if row["val/accuracy"]]
    assert accuracies[result.best_epoch - 1] == max(accuracies)
    assert (result.epochs, len(accuracies)) == (4, 4)
    assert not result.model.training


def test_where_the_images_are_and_how_the_model_runs_changes_nothing(
    whole: tuple[FitResult, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    result = trained(tmp_path, data=dataclasses.replace(DATA, on_device=True), compiled=True)
    assert len(compiled) == 1
    assert result.figures == whole[0].figures


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_on_the_gpu_train_like_images_on_the_cpu(tmp_path: Path) -> None:
    found = [
        trained(tmp_path, data=dataclasses.replace(DATA, on_device=on_device), accelerator="gpu")
        for on_device in (False, True)
    ]
    assert found[0].figures == pytest.approx(found[1].figures, abs=1e-3)


def test_the_learning_rate_rises_and_falls_to_nothing(whole: tuple[FitResult, Path]) -> None:
    rates = [float(row["lr"]) for row in table(whole[1]) if row["lr"]]
    assert rates[0] == pytest.approx(1e-2, rel=0.2)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_training_learns(whole: tuple[FitResult, Path]) -> None:
    losses = [float(row["train/loss"]) for row in table(whole[1]) if row["train/loss"]]
    assert losses[-1] < losses[0] - 0.1


def test_a_resumed_run_ends_like_an_uninterrupted_one(whole: tuple[FitResult, Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, callbacks=[Stop(2)])
    assert len(table(tmp_path)) == 2
    resumed, expected = trained(tmp_path, resume=True), whole[0]
    for (name, tensor), other in zip(
        resumed.model.state_dict().items(), expected.model.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name
    fields = ("model", "seconds", "outcomes")
    assert resumed.outcomes is not None
    assert expected.outcomes is not None
    assert torch.equal(resumed.outcomes.values, expected.outcomes.values)
    assert {key: value for key, value in vars(resumed).items() if key not in fields} == {
        key: value for key, value in vars(expected).items() if key not in fields
    }
    assert table(tmp_path) == table(whole[1])
    ends = [torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in (tmp_path, whole[1])]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_ctrl_c_in_the_final_test_is_ctrl_c(tmp_path: Path) -> None:
    class StopTesting(Callback):
        def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, callbacks=[StopTesting()])


def test_two_seeds_train_differently(whole: tuple[FitResult, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = fit(
        build_model(MODEL, num_classes=10),
        ImageDataModule(DATA, seed=6),
        OptimConfig(lr=1e-2),
        {"max_epochs": 4, "accelerator": "cpu"},
        tmp_path,
        seed=6,
    )
    assert other.figures["loss"] != whole[0].figures["loss"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        FusionError, match=r"the training loss became (nan|inf) in epoch 1, step \d+; lower --optim\.lr"
    ):
        trained(tmp_path, lr=1e30)
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_truncated_checkpoint_is_named(whole: tuple[FitResult, Path], tmp_path: Path, keep: float) -> None:
    content = (whole[1] / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(content[: int(keep * len(content))])
    with pytest.raises(FusionError, match=r"last\.ckpt is truncated or damaged .*; start again with --overwrite"):
        trained(tmp_path, resume=True)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(FusionError, match="no epoch was finished; start again with --overwrite"):
        trained(tmp_path, resume=True)


def test_an_option_the_trainer_refuses(tmp_path: Path) -> None:
    with pytest.raises(FusionError, match=r"Lightning's Trainer refuses its options: .*abacus"):
        trained(tmp_path, accelerator="abacus")


def test_a_quick_look_keeps_no_checkpoints(tmp_path: Path) -> None:
    result = trained(tmp_path, fast_dev_run=True)
    assert 0 <= result.figures["accuracy"] <= 1
    assert not (tmp_path / "checkpoints").exists()


def test_every_epoch_and_rank_has_its_own_randomness() -> None:
    @dataclasses.dataclass
    class Where:
        current_epoch: int
        global_rank: int

    def drawn(seed: int, epoch: int, rank: int) -> float:
        SeedEpochs(seed).on_train_epoch_start(Where(epoch, rank), None)  # type: ignore[arg-type]
        return torch.rand(1).item()

    assert drawn(1, 2, 0) == drawn(1, 2, 0)
    assert len({drawn(1, 2, 0), drawn(1, 2, 1), drawn(1, 3, 0), drawn(2, 2, 0)}) == 4


def test_the_metrics_file_forgets_epochs_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path / "metrics.csv")
    for epoch in range(3):
        first.log_metrics({"epoch": epoch, "val/loss": 1.0 + epoch}, step=epoch)
        first.log_metrics({"epoch": epoch, "train/loss": 2.0}, step=epoch)
    resumed = MetricsFile(tmp_path / "metrics.csv", resume=True)
    resumed.log_metrics({"epoch": 1, "val/loss": 9.0}, step=1)
    assert [(row["epoch"], row["val/loss"], row["train/loss"]) for row in table(tmp_path)] == [
        ("0", "1.0", "2.0"),
        ("1", "9.0", ""),
    ]
    reported = MetricsFile(tmp_path / "metrics.csv", resume=True)
    reported.log_metrics({"fused finetuned/accuracy": 0.5})
    assert [(row["epoch"], row["step"], row["fused finetuned/accuracy"]) for row in table(tmp_path)] == [
        ("0", "0", ""),
        ("1", "1", "0.5"),
    ]


def test_weights_and_biases_without_a_key_runs_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not has_wandb_key()
    run = tmp_path / "run"
    run.mkdir()
    loggers = make_loggers(["wandb"], run, name="test", job="train", config={"seed": 1})
    for logger in loggers:
        logger.log_metrics({"epoch": 0, "val/loss": 0.5}, step=0)
    said = finish_loggers(loggers)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    where = f"Weights & Biases: no API key, so kept offline in {tmp_path / 'wandb'}; "
    assert said.startswith(f"{where}upload it with: wandb sync ")
    kept = Path(said.rpartition(" ")[2])
    assert kept == tmp_path / "wandb"
    assert list(kept.glob("offline-run-*/run-*.wandb"))
    assert table(run)[0]["val/loss"] == "0.5"


def test_a_key_in_the_environment_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert has_wandb_key()


def test_a_checkpoint_is_the_old_or_the_new_and_needs_no_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    path = tmp_path / "checkpoints/last.ckpt"
    WholeCheckpoints().save_checkpoint({"epoch": 1}, path)

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            WholeCheckpoints().save_checkpoint({"epoch": 2}, path)
    assert read_checkpoint(path) == {"epoch": 1}
    WholeCheckpoints().save_checkpoint({"epoch": 2}, path)
    assert read_checkpoint(path) == {"epoch": 2}
    assert [one.name for one in path.parent.iterdir()] == ["last.ckpt"]


def test_sigterm_is_left_to_who_handled_it(tmp_path: Path) -> None:
    """Lightning's handler would wait for other ranks that a scheduler stopped too."""
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(signal.getsignal(signal.SIGTERM))

        def on_test_batch_end(self, *_: Any) -> None:
            seen.append(signal.getsignal(signal.SIGTERM))

    trained(tmp_path, max_epochs=1, callbacks=[Look()])
    assert set(seen) == {signal.getsignal(signal.SIGTERM)}
