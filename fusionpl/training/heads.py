"""Training models that share a trunk, all heads at once, as a LightningModule."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric

from fusionpl.datamodules.heads import HeadSplits
from fusionpl.models.labels import TAGS
from fusionpl.training.config import OptimConfig
from fusionpl.training.module import METRICS, OF_TAGS, ClassificationModule, loss_of


class HeadsModule(ClassificationModule):
    """Training of several models that share a trunk; logs loss and metrics of each head, and the mean of their losses.

    A step takes a batch of each, and its loss is the mean of the heads' own: cross-entropies of classes and tags, and
    of numbers the squared error over their variance, so that no unit decides how much a head counts. Every parameter
    has a gradient in every step, which DDP wants.

    Args:
        models: a ModuleList that shares parameters, in the order of the heads.
        optim: the optimiser's settings.
        num_classes, metrics: not used; each head's are those of its data.
        data: of the heads.
    """

    def __init__(
        self, models: nn.Module, optim: OptimConfig, num_classes: int, metrics: Sequence[str], *, data: HeadSplits
    ) -> None:
        super().__init__(models, optim, num_classes, ())
        self._names, self._units = list(data.own), list(data.units().values())
        each = list(data.own.values())
        stages = [(stage, number) for stage in ("train", "val", "test") for number in range(len(each))]
        # By number: a name may hold a dot, or be that of a method.
        self.metrics = nn.ModuleDict(
            {
                f"{stage}_{number}_{name}": (OF_TAGS if each[number].kind == TAGS else METRICS)[name](
                    each[number].num_classes
                )
                for stage, number in stages
                for name in each[number].metrics
            }
        )
        self._losses = nn.ModuleDict(
            {f"{stage}_{number}": MeanMetric() for stage, number in stages if stage != "train"}
        )

    def validation_step(self, batch: dict[str, Tensor], index: int, dataloader_idx: int = 0) -> None:
        """Logs the loss and the metrics of one head."""
        self._of_head("val", dataloader_idx, batch)

    def test_step(self, batch: dict[str, Tensor], index: int, dataloader_idx: int = 0) -> None:
        """Logs the loss and the metrics of one head."""
        self._of_head("test", dataloader_idx, batch)

    def on_validation_epoch_end(self) -> None:
        """Logs val/loss, the mean over heads."""
        self._log_mean("val")

    def on_test_epoch_end(self) -> None:
        """Logs test/loss, the mean over heads."""
        self._log_mean("test")

    def _step(self, stage: str, batch: Mapping[str, Any], label_smoothing: float) -> Tensor:
        losses = [self._of_head(stage, number, batch[name], label_smoothing) for number, name in enumerate(self._names)]
        loss = torch.stack(losses).mean()
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        return loss

    def _of_head(self, stage: str, number: int, batch: dict[str, Tensor], label_smoothing: float = 0.0) -> Tensor:
        """The loss of a head's batch in its unit; logs it as it is."""
        labels, output = batch["labels"], self._logits(cast(nn.ModuleList, self.model)[number], batch)
        loss = loss_of(output, labels, label_smoothing)
        self.log_figures(f"{stage}/{self._names[number]}/", output, labels, loss, f"{stage}_{number}_")
        loss = loss / self._units[number]
        if (mean := f"{stage}_{number}") in self._losses:
            cast(MeanMetric, self._losses[mean]).update(loss.detach(), len(labels))
        return loss

    def _log_mean(self, stage: str) -> None:
        losses = [cast(MeanMetric, self._losses[f"{stage}_{number}"]) for number in range(len(self._names))]
        if all(loss.update_called for loss in losses):
            self.log(f"{stage}/loss", torch.stack([loss.compute() for loss in losses]).mean())
        for loss in losses:
            loss.reset()
