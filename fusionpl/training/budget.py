"""Training for a given time."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Timer
from torch import nn

from fusionpl.calibration.forward import device_of
from fusionpl.errors import FusionError
from fusionpl.training.callbacks import SeedEpochs
from fusionpl.training.module import ClassificationModule


@dataclass(frozen=True)
class Trained:
    """What training for a given time ended with.

    Attributes:
        model: the trained model, where it was before, in evaluation mode.
        steps: optimiser steps that fitted into the time.
        seconds: wall time of the training.
    """

    model: nn.Module
    steps: int
    seconds: float


def train_for(
    module: ClassificationModule,
    data: L.LightningDataModule,
    *,
    seed: int,
    trainer_args: Mapping[str, Any],
) -> Trained:
    """Trains on one device until the module's time is over; the batch that is running then is finished.

    Augmentation, dropout and the order of the batches follow from the seed, but how many steps fit into a time, and the
    learning rate of each, depend on the machine: such a result does not repeat number for number.

    Args:
        module: its `seconds` are the budget.
        data: its training batches are iterated as often as there is time.
        seed: decides augmentation and dropout.
        trainer_args: arguments of Lightning's Trainer, such as accelerator and precision.

    Raises:
        FusionError: the module has no budget, or the loss is not finite.
    """
    if module.seconds is None:
        raise FusionError("training for a time needs a module with `seconds`")
    timer = Timer(timedelta(seconds=module.seconds), verbose=False)
    trainer = L.Trainer(
        **{**trainer_args, "devices": 1},
        max_epochs=-1,
        callbacks=[SeedEpochs(seed), timer],
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    home = device_of(module.model)
    module.model.train()
    trainer.fit(module, datamodule=data)
    return Trained(module.whole().eval().to(home), trainer.global_step, timer.time_elapsed("train"))
