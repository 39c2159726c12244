"""Data of models that share a trunk: each head has its own."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from fusionpl.datamodules.base import FixedSplits, Run
from fusionpl.datamodules.labelled import LabelledSplits
from fusionpl.errors import FusionError
from fusionpl.models.labels import NUMBERS


class HeadSplits(FixedSplits):
    """The data of each head; a training batch is one of each, so that every step is of all heads.

    Args:
        own: name of a head -> its data, numbered as its model does.
    """

    metrics = ()

    def __init__(self, own: Mapping[str, LabelledSplits]) -> None:
        super().__init__()
        self.own = own

    @property
    def num_classes(self) -> int:
        """Number of outputs of all heads."""
        return sum(data.num_classes for data in self.own.values())

    def describe(self) -> str:
        """How much there is for each head, in words."""
        return ", ".join(f"{name} {data.describe()}" for name, data in self.own.items())

    def dataset(self, part: str) -> ConcatDataset[Any]:
        """The data of `part` of all, one after the other: their number; what they are is in `own`."""
        return ConcatDataset([data.dataset(part) for data in self.own.values()])

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

    def alone(self) -> None:
        """Serves every sample again after a training whose processes shared them."""
        self.trainer = None
        for data in self.own.values():
            data.trainer = None

    def train_dataloader(self) -> CombinedLoader:  # type: ignore[override]
        """A batch of each head a step; shorter data start again until the longest are through."""
        return self._combined("train_dataloader", "max_size_cycle")

    def val_dataloader(self) -> CombinedLoader:  # type: ignore[override]
        """The validation data of one head after the other."""
        return self._combined("val_dataloader", "sequential")

    def test_dataloader(self) -> CombinedLoader:  # type: ignore[override]
        """The test data of one head after the other."""
        return self._combined("test_dataloader", "sequential")

    def _combined(self, loader: str, mode: Any) -> CombinedLoader:
        for data in self.own.values():
            data.trainer = self.trainer  # which says how many ranks share them
        return CombinedLoader({name: getattr(data, loader)() for name, data in self.own.items()}, mode)


def _variance(name: str, data: LabelledSplits) -> float:
    labels: Tensor = data.dataset("train").labels  # type: ignore[attr-defined]  # of sentences, which alone have numbers
    variance = float(labels.double().var(correction=0))
    if not variance > 0:
        raise FusionError(
            f"the training data of {name} ('{data.config.path}') hold one number alone, from which nothing is learned; "
            "leave its head out, or give other data"
        )
    return variance
