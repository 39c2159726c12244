"""What parents must share to be fused."""

import math
from collections.abc import Mapping, Set

from torch import Tensor

from fusionpl.errors import FusionError
from fusionpl.families.axes import Binding, boundary, section_of


def check_compatible(bindings: Mapping[str, Binding]) -> None:
    """Checks that parents (name -> binding) can be fused: one family, equal fixed axes, blocks that are alike.

    Raises:
        FusionError: naming both parents and what differs.
    """
    (first, reference), *others = bindings.items()
    for name, binding in others:
        if binding.family.name != reference.family.name:
            raise FusionError(
                f"parents of different families: {first} is {reference.family.name}, {name} is {binding.family.name}"
            )
        if binding.family.norm != reference.family.norm:
            kinds = {"pre": "LayerNorms", "rms": "RMSNorms"}
            ours, theirs = (kinds[parent.family.norm] for parent in (reference, binding))
            raise FusionError(f"parents of different norms: {first} has {ours}, {name} has {theirs}")
        if bool(binding.closed) != bool(reference.closed):
            tied, untied = (first, name) if reference.closed else (name, first)
            weight = next(iter(reference.closed | binding.closed))
            raise FusionError(
                f"parents tied and untied: '{weight}' is embedding and decoder in one in {tied}, and not in {untied}; "
                "take two that are alike"
            )
        shown = {block for parent in (reference, binding) for block in parent.blocks}
        shown -= set(reference.blocks) & set(binding.blocks)  # those that only the deeper one has
        parts, others_parts = (_parts(parent, shown) for parent in (reference, binding))
        for parameter in (*parts, *others_parts):
            if parts.get(parameter) != others_parts.get(parameter):
                if parameter in parts and parameter in others_parts:
                    ours, theirs = (", ".join(map(str, units[parameter])) for units in (parts, others_parts))
                    raise FusionError(
                        f"parents of different architecture: '{parameter}' has the units of {ours} in {first}, and of "
                        f"{theirs} in {name}"
                    )
                has, lacks = (first, name) if parameter in parts else (name, first)
                raise FusionError(f"parents of different architecture: {has} has '{parameter}', {lacks} has not")
        for axis in reference.axes.values():
            if axis.fixed and (size := binding.axes[axis.name].size) != axis.size:
                raise FusionError(
                    f"parents differ on the fixed axis '{axis.name}': {first} has {axis.size}, {name} has {size}"
                )


def check_tied(bindings: Mapping[str, Binding]) -> None:
    """Checks that no matrix is embedding and decoder where widths differ and the embedding is scaled by their root.

    Raises:
        FusionError: naming the parents, their widths and the parameter.
    """
    (first, reference), *others = bindings.items()
    for name, binding in others:
        for slot in reference.slots:
            if not slot.rooted or slot.parameter not in reference.closed | binding.closed:
                continue
            width, other = (parent.axes[str(slot.axes[-1])].size for parent in (reference, binding))
            if width != other:
                raise FusionError(
                    f"parents of different widths: {first} has {width}, {name} has {other}, and '{slot.parameter}' "
                    "is both the embedding, multiplied by the root of the width, and the decoder; take parents of one "
                    "width"
                )


def _parts(binding: Binding, without: Set[str]) -> dict[str, tuple[str | None, ...]]:
    """Parameter -> its axes, but for some blocks; what a stack leaves is called alike whatever its depth."""
    last = {boundary(blocks[-1]): f"stack {stack}" for stack, blocks in enumerate(binding.stacks)}

    def named(axis: str | None, section: str) -> str | None:
        inside = section in binding.stacks[binding.stack_of[section_of(axis or "")]] if axis in last else False
        return axis if inside else last.get(axis or "", axis)

    return {
        slot.parameter: tuple(named(axis, slot.section) for axis in slot.axes)
        for slot in binding.slots
        if slot.section not in without
    }


def check_finite(state: Mapping[str, Tensor], name: str) -> None:
    """Raises FusionError naming the first tensor of `state`, parameters of the model `name`, that holds a NaN or an
    infinity."""
    for key, tensor in state.items():
        if not all(math.isfinite(bound) for bound in tensor.aminmax()):
            raise FusionError(f"{name}: tensor '{key}' holds NaN or infinite values; train that parent again")
