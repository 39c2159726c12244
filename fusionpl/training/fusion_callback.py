"""OTFusion: fuses parents into the module that a Trainer is about to run."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from torch import nn

from fusionpl.calibration.batches import Progress, no_progress
from fusionpl.calibration.forward import device_of, has_float64
from fusionpl.errors import FusionError
from fusionpl.families.family import Family
from fusionpl.fusion.config import FuseConfig
from fusionpl.fusion.fuse import fuse
from fusionpl.fusion.result import FusionResult
from fusionpl.models.preprocessing import ImageProcessing


class OTFusion(L.Callback):
    """Replaces `module.model` by the fusion of `parents`, before the strategy wraps the module.

    `L.Trainer(callbacks=[OTFusion(parents)]).fit(module, datamodule)` finetunes a fused model; `validate` and `test`
    evaluate it. Calibration uses `datamodule.calibration_dataloader()`. Refinement also uses
    `datamodule.unlabelled_dataloader()`, and with `refine.augment` `datamodule.augmented`, where there are such. Under
    DDP every rank calibrates on its share of the batches and the moments are summed, so all ranks hold the same fused
    model. It fuses on the Trainer's device, or on the CPU where that device has no float64 (Apple's GPUs).

    Args:
        parents: models, or anything `fusionpl.load_model` takes.
        config: see FuseConfig.
        names: how messages call the parents.
        processing: how images are prepared; see `fusionpl.fuse`. By default as the data module has them
            (`datamodule.processing`), where it says so.
        output: a run folder that the fused model goes to; see `fusionpl.fuse`. Written by rank 0.
        seed: see `fusionpl.fuse`.
        allow_pickle: see `fusionpl.load_model`.
        family: see `fusionpl.fuse`.
        progress: wraps loops for a progress bar; used on rank 0.

    Attributes:
        result: what the fusion made; None before `setup`.

    Raises:
        FusionError: `labels: separate`, which makes several models.
    """

    def __init__(
        self,
        parents: Sequence[nn.Module | str | Path],
        config: FuseConfig | None = None,
        *,
        names: Sequence[str] | None = None,
        processing: ImageProcessing | None = None,
        output: str | Path | None = None,
        seed: int = 0,
        allow_pickle: bool = False,
        family: Family | str | Path | None = None,
        progress: Progress = no_progress,
    ) -> None:
        self.parents = parents
        self.config = config or FuseConfig()
        if self.config.labels == "separate":
            raise FusionError(
                "OTFusion puts one model into a module, labels separate makes one for each parent; use fusionpl.fuse"
            )
        self.names = names
        self.processing = processing
        self.output = output
        self.seed = seed
        self.allow_pickle = allow_pickle
        self.family = family
        self.progress = progress
        self.result: FusionResult | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Fuses once, whichever of fit, validate or test comes first."""
        if self.result is None:
            self.result = self.fuse(trainer)
            pl_module.model = self.result.model.train(stage == "fit")

    def fuse(self, trainer: L.Trainer) -> FusionResult:
        """Fuses on the device of `trainer`, with the calibration data of its data module.

        Raises:
            FusionError: the data module has none; see `fusionpl.fuse` for the rest.
        """
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        calibration = getattr(datamodule, "calibration_dataloader", None)
        if calibration is None:
            raise FusionError(
                "OTFusion needs calibration data: give the Trainer a datamodule with calibration_dataloader()"
            )
        unlabelled = getattr(datamodule, "unlabelled_dataloader", None)
        device = trainer.strategy.root_device
        if not has_float64(device):
            device = torch.device("cpu")
        models = [parent for parent in self.parents if isinstance(parent, nn.Module)]
        homes = [device_of(model) for model in models]
        result = fuse(
            [parent.to(device) if isinstance(parent, nn.Module) else parent for parent in self.parents],
            calibration(),
            self.config,
            names=self.names,
            device=device,
            output=self.output if trainer.is_global_zero else None,
            unlabelled=unlabelled() if unlabelled is not None and self.config.refine.asked else None,
            augment=getattr(datamodule, "augmented", None),
            processing=self.processing or getattr(datamodule, "processing", None),
            seed=self.seed,
            allow_pickle=self.allow_pickle,
            family=self.family,
            progress=self.progress if trainer.is_global_zero else no_progress,
        )
        for model, home in zip(models, homes, strict=True):
            model.to(home)
        return result
