"""Parents of different width: a network widened by duplicating units computes what the narrow one computes, and
fusing one into the other, all weight on the other, gives the function back."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusionpl.alignment.config import AlignConfig
from fusionpl.families.apply import load_parameters
from fusionpl.families.binding import bind
from fusionpl.fusion.config import FuseConfig
from fusionpl.fusion.fuse import fuse
from tests.models_for_tests import FAMILIES, images, outputs

WIDTH, MLP, HEADS, HEAD_DIM = 16, 24, 4, 4

# factor of the residual stream, the MLP, the number of heads, the units of a head
WIDER: dict[str, dict[str, int]] = {
    "mlp": {"mlp": 2},
    "mlp by three": {"mlp": 3},
    "stream": {"width": 2},
    "stream by three and mlp": {"width": 3, "mlp": 2},
    "units of heads": {"head_dim": 2},
    "whole heads": {"heads": 2},
    "whole heads by three": {"heads": 3},
    "all but heads' units": {"width": 2, "mlp": 2, "heads": 2},
    "all": {"width": 2, "mlp": 2, "heads": 2, "head_dim": 2},
}


def widened(name: str, narrow: nn.Module, factors: Mapping[str, int], seed: int = 0) -> nn.Module:
    """A wider network of the same function: every unit appears `factor` times, in a random order.

    What is written is copied; what is read is divided by the number of copies, so that their sum is what it was.
    Attention divides by the root of the heads' width, so with `f` copies of a head's units the queries, whose
    products with the keys are summed `f` times, are divided by the root of `f`.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = {"width": WIDTH, "mlp": MLP, "heads": HEADS, "head_dim": HEAD_DIM}
    wide = FAMILIES[name](**{key: size * factors.get(key, 1) for key, size in sizes.items()})

    def copies(units: int, factor: int) -> Tensor:
        return torch.arange(units).repeat(factor)[torch.randperm(units * factor, generator=generator)]

    stream, heads = copies(WIDTH, factors.get("width", 1)), copies(HEADS, factors.get("heads", 1))
    binding, target = bind(narrow), bind(wide)
    tied = binding.tied()
    inside: dict[str, Tensor] = {}
    hidden: dict[str, Tensor] = {}

    def source(axis: str) -> Tensor:
        """The unit of the narrow network that each unit of the wide one is a copy of."""
        if binding.axes[axis].fixed:
            return torch.arange(binding.axes[axis].size)
        if binding.axes[axis].heads > 1:
            units = inside.setdefault(
                tied[axis], torch.stack([copies(HEAD_DIM, factors.get("head_dim", 1)) for _ in heads])
            )
            return (heads[:, None] * HEAD_DIM + units).flatten()
        if axis.endswith("ffn"):
            return hidden.setdefault(axis, copies(MLP, factors.get("mlp", 1)))
        return stream

    state = {key: torch.empty_like(tensor) for key, tensor in wide.named_parameters()}
    for slot, goal in zip(binding.slots, target.slots, strict=True):
        assert slot.parameter == goal.parameter
        tensor = slot.of(narrow.get_parameter(slot.parameter).detach())
        for dim, (axis, reads) in enumerate(zip(slot.axes, slot.reads, strict=True)):
            if axis is not None:
                units = source(axis)
                tensor = tensor.index_select(dim, units)
                tensor = tensor * (binding.axes[axis].size / len(units)) if reads else tensor
        if any(axis and axis.endswith(".q") for axis in slot.axes):
            tensor = tensor * factors.get("head_dim", 1) ** -0.5
        goal.of(state[goal.parameter]).copy_(tensor)
    return load_parameters(wide, state).eval()


def fused(parent: nn.Module, anchor: nn.Module, **options: Any) -> Tensor:
    """Outputs of the fusion of two parents, all weight on the one that is not the anchor."""
    config = FuseConfig(anchor=1, weights=[1.0, 0.0], align=AlignConfig(solver="emd", **options))
    return outputs(fuse([parent, anchor], [images()], config).model)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("wider", WIDER)
def test_widening_keeps_the_function(name: str, wider: str) -> None:
    narrow = FAMILIES[name](1)
    wide = widened(name, narrow, WIDER[wider])
    torch.testing.assert_close(outputs(wide), outputs(narrow), atol=1e-5, rtol=0)
    assert sum(map(torch.numel, wide.parameters())) > sum(map(torch.numel, narrow.parameters()))


# Flat alignment refuses different numbers of heads: that is tested elsewhere.
LAYOUTS = [
    (wider, heads)
    for wider in WIDER
    for heads in ("flat", "matched")
    if (heads, "heads" in WIDER[wider]) != ("flat", True)
]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("wider", "heads"), LAYOUTS)
@pytest.mark.parametrize("evidence", ["activations", "weights"])
@pytest.mark.parametrize("direction", ["wide into narrow", "narrow into wide"])
def test_fusing_into_the_other_width_gives_the_function_back(
    name: str, wider: str, heads: str, evidence: str, direction: str
) -> None:
    factors = WIDER[wider]
    narrow = FAMILIES[name](2)
    pair = [widened(name, narrow, factors, seed=3), narrow]
    parent, anchor = pair if direction == "wide into narrow" else pair[::-1]
    for residual in ("average", "tie"):
        found = fused(parent, anchor, evidence=evidence, heads=heads, residual=residual)
        torch.testing.assert_close(found, outputs(narrow), atol=1e-4, rtol=0, msg=lambda text: f"{residual}: {text}")  # noqa: B023


@pytest.mark.parametrize("residual", ["branch", "skip", "weighted_scalar", "weighted_matrix"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_residual_policy_between_widths(name: str, residual: str) -> None:
    narrow = FAMILIES[name](4)
    wide = widened(name, narrow, {"width": 2, "mlp": 2})
    for parent, anchor in ((wide, narrow), (narrow, wide)):
        torch.testing.assert_close(fused(parent, anchor, residual=residual), outputs(narrow), atol=1e-4, rtol=0)


def test_one_sided_scaling_does_not_keep_the_function() -> None:
    narrow = FAMILIES["vit_timm"](5)
    wide = widened("vit_timm", narrow, {"mlp": 2})
    assert (fused(wide, narrow, scaling="source") - outputs(narrow)).abs().max() > 1e-2
