"""Discrete optimal transport between two sets of units with uniform marginals: Sinkhorn, EMD, assignment."""

import warnings
from typing import Literal

import numpy as np
import ot
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fusionpl.errors import FusionError
from fusionpl.transport.maps import Scaling, TransportMap

Solver = Literal["sinkhorn", "emd", "assignment"]

SINKHORN_ITERATIONS = 1000
SINKHORN_TOLERANCE = 1e-9
# The default of ot.emd (100,000) stops short of the optimum at the width of a BERT-base MLP.
EMD_ITERATIONS = 10_000_000
# exp(-500) is far above float64's underflow: below this range the kernel form, a pair of matrix-vector products
# an iteration, gives the log-domain result to rounding at a fraction of its time.
_KERNEL_RANGE = 500.0


def solve(cost: Tensor, solver: Solver, *, reg: float = 0.08, scaling: Scaling = "two_sided") -> TransportMap:
    """Solves one transport problem between uniform marginals.

    Args:
        cost: ground metric [n_parent, n_anchor].
        solver: `sinkhorn` (entropic, regularisation `reg` in units of the cost), `emd` (exact linear programme) or
            `assignment` (scipy's; equal sizes only).
        scaling: see TransportMap.

    Raises:
        FusionError: `assignment` between different sizes, a non-positive `reg`, a cost that is not finite.
    """
    matrix = np.ascontiguousarray(cost.detach().cpu().double().numpy())
    if not np.isfinite(matrix).all():
        raise FusionError("the ground metric holds NaN or infinite values; check calibration data and parents")
    if solver == "assignment":
        return _assignment(matrix, scaling)
    n, m = matrix.shape
    mu, nu = np.full(n, 1 / n), np.full(m, 1 / m)
    plan, iterations, converged = _sinkhorn(mu, nu, matrix, reg) if solver == "sinkhorn" else _emd(mu, nu, matrix)
    return TransportMap(
        torch.from_numpy(plan),
        solver,
        scaling,
        cost=float((plan * matrix).sum()),
        iterations=iterations,
        converged=converged,
        marginal_error=float(np.linalg.norm(plan.sum(0) - nu)),
    )


def procrustes(cross: Tensor) -> TransportMap:
    """The (semi-)orthogonal map R that maximises <R, cross>, [n_parent, n_anchor]: R = U V^T of its SVD.

    Source: Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 1966.

    Raises:
        FusionError: `cross` is not finite.
    """
    if not bool(cross.isfinite().all()):
        raise FusionError("the cross-covariance holds NaN or infinite values; check calibration data and parents")
    u, values, vt = torch.linalg.svd(cross.detach().cpu().double(), full_matrices=False)
    return TransportMap(u @ vt, "procrustes", "orthogonal", cost=-float(values.sum()))


def _assignment(matrix: np.ndarray, scaling: Scaling) -> TransportMap:
    n, m = matrix.shape
    if n != m:
        raise FusionError(
            f"align.solver assignment needs parents of one width, here {n} and {m} units; use emd or sinkhorn"
        )
    rows, columns = linear_sum_assignment(matrix)
    plan = torch.zeros(n, n, dtype=torch.float64)
    plan[torch.from_numpy(rows), torch.from_numpy(columns)] = 1 / n
    return TransportMap(plan, "assignment", scaling, cost=float(matrix[rows, columns].mean()))


def _emd(mu: np.ndarray, nu: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, int | None, bool]:
    plan, log = ot.emd(mu, nu, matrix, numItermax=EMD_ITERATIONS, log=True)
    return plan, None, log["warning"] is None


def _sinkhorn(mu: np.ndarray, nu: np.ndarray, matrix: np.ndarray, reg: float) -> tuple[np.ndarray, int | None, bool]:
    if not reg > 0:
        raise FusionError(f"align.reg must be above 0, not {reg}; for an exact plan use align.solver emd")
    method = "sinkhorn" if np.ptp(matrix) / reg < _KERNEL_RANGE else "sinkhorn_log"
    shifted = matrix - matrix.min()  # a constant moves no mass, and keeps the kernel away from underflow
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the caller reports non-convergence with the name of the axis
        plan, log = ot.sinkhorn(
            mu, nu, shifted, reg, method=method, numItermax=SINKHORN_ITERATIONS, stopThr=SINKHORN_TOLERANCE, log=True
        )
    return plan, int(log["niter"]), bool(log["err"][-1] < SINKHORN_TOLERANCE)
