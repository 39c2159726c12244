"""Runs networks through one section of the calibration set and collects what is asked for."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fusionpl.calibration.cursor import CalibrationSet, Cursor, Passage, places_of, sum_over_ranks
from fusionpl.calibration.moments import Key, Moments
from fusionpl.calibration.taps import Place, parameter_units
from fusionpl.calibration.tokens import select
from fusionpl.families.apply import State
from fusionpl.families.axes import Binding
from fusionpl.families.family import TAIL
from fusionpl.transport.products import self_product


class Target(NamedTuple):
    """What passes at a place, with the stream that it is added to, if it is: what a refit fits to.

    Attributes:
        place: where it passes.
        skip: axis of the stream that it is added to.
        total: axis of the stream that it makes.
    """

    place: Place
    skip: str | None = None
    total: str | None = None

    def key(self, section: str, index: int, batch: int) -> Hashable:
        """The key under which it is kept for a network and a batch; the next section writes over it."""
        return index, self.place.module.removeprefix(section), batch


@dataclass(frozen=True)
class Wanted:
    """What to collect in a section.

    Attributes:
        section: its name.
        keys: axes whose joint moments with the anchor's are needed.
        magnitudes: axes of the anchor whose mean absolute activation is needed.
        targets: what is kept, of all networks.
        together: axes whose units are multiplied with those of all networks, side by side.
        tokens: which tokens count as evidence.
    """

    section: str
    keys: Sequence[Key] = ()
    magnitudes: Sequence[str] = ()
    targets: Sequence[Target] = ()
    together: Sequence[str] = ()
    tokens: str = "all"


@dataclass
class Statistics:
    """What a section showed.

    Attributes:
        moments: for each network, key -> its moments with the anchor; none for the anchor itself.
        magnitudes: axis of the anchor -> mean absolute activation, [n].
        together: axis -> the products of the units of all networks, side by side, [sum of n, sum of n].
    """

    moments: list[dict[Key, Moments]]
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    together: dict[str, Tensor] = field(default_factory=dict)


def observe(
    cursors: Sequence[Cursor], anchor: int, states: Sequence[State], data: CalibrationSet, wanted: Wanted
) -> Statistics:
    """Takes all batches through a section; behind it all networks stand at its end.

    Args:
        cursors: of the networks, which stand before the section.
        anchor: index of the anchor.
        states: the networks' parameters of the section; what else it takes to run it is read.
        data: the calibration set; targets are kept with it.
        wanted: what to collect. Moments and magnitudes are those of all ranks.
    """
    bindings = [cursor.network.binding for cursor in cursors]
    device = cursors[anchor].network.device
    seen, values = _parted(wanted.keys, bindings[anchor])
    moments: list[dict[Key, Moments]] = [
        {} if index == anchor else {key: _empty(binding, bindings[anchor], key, device) for key in wanted.keys}
        for index, binding in enumerate(bindings)
    ]
    statistics = Statistics(moments)
    shown, raw = _parted([(axis,) for axis in wanted.magnitudes], bindings[anchor])
    sums = {axis: torch.zeros(bindings[anchor].axes[axis].size + 1, dtype=torch.float64, device=device)
            for (axis,) in shown}  # fmt: skip
    axes = list(dict.fromkeys(axis for key in seen for axis in key))
    for axis in wanted.together:
        width = sum(binding.axes[axis].size for binding in bindings)
        statistics.together[axis] = torch.zeros(width, width, dtype=torch.float64, device=device)
    order = [anchor, *(index for index in range(len(cursors)) if index != anchor)]
    tokens = data.meant(wanted.tokens)
    running = [cursor.states(wanted.section, state) for cursor, state in zip(cursors, states, strict=True)]
    for batch in data:
        weight = data.weight(batch)
        mask_of = partial(data.mask, batch, bindings[anchor])
        theirs: dict[str, Tensor] = {}
        joined: dict[int, dict[str, Tensor]] = {}
        for index in order:
            looked_at = list(dict.fromkeys([*axes, *wanted.together, *(sums if index == anchor else ())]))
            passage = _pass(cursors[index], running[index], batch, looked_at, wanted)
            for target in wanted.targets:
                data.targets[target.key(wanted.section, index, batch)] = data.as_kept(_target(passage, target))
            rows = {axis: select(passage.units(axis), tokens, mask_of(axis)) for axis in looked_at}
            joined[index] = {axis: rows[axis] for axis in wanted.together}
            if index == anchor:
                theirs = rows
                for axis, total in sums.items():
                    total[:-1] += weight * rows[axis].abs().sum(0)
                    total[-1] += weight * len(rows[axis])
            else:
                for key in seen:
                    moments[index][key].update(_beside(rows, key), _beside(theirs, key), weight)
        for axis, total in statistics.together.items():
            beside = torch.cat([joined[index][axis] for index in range(len(cursors))], dim=-1)
            total.add_(self_product(beside), alpha=weight)
    _sum(statistics, seen, sums)
    for (axis,) in values:
        tap = bindings[anchor].taps[axis]
        for ours, state in zip(moments, states, strict=True):
            if (axis,) in ours:
                ours[axis,].update(parameter_units(state[tap.target], tap),
                                   parameter_units(states[anchor][tap.target], tap))  # fmt: skip
    for (axis,) in raw:
        tap = bindings[anchor].taps[axis]
        statistics.magnitudes[axis] = parameter_units(states[anchor][tap.target], tap).double().abs().mean(0)
    return statistics


def _parted(keys: Iterable[Key], binding: Binding) -> tuple[list[Key], list[Key]]:
    """The keys that are seen on the way, and those that are values of a parameter."""
    seen: list[Key] = []
    values: list[Key] = []
    for key in keys:
        tap = binding.taps.get(key[0])
        is_value = tap is not None and tap.kind == "parameter" and not binding.on_boundary(key[0])
        (values if is_value else seen).append(key)
    return seen, values


def _empty(binding: Binding, anchor: Binding, key: Key, device: torch.device) -> Moments:
    n, m = (sum(bound.axes[axis].size for axis in key) for bound in (binding, anchor))
    return Moments.zeros(n, m, device=device)


def _pass(cursor: Cursor, state: State, batch: int, axes: Sequence[str], wanted: Wanted) -> Passage:
    binding = cursor.network.binding
    skips = [target.skip for target in wanted.targets if target.skip is not None]
    places = places_of(binding, (*axes, *skips)) | {target.place for target in wanted.targets}
    return cursor.step(wanted.section, state, batch, places, stop=wanted.section == TAIL)


def _target(passage: Passage, target: Target) -> Tensor:
    seen = passage.seen[target.place]
    summed = target.skip is None or passage.binding.family.norm != "post"
    if target.total is not None and summed and passage.binding.on_boundary(target.total):
        return passage.units(target.total).to(seen)  # behind the last of several blocks that are one
    return seen if target.skip is None else seen + passage.units(target.skip).to(seen)


def _beside(rows: Mapping[str, Tensor], key: Key) -> Tensor:
    return rows[key[0]] if len(key) == 1 else torch.cat([rows[axis] for axis in key], dim=-1)


def _sum(statistics: Statistics, keys: Sequence[Key], sums: Mapping[str, Tensor]) -> None:
    """Adds up what all ranks saw, in one all-reduce, and turns sums of magnitudes into means."""
    if dist.is_initialized():
        for ours in statistics.moments:
            ours.update({key: ours[key].unshifted() for key in keys if key in ours})
        tensors = [
            tensor for ours in statistics.moments for key in keys if key in ours for tensor in ours[key].tensors()
        ]
        sum_over_ranks([*tensors, *sums.values(), *statistics.together.values()])
    statistics.magnitudes |= {axis: total[:-1] / total[-1] for axis, total in sums.items()}
