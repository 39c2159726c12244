"""Axes that linear modules write, described by what the modules read: fewer products where that is narrower."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionpl.calibration.moments import Key, Moments
from fusionpl.calibration.taps import Place
from fusionpl.families import Binding, State
from fusionpl.transport.products import cross_product, self_product

# Products of the outputs' weights are added to those of the inputs: from this ratio of widths on there is a gain.
_WIDER = 2


@dataclass(frozen=True)
class Source:
    """What linear modules of a block read, and the keys whose units they write.

    Attributes:
        place: where it is seen.
        keys: each of axes that these modules write.
    """

    place: Place
    keys: tuple[Key, ...]


def sources(binding: Binding, section: str, keys: Iterable[Key]) -> list[Source]:
    """The sources of a section that are narrower than what their keys show."""
    if section not in binding.blocks:
        return []
    keys = list(keys)
    found = []
    for modules in binding.readers(section):
        shown = [key for key in keys if all(_written_by(binding, axis, modules) for axis in key)]
        wide = sum(binding.axes[axis].size for key in shown for axis in key)
        if shown and wide >= _WIDER * sum(binding.axes[axis].size for axis in binding.reads(modules[0])):
            found.append(Source(Place(modules[0], "input"), tuple(shown)))
    return found


def _written_by(binding: Binding, axis: str, modules: Sequence[str]) -> bool:
    tap = binding.taps.get(axis)
    return tap is not None and tap.kind == "output" and tap.target in modules


def _affine(binding: Binding, state: State, key: Key) -> tuple[Tensor, Tensor]:
    """Weights [n, inputs] and biases [n] that make the units of a key, float64."""
    weights, biases = [], []
    for tap in (binding.taps[axis] for axis in key):
        slot = next(slot for slot in binding.slots if slot.parameter == f"{tap.target}.weight")
        weight, bias = state[slot.parameter].double(), state.get(f"{tap.target}.bias")
        rows = (weight.T if slot.reads[0] else weight)[tap.units]
        weights.append(rows)
        biases.append(rows.new_zeros(len(rows)) if bias is None else bias.double()[tap.units])
    return torch.cat(weights), torch.cat(biases)


class _Inputs:
    """Sums over rows of what one network puts into a source, about the first batch's mean."""

    def __init__(self, rows: Tensor) -> None:
        self.shift = rows.mean(0)
        self.count = torch.zeros((), dtype=torch.float64, device=rows.device)
        self.sum = torch.zeros_like(self.shift, dtype=torch.float64)
        self.own = torch.zeros(len(self.sum), len(self.sum), dtype=torch.float64, device=rows.device)

    def update(self, rows: Tensor) -> Tensor:
        """Adds rows; returns them about the mean."""
        rows = rows - self.shift
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.own += self_product(rows)
        return rows


class InputMoments:
    """Moments of keys from streamed moments of their source.

    Args:
        source: the source.
        bindings: of the networks.
        anchor: index of the anchor.
    """

    def __init__(self, source: Source, bindings: Sequence[Binding], anchor: int) -> None:
        self.source, self.bindings, self.anchor = source, bindings, anchor
        self._inputs: dict[int, _Inputs] = {}
        self._cross: dict[int, Tensor] = {}

    def update(self, rows: Mapping[int, Tensor]) -> None:
        """Adds rows [rows, inputs] of each network, of the same samples and tokens."""
        kinds = {index: one.to(torch.promote_types(one.dtype, torch.float32)) for index, one in rows.items()}
        about = {}
        for index, one in kinds.items():
            if index not in self._inputs:
                self._inputs[index] = _Inputs(one)
            about[index] = self._inputs[index].update(one)
        for index, one in about.items():
            if index != self.anchor:
                self._cross[index] = self._cross.get(index, 0) + cross_product(one, about[self.anchor]).double()

    def moments(self, index: int, states: Sequence[State]) -> dict[Key, Moments]:
        """The moments of a network's units with the anchor's.

        Args:
            index: the network.
            states: the parameters of the section, of every network.
        """
        if not self._inputs:
            return {}
        a, b = self._inputs[index], self._inputs[self.anchor]
        found = {}
        for key in self.source.keys:
            (v, p), (w, q) = (_affine(self.bindings[one], states[one], key) for one in (index, self.anchor))
            found[key] = Moments(
                count=a.count,
                shift_a=v @ a.shift.double() + p,
                shift_b=w @ b.shift.double() + q,
                sum_a=v @ a.sum,
                square_a=((v @ a.own) * v).sum(1),
                sum_b=w @ b.sum,
                square_b=((w @ b.own) * w).sum(1),
                cross=v @ self._cross[index] @ w.T,
                started=True,
            )
        return found
