"""Data of several parents whose heads are kept apart: the labels of each are numbered as its own head does."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from fusionpl.calibration.forward import logits
from fusionpl.datamodules.base import FixedSplits, Run
from fusionpl.datamodules.joint import OwnSplits
from fusionpl.errors import FusionError
from fusionpl.families.binding import bind
from fusionpl.families.family import Family
from fusionpl.models.preprocessing import ImageProcessing
from fusionpl.models.save import class_names
from fusionpl.models.separate import Head, model_of


class SeparateSplits(OwnSplits):
    """The data of each parent, whose labels may be of any kind.

    Args:
        own: name of a parent -> its data.
        heads: theirs, in their order.
        leading: of whose data the options of preparation count.
        family: of the models, where the library does not say.

    Raises:
        FusionError: data of classes that their parent does not know.
    """

    def __init__(
        self, own: Mapping[str, FixedSplits], heads: Sequence[Head], leading: str, family: Family | None = None
    ) -> None:
        self.heads = dict(zip(own, heads, strict=True))
        super().__init__(own, {name: class_names(head.of) for name, head in self.heads.items()}, leading)
        self.family = family

    @property
    def num_classes(self) -> int:
        """Number of outputs of all heads."""
        return sum(head.columns.stop - head.columns.start for head in self.heads.values())

    def follow(self, model: nn.Module, processing: ImageProcessing | None = None) -> None:
        """Takes what the options leave open from a model that has all heads, and of each its numbers of classes."""
        for name, alone in self._apart(model).items():
            self.own[name].follow(alone, processing)

    def check_model(self, model: nn.Module, run: Run | None = None) -> None:
        """Raises FusionError unless `model`, which has all heads, reads the data of all and its heads fit these.

        Args:
            model: of either library.
            run: gives the outputs of all heads for a batch; by default it is run.
        """
        for name, alone in self._apart(model).items():
            try:
                self.own[name].check_model(alone, partial(_of_head, run or partial(logits, model), self.heads[name]))
            except FusionError as error:
                raise FusionError(f"{name}: {error}") from error

    def _apart(self, model: nn.Module) -> dict[str, nn.Module]:
        """Name of a parent -> the model with its head alone."""
        binding = bind(model, self.family)
        return {name: model_of(model, head, binding) for name, head in self.heads.items()}


def _of_head(run: Run, head: Head, batch: dict[str, Any]) -> Tensor:
    return run(batch)[..., head.columns]
