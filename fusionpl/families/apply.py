"""Moves the parameters of a model along transport maps: the same lines for every tensor of every architecture."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fusionpl.families.binding import Binding, Slot
from fusionpl.transport import TransportMap

State = dict[str, Tensor]

Pair = tuple[str, str]


def move(tensor: Tensor, slot: Slot, maps: Mapping[str, TransportMap], skip: frozenset[str] = frozenset()) -> Tensor:
    """Moves one slot's tensor (float64) from the parent's units to the anchor's, dimension by dimension.

    Axes without a map, and those in `skip`, stay as they are.
    """
    for dim, (axis, reads) in enumerate(zip(slot.axes, slot.reads, strict=True)):
        if axis is not None and axis in maps and axis not in skip:
            view = maps[axis].to_input if reads else maps[axis].to_output
            tensor = torch.tensordot(tensor, view.to(tensor), dims=([dim], [0])).movedim(-1, dim)
    return tensor


def aligned_state(
    model: nn.Module,
    binding: Binding,
    anchor: nn.Module,
    anchor_binding: Binding,
    maps: Mapping[str, TransportMap],
    joint: Mapping[Pair, TransportMap] | None = None,
) -> State:
    """The parameters of `model` in the units of `anchor`.

    Args:
        maps: axis -> map [n_parent, n_anchor]; axes without one stay.
        joint: (q, k) -> one map over the units of both, [2 n_parent, 2 n_anchor]; rows may move between the two.

    Returns:
        Parameter name -> tensor with the anchor's shape and type. Tied parameters appear once.
    """
    source, target = dict(model.named_parameters()), dict(anchor.named_parameters())
    state = {name: torch.empty_like(tensor, requires_grad=False) for name, tensor in target.items()}
    pairs = joint or {}
    paired = frozenset(axis for pair in pairs for axis in pair)
    for slot, goal in zip(binding.slots, anchor_binding.slots, strict=True):
        moved = move(slot.of(source[slot.parameter].detach()).double(), slot, maps, skip=paired)
        for first, second in pairs:
            if first in slot.axes:
                partner = _partner(binding, slot, first, second)
                other = move(partner.of(source[partner.parameter].detach()).double(), partner, maps, skip=paired)
                both = _mixed(torch.cat([moved, other]), pairs[first, second])
                moved, other = both.split([len(both) // 2] * 2)
                mate = _partner(anchor_binding, goal, first, second)
                mate.of(state[mate.parameter]).copy_(other)
        if not any(second in slot.axes for _, second in pairs):
            goal.of(state[goal.parameter]).copy_(moved)
    return state


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
