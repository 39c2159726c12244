"""Attention heads matched first, then the units inside each matched pair."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fusionpl.transport import Gram, TransportMap, solve

UnitSolver = Callable[[Gram], TransportMap]


def match_heads(
    circuits: Mapping[str, Gram],
    heads: tuple[int, int],
    *,
    compare: Callable[[Gram], float],
    solve_units: UnitSolver,
) -> dict[str, TransportMap]:
    """Matches heads by the cost of aligning their circuits, then aligns units pair by pair.

    Args:
        circuits: name (`qk`, `vo`) -> Gram over the units of all heads, head by head.
        heads: number of heads of the parent and of the anchor.
        compare: the cost of a pair of heads at their best alignment. Each circuit's costs are divided by their mean
            magnitude before they are added.
        solve_units: solves one pair's problem for the map inside it.

    Returns:
        name -> map over all units: the head plan times the unit plan of each pair it uses.
    """
    total: Tensor | float = 0.0
    for inner in circuits.values():
        costs = torch.tensor([[compare(pair) for pair in row] for row in _pairs(inner, heads)], dtype=torch.float64)
        total = total + costs / costs.abs().mean().clamp_min(1e-300)
    assert isinstance(total, Tensor)
    plan = solve(total, "assignment" if heads[0] == heads[1] else "emd").plan
    return {name: _assembled(plan, _pairs(inner, heads), solve_units) for name, inner in circuits.items()}


def _pairs(inner: Gram, heads: tuple[int, int]) -> list[list[Gram]]:
    def groups(n: int, count: int) -> Sequence[slice]:
        width = n // count
        return [slice(i * width, (i + 1) * width) for i in range(count)]

    rows, columns = groups(len(inner.parent), heads[0]), groups(len(inner.anchor), heads[1])
    return [[inner.block(row, column) for column in columns] for row in rows]


def _assembled(plan: Tensor, pairs: list[list[Gram]], solve_units: UnitSolver) -> TransportMap:
    used = {(int(i), int(j)): solve_units(pairs[i][j]) for i, j in plan.nonzero()}
    height, width = len(pairs[0][0].parent), len(pairs[0][0].anchor)
    empty = torch.zeros(height, width, dtype=torch.float64)
    rows = [
        torch.cat([plan[i, j] * used[i, j].plan if (i, j) in used else empty for j in range(plan.shape[1])], dim=1)
        for i in range(plan.shape[0])
    ]
    some = next(iter(used.values()))
    found = replace(
        some,
        plan=torch.cat(rows),
        cost=sum(float(plan[pair]) * (one.cost or 0.0) for pair, one in used.items()),
        iterations=max((one.iterations or 0 for one in used.values()), default=None),
        converged=all(one.converged for one in used.values()),
        marginal_error=max(one.marginal_error for one in used.values()),
    )
    if some.scaling != "orthogonal":
        return found
    ours, theirs = plan.shape  # no marginal normalises an orthogonal map: that of the heads is taken out here
    return replace(found, plan=theirs * found.plan, read_gain=some.read_gain * ours / theirs)
