"""Discrete optimal transport between two sets of units with uniform marginals: Sinkhorn, EMD, assignment."""

import warnings
from dataclasses import replace
from typing import Any

import ot
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fusionpl.errors import FusionError
from fusionpl.transport.maps import TransportMap, identity
from fusionpl.transport.names import Scaling, Solver

SINKHORN_ITERATIONS = 1000
SINKHORN_TOLERANCE = 1e-9
# The default of ot.emd (100,000) stops short of the optimum at the width of a BERT-base MLP.
EMD_ITERATIONS = 10_000_000
# exp(-500) is far above float64's underflow: below this range the kernel form, a pair of matrix-vector products
# an iteration, gives the log-domain result to rounding at a fraction of its time.
_KERNEL_RANGE = 500.0


def solve(cost: Tensor, solver: Solver, *, reg: float = 0.08, scaling: Scaling = "two_sided") -> TransportMap:
    """Solves one transport problem between uniform marginals.

    Sinkhorn runs where the cost is, through POT's backends; on the CPU that is NumPy's, which is faster there. The hard
    solvers run on the CPU.

    Args:
        cost: ground metric [n_parent, n_anchor].
        solver: `sinkhorn` (entropic, regularisation `reg` in units of the cost), `emd` (exact linear programme),
            `assignment` (scipy's; equal sizes only) or `identity` (unit i to unit i whatever the cost; equal sizes).
        scaling: see TransportMap.

    Returns:
        TransportMap; its plan is on the device of the cost.

    Raises:
        FusionError: `assignment` between different sizes, a non-positive `reg`, a cost that is not finite.

    >>> solve(torch.tensor([[5.0, 1.0], [2.0, 7.0]]), "assignment").plan.tolist()
    [[0.0, 0.5], [0.5, 0.0]]
    """
    cost = cost.detach().double()
    if not bool(cost.isfinite().all()):
        raise FusionError("the ground metric holds NaN or infinite values; check calibration data and parents")
    if solver == "assignment":
        return _assignment(cost, scaling)
    n, m = cost.shape
    if solver == "identity":
        check_one_width(solver, n, m)
        return replace(identity(n, device=cost.device), solver=solver, scaling=scaling)
    mu, nu = (torch.full((size,), 1 / size, dtype=cost.dtype, device=cost.device) for size in (n, m))
    plan, iterations, converged = _sinkhorn(mu, nu, cost, reg) if solver == "sinkhorn" else _emd(mu, nu, cost)
    return TransportMap(
        plan,
        solver,
        scaling,
        cost=float((plan * cost).sum()),
        iterations=iterations,
        converged=converged,
        marginal_error=float(torch.linalg.vector_norm(plan.sum(0) - nu)),
    )


def procrustes(cross: Tensor) -> TransportMap:
    """The (semi-)orthogonal map R that maximises <R, cross>, [n_parent, n_anchor]: R = U V^T of its SVD.

    Source: Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 1966.

    Raises:
        FusionError: `cross` is not finite.
    """
    return procrustes_batch(cross[None])[0]


def procrustes_batch(crosses: Tensor) -> list[TransportMap]:
    """Procrustes problems of one size, [problems, n_parent, n_anchor], solved as one batch on their device.

    Raises:
        FusionError: `crosses` are not finite.
    """
    if not bool(crosses.isfinite().all()):
        raise FusionError("the cross-covariance holds NaN or infinite values; check calibration data and parents")
    u, values, vt = torch.linalg.svd(crosses.detach().double(), full_matrices=False)
    return [
        TransportMap(plan, "procrustes", "orthogonal", cost=-float(sum_))
        for plan, sum_ in zip(u @ vt, values.sum(-1), strict=True)
    ]


def check_one_width(solver: Solver, n: int, m: int) -> None:
    """Raises FusionError where a solver that pairs units one by one meets n of a parent and m of the anchor."""
    if solver in ("assignment", "identity") and n != m:
        raise FusionError(
            f"align.solver {solver} needs parents of one width, here {n} and {m} units; use emd or sinkhorn"
        )


def _assignment(cost: Tensor, scaling: Scaling) -> TransportMap:
    check_one_width("assignment", *cost.shape)
    n = len(cost)
    matrix = cost.cpu().numpy()
    rows, columns = linear_sum_assignment(matrix)
    plan = torch.zeros(n, n, dtype=torch.float64)
    plan[torch.from_numpy(rows), torch.from_numpy(columns)] = 1 / n
    return TransportMap(plan.to(cost.device), "assignment", scaling, cost=float(matrix[rows, columns].mean()))


def _emd(mu: Tensor, nu: Tensor, cost: Tensor) -> tuple[Tensor, int | None, bool]:
    plan, log = ot.emd(mu.cpu().numpy(), nu.cpu().numpy(), cost.cpu().numpy(), numItermax=EMD_ITERATIONS, log=True)
    return torch.from_numpy(plan).to(cost.device), None, log["warning"] is None


def _sinkhorn(mu: Tensor, nu: Tensor, cost: Tensor, reg: float) -> tuple[Tensor, int | None, bool]:
    if not reg > 0:
        raise FusionError(f"align.reg must be above 0, not {reg}; for an exact plan use align.solver emd")
    shifted = cost - cost.min()  # a constant moves no mass, and keeps the kernel away from underflow
    method = "sinkhorn" if float(shifted.max()) / reg < _KERNEL_RANGE else "sinkhorn_log"
    problem: tuple[Any, ...] = (mu, nu, shifted)
    if cost.device.type == "cpu":
        problem = tuple(tensor.numpy() for tensor in problem)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the caller reports non-convergence with the name of the axis
        plan, log = ot.sinkhorn(
            *problem, reg, method=method, numItermax=SINKHORN_ITERATIONS, stopThr=SINKHORN_TOLERANCE, log=True
        )
    return torch.as_tensor(plan), int(log["niter"]), bool(log["err"][-1] < SINKHORN_TOLERANCE)
