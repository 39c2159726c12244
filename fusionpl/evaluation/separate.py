"""Measures models of one trunk with a head for each parent, each head on its own parent's test data."""

from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.calibration.forward import eval_mode, logits
from fusionpl.datamodules.base import calibration_of
from fusionpl.datamodules.separate import SeparateSplits
from fusionpl.evaluation.bench import Cost, Made
from fusionpl.evaluation.bounds import bounds_of
from fusionpl.evaluation.cost import flops, parameters
from fusionpl.evaluation.matched import matched_axes
from fusionpl.evaluation.measuring import UNMEASURED, Beside
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import ALL_PARENTS, CEILINGS, HEAD_FITTED, PARENT, Row, known
from fusionpl.evaluation.scores import Scores, in_row
from fusionpl.families.binding import bind
from fusionpl.fusion.config import mixing_weights
from fusionpl.fusion.result import FusionResult
from fusionpl.fusion.voting import votings_apart
from fusionpl.models.separate import model_of


class SeparateBench:
    """Where networks are measured that have the heads of all parents side by side.

    Args:
        report: gets the rows.
        data: of each parent.
        device: where models are run.
    """

    def __init__(self, report: Report, data: SeparateSplits, device: torch.device) -> None:
        self.report, self.data, self._device = report, data, device

    def add(self, name: str, network: nn.Module, **more: Any) -> None:
        """Adds a row for a network that answers for all tasks in one pass.

        Args:
            name: of the row.
            network: with all heads.
            more: of the row, besides what is measured.
        """
        network = network.to(self._device)
        tasks = {task: self._scores(network, task, self._test[task]) for task in self.data.own}
        self._put(name, tasks, parameters=parameters(network), flops=self._flops(network), **more)

    def add_made(self, name: str, made: Made, **more: Any) -> None:
        """Adds a row with what the network took."""
        network, cost = made
        self.add(name, network, needs=cost.needs, seconds=round(cost.seconds, 1), steps=cost.steps, **more)

    def add_parents(self, parents: Mapping[str, nn.Module]) -> None:
        """Adds a row for each parent, which answers for its own task, and one for all of them run.

        Args:
            parents: with an output for the heads of all.
        """
        every, sizes, operations = {}, 0, 0
        for name, network in parents.items():
            head, binding = self.data.heads[name], bind(network, self.data.family)
            alone = model_of(network, head, binding).to(self._device)
            every[name] = self._scores(network.to(self._device), name, self._test[name])
            cost = {"parameters": parameters(alone), "flops": self._flops(alone)}
            self._put(f"{PARENT}{name}", {name: every[name]}, validation=self._validated(network, [name]), **cost)
            sizes, operations = sizes + cost["parameters"], operations + cost["flops"]
        self._put(ALL_PARENTS, every, parameters=sizes, flops=operations)

    def add_bounds(
        self, parents: Mapping[str, nn.Module], calibration: CalibrationSet, result: FusionResult
    ) -> int | None:
        """Adds what a fused model lies between: the one parent whose trunk serves all tasks best once each head is
        fitted to what its own parent says, and all trunks side by side with heads that are fitted alike.

        Args:
            parents: with an output for the heads of all, where they are run.
            calibration: the data of each parent.
            result: of the fusion.

        Returns:
            The index of the best trunk; None where they have no head to fit.
        """
        models = list(parents.values())
        votings = votings_apart(result.heads, mixing_weights(result.config.weights, len(models)))
        validated = partial(self._validated, tasks=self.data.own)
        bounds = bounds_of(models, votings, calibration, validated, result.binding.family)
        if bounds is None:
            return None
        row = f"{HEAD_FITTED}{PARENT}{list(parents)[bounds.best]}"
        self.add_made(row, bounds.fitted, validation=bounds.validation)
        if bounds.ceiling is not None:
            self.add_made(CEILINGS, bounds.ceiling)
        return bounds.best

    @cached_property
    def _test(self) -> dict[str, list[Any]]:
        return {name: list(data.test_dataloader()) for name, data in self.data.own.items()}

    def _scores(self, network: nn.Module, task: str, batches: Iterable[Mapping[str, Any]]) -> Scores:
        return Scores.of(*_given(network, self.data.heads[task].columns, batches))

    def _validated(self, network: nn.Module, tasks: Iterable[str]) -> float | None:
        """The mean figure of tasks on their validation data, 0 for one that is not a number, as the correlation of a
        constant; None where one has no data."""
        if not all(self.data.sizes("validation")):
            return None
        network = network.to(self._device)
        figures = [self._scores(network, task, self.data.own[task].val_dataloader()).figure for task in tasks]
        return sum(filter(known, figures)) / len(figures)

    def _flops(self, model: nn.Module) -> int:
        """On a sample of the first parent's, whatever the model is for: sentences of tasks are not equally long."""
        return flops(model, next(iter(self._test.values()))[0])

    def _put(self, name: str, tasks: Mapping[str, Scores], **more: Any) -> None:
        self.report.add(Row(name, **in_row(tasks), **more), tasks=tasks)


def measure_separate(
    bench: SeparateBench, result: FusionResult, cost: Cost, beside: Beside, *, full: bool = True
) -> None:
    """Measures parents, all of them run, the best trunk with all heads fitted, the ceiling, and the fused network.

    There is no plain average: heads that say other things have none. Where the data of one parent leave nothing to test
    on, the report gets a note and no rows.

    Args:
        bench: whose report gets the rows.
        result: of the fusion.
        cost: of the fusion.
        beside: parents, and what else to compare with, all with the heads of all.
        full: adds the maps.
    """
    report = bench.report
    if not all(bench.data.sizes("test")):
        print(UNMEASURED)
        report.notes.append(UNMEASURED)
        return
    parents = {name: load() for name, load in beside.parents.items()}
    bench.add_parents(parents)
    best = bench.add_bounds(parents, calibration_of(bench.data, result.config.calibration), result)
    models = list(parents.values())
    trained = {name: make(best or 0, models) for name, make in beside.alternatives.items()}
    parents.clear()  # before more is loaded
    models.clear()
    for name, made in {**beside.others, **trained}.items():
        bench.add_made(name, made)
    if result.refitted is not None and result.config.refit.method != "none":
        bench.add("refitted", result.refitted)
    bench.add_made("fused", (result.network, cost))
    if full and result.config.strategy == "transport":
        report.axes = matched_axes(result.maps)
    report.blocks = {one.parent: (one.alike, one.path) for one in result.matchings if one.alike is not None}


@torch.inference_mode()
def _given(network: nn.Module, columns: slice, batches: Iterable[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """What a network puts out for all samples, the columns of one head, and the labels."""
    outputs: list[Tensor] = []
    labels: list[Tensor] = []
    with eval_mode(network):
        for batch in batches:
            outputs.append(logits(network, batch)[..., columns].float().cpu())
            labels.append(batch["labels"].cpu())
    return torch.cat(outputs), torch.cat(labels)
