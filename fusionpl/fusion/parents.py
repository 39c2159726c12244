"""A parent with its alignment: its activations and its parameters in the anchor's units."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionpl.alignment.maps import Maps
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.errors import FusionError
from fusionpl.families.apply import State, aligned_state, copy_rows
from fusionpl.families.axes import Binding
from fusionpl.families.family import VOCABULARY


@dataclass(frozen=True)
class AlignedParent:
    """A parent with what brings it into the anchor's units.

    Attributes:
        network: the parent.
        maps: its own; None for the anchor.
        weight: its share.
        missing_blocks: of the fused network, for which it has none: there it has the anchor's parameters, and writes
            nothing.
    """

    network: SectionedModel
    maps: Maps | None
    weight: float
    missing_blocks: frozenset[str] = frozenset()

    @property
    def binding(self) -> Binding:
        """The parent's."""
        return self.network.binding

    def moved(self, seen: Mapping[str, Tensor], axis: str) -> Tensor:
        """The activations of `axis` in the anchor's units, [..., n_anchor], or anything else that is linear in them.

        Args:
            seen: axis -> activations; with `align.qk joint` those of the whole circuit.
            axis: which of them.
        """
        if self.maps is None or axis not in self.maps:
            return seen[axis]
        for circuit, plan in self.maps.joint.items():
            if axis in circuit:
                both = torch.cat([seen[member] for member in circuit], dim=-1)
                return (both @ plan.to_output.to(both)).chunk(2, dim=-1)[circuit.index(axis)]
        return seen[axis] @ self.maps[axis].to_output.to(seen[axis])

    def aligned(self, state: State, target: State, anchor: Binding) -> State:
        """Parameters in the anchor's units; tokens that the parent has not have the anchor's rows.

        Args:
            state: the parameters of whole sections.
            target: the anchor's of the same names.
            anchor: the anchor's binding.
        """
        if self.maps is None:
            return state
        # A post-LN norm is part of the stream, which is the parent's own.
        away = {
            slot.parameter
            for slot in anchor.slots
            if slot.section in self.missing_blocks
            and not (anchor.family.norm == "post" and set(slot.axes) <= set(anchor.joins))
        }
        state = {name: tensor for name, tensor in state.items() if name not in away}
        self._check_maps(state)
        moved = aligned_state(state, self.binding, target, anchor, self.maps, self.maps.joint)
        if self.network.missing_tokens is not None:
            copy_rows(moved, target, anchor, VOCABULARY, self.network.missing_tokens)
        branches = {join.branch for join in anchor.joins.values()}
        for slot in anchor.slots:
            if slot.parameter in away and slot.parameter in target:
                silent = not slot.gain and any(axis in branches and slot.writes(axis) for axis in slot.axes if axis)
                own = target[slot.parameter]
                moved[slot.parameter] = torch.zeros_like(own) if silent else own
        return moved

    def _check_maps(self, state: State) -> None:
        """Raises FusionError where a parameter would stay as it is because an axis of it has no map."""
        assert self.maps is not None
        for slot in self.binding.slots:
            for axis in slot.axes if slot.parameter in state else ():
                if axis and not self.binding.axes[axis].fixed and axis not in self.maps:
                    raise FusionError(
                        f"{self.network.name}: no map was found for axis '{axis}' of '{slot.parameter}', which would "
                        "not move with the rest; this is a mistake of fusionpl or of the family file"
                    )
