"""Softmax regression to given probabilities: the last linear map of a classifier, fitted to what others predict.

For inputs x with a constant 1 behind them and probabilities p, the W that minimises

    mean of -sum_c p_c log softmax(W^T x)_c  +  penalty * e / 2 * |W - W_0|^2,    e the mean energy of the inputs.

It is convex, so that no seed and no learning rate decide anything. Several labels of one sample are a logistic
regression each: `sigmoid` in the place of `softmax`. Source: Hinton et al., "Distilling the Knowledge in a Neural
Network", 2015, for fitting to predicted probabilities; L-BFGS with the line search of torch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Link = Literal["softmax", "sigmoid"]
Rows = Callable[[], Iterable[tuple[Tensor, Tensor]]]
Reduce = Callable[[Sequence[Tensor]], None]

# In units of the inputs' mean energy, from the strongest on.
PENALTIES = (1.0, 0.1, 1e-2, 1e-3, 1e-4)
STEPS, LAST_STEPS = 15, 40  # of L-BFGS, for each penalty from what the one before gave, and with the one that is chosen
HISTORY = 8
TOLERANCE = 1e-6  # of the largest entry of the gradient
HELD = 2**24  # entries of inputs and probabilities up to which they are computed once
IN_FLOAT64 = 2**20  # entries of W up to which steps are added up in float64; rows are always multiplied in float32


@dataclass(frozen=True)
class Fitted:
    """What a fit found.

    Attributes:
        matrix: [n + 1, classes].
        penalty: the one that predicts the held-out rows best; infinity where no fit predicts better than the prior.
        before, after: the mean divergence of the held-out rows from what was given, in nats, with the prior and with
            what was fitted to the other rows.
    """

    matrix: Tensor
    penalty: float
    before: float
    after: float


def log_mean(logits: Sequence[Tensor], weights: Sequence[float], link: Link = "softmax") -> Tensor:
    """The log of the weighted mean of the probabilities of logits [..., classes], float32; of a sigmoid the mean
    probabilities themselves would do, but one type is enough."""
    log_of = functional.logsigmoid if link == "sigmoid" else lambda one: one.log_softmax(-1)
    each = [
        log_of(one.float()) + float(torch.tensor(weight).log()) for one, weight in zip(logits, weights, strict=True)
    ]
    return torch.stack(each).logsumexp(0)


def fit_softmax(
    rows: Rows,
    held_out: Rows,
    prior: Tensor,
    *,
    link: Link = "softmax",
    both: bool = True,
    reduce: Reduce = lambda sums: None,
) -> Fitted:
    """Softmax regression shrunk towards `prior`, with the penalty that predicts the held-out rows best.

    The rows are gone through anew for each step, so that memory stays flat.

    Args:
        rows, held_out: give inputs [rows, n], without the constant, and probabilities [rows, classes], batch by batch.
        prior: [n + 1, classes], for the constant in the last row.
        link: what makes probabilities of W^T x.
        both: whether the solution uses the held-out rows too, once they have chosen the penalty.
        reduce: adds up tensors over the processes, in place.
    """
    kind = torch.float64 if prior.numel() <= IN_FLOAT64 else torch.float32
    start, problem = prior.to(kind), _Problem(rows, prior, link, reduce)
    judge = _Problem(held_out, prior, link, reduce)
    if not problem.count or not judge.count:
        return Fitted(prior, float("inf"), float("nan"), float("nan"))
    before = judge.loss(start)
    best, penalty, after, matrix = start, float("inf"), before, start
    for candidate in PENALTIES:
        matrix = problem.minimised(matrix, start, candidate)
        loss = judge.loss(matrix)
        if not loss < after:
            break
        best, penalty, after = matrix, candidate, loss
    if both and penalty < float("inf"):

        def together() -> Iterable[tuple[Tensor, Tensor]]:
            yield from rows()
            yield from held_out()

        best = _Problem(together, prior, link, reduce).minimised(best, start, penalty, LAST_STEPS)
    entropy = judge.entropy
    return Fitted(best.to(prior), penalty, before - entropy, after - entropy)


class _Problem:
    """The mean cross-entropy over some rows, and its gradient; the same on all ranks."""

    def __init__(self, rows: Rows, prior: Tensor, link: Link, reduce: Reduce) -> None:
        self._rows, self._link, self._reduce = rows, link, reduce
        self._held: list[tuple[Tensor, Tensor]] | None = []  # all rows, as long as they are few
        sums = prior.new_zeros(3, dtype=torch.float64)  # rows, energy of the inputs, entropy of the targets
        size = 0
        for x, p in rows():
            size += x.numel() + p.numel()
            self._held = None if self._held is None or size > HELD else [*self._held, (x.float(), p)]
            own = torch.special.entr(p).double().sum()
            own = own + torch.special.entr(1 - p).double().sum() if link == "sigmoid" else own
            sums += torch.stack([sums.new_full((), len(x)), x.double().square().mean(-1).sum(), own])
        if self._held:
            xs, ps = zip(*self._held, strict=True)
            self._held = [(torch.cat(xs), torch.cat(ps))]
        reduce([sums])
        self.count = float(sums[0])
        self._energy, self.entropy = (float(one) / max(self.count, 1.0) for one in sums[1:])

    def loss(self, matrix: Tensor) -> float:
        """The mean cross-entropy of W [n + 1, classes]."""
        total = matrix.new_zeros((), dtype=torch.float64)
        for x, p in self._rows() if self._held is None else self._held:
            total += self._judged(x, p, matrix.float())[0]
        self._reduce([total])
        return float(total) / self.count

    def minimised(self, matrix: Tensor, prior: Tensor, penalty: float, steps: int = STEPS) -> Tensor:
        """The W that minimises the loss and the penalty, from `matrix` on."""
        found, strength = matrix.clone(), penalty * self._energy
        optimizer = torch.optim.LBFGS(
            [found], max_iter=steps, history_size=HISTORY, tolerance_grad=TOLERANCE, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            total, gradient, now = found.new_zeros((), dtype=torch.float64), torch.zeros_like(found), found.float()
            for x, p in self._rows() if self._held is None else self._held:
                loss, error = self._judged(x, p, now)
                total += loss
                gradient[:-1] += x.to(error).T @ error
                gradient[-1] += error.sum(0)
            self._reduce([total, gradient])
            away = found - prior
            found.grad = gradient / self.count + strength * away
            return (total / self.count + 0.5 * strength * away.double().square().sum()).to(found)

        with torch.no_grad():
            optimizer.step(closure)
        return found

    def _judged(self, x: Tensor, p: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the cross-entropy over rows, and its derivatives by the outputs, [rows, classes]."""
        outputs, p = torch.addmm(matrix[-1], x.to(matrix), matrix[:-1]), p.to(matrix)
        if self._link == "sigmoid":
            loss = functional.binary_cross_entropy_with_logits(outputs, p, reduction="sum")
            return loss.double(), outputs.sigmoid() - p
        found = outputs.log_softmax(-1)
        return -(p * found).sum().double(), found.exp() - p
