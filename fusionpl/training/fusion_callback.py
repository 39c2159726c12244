"""OTFusion: fuses parents into the module that a Trainer is about to run."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from torch import nn

from fusionpl.calibration import Progress, device_of, has_float64, no_progress
from fusionpl.errors import FusionError
from fusionpl.fusion import FuseConfig, FusionResult, fuse
from fusionpl.models import load_model


class OTFusion(L.Callback):
    """Replaces `module.model` by the fusion of `parents`, before the strategy wraps the module.

    `L.Trainer(callbacks=[OTFusion(parents)]).fit(module, datamodule)` finetunes a fused model; `validate` and `test`
    evaluate it. Calibration uses `datamodule.calibration_dataloader()`. Under DDP every rank calibrates on its share of
    the batches and the moments are summed, so all ranks hold the same fused model. It fuses on the Trainer's device, or
    on the CPU where that device has no float64 (Apple's GPUs).

    Args:
        parents: models, or anything `fusionpl.load_model` takes.
        config: see FuseConfig.
        names: how messages call the parents.
        progress: wraps loops for a progress bar; used on rank 0.

    Attributes:
        result: what the fusion made; None before `setup`.
    """

    def __init__(
        self,
        parents: Sequence[nn.Module | str | Path],
        config: FuseConfig | None = None,
        *,
        names: Sequence[str] | None = None,
        progress: Progress = no_progress,
    ) -> None:
        self.parents = parents
        self.config = config or FuseConfig()
        self.names = names
        self.progress = progress
        self.result: FusionResult | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Fuses once, whichever of fit, validate or test comes first."""
        if self.result is not None:
            return
        if self.config.refine.method != "none":
            raise FusionError("OTFusion runs inside a Trainer, refine.method needs its own; use fusionpl.fuse")
        calibration = getattr(trainer.datamodule, "calibration_dataloader", None)  # type: ignore[attr-defined]
        if calibration is None:
            raise FusionError(
                "OTFusion needs calibration data: give the Trainer a datamodule with calibration_dataloader()"
            )
        device = trainer.strategy.root_device
        if not has_float64(device):
            device = torch.device("cpu")
        parents = [parent if isinstance(parent, nn.Module) else load_model(parent) for parent in self.parents]
        homes = [device_of(parent) for parent in parents]
        self.result = fuse(
            [parent.to(device) for parent in parents],
            calibration(),
            self.config,
            names=self.names,
            progress=self.progress if trainer.is_global_zero else no_progress,
        )
        for parent, home in zip(parents, homes, strict=True):
            parent.to(home)
        pl_module.model = self.result.model.train(stage == "fit")
