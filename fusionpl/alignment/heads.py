"""Attention heads matched first, then the units inside each matched pair."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fusionpl.transport import Gram, Metric, Solver, TransportMap, ground_metric, solve

UnitSolver = Callable[[Gram], TransportMap]


def match_heads(
    circuits: Mapping[str, Gram],
    heads: tuple[int, int],
    *,
    metric: Metric,
    solve_units: UnitSolver,
    hard: Solver,
) -> dict[str, TransportMap]:
    """Matches heads by the cost of aligning their circuits, then aligns units pair by pair.

    Args:
        circuits: name (`qk`, `vo`) -> Gram over the units of all heads, head by head.
        heads: number of heads of the parent and of the anchor.
        metric: ground metric between units.
        solve_units: solves one pair's problem for the map inside it.
        hard: `assignment` for equal numbers of units, else `emd`: compares heads at their best alignment.

    Returns:
        name -> map over all units: the head plan times the unit plan of each pair it uses.
    """
    total: Tensor | float = 0.0
    for inner in circuits.values():
        costs = torch.tensor(
            [
                [float(solve(ground_metric(pair, metric, "none"), hard).cost or 0.0) for pair in row]
                for row in _pairs(inner, heads)
            ],
            dtype=torch.float64,
        )
        total = total + costs / costs.mean().clamp_min(1e-300)
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
    return TransportMap(
        torch.cat(rows),
        some.solver,
        some.scaling,
        cost=sum(float(plan[pair]) * (one.cost or 0.0) for pair, one in used.items()),
        iterations=max((one.iterations or 0 for one in used.values()), default=None),
        converged=all(one.converged for one in used.values()),
        marginal_error=max(one.marginal_error for one in used.values()),
    )
