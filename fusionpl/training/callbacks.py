"""Lightning callbacks of every training run."""

import signal
import sys
import threading
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback, ProgressBar
from tqdm import tqdm


class SeedEpochs(Callback):
    """Seeds the global RNGs at the start of every epoch from (seed, epoch, rank).

    Whatever draws from them (augmentation, dropout) then does the same in a resumed run as in an uninterrupted
    one, and something else on every rank.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seeds python, numpy and torch."""
        entropy = (self.seed, trainer.current_epoch, trainer.global_rank)
        L.seed_everything(int(np.random.SeedSequence(entropy).generate_state(1)[0]), verbose=False)


class OwnSignals(Callback):
    """Leaves SIGTERM to who handled it before the Trainer.

    Lightning's handler sends the other ranks a message in the middle of whatever they exchange: where a scheduler stops
    all of them at once, they may wait for each other for ever.
    """

    def __init__(self) -> None:
        self._handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes Lightning's handler away again."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)

    on_test_start = on_train_start


class RunProgress(ProgressBar):
    """One bar over the whole run, with the time that is left; without a terminal, one line an epoch.

    Lightning's own bars know only the time to the end of an epoch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[Any] | None = None
        self._shown = True

    def disable(self) -> None:
        """Lightning calls this on every rank but the first."""
        self._shown = False

    def enable(self) -> None:
        """Undoes `disable`."""
        self._shown = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the bar, where a resumed run stopped."""
        if self._shown:
            self._bar = tqdm(
                total=int(trainer.estimated_stepping_batches),
                initial=trainer.global_step,
                disable=not sys.stderr.isatty(),
                dynamic_ncols=True,
                leave=False,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left{postfix}",
            )
            self._describe(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Moves the bar by the optimiser's steps."""
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the epoch's figures."""
        if self._bar is None:
            return
        figures = {name: float(trainer.callback_metrics[name]) for name in _SHOWN if name in trainer.callback_metrics}
        text = ", ".join(f"{name.replace('/', ' ')} {value:.3f}" for name, value in figures.items())
        if self._bar.disable:
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: {text}")
        else:
            self._bar.set_postfix_str(text)
            self._describe(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that the error has a line of its own."""
        self._close()

    def _describe(self, trainer: L.Trainer) -> None:
        if self._bar is not None:
            self._bar.set_description_str(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


_SHOWN = ("train/loss", "val/loss", "val/accuracy")
