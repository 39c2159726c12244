"""Training a model to its best checkpoint: what the train and the finetune command share."""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, Timer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from fusionpl.datamodules.base import FixedSplits
from fusionpl.errors import FusionError, reason
from fusionpl.evaluation.outcomes import Outcomes
from fusionpl.training.callbacks import OwnSignals, RunProgress, SeedEpochs
from fusionpl.training.checkpoints import WholeCheckpoints
from fusionpl.training.config import OptimConfig
from fusionpl.training.module import ClassificationModule


@dataclass(frozen=True)
class FitResult:
    """What a training run ended with.

    Args:
        model: the given model with the weights of the best epoch, on the CPU, in evaluation mode.
        figures: loss and metrics on the test split, by name: accuracy in 0..1, perplexity, ...
        best_epoch: the epoch (from 1) that was best in validation.
        epochs: epochs trained.
        seconds: wall time of the training, over all parts of a resumed run.
        outcomes: what the model did on each test sample; None where the Trainer's options leave no test.
    """

    model: nn.Module
    figures: Mapping[str, float]
    best_epoch: int
    epochs: int
    seconds: float
    outcomes: Outcomes | None


def fit(
    model: nn.Module,
    data: FixedSplits,
    optim: OptimConfig,
    trainer_args: dict[str, Any],
    folder: Path,
    *,
    seed: int,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    monitor: str = "val/accuracy",
    mode: Literal["min", "max"] = "max",
    module: Callable[..., ClassificationModule] = ClassificationModule,
) -> FitResult:
    """Trains `model` in place, keeps the weights of the best epoch and tests them.

    It may be called several times in one process, under DDP and FSDP too: every rank must make the same calls.

    Args:
        model: a timm or transformers model.
        data: where batches come from.
        optim: the optimiser's settings.
        trainer_args: arguments of Lightning's Trainer, `max_epochs` among them.
        folder: `checkpoints/best.ckpt` and `checkpoints/last.ckpt` are kept in it; last.ckpt is written at the end
            of every epoch.
        seed: decides augmentation and dropout; `data` has its own for the order.
        loggers: see `make_loggers`.
        callbacks: more of Lightning's callbacks.
        resume: continue from last.ckpt; the run ends with the numbers an uninterrupted one would have had.
        monitor, mode: the validation figure that the best epoch is chosen by, and whether more of it is better.
        module: makes what Lightning trains from (model, optim, number of classes, metrics).

    Raises:
        FusionError: the loss is not finite, or there is nothing to resume, or it is damaged.
        KeyboardInterrupt: the user stopped it; last.ckpt holds every finished epoch.
    """
    last, best = folder / "checkpoints" / "last.ckpt", folder / "checkpoints" / "best.ckpt"
    if resume:
        read_checkpoint(last)
    data.check_model(model)
    trained = module(model.train(), optim, data.num_classes, data.metrics)
    timer = Timer(verbose=False)
    trainer = build_trainer(folder, trainer_args, loggers, [SeedEpochs(seed), timer, *callbacks], monitor, mode)
    with _interruptible():
        try:
            trainer.fit(trained, datamodule=data, ckpt_path=last if resume else None, weights_only=True)
        except MisconfigurationException as error:
            raise FusionError(f"Lightning's Trainer refuses its options: {reason(error)}") from error
    best_epoch = trainer.current_epoch
    # A fast_dev_run writes no checkpoints, and max_steps may end before the first epoch does.
    if best.is_file():
        checkpoint = read_checkpoint(best)
        set_model_state_dict(trained, checkpoint["state_dict"], options=StateDictOptions(full_state_dict=True))
        best_epoch = checkpoint["epoch"] + 1
    with _interruptible():
        figures = trainer.test(trained, datamodule=data, verbose=False)[0]
    return FitResult(
        model=trained.whole().eval(),
        # the loss last: the metrics are what a reader looks for
        figures={name.removeprefix("test/"): figures[name] for name in sorted(figures, key="test/loss".__eq__)},
        best_epoch=best_epoch,
        epochs=trainer.current_epoch,
        seconds=timer.time_elapsed("train"),
        outcomes=trained.outcomes,
    )


@contextmanager
def _interruptible() -> Iterator[None]:
    """Gives Ctrl-C back, which Lightning turns into an exit with code 1, after which it ignores further ones."""
    try:
        yield
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from stop


def build_trainer(
    folder: Path,
    args: dict[str, Any],
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[Callback] = (),
    monitor: str = "val/accuracy",
    mode: Literal["min", "max"] = "max",
) -> L.Trainer:
    """A Trainer with the best and the last checkpoint in `folder`/checkpoints.

    Args:
        folder: the run folder.
        args: further arguments of the Trainer; None leaves Lightning's default.
        loggers: where figures go.
        callbacks: run before the checkpoints are written, so that these hold their state.
        monitor, mode: what the best checkpoint is chosen by.

    Raises:
        FusionError: the Trainer refuses an argument, such as an accelerator this machine lacks.
    """
    given = {key: value for key, value in args.items() if value is not None}
    args = {"num_sanity_val_steps": 0, "enable_model_summary": False} | given
    always: dict[str, Any] = {
        "dirpath": folder / "checkpoints",
        "save_on_train_epoch_end": True,
        "enable_version_counter": False,
        "auto_insert_metric_name": False,
    }
    # the best first: the last must hold what the best was
    checkpoints: list[Callback] = [
        ModelCheckpoint(filename="best", monitor=monitor, mode=mode, **always),
        ModelCheckpoint(filename="last", **always),
    ]
    if args.get("strategy") == "fsdp_cpu_offload":
        raise FusionError("trainer.strategy fsdp_cpu_offload is not supported; use fsdp")
    if args.get("strategy") == "fsdp":
        # PyTorch's second FSDP, which runs on the CPU too and clips gradients by their norm; Lightning's "fsdp", the
        # first, does neither. It has no name in Lightning; `ClassificationModule.configure_model` does the sharding.
        args["strategy"] = ModelParallelStrategy(save_distributed_checkpoint=False)
    bar: list[Callback] = [RunProgress()] if args.get("enable_progress_bar", True) else []
    try:
        return L.Trainer(
            default_root_dir=folder,
            logger=list(loggers) or False,
            callbacks=[OwnSignals(), *bar, *callbacks, *checkpoints],
            plugins=[WholeCheckpoints()],
            use_distributed_sampler=False,
            **args,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise FusionError(f"Lightning's Trainer refuses its options: {reason(error)}") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a Lightning checkpoint, tensors and plain values only.

    Raises:
        FusionError: it is not there or it is damaged.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FusionError(
            f"there is no {path}: no epoch was finished; start again with --overwrite in place of --resume"
        ) from error
    except Exception as error:  # zip, pickle and torch each have their own for a damaged file
        raise FusionError(f"{path} is truncated or damaged ({reason(error)}); start again with --overwrite") from error
    return checkpoint
