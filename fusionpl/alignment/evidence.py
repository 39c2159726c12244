"""What describes the units of an axis: their activations, or their incoming weights."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fusionpl.calibration import Key, Moments, Scale
from fusionpl.families import Binding, Slot, move
from fusionpl.transport import Gram, TransportMap, gram


class Evidence(Protocol):
    """Inner products between the units of a parent and of the anchor."""

    def alike(self, axes: Sequence[str], maps: Mapping[str, TransportMap]) -> Gram:
        """One set of units described by all `axes` of one size together."""

    def beside(self, axes: Sequence[str], maps: Mapping[str, TransportMap]) -> Gram:
        """The units of all `axes`, one after the other, as one set."""

    def magnitude(self, axis: str) -> Tensor:
        """[n_anchor], the mean absolute activation of the anchor's units."""


class ActivationEvidence:
    """Activations over the calibration set, each axis scaled by itself. Parameters tapped as such stay raw."""

    def __init__(self, moments: Mapping[Key, Moments], anchor: Binding, scale: Scale, *, centred: bool) -> None:
        self.moments, self.anchor = moments, anchor
        self.scale: Scale = "center" if centred and scale in ("none", "normalize") else scale
        self.raw: Scale = "center" if centred else "none"

    def alike(self, axes: Sequence[str], maps: Mapping[str, TransportMap]) -> Gram:
        """Activations of all `axes`, each scaled by itself, stacked along the samples."""
        first, *rest = (self.beside((axis,), maps) for axis in axes)
        return sum(rest, start=first)

    def beside(self, axes: Sequence[str], maps: Mapping[str, TransportMap]) -> Gram:
        """Activations of the units of all `axes` over the same samples."""
        raw = self.anchor.taps[axes[0]].kind == "parameter"
        return self.moments[tuple(axes)].gram(self.raw if raw else self.scale)

    def unscaled(self, axes: Sequence[str]) -> Gram:
        """Activations of all `axes` as they are, stacked along the samples, those of each axis with unit total norm."""
        grams = (self.moments[axis,].gram("none") for axis in axes)
        first, *rest = (one.normalized() for one in grams)
        return sum(rest, start=first)

    def magnitude(self, axis: str) -> Tensor:
        """[n_anchor], the mean absolute activation of the anchor's units."""
        return self.moments[axis,].magnitude()


class WeightEvidence:
    """Rows of the weights that write an axis, after aligning what they read; without biases and norms."""

    def __init__(
        self,
        parent: nn.Module,
        binding: Binding,
        anchor: nn.Module,
        anchor_binding: Binding,
        scale: Scale,
        *,
        centred: bool,
        magnitudes: Mapping[Key, Moments],
    ) -> None:
        self.source, self.target = dict(parent.named_parameters()), dict(anchor.named_parameters())
        self.binding, self.anchor_binding = binding, anchor_binding
        self.scale, self.centred, self.magnitudes = scale, centred, magnitudes

    def needs(self, axis: str) -> tuple[str, ...]:
        """The free axes whose maps must be known first: those that the rows of `axis` read."""
        read = {
            name
            for slot in self.binding.writers(axis)
            for name, reads in zip(slot.axes, slot.reads, strict=True)
            if reads and name and not self.binding.axes[name].fixed
        }
        return tuple(sorted(read))

    def alike(self, axes: Sequence[str], maps: Mapping[str, TransportMap]) -> Gram:
        """Each unit's rows of all `axes` side by side, then scaled as one vector."""
        rows = [self._rows(axis, maps) for axis in axes]
        return self._gram(*(torch.cat(side, dim=1) for side in zip(*rows, strict=True)))

    def beside(self, axes: Sequence[str], maps: Mapping[str, TransportMap]) -> Gram:
        """The rows of all `axes`, one unit a row."""
        rows = [self._rows(axis, maps) for axis in axes]
        return self._gram(*(torch.cat(side, dim=0) for side in zip(*rows, strict=True)))

    def magnitude(self, axis: str) -> Tensor:
        """[n_anchor], the mean absolute activation of the anchor's units."""
        return self.magnitudes[axis,].magnitude()

    def _gram(self, a: Tensor, b: Tensor) -> Gram:
        if self.centred and a.shape[1] > 1:
            a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        inner = gram(a, b)
        return inner if self.scale == "none" or inner.scalar else inner.unit()

    def _rows(self, axis: str, maps: Mapping[str, TransportMap]) -> tuple[Tensor, Tensor]:
        inputs = {name: maps[name] for name in self.needs(axis)}
        ours = [
            _as_rows(move(slot.of(self.source[slot.parameter].detach()).double(), slot, inputs), slot, axis)
            for slot in self.binding.writers(axis)
        ]
        theirs = [
            _as_rows(slot.of(self.target[slot.parameter].detach()).double(), slot, axis)
            for slot in self.anchor_binding.writers(axis)
        ]
        return torch.cat(ours, dim=1), torch.cat(theirs, dim=1)


def _as_rows(tensor: Tensor, slot: Slot, axis: str) -> Tensor:
    return tensor.movedim(slot.axes.index(axis), 0).flatten(1)
