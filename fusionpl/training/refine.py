"""Learned refinement: the fused model is drawn to its parents' mean on unlabeled data."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import get_cosine_schedule_with_warmup

from fusionpl.calibration import (
    CalibrationConfig,
    Progress,
    batches,
    device_of,
    eval_mode,
    has_float64,
    logits,
    no_progress,
    recorded,
)
from fusionpl.families import Binding
from fusionpl.fusion import AlignedParent, FuseConfig, FusionResult, RefineConfig
from fusionpl.fusion import fuse as fuse_once

WARMUP = 0.1


class Refinement(L.LightningModule):
    """Unlabeled distillation from aligned parents: their mean stream at every join, and their mean prediction.

    The loss is the mean over joins of |stream - target|^2 / |target|^2, plus the cross-entropy to the ensemble's
    probabilities.

    Args:
        model, binding: the fused model, refined in place.
        parents: the teachers.
        config: steps and learning rate.
    """

    def __init__(
        self, model: nn.Module, binding: Binding, parents: Sequence[AlignedParent], config: RefineConfig
    ) -> None:
        super().__init__()
        self.model, self.binding, self.config = model, binding, config
        self.parents = parents  # not registered: they are neither trained nor saved
        self.streams = [axis for axis in binding.joins if axis in binding.taps]

    def on_fit_start(self) -> None:
        """Brings the parents to where the model is."""
        for parent in self.parents:
            parent.model.to(self.device)

    def training_step(self, batch: Mapping[str, Tensor], index: int) -> Tensor:
        """The loss of a batch of model inputs."""
        wanted, probabilities = self._targets(batch)
        with recorded(self.model, self.binding, self.streams, gradients=True) as seen:
            scores = logits(self.model, batch)
        mask = batch.get("attention_mask")
        losses = [_relative_error(seen[axis], wanted[axis], mask) for axis in self.streams]
        scores, probabilities = (_kept(tensor, mask) for tensor in (scores, probabilities))
        loss = torch.stack(losses).mean() + functional.cross_entropy(scores, probabilities)
        self.log("refine/loss", loss)
        return loss

    @torch.no_grad()
    def _targets(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        wanted: dict[str, Tensor] = {}
        probabilities: Tensor | float = 0.0
        for parent in self.parents:
            with recorded(parent.model, parent.binding, self.streams) as seen:
                probabilities = probabilities + parent.weight * logits(parent.model, batch).softmax(-1)
            for axis in self.streams:
                wanted[axis] = wanted.get(axis, 0) + parent.weight * parent.moved(seen, axis)
        assert isinstance(probabilities, Tensor)
        return wanted, probabilities

    def configure_optimizers(self) -> Any:
        """AdamW with a linear warm-up and a cosine to zero."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.config.lr, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * self.config.steps), self.config.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def refine(
    result: FusionResult,
    calibration: Iterable[Any],
    *,
    seed: int = 0,
    trainer_args: Mapping[str, Any] | None = None,
) -> None:
    """Refines `result.model` in place as `result.config.refine` says; the result keeps what it was before.

    Args:
        result: of a fusion with its parents.
        calibration: batches of model inputs; labels are not read.
        seed: decides the order of the batches.
        trainer_args: for Lightning's Trainer: accelerator, devices, strategy, precision.
    """
    config, home = result.config, device_of(result.model)
    sizes = CalibrationConfig(samples=config.calibration.samples, batch_size=config.refine.batch_size)
    data = [batch for _, batch in batches(calibration, sizes)]
    if config.refit.method == "none":
        result.averaged = copy.deepcopy(result.model)
    else:
        result.refitted = copy.deepcopy(result.model)
    L.seed_everything(seed, workers=True, verbose=False)
    order = torch.Generator().manual_seed(seed)
    loader: DataLoader[Any] = DataLoader(cast(Dataset[Any], data), batch_size=None, shuffle=True, generator=order)
    own = {
        "max_epochs": -1, "max_steps": config.refine.steps, "gradient_clip_val": 1.0, "logger": False,
        "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False,
        "use_distributed_sampler": False,
    }  # fmt: skip
    module = Refinement(result.model.train(), result.binding, result.parents, config.refine)
    with eval_mode(*(parent.model for parent in result.parents)):
        _trainer({**(trainer_args or {}), **own}).fit(module, loader)
    result.model.to(home).eval()


def _trainer(args: Mapping[str, Any]) -> L.Trainer:
    """A Trainer on a device that has the float64 of the targets."""
    trainer = L.Trainer(**args)
    return trainer if has_float64(trainer.strategy.root_device) else L.Trainer(**{**args, "accelerator": "cpu"})


def fuse(
    parents: Sequence[nn.Module],
    calibration: Iterable[Any],
    config: FuseConfig | None = None,
    *,
    names: Sequence[str] | None = None,
    progress: Progress = no_progress,
) -> FusionResult:
    """`fusionpl.fusion.fuse`, and `refine` behind it where `config.refine.method` asks for it."""
    config = config or FuseConfig()
    if config.refine.method == "none":
        return fuse_once(parents, calibration, config, names=names, progress=progress)
    data = list(calibration)
    result = fuse_once(parents, data, config, names=names, progress=progress)
    refine(result, data, trainer_args={"devices": 1})
    return result


def _kept(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """[rows, n]: every row of [B, n], and of [B, T, n] those that are no padding."""
    if tensor.ndim == 2:
        return tensor
    return tensor.flatten(0, 1) if mask is None else tensor[mask.to(tensor.device).bool()]


def _relative_error(stream: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    stream, target = _kept(stream, mask), _kept(target, mask).to(stream)
    return (stream - target).square().sum() / target.square().sum().clamp_min(1e-12)
