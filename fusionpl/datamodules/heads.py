"""Data of models that share a trunk: each head has its own."""

from typing import Any

from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn

from fusionpl.datamodules.base import FixedSplits, Run
from fusionpl.datamodules.joint import SeveralSplits
from fusionpl.errors import FusionError
from fusionpl.models.labels import NUMBERS


class HeadSplits(SeveralSplits):
    """The data of each head; a training batch is one of each, so that every step is of all heads.

    Args:
        own: name of a head -> its data, numbered as its model does.
    """

    metrics = ()

    @property
    def num_classes(self) -> int:
        """Number of outputs of all heads."""
        return sum(data.num_classes for data in self.own.values())

    def units(self) -> dict[str, float]:
        """What the loss of each head is measured in: of numbers their variance, else 1.

        Raises:
            FusionError: all numbers are the same.
        """
        return {name: _variance(name, data) if data.kind == NUMBERS else 1.0 for name, data in self.own.items()}

    def check_model(self, model: nn.Module, run: Run | None = None) -> None:
        """Raises FusionError unless each of a list of models reads the data of its head.

        Args:
            model: a ModuleList, in the order of the heads.
            run: see `FixedSplits`.
        """
        for one, data in zip(model.children(), self.own.values(), strict=True):
            data.check_model(one, run)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augments training batches, those of each head as its data say."""
        if self.trainer is None or not self.trainer.training:
            return batch
        return {name: self.own[name].augmented(one) for name, one in batch.items()}

    def train_dataloader(self) -> CombinedLoader:  # type: ignore[override]
        """A batch of each head a step; shorter data start again until the longest are through."""
        return CombinedLoader(self.loaders("train_dataloader"), "max_size_cycle")

    def val_dataloader(self) -> CombinedLoader:  # type: ignore[override]
        """The validation data of one head after the other."""
        return CombinedLoader(self.loaders("val_dataloader"), "sequential")

    def test_dataloader(self) -> CombinedLoader:  # type: ignore[override]
        """The test data of one head after the other."""
        return CombinedLoader(self.loaders("test_dataloader"), "sequential")


def _variance(name: str, data: FixedSplits) -> float:
    labels: Tensor = data.dataset("train").labels  # type: ignore[attr-defined]  # of sentences, which alone have numbers
    variance = float(labels.double().var(correction=0))
    if not variance > 0:
        raise FusionError(
            f"the training data of {name} ('{data.config.path}') hold one number alone, from which nothing is learned; "
            "leave its head out, or give other data"
        )
    return variance
