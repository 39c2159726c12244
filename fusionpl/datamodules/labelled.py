"""Samples with labels: of all classes or of some, numbered as the model does that reads them."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from fusionpl.datamodules.base import FixedSplits, Run
from fusionpl.datamodules.labels import Labels
from fusionpl.datamodules.splits import Indices, labelled_parts
from fusionpl.errors import FusionError
from fusionpl.models.labels import Kind
from fusionpl.models.save import class_names


class LabelledSplits(FixedSplits):
    """Fixed splits of samples with labels: neither seed, nor classes, nor a model change what is in which split."""

    _sets: dict[str, Any]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, in the order of the labels; None for a regression."""
        return self._labels.names

    @property
    def kind(self) -> Kind:
        """What the labels are."""
        return self._labels.kind

    @property
    def num_classes(self) -> int:
        """Number of classes; 1 for a regression."""
        return len(self._labels.names) if self._labels.names else 1

    def check_model(self, model: Any, run: Run | None = None) -> None:
        """Raises FusionError where `model` knows other classes of these data by name, of which there may be as many;
        else see `FixedSplits`."""
        known, served, every = (set(names or ()) for names in (class_names(model), self.class_names, self._every.names))
        if known and known < every and not served <= known:
            own = ", ".join(class_names(model) or ())
            raise FusionError(
                f"the {type(model).__name__} knows the classes {own} of '{self.config.path}' and not "
                f"{', '.join(name for name in self.class_names or () if name not in known)}; its own are "
                f"--data.classes '[{own}]'"
            )
        super().check_model(model, run)

    def calibration_sizes(self) -> list[int]:
        """How many calibration samples there are; none is read."""
        return [len(self._parts["calibration"][1])]

    def called(self, names: Sequence[str]) -> None:
        """Gives classes that have numbers for names those of a model's outputs, where its own are words.

        Args:
            names: the model's, in its order.
        """
        own = self._labels.names or ()
        if all(map(str.isdigit, own)) and not set(own) <= set(names) and all(int(name) < len(names) for name in own):
            self._labels = replace(self._labels, names=tuple(names[int(name)] for name in own))

    @property
    @abstractmethod
    def _every(self) -> Labels:
        """The labels of the whole data set, by its own numbers."""

    @cached_property
    def _labels(self) -> Labels:
        """The labels that are served, by the numbers that models give them."""
        asked = self.config.classes
        return self._every if asked is None else self._every.of_classes(asked, self.config.path)

    @cached_property
    def _parts(self) -> dict[str, tuple[str, Indices]]:
        """For every part, the split it is from and its indices there."""
        kept = None if self.config.classes is None else self._labels.values
        return labelled_parts({split: self._usable(split) for split in self._every.values}, self.config, kept)

    def _usable(self, split: str) -> NDArray[Any]:
        """Labels of a split, by the data set's own numbers: others would cut it into other parts."""
        return self._every.values[split]

    def _number_like(self, model: Any) -> None:
        """Numbers classes and tags as `model` does, where it knows the names of all of them."""
        outputs = getattr(getattr(model, "config", None), "num_labels", 0)
        if (names := self._labels.like(class_names(model), outputs)) is not None:
            self._labels = self._labels.named(names)
            self._sets.clear()
