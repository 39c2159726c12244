"""Training a model of either library as a LightningModule."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

import lightning as L
import torch
from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]  # timm marks no exports
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric
from torchmetrics.aggregation import CatMetric
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
    MultilabelAccuracy,
    MultilabelF1Score,
)
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.text import Perplexity
from transformers import get_cosine_schedule_with_warmup

from fusionpl.calibration.forward import logits
from fusionpl.datamodules.base import IGNORED
from fusionpl.errors import FusionError
from fusionpl.evaluation.outcomes import Outcomes, are_tags, scored
from fusionpl.families.binding import bind
from fusionpl.models.labels import TAGS, kind_of
from fusionpl.schedule import Clock, warmup_cosine
from fusionpl.training.config import OptimConfig


class ClassificationModule(L.LightningModule):
    """Training with labels; logs loss and metrics of train, val and test, and the learning rate, once an epoch.

    The loss is the cross-entropy of classes [B] or of tokens [B, T] (-100 is not scored), and the squared error of
    labels that are floating-point numbers; of tags, floating point [B, tags], the binary cross-entropy of each.

    Args:
        model: a timm or transformers model, trained in place.
        optim: the optimiser's settings.
        num_classes: number of classes or tokens; 1 for regression.
        metrics: what is measured besides the loss, a name of METRICS each.
        compiled: run the model through `torch.compile`.
        seconds: wall time that the learning rate's schedule is spread over, in place of the Trainer's steps.

    Attributes:
        outcomes: what the model did on each test sample, of all ranks in the data's order; None before a test.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        num_classes: int,
        metrics: Sequence[str] = ("accuracy",),
        *,
        compiled: bool = False,
        seconds: float | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.seconds = seconds
        self.outcomes: Outcomes | None = None
        self._scored = CatMetric(nan_strategy="disable")
        # the function, not the model: what is trained and saved stays an ordinary model
        self._logits = torch.compile(logits) if compiled else logits
        self.optim = optim
        known = OF_TAGS if kind_of(model) == TAGS else METRICS
        self.metrics = nn.ModuleDict(
            {f"{stage}_{name}": known[name](num_classes) for stage in ("train", "val", "test") for name in metrics}
        )

    def configure_model(self) -> None:
        """Under FSDP, trains a copy of the model that is shared out: a block is whole only while it runs.

        Lightning calls this after `setup`, in which OTFusion fuses, and again for a test.
        """
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        self._unsharded = (self.model.cpu(),)  # in a tuple, so that it is no submodule
        self.model = copy.deepcopy(self.model)
        mesh = init_device_mesh(self.device_mesh.device_type, (self.trainer.world_size,))
        with suppress(FusionError):  # a model that no family describes is one unit
            for block in bind(self.model).blocks:
                fully_shard(self.model.get_submodule(block), mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def whole(self) -> nn.Module:
        """The model with all its weights, on the CPU. Under FSDP they are gathered: every process must call it."""
        if not isinstance(self.model, FSDPModule):
            return self.model.cpu()
        (model,) = self._unsharded
        weights = model.state_dict()
        for name, tensor in self.model.state_dict().items():
            weights[name].copy_(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        return model.cpu()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The logits [B, classes] or [B, T, tokens] of a batch."""
        return self._logits(self.model, batch)

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
        """Logs val/loss and the metrics."""
        self._step("val", batch, 0.0)

    def test_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Logs test/loss and the metrics."""
        self._step("test", batch, 0.0)

    def on_test_epoch_end(self) -> None:
        """Puts the outcomes of all ranks together: the first has samples 0, n, 2n, ... of n ranks."""
        scores, world = self._scored.compute(), self.trainer.world_size
        self._scored.reset()
        if isinstance(scores, Tensor):
            order = torch.cat([torch.arange(rank, len(scores), world) for rank in range(world)])
            values = torch.empty(scores.shape)
            values[order] = scores.cpu()
            self.outcomes = Outcomes(values)

    def on_train_epoch_end(self) -> None:
        """Logs the learning rate the epoch ended with."""
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], rank_zero_only=True)

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule, stepped once a batch.

        Raises:
            FusionError: nothing says how many steps there are.
        """
        groups = param_groups_weight_decay(self.model, self.optim.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.optim.lr)
        if self.seconds is not None:
            clock, warmup = Clock(self.seconds), self.optim.warmup
            by_clock = LambdaLR(optimizer, lambda _: warmup_cosine(clock.share, warmup))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": by_clock, "interval": "step"}}
        steps = self.trainer.estimated_stepping_batches
        endless = steps in (-1, float("inf"))  # Lightning hands on the -1 of an unset max_steps
        if endless and self.trainer.limit_train_batches:  # 0 trains nothing, and needs no end
            raise FusionError(
                "streamed training data has no known end: say how many batches an epoch has with "
                "--trainer.limit_train_batches"
            )
        steps = int(steps)
        schedule = get_cosine_schedule_with_warmup(optimizer, round(self.optim.warmup * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _step(self, stage: str, batch: dict[str, Tensor], label_smoothing: float) -> Tensor:
        labels, output = batch["labels"], self(batch)
        if stage == "test":
            self._scored.update(scored(output, labels))
        loss = loss_of(output, labels, label_smoothing)
        self.log_figures(f"{stage}/", output, labels, loss, f"{stage}_")
        return loss

    def log_figures(self, prefix: str, output: Tensor, labels: Tensor, loss: Tensor, own: str) -> None:
        """Logs the loss and the metrics of a batch, once an epoch.

        Args:
            prefix: what the names that are logged begin with.
            output, labels, loss: of the batch.
            own: what the keys of its metrics begin with.
        """
        if labels.is_floating_point():
            output, count = output if are_tags(labels) else output.squeeze(-1), len(labels)
        else:
            count = len(labels) if labels.ndim == 1 else int((labels != IGNORED).sum())
        settings: dict[str, Any] = {
            "on_step": False,
            "on_epoch": True,
            "batch_size": count,
            "add_dataloader_idx": False,
        }
        self.log(f"{prefix}loss", loss, sync_dist=True, **settings)
        for key, module in self.metrics.items():
            if not key.startswith(own):
                continue
            name, metric = key.removeprefix(own), cast(Metric, module)
            tokens = labels.ndim > 1 and name != "perplexity" and not are_tags(labels)
            metric(*((output.flatten(0, -2), labels.flatten()) if tokens else (output, labels)))
            self.log(f"{prefix}{name}", metric, **settings)


def loss_of(output: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The loss of a batch of logits; see `ClassificationModule`."""
    if are_tags(labels):
        return functional.binary_cross_entropy_with_logits(output, labels.lerp(labels.new_tensor(0.5), label_smoothing))
    if labels.is_floating_point():
        return functional.mse_loss(output.squeeze(-1), labels)
    return functional.cross_entropy(
        output.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, label_smoothing=label_smoothing
    )


