"""The loss barrier: how the straight line between two models in weight space behaves."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusionpl.errors import FusionError
from fusionpl.evaluation.metrics import evaluate


@dataclass(frozen=True)
class Curve:
    """Accuracy and loss of lambda A + (1 - lambda) B; `lambdas` rise from 0 (B) to 1 (A)."""

    lambdas: tuple[float, ...]
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]

    @property
    def loss_excess(self) -> tuple[float, ...]:
        """At each lambda, the loss above the straight line between the two ends."""
        return tuple(value - line for value, line in zip(self.loss, self._line(self.loss), strict=True))

    @property
    def accuracy_drop(self) -> tuple[float, ...]:
        """At each lambda, the accuracy missing to the straight line between the two ends."""
        return tuple(line - value for value, line in zip(self.accuracy, self._line(self.accuracy), strict=True))

    @property
    def barrier(self) -> float:
        """B = max_l [L(l A + (1-l) B) - (l L(A) + (1-l) L(B))], at least 0 (Frankle et al., 1912.05671)."""
        return _largest(self.loss_excess)

    @property
    def accuracy_barrier(self) -> float:
        """The same for accuracy: the largest drop below the straight line, in [0, 1]."""
        return _largest(self.accuracy_drop)

    def as_dict(self) -> dict[str, Any]:
        """The curve and its barriers for JSON; null for what is not a finite number."""
        figures = {"accuracy": self.accuracy, "loss": self.loss}
        return {
            "barrier": _number(self.barrier),
            "accuracy_barrier": _number(self.accuracy_barrier),
            "lambdas": list(self.lambdas),
            **{name: [_number(value) for value in values] for name, values in figures.items()},
        }

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Curve":
        """A curve that `as_dict` wrote."""
        columns = (values[key] for key in ("lambdas", "accuracy", "loss"))
        return cls(*(tuple(math.nan if value is None else value for value in column) for column in columns))

    def _line(self, values: Sequence[float]) -> list[float]:
        return [at * values[-1] + (1 - at) * values[0] for at in self.lambdas]


def _number(value: float) -> float | None:
    """JSON has no NaN or infinity."""
    return value if math.isfinite(value) else None


def _largest(values: Sequence[float]) -> float:
    """The maximum, where NaN (a model that broke on the way) is larger than any number."""
    return max(values, key=lambda value: (value != value, value))


def interpolation(
    template: nn.Module,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    batches: Iterable[Mapping[str, Any]],
    points: int = 11,
) -> Curve:
    """Evaluates models on the straight line from B (lambda 0) to A (lambda 1).

    Args:
        template: a model whose architecture both states fit; it is copied, never changed.
        state_a: A's `state_dict()`; tensors that are not floating point (counters) are taken from A.
        state_b: B's `state_dict()`, same names and shapes.
        batches: labelled batches that can be iterated `points` times.
        points: how many evenly spaced lambdas, both ends included; at least 2.

    Raises:
        FusionError: the two states differ in a tensor's name or shape; the tensor is named.
        ValueError: fewer than 2 points.
    """
    if points < 2:
        raise ValueError(f"an interpolation needs at least 2 points, not {points}")
    for name in sorted(state_a.keys() ^ state_b.keys()):
        raise FusionError(f"cannot interpolate: '{name}' is in only one of the two models")
    for name, a in state_a.items():
        if a.shape != state_b[name].shape:
            shapes = f"{tuple(a.shape)} and {tuple(state_b[name].shape)}"
            raise FusionError(f"cannot interpolate: '{name}' has shapes {shapes}; align the models first")
    model = copy.deepcopy(template)
    lambdas = [index / (points - 1) for index in range(points)]
    measured = []
    for weight in lambdas:
        model.load_state_dict({name: _between(state_a[name], state_b[name], weight) for name in state_a})
        measured.append(evaluate(model, batches))
    return Curve(tuple(lambdas), tuple(each["accuracy"] for each in measured), tuple(each["loss"] for each in measured))


def _between(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """weight a + (1 - weight) b, exact at both ends."""
    return torch.lerp(b.detach().to(a), a.detach(), weight) if a.is_floating_point() else a
