"""The weighted mean of parents' parameters, in the anchor's units or, for comparison, as they are."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fusionpl.families.apply import State, own_state, with_parameters
from fusionpl.families.axes import Binding
from fusionpl.fusion.parents import AlignedParent
from fusionpl.models.classes import missing_classes, partial_heads, whole_heads


def average(
    states: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    kept: frozenset[str] = frozenset(),
    anchor: int = 0,
) -> State:
    """The weighted mean of parameters, in the anchor's types; those named in `kept` are the anchor's.

    >>> average([{"w": torch.tensor([1.0, 3.0])}, {"w": torch.tensor([3.0, 5.0])}], [0.25, 0.75])
    {'w': tensor([2.5000, 4.5000])}
    """

    def mean(name: str) -> Tensor:
        if name in kept:
            return states[anchor][name].clone()
        total = torch.zeros_like(states[anchor][name], dtype=torch.float64)
        for weight, state in zip(weights, states, strict=True):
            total.add_(state[name], alpha=weight)
        return total.to(states[anchor][name].dtype)

    return {name: mean(name) for name in states[anchor]}


def averaged(
    parents: Sequence[AlignedParent],
    anchor: int,
    states: Sequence[State],
    kept: frozenset[str],
    target: State,
    goal: Binding,
) -> State:
    """The mean of the aligned parents' parameters, in the type that they were moved in; of a class, the mean of those
    that know it.

    Args:
        parents: with the maps that these parameters need.
        anchor: index of the anchor.
        states: each parent's parameters of whole sections.
        kept: those that are the anchor's.
        target: parameters of the fused network's shape: the anchor's, where that is the same.
        goal: the fused network's binding.
    """
    aligned = [parent.aligned(state, target, goal) for parent, state in zip(parents, states, strict=True)]
    weights = [parent.weight for parent in parents]
    mean = average(aligned, weights, kept, anchor)
    heads = _of_those_who_know(aligned, [parent.network.original.module for parent in parents], weights)
    return {**mean, **{name: tensor for name, tensor in heads.items() if name not in kept}}


def vanilla(parents: Sequence[nn.Module], weights: Sequence[float]) -> nn.Module | None:
    """Vanilla fusion: the entry-by-entry weighted mean of the parents' parameters.

    Returns:
        A new model in eval mode, or None when the parents' tensors differ in shape.
    """
    states = [own_state(parent) for parent in parents]
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    if any(other != shapes[0] for other in shapes[1:]):
        return None
    mean = {**average(states, weights), **_of_those_who_know(states, parents, weights)}
    return whole_heads(with_parameters(parents[0], mean)).eval()


def _of_those_who_know(
    states: Sequence[Mapping[str, Tensor]], models: Sequence[nn.Module], weights: Sequence[float]
) -> State:
    """The heads of models some of which lack classes: of a class, the mean of those that know it, whose weights count
    alike where they are 0."""
    missing = [missing_classes(model) for model in models]
    lacking = next((own for own in missing if own is not None), None)
    if lacking is None:
        return {}
    known = torch.stack([torch.ones_like(lacking) if own is None else ~own for own in missing]).double()
    votes = known * torch.tensor(weights, dtype=torch.float64)[:, None]
    votes = torch.where(votes.sum(0) > 0, votes, known)
    shares = votes / votes.sum(0).clamp_min(1e-300)
    heads = {name for model in models for name in partial_heads(model)}

    def mean(name: str) -> Tensor:
        first = states[0][name]
        total = torch.zeros_like(first, dtype=torch.float64)
        for share, state in zip(shares, states, strict=True):
            total += share.to(first.device).view(-1, *[1] * (first.ndim - 1)) * state[name]
        return total.to(first.dtype)

    return {name: mean(name) for name in states[0] if name.rpartition(".")[0] in heads}
