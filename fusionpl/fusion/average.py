"""The weighted mean of parameters that live in the same units."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fusionpl.errors import FusionError
from fusionpl.families import State


def own_state(model: nn.Module) -> State:
    """The model's own parameters; tied ones once."""
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def mixing_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """One weight a parent; None is uniform. Raises FusionError unless there are `count` of them that sum to 1."""
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise FusionError(f"weights: {len(weights)} numbers for {count} parents; give one a parent")
    if not abs(sum(weights) - 1) <= 1e-6:
        raise FusionError(f"weights must sum to 1, {list(weights)} sum to {sum(weights):g}")
    return list(weights)


def average(
    states: Sequence[State], weights: Sequence[float], kept: frozenset[str] = frozenset(), anchor: int = 0
) -> State:
    """The weighted mean of parameters; those named in `kept` are the anchor's."""

    def mean(name: str) -> Tensor:
        if name in kept:
            return states[anchor][name]
        terms = [weight * state[name].double() for weight, state in zip(weights, states, strict=True)]
        return torch.stack(terms).sum(0).to(states[anchor][name].dtype)

    return {name: mean(name) for name in states[anchor]}
