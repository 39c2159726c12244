"""Softmax regression to given probabilities: the last linear map of a classifier, fitted to what others predict.

For inputs x with a constant 1 behind them and probabilities p, the W that minimises

    mean of -sum_c p_c log softmax(W^T x)_c  +  penalty * e / 2 * |W - W_0|^2,    e the mean energy of the inputs.

It is convex, so that no seed and no learning rate decide anything. Several labels of one sample are a logistic
regression each: `sigmoid` in the place of `softmax`. Source: Hinton et al., "Distilling the Knowledge in a Neural
Network", 2015, for fitting to predicted probabilities; L-BFGS with the line search of torch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from fusionpl.transport.products import self_product

Link = Literal["softmax", "sigmoid"]
# Inputs [rows, n], probabilities [rows, classes], and how much each of these rows counts.
Rows = Callable[[], Iterable[tuple[Tensor, Tensor, float]]]
Reduce = Callable[[Sequence[Tensor]], None]

# In units of the inputs' mean energy, from the strongest on.
PENALTIES = (1.0, 0.1, 1e-2, 1e-3, 1e-4)
STEEPEST = 0.25  # the largest curvature of the logistic function
STEPS, LAST_STEPS = 15, 40  # of L-BFGS, for each penalty from what the one before gave, and with the one that is chosen
HISTORY = 8
TOLERANCE = 1e-9  # of the largest entry of the gradient
HELD = 2**24  # entries of inputs and probabilities up to which they are computed once
IN_FLOAT64 = 2**20  # entries of W up to which steps are added up in float64
# Entries of W up to which a head is fitted, and products of rows and W up to which all rows are used: of a decoder of
# many tokens a part, evenly spread, so that a fit takes minutes at most.
LARGEST, MOST = 2**26, 2**35
EXACT = 2**25  # products of rows and W up to which these are computed in float64 too


@dataclass(frozen=True)
class Fitted:
    """The result of a fit.

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


def spread(rows: int, entries: int) -> int:
    """A fit of `rows` rows to a W of `entries` entries uses one row in this many."""
    return max(1, -(-rows * entries // MOST))


def log_mean(logits: Sequence[Tensor], weights: Sequence[float | Tensor], link: Link = "softmax") -> Tensor:
    """The log of the weighted mean of probabilities, float32.

    Args:
        logits: of several models, [..., classes] each.
        weights: one number a model, or one for each of its classes [classes], summing to 1.
        link: what makes probabilities of them.
    """
    log_of = functional.logsigmoid if link == "sigmoid" else partial(torch.log_softmax, dim=-1)
    each = [
        log_of(scores.float()) + torch.as_tensor(weight).to(scores.device, torch.float32).log()
        for scores, weight in zip(logits, weights, strict=True)
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
        rows, held_out: give inputs [rows, n], without the constant, probabilities [rows, classes], and how much each of
            these rows counts, batch by batch.
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

        def together() -> Iterable[tuple[Tensor, Tensor, float]]:
            yield from rows()
            yield from held_out()

        best = _Problem(together, prior, link, reduce).minimised(best, start, penalty, LAST_STEPS)
    entropy = judge.entropy
    return Fitted(best.to(prior), penalty, before - entropy, after - entropy)


class _Problem:
    """The mean cross-entropy over some rows, and its gradient; the same on all ranks."""

    def __init__(self, rows: Rows, prior: Tensor, link: Link, reduce: Reduce) -> None:
        self._rows, self._link, self._reduce = rows, link, reduce
        n = len(prior)
        xx = prior.new_zeros(n, n, dtype=torch.float64)  # of inputs with their constant
        sums = xx.new_zeros(2)  # rows, entropy of the targets
        size = 0
        held: list[tuple[Tensor, Tensor, Tensor]] = []
        for x, p, weight in rows():
            size += x.numel() + p.numel()
            if size <= HELD:
                held.append((x.float(), p, p.new_full((len(p), 1), weight)))
            xx.add_(self_product(_with_constant(x)), alpha=weight)
            own = torch.special.entr(p).double().sum()
            own = own + torch.special.entr(1 - p).double().sum() if link == "sigmoid" else own
            sums[0] += weight * len(x)
            sums[1] += weight * own
        # All rows, as long as they are few.
        self._held = [tuple(map(torch.cat, zip(*held, strict=True)))] if held and size <= HELD else None
        reduce([xx, sums])
        self.count = float(sums[0])
        exact = self._held is not None and self.count * prior.numel() <= EXACT
        self._kind = torch.float64 if exact else torch.float32
        self._products, self.entropy = xx / max(self.count, 1.0), float(sums[1]) / max(self.count, 1.0)
        self._energy = float(self._products.diagonal()[:-1].mean())

    def loss(self, matrix: Tensor) -> float:
        """The mean cross-entropy of W [n + 1, classes]."""
        total = matrix.new_zeros((), dtype=torch.float64)
        for x, p, weight in self._held or self._rows():
            total += self._judged(x, p, weight, matrix.to(self._kind))[0]
        self._reduce([total])
        return float(total) / self.count

    def minimised(self, matrix: Tensor, prior: Tensor, penalty: float, steps: int = STEPS) -> Tensor:
        """The W that minimises the loss and the penalty, from `matrix` on."""
        strength = penalty * self._energy
        # In these coordinates the loss is about as steep in all directions, and few steps lead to its minimum.
        values, vectors = torch.linalg.eigh(self._products)
        scales = (values.clamp_min(0) * STEEPEST + strength).rsqrt()
        turn = ((vectors * scales) @ vectors.T).to(matrix)
        coordinates = torch.linalg.solve(turn, matrix - prior)
        optimizer = torch.optim.LBFGS(
            [coordinates], max_iter=steps, history_size=HISTORY, tolerance_grad=TOLERANCE, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            away = turn @ coordinates
            total, gradient = coordinates.new_zeros((), dtype=torch.float64), torch.zeros_like(coordinates)
            now = (prior + away).to(self._kind)
            for x, p, weight in self._held or self._rows():
                lost, error = self._judged(x, p, weight, now)
                total += lost
                gradient += (_with_constant(x.to(error)).T @ error).to(gradient)
            self._reduce([total, gradient])
            coordinates.grad = turn @ (gradient / self.count + strength * away)
            loss: Tensor = total / self.count + 0.5 * strength * away.double().square().sum()
            return loss.to(coordinates)

        with torch.no_grad():
            optimizer.step(closure)
        best: Tensor = prior + turn @ coordinates
        return best

    def _judged(self, x: Tensor, p: Tensor, weight: Tensor | float, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the cross-entropy over rows, and its derivatives by the outputs, [rows, classes]."""
        outputs, p = torch.addmm(matrix[-1], x.to(matrix), matrix[:-1]), p.to(matrix)
        weight = weight.to(p) if isinstance(weight, Tensor) else weight
        if self._link == "sigmoid":
            loss = weight * functional.binary_cross_entropy_with_logits(outputs, p, reduction="none")
            return loss.sum().double(), weight * (outputs.sigmoid() - p)
        log_probabilities: Tensor = outputs.log_softmax(-1)
        return -(weight * p * log_probabilities).sum().double(), weight * (log_probabilities.exp() - p)


def _with_constant(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
