"""Puts models to the test, a row of a report each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fusionpl.datamodules.base import FixedSplits
from fusionpl.evaluation.barrier import Curve, interpolation
from fusionpl.evaluation.continuation import continuation
from fusionpl.evaluation.cost import flops, parameters
from fusionpl.evaluation.metrics import evaluate, evaluate_samples
from fusionpl.evaluation.outcomes import Outcomes
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import Needs, Row, judged
from fusionpl.evaluation.scores import Scores, in_row
from fusionpl.fusion.average import vanilla
from fusionpl.fusion.config import mixing_weights
from fusionpl.fusion.heads import SideBySide
from fusionpl.models.classes import missing_classes
from fusionpl.models.labels import CLASSES

CURVE_BATCHES = 4
Load = Callable[[], nn.Module]  # gives a model, made anew at each call


@dataclass(frozen=True)
class Cost:
    """What a model took beside its parents.

    Attributes:
        needs: the data; None for none.
        seconds: wall time.
        steps: optimiser steps, of what is trained for a given time.
    """

    needs: Needs | None
    seconds: float
    steps: int | None = None


Made = tuple[nn.Module, Cost]


class Bench:
    """Where models of one task are measured that have outputs to judge; see `EmbeddingBench` for the others.

    Args:
        report: gets the rows.
        data: its test split decides them, its validation split the best model and the curves.
        device: where models are run.
    """

    def __init__(self, report: Report, data: FixedSplits, device: torch.device) -> None:
        self.report, self.data, self._device = report, data, device

    @property
    def empty(self) -> bool:
        """Whether there is nothing to test on."""
        return not all(self.data.sizes("test"))

    def add(self, name: str, models: Sequence[nn.Module], *, prompted: bool = False, **more: Any) -> None:
        """Adds a row for a model, or for the ensemble of several.

        Args:
            name: of the row.
            models: one or more, which are moved to the device.
            prompted: whether a causal language model goes on with a prompt, too.
            more: of the row, besides what is measured.
        """
        self._measure(name, [model.to(self._device) for model in models], **more)
        prompt = self.data.prompt
        if prompted and prompt is not None:
            self.report.prompt = self.data.tokenizer.decode(prompt)
            self.report.continuations[name] = continuation(models[0], self.data.tokenizer, prompt)

    def add_made(self, name: str, made: Made, *, prompted: bool = True, **more: Any) -> None:
        """Adds a row with what the model took."""
        model, cost = made
        took: dict[str, Any] = {"needs": cost.needs, "seconds": round(cost.seconds, 1), "steps": cost.steps}
        self.add(name, [model], prompted=prompted, **took, **more)

    def add_models(
        self, kind: str, models: Mapping[str, nn.Module], weights: Sequence[float] | None = None
    ) -> nn.Module | None:
        """Adds rows for models and, where there are several, their ensemble; returns their plain average, where they
        have one shape.

        Args:
            kind: what the names of the rows begin with.
            models: by their names.
            weights: of the average.
        """
        each = list(models.values())
        plain = vanilla(each, mixing_weights(weights, len(each))) if len(each) > 1 else None  # where float64 is
        for name, model in models.items():
            self.add(f"{kind}{name}", [model], prompted=True, validation=self.validated(model))
        if len(each) > 1:
            self.add("ensemble", each)
        return plain

    def curves(self, ends: Mapping[str, tuple[Load, Load]]) -> dict[str, Curve]:
        """The straight way between two models, on some of the validation data: name -> what gives the two."""
        batches = list(islice(self.data.val_dataloader(), CURVE_BATCHES))
        curves = {}
        for name, makers in ends.items():
            a, b = (make().to(self._device) for make in makers)
            curves[name] = interpolation(a, a.state_dict(), b.state_dict(), batches)
        return curves

    def validated(self, model: nn.Module) -> float | None:
        """The figure by which the best model is chosen; None without validation data."""
        if not all(self.data.sizes("validation")):
            return None
        return judged(evaluate(model.to(self._device), self.data.val_dataloader()))

    def _measure(self, name: str, models: Sequence[nn.Module], **more: Any) -> None:
        """Adds a row for models that are where they are run."""
        measured, outcomes = evaluate_samples(models, self._batches)
        figures: dict[str, Any] = {**measured, **self.data.derived(measured), **more}
        self._put(name, models, outcomes, **figures)

    @cached_property
    def _batches(self) -> list[Any]:
        return list(self.data.test_dataloader())

    def _put(
        self,
        name: str,
        models: Sequence[nn.Module],
        outcomes: Outcomes,
        tasks: Mapping[str, Scores] | None = None,
        **figures: Any,
    ) -> None:
        """Adds a row, with what the models cost, and the figure of each task."""
        if missing_to(models) is not None and self.data.kind == CLASSES:
            del figures["loss"]  # which has no end where a class is impossible to a model
        row = Row(
            name,
            **in_row(tasks or {}),
            parameters=sum(parameters(model) for model in models),
            flops=sum(flops(model, self._batches[0]) for model in models),
            **figures,
        )
        self.report.add(row, outcomes, tasks)


def missing_to(models: Sequence[nn.Module]) -> Tensor | None:
    """The classes that one model alone does not know, bool [classes]; None where it knows all, or of several models."""
    alone = len(models) == 1 and not isinstance(models[0], SideBySide)
    return missing_classes(models[0]) if alone else None
