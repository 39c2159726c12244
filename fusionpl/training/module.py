"""Training a classifier of either library as a LightningModule."""

from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import torch
from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]  # timm marks no exports
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from transformers import get_cosine_schedule_with_warmup

from fusionpl.calibration.forward import logits
from fusionpl.errors import FusionError


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine to zero.

    Args:
        lr: the largest learning rate.
        weight_decay: for weight matrices; biases and norms have none.
        warmup: share of all steps the learning rate rises in.
        label_smoothing: share of the target spread over all classes; 0 for none. Only training uses it.
    """

    lr: float = 1.2e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    label_smoothing: float = 0.0


class ClassificationModule(L.LightningModule):
    """Cross-entropy training; logs loss and accuracy of train, val and test, and the learning rate, once an epoch.

    Args:
        model: a timm or transformers classifier, trained in place.
        optim: the optimiser's settings.
        num_classes: number of classes.
    """

    def __init__(self, model: nn.Module, optim: OptimConfig, num_classes: int) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.accuracies = nn.ModuleDict(
            {f"{stage}_accuracy": _accuracy(num_classes) for stage in ("train", "val", "test")}
        )

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The logits [B, classes] of a batch."""
        return logits(self.model, batch)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """The loss of a training batch.

        Raises:
            FusionError: it is not finite.
        """
        loss = self._step("train", batch, self.optim.label_smoothing)
        if not torch.isfinite(loss):
            raise FusionError(
                f"the training loss became {loss.item()} in epoch {self.current_epoch + 1}, step {index + 1};"
                f" lower --optim.lr (it is {self.optim.lr:g}) or set --trainer.gradient_clip_val"
            )
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Logs val/loss and val/accuracy."""
        self._step("val", batch, 0.0)

    def test_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Logs test/loss and test/accuracy."""
        self._step("test", batch, 0.0)

    def on_train_epoch_end(self) -> None:
        """Logs the learning rate the epoch ended with."""
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], rank_zero_only=True)

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule, stepped once a batch."""
        groups = param_groups_weight_decay(self.model, self.optim.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.optim.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, round(self.optim.warmup * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _step(self, stage: str, batch: dict[str, Tensor], label_smoothing: float) -> Tensor:
        labels = batch["labels"]
        output = self(batch)
        loss = functional.cross_entropy(output, labels, label_smoothing=label_smoothing)
        accuracy = cast(Metric, self.accuracies[f"{stage}_accuracy"])
        accuracy(output, labels)
        settings: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(labels)}
        self.log(f"{stage}/loss", loss, sync_dist=True, **settings)
        self.log(f"{stage}/accuracy", accuracy, **settings)
        return loss


def _accuracy(num_classes: int) -> Metric:
    return MulticlassAccuracy(num_classes, average="micro")
