"""Ground metrics, solvers and maps against scipy, and against what they are by definition."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

from fusionpl.errors import FusionError
from fusionpl.transport.costs import gram, ground_metric
from fusionpl.transport.maps import TransportMap, identity, permutation
from fusionpl.transport.names import Metric, Solver
from fusionpl.transport.solvers import solve

SCIPY = {"euclidean": "euclidean", "sqeuclidean": "sqeuclidean", "cosine": "cosine", "correlation": "correlation"}


def rows(n: int, features: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(n, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_cost(n: int, m: int, seed: int = 0) -> Tensor:
    return torch.rand(n, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ground metrics


@pytest.mark.parametrize("metric", SCIPY)
def test_every_metric_is_scipys(metric: Metric) -> None:
    a, b = rows(5, seed=1) + 0.5, rows(8, seed=2)
    ours, theirs = (a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)) if metric == "correlation" else (a, b)
    cost = ground_metric(gram(ours, theirs), metric, "none")
    np.testing.assert_allclose(cost, cdist(a, b, SCIPY[metric]), atol=1e-10)


def test_normalisations() -> None:
    a, b = rows(5, seed=1), rows(6, seed=2)
    distance = cdist(a, b)
    expected = {
        "max": distance / distance.max(),
        "mean": distance / distance.mean(),
        "median": distance / np.sort(distance.flatten())[(distance.size - 1) // 2],
        "log": np.log(1 + distance),
        "none": distance,
    }
    for normalize, cost in expected.items():
        found = ground_metric(gram(a, b), "euclidean", normalize)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, cost, atol=1e-10, err_msg=normalize)


@pytest.mark.parametrize("normalize", ["max", "mean", "median", "log", "none"])
@pytest.mark.parametrize("metric", SCIPY)
def test_identical_dead_units_cost_no_nan(metric: Metric, normalize: str) -> None:
    dead = torch.zeros(3, 4, dtype=torch.float64)
    cost = ground_metric(gram(dead, dead), metric, normalize)  # type: ignore[arg-type]
    assert torch.isfinite(cost).all()
    assert (cost == cost[0, 0]).all()


def test_gram_of_features_side_by_side_and_of_blocks() -> None:
    a, b, c, d = rows(3), rows(4, seed=1), rows(3, 5, seed=2), rows(4, 5, seed=3)
    side_by_side = gram(torch.cat([a, c], 1), torch.cat([b, d], 1))
    total = gram(a, b) + gram(c, d)
    part = total.block(slice(1, 3), slice(0, 2))
    for name in ("parent", "anchor", "cross"):
        torch.testing.assert_close(getattr(total, name), getattr(side_by_side, name))
    torch.testing.assert_close(part.cross, total.cross[1:3, :2])
    torch.testing.assert_close(part.parent, total.parent[1:3])
    torch.testing.assert_close(part.anchor, total.anchor[:2])


def test_unit_gram_is_the_gram_of_unit_rows() -> None:
    a, b = rows(3), rows(4, seed=1)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(gram(a, b).unit().cross, gram(unit(a), unit(b)).cross)
    torch.testing.assert_close(gram(a, b).unit().parent, torch.ones(3, dtype=torch.float64))


# solvers


@pytest.mark.parametrize("seed", range(5))
def test_hard_solvers_find_scipys_assignment(seed: int) -> None:
    cost = random_cost(12, 12, seed)
    wanted = torch.zeros(12, 12, dtype=torch.float64)
    picked = linear_sum_assignment(cost)
    wanted[picked] = 1 / 12
    for solver in ("emd", "assignment"):
        found = solve(cost, solver)
        torch.testing.assert_close(found.plan, wanted)
        assert found.cost == pytest.approx(cost[picked].mean().item())
        assert found.converged


@pytest.mark.parametrize("seed", range(5))
def test_sinkhorn_at_low_regularisation_is_scipys_assignment(seed: int) -> None:
    cost = random_cost(12, 12, seed)
    found = solve(cost, "sinkhorn", reg=1e-3)
    order = linear_sum_assignment(cost)[1]
    assert (found.plan.argmax(1).numpy() == order).all()
    # the entropic plan costs at most reg * log(n) more
    assert found.cost == pytest.approx(cost[range(12), order].mean().item(), abs=1e-3 * np.log(12) + 1e-6)


def test_sinkhorn_minimises_transport_minus_entropy() -> None:
    """The optimum is the only coupling of the form diag(u) exp(-C / reg) diag(v) with the right marginals."""
    cost, reg = random_cost(6, 9), 0.1
    plan = solve(cost, "sinkhorn", reg=reg).plan
    potential = reg * plan.log() + cost  # = f_i + g_j
    torch.testing.assert_close(potential, potential[:, :1] + potential[:1, :] - potential[0, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(plan.sum(1), torch.full((6,), 1 / 6, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(plan.sum(0), torch.full((9,), 1 / 9, dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize("reg", [1e-2, 1e-3, 1e-4, 1e-6, 1e-9])
@pytest.mark.parametrize("shape", [(10, 10), (7, 12)])
def test_small_regularisation_neither_underflows_nor_overflows(reg: float, shape: tuple[int, int]) -> None:
    found = solve(random_cost(*shape), "sinkhorn", reg=reg)
    assert torch.isfinite(found.plan).all()
    assert found.plan.sum().item() == pytest.approx(1, abs=1e-6)
    assert (found.to_output.sum(0) - 1).abs().max() < 1e-9


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_kernel_and_log_domain_agree(monkeypatch: pytest.MonkeyPatch, offset: float) -> None:
    cost = random_cost(8, 8) + offset
    kernel = solve(cost, "sinkhorn", reg=0.02).plan
    monkeypatch.setattr("fusionpl.transport.solvers._KERNEL_RANGE", 0.0)
    torch.testing.assert_close(solve(cost, "sinkhorn", reg=0.02).plan, kernel, atol=1e-8, rtol=0)


def test_unconverged_sinkhorn_says_so() -> None:
    hard = solve(random_cost(20, 20), "sinkhorn", reg=1e-4)
    assert not hard.converged
    assert hard.iterations is not None
    assert hard.iterations >= 990
    assert hard.marginal_error > 1e-9
    easy = solve(random_cost(20, 20), "sinkhorn", reg=0.1)
    assert easy.converged
    assert easy.iterations is not None
    assert 0 < easy.iterations < 990
    assert easy.marginal_error < 1e-8


def test_unfinished_emd_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionpl.transport.solvers.EMD_ITERATIONS", 3)
    with pytest.warns(UserWarning, match="numItermax|iterations"):
        assert not solve(random_cost(30, 30), "emd").converged


@pytest.mark.parametrize("solver", ["sinkhorn", "emd"])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 9)])
def test_uniform_marginals_between_different_sizes(solver: Solver, shape: tuple[int, int]) -> None:
    plan = solve(random_cost(*shape), solver, reg=0.1).plan
    for dim, n in ((1, shape[0]), (0, shape[1])):
        torch.testing.assert_close(plan.sum(dim), torch.full((n,), 1 / n, dtype=torch.float64), atol=1e-8, rtol=0)


@given(st.permutations(range(9)), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_planted_permutation_is_recovered_exactly(order: list[int], seed: int) -> None:
    anchor = rows(9, seed=seed)
    parent = torch.empty_like(anchor)
    parent[torch.tensor(order)] = anchor  # anchor unit j is parent unit order[j]
    wanted = permutation(torch.tensor(order))
    for metric, solver in itertools.product(SCIPY, ("emd", "assignment")):
        cost = ground_metric(gram(parent, anchor), metric, "max")  # type: ignore[arg-type]
        found = solve(cost, solver)  # type: ignore[arg-type]
        assert torch.equal(found.to_output.round(decimals=12), wanted.to_output)
        torch.testing.assert_close(found.to_output.T @ parent, anchor)


def test_assignment_refuses_different_sizes() -> None:
    with pytest.raises(FusionError, match="assignment needs parents of one width, here 3 and 4 units; use emd"):
        solve(random_cost(3, 4), "assignment")


@pytest.mark.parametrize("reg", [0.0, -1.0, float("nan")])
def test_regularisation_must_be_positive(reg: float) -> None:
    with pytest.raises(FusionError, match=r"align.reg must be above 0"):
        solve(random_cost(3, 3), "sinkhorn", reg=reg)


@pytest.mark.parametrize("solver", ["sinkhorn", "emd", "assignment"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_cost_must_be_finite(solver: Solver, bad: float) -> None:
    cost = random_cost(3, 3)
    cost[1, 2] = bad
    with pytest.raises(FusionError, match="ground metric holds NaN or infinite"):
        solve(cost, solver)


# maps


@pytest.mark.parametrize("solver", ["sinkhorn", "emd"])
@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_views_are_convex_combinations(solver: Solver, shape: tuple[int, int]) -> None:
    found = solve(random_cost(*shape), solver, reg=0.05)
    assert found.to_output.shape == found.to_input.shape == shape
    torch.testing.assert_close(found.to_output.sum(0), torch.ones(shape[1], dtype=torch.float64))
    torch.testing.assert_close(found.to_input.sum(1), torch.ones(shape[0], dtype=torch.float64))
    assert (found.to_output >= 0).all()


def test_source_scaling_multiplies_by_the_parents_width() -> None:
    cost = random_cost(4, 9)
    two_sided, source = (solve(cost, "emd", scaling=scaling) for scaling in ("two_sided", "source"))
    torch.testing.assert_close(source.to_output, two_sided.plan * 4)
    torch.testing.assert_close(source.to_input, two_sided.plan * 4)
    torch.testing.assert_close(source.to_input, two_sided.to_input)
    assert (source.to_output - two_sided.to_output).abs().max() > 0.1


def test_scalings_agree_for_equal_widths() -> None:
    cost = random_cost(7, 7)
    two_sided, source = (solve(cost, "sinkhorn", scaling=scaling) for scaling in ("two_sided", "source"))
    torch.testing.assert_close(source.to_output, two_sided.to_output, atol=1e-8, rtol=0)
    torch.testing.assert_close(source.to_input, two_sided.to_input, atol=1e-8, rtol=0)


def test_orthogonal_map_has_one_view() -> None:
    q = torch.linalg.qr(rows(5, 5)).Q
    one = TransportMap(q, "rotation", "orthogonal")
    assert torch.equal(one.to_output, q)
    assert torch.equal(one.to_input, q)


def test_permutation_and_identity_move_what_they_say() -> None:
    units = rows(4)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(permutation(order).to_output.T @ units, units[order])
    torch.testing.assert_close(identity(4).to_input, torch.eye(4, dtype=torch.float64))


def test_block_keeps_plan_and_scaling() -> None:
    whole = TransportMap(random_cost(4, 6), "emd", "source")
    part = whole.block(slice(2), slice(3, 6))
    assert torch.equal(part.plan, whole.plan[:2, 3:])
    assert (part.solver, part.scaling) == ("emd", "source")
