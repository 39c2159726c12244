"""Ridge regression from streamed normal equations: memory does not grow with the rows."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

# In units of the inputs' mean energy; the largest all but keeps the prior. Below the smallest, the rounding errors of
# float32 activations would decide the directions in which the inputs hardly vary.
PENALTIES = tuple(10.0**power for power in range(-4, 3))


@dataclass
class NormalEquations:
    """Sums over rows x [n] (the last input is a constant 1) and targets y [m] of a linear least-squares problem.

    Attributes:
        count: number of rows, a scalar tensor.
        xx: [n, n], the sum of x x^T.
        xy: [n, m], the sum of x y^T.
        yy: a scalar tensor, the sum of |y|^2.
    """

    count: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def zeros(cls, n: int, m: int, *, device: torch.device | str = "cpu") -> "NormalEquations":
        """The empty sums of n inputs, the constant not counted, and m targets."""
        sizes: tuple[tuple[int, ...], ...] = ((), (n + 1, n + 1), (n + 1, m), ())
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))

    def tensors(self) -> list[Tensor]:
        """All sums; they are additive over rows, batches and ranks."""
        return [self.count, self.xx, self.xy, self.yy]

    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds rows: x [rows, n] without the constant, y [rows, m]."""
        x, y = x.to(self.xx), y.to(self.xy)
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self.count += len(x)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy += y.square().sum()

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        """The sums over both sets of rows."""
        return NormalEquations(*(a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)))

    def ridge(self, prior: Tensor, penalty: float) -> Tensor:
        """The W [n + 1, m] that minimises sum |W^T x - y|^2 + penalty * e * |W - prior|^2, e the mean energy of x."""
        values, vectors = self._spectrum
        shift = penalty * self.xx.diagonal().mean()
        return prior + vectors @ ((vectors.T @ (self.xy - self.xx @ prior)) / (values + shift)[:, None])

    def error(self, solution: Tensor) -> float:
        """The mean squared error of W [n + 1, m] over the rows, summed over the targets."""
        fitted = (solution * (self.xx @ solution - 2 * self.xy)).sum()
        return float((fitted + self.yy) / self.count)

    @functools.cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.xx)
        return values.clamp_min(0), vectors


def fit_ridge(rows: NormalEquations, held_out: NormalEquations, prior: Tensor) -> tuple[Tensor, float]:
    """Ridge regression shrunk towards `prior`, with the penalty that predicts the held-out rows best.

    Args:
        rows, held_out: two parts of the data; the returned solution uses both.
        prior: [n + 1, m], for the constant in the last row.

    Returns:
        W [n + 1, m] and the penalty; the prior itself and infinity where no fit predicts better.
    """
    if not float(held_out.count) or not float(rows.count):
        return prior, float("inf")
    errors = {penalty: held_out.error(rows.ridge(prior, penalty)) for penalty in PENALTIES}
    errors[float("inf")] = held_out.error(prior)
    best = min(errors, key=lambda penalty: errors[penalty])
    return (prior if best == float("inf") else (rows + held_out).ridge(prior, best)), best
