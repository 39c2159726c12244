"""What parents must share to be fused."""

import math
from collections.abc import Mapping

from torch import Tensor

from fusionpl.errors import FusionError
from fusionpl.families.axes import Binding


def check_compatible(bindings: Mapping[str, Binding]) -> None:
    """Checks that parents (name -> binding) can be fused: one family, one depth, equal fixed axes.

    Raises:
        FusionError: naming both parents and what differs.
    """
    (first, reference), *others = bindings.items()
    for name, binding in others:
        if binding.family.name != reference.family.name:
            raise FusionError(
                f"parents of different families: {first} is {reference.family.name}, {name} is {binding.family.name}"
            )
        if binding.depths != reference.depths:
            ours, theirs = (" and ".join(map(str, one.depths)) for one in (reference, binding))
            raise FusionError(
                f"parents of different depth: {first} has {ours} blocks, {name} has {theirs}; "
                "train parents of one depth"
            )
        parts, others_parts = ({slot.parameter: slot.axes for slot in one.slots} for one in (reference, binding))
        for parameter in (*parts, *others_parts):
            if parts.get(parameter) != others_parts.get(parameter):
                has, lacks = (first, name) if parameter in parts else (name, first)
                raise FusionError(f"parents of different architecture: {has} has '{parameter}', {lacks} has not")
        for axis in reference.axes.values():
            other = binding.axes[axis.name]
            if axis.fixed and other.size != axis.size:
                raise FusionError(
                    f"parents differ on the fixed axis '{axis.name}': {first} has {axis.size}, {name} has {other.size}"
                )


def check_finite(state: Mapping[str, Tensor], name: str) -> None:
    """Raises FusionError naming the first tensor of `state`, parameters of the model `name`, that holds a NaN or an
    infinity."""
    for key, tensor in state.items():
        if not all(math.isfinite(bound) for bound in tensor.aminmax()):
            raise FusionError(f"{name}: tensor '{key}' holds NaN or infinite values; train that parent again")
