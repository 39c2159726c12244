"""Attention heads matched first, then the units inside each matched pair."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fusionpl.transport import Gram, TransportMap, solve

Pairs = list[list[Gram]]  # of each head of the parent with each of the anchor


def match_heads(
    circuits: Mapping[str, Gram],
    heads: tuple[int, int],
    *,
    compare: Callable[[Pairs], Tensor],
    solve_units: Callable[[list[Gram]], list[TransportMap]],
) -> dict[str, TransportMap]:
    """Matches heads by the cost of aligning their circuits, then aligns units pair by pair.

    Args:
        circuits: name (`qk`, `vo`) -> Gram over the units of all heads, head by head.
        heads: number of heads of the parent and of the anchor.
        compare: the cost of each pair of heads at their best alignment, [heads of the parent, of the anchor]. Each
            circuit's costs are divided by their mean magnitude before they are added.
        solve_units: solves the problems of matched pairs for the maps inside them.

    Returns:
        name -> map over all units: the head plan times the unit plan of each pair it uses.
    """
    pairs = {name: _pairs(inner, heads) for name, inner in circuits.items()}
    costs = [compare(each) for each in pairs.values()]
    total = torch.stack([cost / cost.abs().mean().clamp_min(1e-300) for cost in costs]).sum(0)
    plan = solve(total, "assignment" if heads[0] == heads[1] else "emd").plan
    return {name: _assembled(plan, each, solve_units) for name, each in pairs.items()}


def _pairs(inner: Gram, heads: tuple[int, int]) -> Pairs:
    def groups(n: int, count: int) -> list[slice]:
        width = n // count
        return [slice(i * width, (i + 1) * width) for i in range(count)]

    rows, columns = groups(len(inner.parent), heads[0]), groups(len(inner.anchor), heads[1])
    return [[inner.block(row, column) for column in columns] for row in rows]


def _assembled(plan: Tensor, pairs: Pairs, solve_units: Callable[[list[Gram]], list[TransportMap]]) -> TransportMap:
    places = [(int(i), int(j)) for i, j in plan.nonzero()]
    used = dict(zip(places, solve_units([pairs[i][j] for i, j in places]), strict=True))
    height, width = len(pairs[0][0].parent), len(pairs[0][0].anchor)
    ours, theirs = plan.shape
    whole = torch.zeros(ours, height, theirs, width, dtype=torch.float64, device=plan.device)
    for (i, j), one in used.items():
        whole[i, :, j] = plan[i, j] * one.plan
    some = used[places[0]]
    found = replace(
        some,
        plan=whole.view(ours * height, theirs * width),
        cost=sum(float(plan[place]) * (one.cost or 0.0) for place, one in used.items()),
        iterations=max((one.iterations or 0 for one in used.values()), default=None),
        converged=all(one.converged for one in used.values()),
        marginal_error=max(one.marginal_error for one in used.values()),
    )
    if some.scaling != "orthogonal":
        return found
    # no marginal normalises an orthogonal map: that of the heads is taken out here
    return replace(found, plan=theirs * found.plan, read_gain=some.read_gain * ours / theirs)
