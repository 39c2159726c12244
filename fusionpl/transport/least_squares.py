"""Ridge regression from streamed normal equations: memory does not grow with the rows."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionpl.errors import FusionError
from fusionpl.transport.products import cross_product, self_product
from fusionpl.transport.softmax import Fitted, Reduce, Rows

# In units of the inputs' mean energy; the largest all but keeps the prior. Below the smallest, the rounding errors of
# float32 activations would decide the directions in which the inputs hardly vary.
PENALTIES = tuple(10.0**power for power in range(-4, 3))
# The penalty is chosen by so many random combinations of the targets where there are more: their squared errors add up
# to those of all targets, in the mean, at a fraction of the time.
COMBINATIONS = 64


@dataclass
class NormalEquations:
    """Sums over rows x [n] (the last input is a constant 1) and targets y [m] of a linear least-squares problem.

    Attributes:
        count: number of rows, a scalar tensor.
        xx: [n + 1, n + 1], the sum of x x^T.
        xy: [n + 1, m], the sum of x y^T.
    """

    count: Tensor
    xx: Tensor
    xy: Tensor

    @classmethod
    def zeros(cls, n: int, m: int, *, device: torch.device | str = "cpu") -> "NormalEquations":
        """The empty sums of n inputs, the constant not counted, and m targets."""
        sizes: tuple[tuple[int, ...], ...] = ((), (n + 1, n + 1), (n + 1, m))
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))

    def tensors(self) -> list[Tensor]:
        """All sums; they are additive over rows, batches and ranks."""
        return [self.count, self.xx, self.xy]

    def update(self, x: Tensor, *targets: Tensor, weight: float = 1.0) -> None:
        """Adds rows: x [rows, n] without the constant; the targets [rows, m_i] stand side by side.

        A batch is multiplied in float32 (in float64 if it is that) and added up in float64; each row counts `weight`
        times.
        """
        self.count += weight * len(x)
        self.xx[:-1, :-1].add_(self_product(x), alpha=weight)
        sums = weight * x.sum(0)
        self.xx[:-1, -1] += sums
        self.xx[-1, :-1] += sums
        self.xx[-1, -1] += weight * len(x)
        start = 0
        for y in targets:
            columns = slice(start, start + y.shape[1])
            self.xy[:-1, columns].add_(cross_product(x, y), alpha=weight)
            self.xy[-1, columns] += weight * y.sum(0)
            start = columns.stop

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        """The sums over both sets of rows."""
        return NormalEquations(*(a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)))

    def with_targets(self, xy: Tensor) -> "NormalEquations":
        """The same rows with other targets, by their products with the inputs, [n + 1, m]."""
        return NormalEquations(self.count, self.xx, xy)

    def less(self, solution: Tensor) -> "NormalEquations":
        """The same rows with what W [n + 1, m] leaves of their targets: y - W^T x."""
        return self.with_targets(self.xy - self.xx @ solution)

    def ridge(self, penalty: float) -> Tensor:
        """The W [n + 1, m] that minimises sum |W^T x - y|^2 + penalty * e * |W|^2, e the mean energy of x."""
        shifted = self.xx.clone()
        shifted.diagonal().add_(penalty * self.xx.diagonal().mean())
        return torch.cholesky_solve(self.xy, torch.linalg.cholesky(shifted))

    def error(self, solution: Tensor) -> float:
        """The mean over the rows of |W^T x - y|^2 - |y|^2: the squared error of W [n + 1, m] but for a constant."""
        return float((solution * (self.xx @ solution - 2 * self.xy)).sum() / self.count)


def fit_ridge(
    rows: NormalEquations,
    held_out: NormalEquations,
    prior: Tensor,
    guess: float | None = None,
    *,
    search: bool = True,
    both: bool = True,
) -> tuple[Tensor, float]:
    """Ridge regression shrunk towards `prior`, with the penalty that predicts the held-out rows best.

    The held-out error falls and then rises with the penalty, so it is followed downhill instead of computed for all.
    Where there are many targets, random combinations of them stand for all.

    Args:
        rows, held_out: two parts of the data.
        prior: [n + 1, m], for the constant in the last row.
        guess: the penalty to begin with, that of a similar problem; with a search it changes the time alone.
        search: whether to look beside the guess; where it is none of the penalties that is done in any case.
        both: whether the solution uses the held-out rows too, once they have chosen the penalty.

    Returns:
        W [n + 1, m] and the penalty; the prior itself and infinity where no fit predicts better.

    Raises:
        FusionError: what is fitted is not finite.
    """
    if not float(held_out.count) or not float(rows.count):
        return prior, float("inf")
    if not all(bool(matrix.isfinite().all()) for part in (rows, held_out) for matrix in (part.xx, part.xy)):
        raise FusionError("the activations of a refit hold NaN or infinite values; check calibration data and parents")
    trial, judge = (part.with_targets(_combined(part.xy)).less(_combined(prior)) for part in (rows, held_out))

    @functools.cache
    def error(index: int) -> float:
        return judge.error(trial.ridge(PENALTIES[index]))

    best = PENALTIES.index(guess) if guess in PENALTIES else len(PENALTIES) // 2
    for step in (-1, 1) if search or guess not in PENALTIES else ():
        while 0 <= best + step < len(PENALTIES) and error(best + step) < error(best):
            best += step
    if error(best) >= 0:
        return prior, float("inf")
    used = rows + held_out if both else rows
    return prior + used.less(prior).ridge(PENALTIES[best]), PENALTIES[best]


def fit_numbers(
    rows: Rows, held_out: Rows, prior: Tensor, *, both: bool = True, reduce: Reduce = lambda sums: None
) -> Fitted:
    """As `fit_softmax`, to numbers [rows, m] in the place of probabilities: ridge regression shrunk towards `prior`.

    What it finds is a share of the numbers' variance in the place of nats.
    """
    parts = [NormalEquations.zeros(len(prior) - 1, prior.shape[1], device=prior.device) for _ in range(2)]
    squares = torch.zeros((), dtype=torch.float64, device=prior.device)  # of those held out
    for part, (equations, given) in enumerate(zip(parts, (rows, held_out), strict=True)):
        for x, y, weight in given():
            equations.update(x, y, weight=weight)
            squares += part * weight * y.double().square().sum()
    reduce([*(tensor for part in parts for tensor in part.tensors()), squares])
    fitted, judge = parts
    energy, mean = squares / judge.count, judge.xy[-1] / judge.count
    variance = float(energy - mean.square().sum()) or 1.0

    def left(matrix: Tensor) -> float:
        return (judge.error(matrix) + float(energy)) / variance

    alone, penalty = fit_ridge(fitted, judge, prior, both=False)
    matrix = fit_ridge(fitted, judge, prior, penalty)[0] if both else alone
    return Fitted(matrix, penalty, left(prior), left(alone))


def _combined(targets: Tensor) -> Tensor:
    """[n, m] -> at most COMBINATIONS columns, which are sums of all with random signs, always the same ones."""
    if targets.shape[1] <= COMBINATIONS:
        return targets
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (targets.shape[1], COMBINATIONS), generator=generator) * 2 - 1
    combined: Tensor = targets @ (signs.to(targets) / COMBINATIONS**0.5)
    return combined
