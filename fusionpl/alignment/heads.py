"""Attention heads matched first, then the units inside each matched pair."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fusionpl.alignment.config import AlignConfig
from fusionpl.transport.costs import Gram, ground_metric
from fusionpl.transport.maps import TransportMap
from fusionpl.transport.names import Solver
from fusionpl.transport.solvers import solve

Pairs = list[list[Gram]]  # of each head of the parent with each of the anchor


def match_heads(
    circuits: Mapping[str, Gram],
    heads: tuple[int, int],
    *,
    compare: Callable[[Pairs], Tensor],
    solve_units: Callable[[list[Gram]], list[TransportMap]],
    plan: Tensor | None = None,
) -> dict[str, TransportMap]:
    """Matches heads by the cost of aligning their circuits, then aligns units pair by pair.

    Args:
        circuits: name (`qk`, `vo`) -> Gram over the units of all heads, head by head.
        heads: number of heads of the parent and of the anchor.
        compare: the cost of each pair of heads at their best alignment, [heads of the parent, of the anchor]. Each
            circuit's costs are divided by their mean magnitude before they are added.
        solve_units: solves the problems of matched pairs for the maps inside them.
        plan: between heads, where it is known.

    Returns:
        name -> map over all units: the head plan times the unit plan of each pair it uses.
    """
    pairs = {name: pairs_of(inner, heads) for name, inner in circuits.items()}
    if plan is None:
        plan = head_map([compare(each) for each in pairs.values()]).plan
    maps = {}
    for name, each in pairs.items():
        places = used(plan)
        units = solve_units([each[i][j] for i, j in places])
        maps[name] = assembled(plan, dict(zip(places, units, strict=True)))
    return maps


def head_map(costs: list[Tensor]) -> TransportMap:
    """The map between heads, [of the parent, of the anchor]; each of the costs is divided by its mean magnitude."""
    total = torch.stack([cost / cost.abs().mean().clamp_min(1e-300) for cost in costs]).sum(0)
    return solve(total, "assignment" if total.shape[0] == total.shape[1] else "emd")


def used(plan: Tensor) -> list[tuple[int, int]]:
    """The pairs that a plan joins."""
    return [(int(i), int(j)) for i, j in plan.nonzero()]


def unit_costs(pairs: Pairs, config: AlignConfig) -> Tensor:
    """The cost of each pair of heads at its best hard alignment."""
    sizes = pairs[0][0].cross.shape
    solver: Solver = "assignment" if sizes[0] == sizes[1] else "emd"
    costs = [[solve(ground_metric(gram, config.metric, "none"), solver).cost for gram in row] for row in pairs]
    return torch.tensor(costs, dtype=torch.float64).to(pairs[0][0].cross.device)


def pairs_of(inner: Gram, heads: tuple[int, int]) -> Pairs:
    """The Gram of each head of the parent with each of the anchor."""

    def groups(n: int, count: int) -> list[slice]:
        width = n // count
        return [slice(i * width, (i + 1) * width) for i in range(count)]

    rows, columns = groups(len(inner.parent), heads[0]), groups(len(inner.anchor), heads[1])
    return [[inner.block(row, column) for column in columns] for row in rows]


def assembled(plan: Tensor, units: Mapping[tuple[int, int], TransportMap]) -> TransportMap:
    """The map over the units of all heads, from the plan between heads and a map for each pair that it joins."""
    some = next(iter(units.values()))
    height, width = some.plan.shape
    ours, theirs = plan.shape
    whole = torch.zeros(ours, height, theirs, width, dtype=torch.float64, device=plan.device)
    for (i, j), unit_map in units.items():
        whole[i, :, j] = plan[i, j] * unit_map.plan
    whole_map = replace(
        some,
        plan=whole.view(ours * height, theirs * width),
        cost=sum(float(plan[place]) * (unit_map.cost or 0.0) for place, unit_map in units.items()),
        iterations=max((unit_map.iterations or 0 for unit_map in units.values()), default=None),
        converged=all(unit_map.converged for unit_map in units.values()),
        marginal_error=max(unit_map.marginal_error for unit_map in units.values()),
    )
    if some.scaling != "orthogonal":
        return whole_map
    # no marginal normalises an orthogonal map: that of the heads is taken out here
    return replace(whole_map, plan=theirs * whole_map.plan, read_gain=some.read_gain * ours / theirs)
