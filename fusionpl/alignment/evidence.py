"""What describes the units of an axis: their activations, or their incoming weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from fusionpl.calibration.config import Scale
from fusionpl.calibration.moments import Key, Moments
from fusionpl.families.apply import State, move
from fusionpl.families.axes import Binding, Slot, section_of
from fusionpl.transport.costs import Gram, gram
from fusionpl.transport.maps import TransportMap


class Evidence(Protocol):
    """Inner products between the units of a parent and of the anchor."""

    def needs(self, axis: str) -> tuple[str, ...]:
        """The axes whose maps must be known before the units of `axis` are compared."""

    def stacked(self, axes: Sequence[str], maps: Mapping[str, TransportMap]) -> Gram:
        """One set of units described by all `axes` of one size together."""

    def concatenated(self, axes: Sequence[str], maps: Mapping[str, TransportMap]) -> Gram:
        """The units of all `axes`, one after the other, as one set."""

    def raw(self, axis: str, maps: Mapping[str, TransportMap]) -> Gram:
        """The units of an axis without any scaling, about zero: what rotations of units keep."""


class ActivationEvidence:
    """Activations over the calibration set, each axis scaled by itself. Parameters tapped as such stay raw.

    Args:
        moments: of the parent with the anchor.
        anchor: the anchor's binding.
        scale: what is done to each unit's activations.
        centred: whether their mean is taken away in any case.
    """

    def __init__(self, moments: Mapping[Key, Moments], anchor: Binding, scale: Scale, *, centred: bool) -> None:
        self.moments, self.anchor = moments, anchor
        self.scale: Scale = "center" if centred and scale in ("none", "normalize") else scale
        self._unscaled: Scale = "center" if centred else "none"

    def needs(self, axis: str) -> tuple[str, ...]:
        """No axes: activations are compared as they are."""
        return ()

    def stacked(self, axes: Sequence[str], maps: Mapping[str, TransportMap]) -> Gram:
        """Activations of all `axes`, each scaled by itself, stacked along the samples."""
        return reduce(Gram.__add__, (self.concatenated((axis,), maps) for axis in axes))

    def concatenated(self, axes: Sequence[str], maps: Mapping[str, TransportMap]) -> Gram:
        """Activations of the units of all `axes` over the same samples."""
        tap = self.anchor.taps.get(axes[0])
        raw = tap is not None and tap.kind == "parameter"
        return self.moments[tuple(axes)].gram(self._unscaled if raw else self.scale)

    def raw(self, axis: str, maps: Mapping[str, TransportMap]) -> Gram:
        """Activations as they are."""
        return self.moments[axis,].gram("none")

    def unscaled(self, axes: Sequence[str]) -> Gram:
        """Activations of all `axes` as they are, stacked along the samples, those of each axis with unit total norm."""
        return reduce(Gram.__add__, (self.moments[axis,].gram("none").normalized() for axis in axes))


class WeightEvidence:
    """Rows of the weights that write an axis, after aligning what they read; without biases and norms.

    Args:
        parent, anchor: give the parameters of a section.
        binding, anchor_binding: theirs.
        scale: `none` leaves the rows as they are, anything else scales them to unit length.
        centred: whether the mean of each row is taken away.
    """

    def __init__(
        self,
        parent: Callable[[str], State],
        binding: Binding,
        anchor: Callable[[str], State],
        anchor_binding: Binding,
        scale: Scale,
        *,
        centred: bool,
    ) -> None:
        self.parent, self.binding, self.anchor, self.anchor_binding = parent, binding, anchor, anchor_binding
        self.scale, self.centred = scale, centred

    def needs(self, axis: str) -> tuple[str, ...]:
        """The free axes that the rows of `axis` read."""
        read = {
            name
            for slot in self.binding.writers(axis)
            for name, reads in zip(slot.axes, slot.reads, strict=True)
            if reads and name and not self.binding.axes[name].fixed
        }
        return tuple(sorted(read))

    def stacked(self, axes: Sequence[str], maps: Mapping[str, TransportMap]) -> Gram:
        """Each unit's rows of all `axes` side by side, then scaled as one vector."""
        return self._gram(self._rows((axis,), maps) for axis in axes)

    def concatenated(self, axes: Sequence[str], maps: Mapping[str, TransportMap]) -> Gram:
        """The rows of all `axes`, one unit a row."""
        return self._gram([self._rows(axes, maps)])

    def raw(self, axis: str, maps: Mapping[str, TransportMap]) -> Gram:
        """The rows as they are."""
        return gram(*self._rows((axis,), maps))

    def _gram(self, rows: Iterable[tuple[Tensor, Tensor]]) -> Gram:
        """The Gram of features that come in parts: [n_parent, features] and [n_anchor, features] each."""
        moments: Moments | None = None
        for ours, theirs in rows:
            moments = moments or Moments.zeros(len(ours), len(theirs), device=ours.device)
            moments.update(ours.T, theirs.T)
        assert moments is not None
        inner = moments.gram("center" if self.centred and float(moments.count) > 1 else "none")
        return inner if self.scale == "none" or inner.scalar else inner.unit()

    def _rows(self, axes: Sequence[str], maps: Mapping[str, TransportMap]) -> tuple[Tensor, Tensor]:
        ours = [self._described(axis, self.binding, self.parent, maps) for axis in axes]
        theirs = [self._described(axis, self.anchor_binding, self.anchor, None) for axis in axes]
        return torch.cat(ours), torch.cat(theirs)

    def _described(
        self, axis: str, binding: Binding, read: Callable[[str], State], maps: Mapping[str, TransportMap] | None
    ) -> Tensor:
        inputs = {} if maps is None else {name: maps[name] for name in self.needs(axis)}
        state = read(section_of(axis))
        return torch.cat([
            _as_rows(move(slot.of(state[slot.parameter]).double(), slot, inputs), slot, axis)
            for slot in binding.writers(axis)
        ], dim=1)  # fmt: skip


def _as_rows(tensor: Tensor, slot: Slot, axis: str) -> Tensor:
    units = tensor.movedim(slot.axes.index(axis), 0)
    return units.reshape(len(units), -1)
