"""Moves the parameters of a model along transport maps: the same lines for every tensor of every architecture."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusionpl.families.axes import Binding, Slot
from fusionpl.transport.maps import TransportMap

State = dict[str, Tensor]

Pair = tuple[str, str]


def own_state(model: nn.Module) -> State:
    """The model's own parameters; tied ones once."""
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def in_float32(state: Mapping[str, Tensor]) -> State:
    """The same parameters in float32, or in float64 where they are that."""
    return {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in state.items()}


def move(tensor: Tensor, slot: Slot, maps: Mapping[str, TransportMap], skip: frozenset[str] = frozenset()) -> Tensor:
    """Moves one slot's tensor from the parent's units to the anchor's, dimension by dimension, in its own type.

    Axes without a map, and those in `skip`, stay as they are.
    """
    for dim, (axis, reads) in enumerate(zip(slot.axes, slot.reads, strict=True)):
        if axis is not None and axis in maps and axis not in skip:
            view = maps[axis].to_input if reads else maps[axis].to_output
            tensor = torch.tensordot(tensor, view.to(tensor), dims=([dim], [0])).movedim(-1, dim)
    return tensor


def aligned_state(
    source: Mapping[str, Tensor],
    binding: Binding,
    target: Mapping[str, Tensor],
    goal: Binding,
    maps: Mapping[str, TransportMap],
    joint: Mapping[Pair, TransportMap] | None = None,
) -> State:
    """Parameters in the units of the anchor.

    Args:
        source: the parameters to move, all of a model or those of whole sections; half precision is moved in float32.
        binding: that of the model that is moved.
        target: the anchor's parameters of the same names.
        goal: the anchor's binding.
        maps: axis -> map [n_parent, n_anchor]; axes without one stay.
        joint: (q, k) -> one map over the units of both, [2 n_parent, 2 n_anchor]; rows may move between the two.

    Returns:
        Parameter name -> tensor with the anchor's shape, in the type that it was moved in.
    """
    source = in_float32(source)
    state = {name: torch.empty_like(target[name], dtype=tensor.dtype) for name, tensor in source.items()}
    pairs = joint or {}
    paired = frozenset(axis for pair in pairs for axis in pair)

    def moved(slot: Slot) -> Tensor:
        values = move(slot.of(source[slot.parameter]), slot, maps, skip=paired)
        if slot.rooted:  # the anchor multiplies by the root of its own width
            ours, theirs = (side.axes[str(slot.axes[-1])].size for side in (binding, goal))
            values = values * float(ours / theirs) ** 0.5
        return values

    for slot, place in zip(binding.slots, goal.slots, strict=True):
        if slot.parameter not in source or any(second in slot.axes for _, second in pairs):
            continue
        turned = [maps[axis] for axis in slot.axes if axis and axis in maps and maps[axis].scaling == "orthogonal"]
        if slot.gain and turned:  # it is 1 in both, or will be fitted
            gain = turned[0].norm_gain if slot.gain == "norm" else 1.0
            offset = goal.family.offset if slot.gain == "norm" else 0
            place.put(state[place.parameter], torch.full_like(place.of(state[place.parameter]), gain - offset))
            continue
        values = moved(slot)
        for first, second in pairs:
            if first in slot.axes:
                both = _mixed(torch.cat([values, moved(_partner(binding, slot, first, second))]), pairs[first, second])
                values, other = both.split([len(both) // 2] * 2)
                mate = _partner(goal, place, first, second)
                mate.put(state[mate.parameter], other)
        place.put(state[place.parameter], values)
    return state


def copy_rows(state: State, source: Mapping[str, Tensor], binding: Binding, axis: str, rows: Tensor) -> None:
    """Gives the parameters in `state`, in place, some units of a fixed axis as they are in `source`."""
    for slot in binding.slots:
        if slot.parameter in state and axis in slot.axes:
            place = rows.to(state[slot.parameter].device)
            dim = slot.axes.index(axis)
            values = slot.of(source[slot.parameter]).index_select(dim, place)
            slot.of(state[slot.parameter]).index_copy_(dim, place, values.to(state[slot.parameter].dtype))


def _mixed(rows: Tensor, plan: TransportMap) -> Tensor:
    return torch.einsum("pa,p...->a...", plan.to_output.to(rows), rows)


def _partner(binding: Binding, slot: Slot, first: str, second: str) -> Slot:
    wanted = tuple(second if axis == first else axis for axis in slot.axes)
    return next(other for other in binding.slots if other.axes == wanted and other.reads == slot.reads)


def load_parameters(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Copies `state` into the parameters of `model`, in place (ties stay ties); returns the model."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in state.items():
            parameters[name].copy_(tensor)
    return model


def with_parameters(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` that holds `state` in the type of its own parameters, which are not copied (ties stay ties)."""
    held = {
        id(parameter): nn.Parameter(state[name].to(parameter.dtype), requires_grad=parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }
    return copy.deepcopy(model, dict[int, Any](held))