@torch.no_grad()
def shrunk(model: nn.Module, factor: float) -> nn.Module:
    """A model with smaller weights: where training has ended, they learn again.

    Source: Ash and Adams, "On Warm-Starting Neural Network Training", NeurIPS 2020, without their noise.

    Args:
        model: changed in place, and returned.
        factor: of all parameters but those of one dimension, the biases and norms.
    """
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(factor)
    return model


class _F1OfClassOne(BinaryF1Score):
    """GLUE's F1, that of class 1, from the logits of two classes."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds.argmax(-1), target)


METRICS: Mapping[str, Callable[[int], Metric]] = {
    # Unchecked, since a padded vocabulary has more outputs than there are tokens.
    "accuracy": lambda classes: MulticlassAccuracy(classes, average="micro", ignore_index=IGNORED, validate_args=False),
    "f1": lambda classes: _F1OfClassOne() if classes == 2 else MulticlassF1Score(classes, average="macro"),
    "matthews": lambda classes: MulticlassMatthewsCorrCoef(classes),
    "pearson": lambda _: PearsonCorrCoef(),
    "spearman": lambda _: SpearmanCorrCoef(),
    "perplexity": lambda _: Perplexity(ignore_index=IGNORED),
}
# Of tags, each a label of its own, which hold where they are more probable than one half.
OF_TAGS: Mapping[str, Callable[[int], Metric]] = {
    "accuracy": lambda tags: MultilabelAccuracy(tags, average="micro"),
    "f1": lambda tags: MultilabelF1Score(tags, average="micro"),
}
