"""Learning from other models: what could be done with parents instead of fusing them."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from fusionpl.calibration.forward import eval_mode, logits
from fusionpl.datamodules.base import FixedSplits
from fusionpl.fusion.teaching import loss_to_mean
from fusionpl.models.labels import TAGS, kind_of
from fusionpl.training.config import OptimConfig
from fusionpl.training.module import ClassificationModule, loss_of


class Distillation(ClassificationModule):
    """Training on the mean of the teachers' probabilities, or half on it and half on the labels.

    The loss is that of `loss_to_mean`, of classes [B] or at every place of [B, T]; where the models put out one number,
    no labels are learned.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, at temperature 1.

    Args:
        model, optim, num_classes, metrics, seconds: see ClassificationModule.
        teachers: models with the same outputs.
        labels: whether the labels of the training data are learned too; otherwise they are never read.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        num_classes: int,
        metrics: Sequence[str] = (),
        *,
        teachers: Sequence[nn.Module],
        labels: bool,
        seconds: float | None = None,
    ) -> None:
        super().__init__(model, optim, num_classes, metrics, seconds=seconds)
        self.teachers = list(teachers)  # a list, so that they are neither trained nor saved
        self.labels = labels

    def on_fit_start(self) -> None:
        """Brings the teachers to where the model is."""
        for teacher in self.teachers:
            teacher.to(self.device)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """The loss of a training batch."""
        with torch.no_grad(), eval_mode(*self.teachers):
            given = [logits(teacher, batch) for teacher in self.teachers]
        output = self(batch)
        kind = kind_of(self.model)
        loss = loss_to_mean(output, given, [1 / len(given)] * len(given), kind=kind)
        if not self.labels or (kind != TAGS and output.shape[-1] == 1):
            return loss
        return (loss_of(output, batch["labels"]) + loss) / 2


class UnlabelledData(L.LightningDataModule):
    """The calibration data as training data: in a new order each epoch, and augmented as training data are.

    Args:
        data: whose calibration data.
        samples: at most so many, the first ones, as a fusion takes them.
        batch_size: samples a step.
        seed: decides the order.
    """

    def __init__(self, data: FixedSplits, samples: int, batch_size: int, seed: int) -> None:
        super().__init__()
        self.data, self.samples, self.batch_size, self.seed = data, samples, batch_size, seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches."""
        kept = self.data.calibration_dataloader(self.batch_size)
        count = min(self.samples, len(kept.dataset))  # type: ignore[arg-type]  # all have a length
        return DataLoader(
            Subset(kept.dataset, range(count)),
            batch_size=self.batch_size,
            shuffle=True,
            collate_fn=kept.collate_fn,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augments a batch on its device."""
        return self.data.augmented(batch)
