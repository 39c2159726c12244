"""What commands measure: a fused model beside its parents, or models alone, whole and on the test data."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.calibration.kept import Kept, budget
from fusionpl.cli.fuse import Depth
from fusionpl.datamodules.base import FixedSplits
from fusionpl.errors import FusionError
from fusionpl.evaluation import continuation
from fusionpl.evaluation.barrier import Curve, interpolation
from fusionpl.evaluation.cost import flops, parameters
from fusionpl.evaluation.matched import MatchedAxis
from fusionpl.evaluation.metrics import evaluate, evaluate_samples
from fusionpl.evaluation.neighbours import agreement, embeddings, probe, similarities
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import HEAD_FITTED, MODEL, PARENT, Needs, Row, best_parent, judged
from fusionpl.fusion.average import vanilla
from fusionpl.fusion.config import mixing_weights
from fusionpl.fusion.heads import fit_head
from fusionpl.fusion.result import FusionResult
from fusionpl.fusion.voting import Voting
from fusionpl.models.labels import CLASSES

CURVE_BATCHES = 4
COMPARED = 2000  # samples whose neighbours are compared
PROBED = 2000  # samples that a linear probe is fitted to
UNMEASURED = "nothing was measured: the data are so few that all of them were used for calibration"


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
Alternative = Callable[[int, Sequence[nn.Module]], Made]


def measure(
    names: Sequence[str],
    load: Callable[[str], nn.Module],
    result: FusionResult,
    cost: Cost,
    others: Mapping[str, Made],
    alternatives: Mapping[str, Alternative],
    data: FixedSplits,
    device: torch.device,
    settings: dict[str, Any],
    depth: Depth = "full",
) -> Report:
    """Measures parents, their ensemble, the plain average, other fusions, alternatives and the fused model.

    Causal language models go on with a prompt, too.

    Args:
        names: of the parents.
        load: gives a parent by its name.
        result: of the fusion; its warnings and notes are the report's notes.
        cost: of the fusion.
        others: row -> a model to compare with, and its cost.
        alternatives: row -> what makes a model of the best parent, by its index, and of all parents.
        data: its test split decides the rows, its validation split the best parent and the curves.
        device: where models are run.
        settings: shown in the report.
        depth: `full` adds the curves, and what is made of aligned parents: their average and the maps (with strategy
            joint no parent is a model of its own there); `none` measures nothing.

    Returns:
        The report; without rows, and with a note and a printed line, where the data leave nothing to test on.
    """
    report = Report(config=settings, notes=[*result.warnings, *result.notes])
    if depth != "none" and not len(data.dataset("test")):  # type: ignore[arg-type]  # all have a length
        print(UNMEASURED)
        report.notes.append(UNMEASURED)
        return report
    if depth == "none":
        return report
    prompted = {*(f"{PARENT}{name}" for name in names), "vanilla", *others, *alternatives, "fused"}
    bench = _bench(report, data, device, prompted)
    models, plain = bench.add_models(PARENT, {name: load(name) for name in names}, result.config.weights)
    chosen = best_parent(report.rows)
    assert chosen is not None
    best = names.index(chosen[0].name.removeprefix(PARENT))
    trained = {name: make(best, models) for name, make in alternatives.items()}
    fitted = bench.head_fitted(models[best], models, result)
    models.clear()
    if fitted is not None:
        bench.add_made(f"{HEAD_FITTED}{chosen[0].name}", *fitted)
    if plain is not None:
        bench.add("vanilla", [plain])
    for matching in result.matchings:
        if matching.reduced and depth == "full":
            parent = result.parents[names.index(matching.parent)]
            bench.add(f"{matching.parent} in {result.binding.depth} blocks", [parent.network.whole()])
    for name, made in {**others, **trained}.items():
        bench.add_made(name, *made)
    aligned = depth == "full" and result.config.strategy == "transport"
    if aligned and (result.config.refit.method != "none" or result.refitted is not None):
        bench.add("aligned average", [result.average()])
    if result.refitted is not None and result.config.refit.method != "none":
        bench.add("refitted", [result.refitted])
    bench.add_made("fused", result.model, cost)
    if aligned:
        drawn = _drawn(result)
        report.axes = {name: MatchedAxis.of(transport, drawn=name in drawn) for name, transport in result.maps.items()}
    report.blocks = {
        matching.parent: (matching.alike, matching.path) for matching in result.matchings if matching.alike is not None
    }
    if depth == "full" and report.rows[0].accuracy is not None:  # the curve of a regression has no accuracy to show
        other = next(index for index in range(len(names)) if index != result.anchor)
        ends: dict[str, tuple[Callable[[], nn.Module], ...]] = {}
        if plain is not None:
            ends["vanilla"] = tuple(partial(load, names[index]) for index in (other, result.anchor))
        if result.config.strategy == "transport":
            ends["aligned"] = tuple(partial(result.aligned_parent, index) for index in (other, result.anchor))
        report.barrier = bench.curves(ends)
    return report


def measure_models(
    names: Sequence[str],
    load: Callable[[str], nn.Module],
    data: FixedSplits,
    device: torch.device,
    settings: dict[str, Any],
) -> Report:
    """Measures models of one task, their ensemble, and where they have one shape their plain average and the way from
    the second to the first.

    Args:
        names: of the models.
        load: gives a model by its name.
        data: see `measure`.
        device: where models are run.
        settings: shown in the report.

    Raises:
        FusionError: there is nothing to test on.
    """
    models = {name: load(name) for name in names}  # first: images are brought to their size
    if not len(data.dataset("test")):  # type: ignore[arg-type]  # all have a length
        raise FusionError(f"'{data.config.path}' has too few data to measure on; give more with --data.path")
    report = Report(config=settings)
    bench = _bench(report, data, device, {*(f"{MODEL}{name}" for name in names), "vanilla"})
    _, plain = bench.add_models(MODEL, models, None)
    if plain is not None:
        bench.add("vanilla", [plain])
        if report.rows[0].accuracy is not None:
            report.barrier = bench.curves({"vanilla": tuple(partial(load, name) for name in (names[1], names[0]))})
    return report


class _Bench:
    """Puts models to the test, a row of a report each.

    Args:
        report: gets the rows.
        data: its test split decides them.
        device: where models are run.
        prompted: the rows of language models that go on with a prompt.
    """

    def __init__(self, report: Report, data: FixedSplits, device: torch.device, prompted: set[str]) -> None:
        self._report, self._data, self._device, self._prompted = report, data, device, prompted
        tested = data.test_dataloader()
        some = None if data.pooling is None else max(1, COMPARED // data.evaluation_batch)
        self._batches = list(islice(tested, some))
        report.prompt = "" if data.prompt is None else data.tokenizer.decode(data.prompt)

    def add(self, name: str, models: Sequence[nn.Module], **more: Any) -> None:
        """Adds a row for a model, or for the ensemble of several."""
        models = [model.to(self._device) for model in models]
        measured, outcomes = evaluate_samples(models, self._batches)
        metrics: dict[str, Any] = {**measured, **self._data.derived(measured), **more}
        row = Row(
            name=name,
            parameters=sum(parameters(model) for model in models),
            flops=sum(flops(model, self._batches[0]) for model in models),
            **metrics,
        )
        self._report.add(row, outcomes)
        if self._data.prompt is not None and name in self._prompted:
            self._report.continuations[name] = continuation(models[0], self._data.tokenizer, self._data.prompt)

    def add_made(self, name: str, model: nn.Module, cost: Cost) -> None:
        """Adds a row with what the model took."""
        more = {"validation": self._validated(model)} if name.startswith(HEAD_FITTED) else {}
        self.add(name, [model], needs=cost.needs, seconds=round(cost.seconds, 1), steps=cost.steps, **more)

    def head_fitted(self, model: nn.Module, parents: Sequence[nn.Module], result: FusionResult) -> Made | None:
        """A parent whose head alone is fitted to what all predict on the calibration data; None where it has none."""
        started, config, family = time.monotonic(), result.config, result.binding.family
        voting, options = Voting(mixing_weights(config.weights, len(parents))), config.calibration
        loader = self._data.calibration_dataloader(options.batch_size)
        data = CalibrationSet(loader, options, Kept(budget(options.memory)), whole=True)
        fitted = fit_head(model, parents, voting, data, family=family)
        return (fitted[0], Cost("unlabelled data", time.monotonic() - started)) if fitted else None

    def add_models(
        self, kind: str, models: Mapping[str, nn.Module], weights: Sequence[float] | None
    ) -> tuple[list[nn.Module], nn.Module | None]:
        """Adds rows for models and, where there are several, their ensemble; returns them and their plain average."""
        each = list(models.values())
        plain = vanilla(each, mixing_weights(weights, len(each))) if len(each) > 1 else None  # where float64 is
        for name, model in models.items():
            self.add(f"{kind}{name}", [model], validation=self._validated(model))
        if len(each) > 1:
            self.add("ensemble", each)
        return each, plain

    def curves(self, ends: Mapping[str, Sequence[Callable[[], nn.Module]]]) -> dict[str, Curve]:
        """The straight way between two models, on some of the validation data: name -> what gives the two."""
        batches = list(islice(self._data.val_dataloader(), CURVE_BATCHES))
        curves = {}
        for name, makers in ends.items():
            a, b = (make().to(self._device) for make in makers)
            curves[name] = interpolation(a, a.state_dict(), b.state_dict(), batches)
        return curves

    def _validated(self, model: nn.Module) -> float | None:
        """The figure by which the best model is chosen; None without validation data."""
        if not len(self._data.dataset("validation")):  # type: ignore[arg-type]  # all have a length
            return None
        return judged(evaluate(model.to(self._device), self._data.val_dataloader()))


class _EmbeddingBench(_Bench):
    """The same for encoders without a head: the ensemble is the mean of their similarities, and what all others are
    compared with."""

    _wanted: Tensor | None = None

    def add(self, name: str, models: Sequence[nn.Module], **more: Any) -> None:
        """Adds a row for an encoder, or for the mean of the similarities of several."""
        each = [self._embedded(model.to(self._device), self._batches) for model in models]
        similarity = torch.stack([similarities(embedded) for embedded, _ in each]).mean(0)
        assert self._wanted is not None  # the models come first
        outcomes = agreement(similarity, self._wanted)
        probed = probe(self._fitted(models[0]), each[0]) if len(models) == 1 and self._labelled else None
        row = Row(
            name=name,
            agreement=outcomes.figures["accuracy"],
            probe=probed,
            parameters=sum(parameters(model) for model in models),
            flops=sum(flops(model, self._batches[0]) for model in models),
            **more,
        )
        self._report.add(row, outcomes)

    def add_models(
        self, kind: str, models: Mapping[str, nn.Module], weights: Sequence[float] | None
    ) -> tuple[list[nn.Module], nn.Module | None]:
        """Adds rows for encoders and for all of them together."""
        together = [similarities(self._embedded(model.to(self._device), self._batches)[0]) for model in models.values()]
        self._wanted = torch.stack(together).mean(0)
        return super().add_models(kind, models, weights)

    @property
    def _labelled(self) -> bool:
        return self._data.kind == CLASSES and (self._data.class_names or ()) not in ((), ("",))

    def _embedded(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        assert self._data.pooling is not None
        return embeddings(model, batches, self._data.pooling)

    def _fitted(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        return self._embedded(model, islice(self._data.train_dataloader(), PROBED // self._data.config.batch_size))

    def _validated(self, model: nn.Module) -> float | None:
        """Nothing: there is no figure of one encoder alone."""
        return None


def _bench(report: Report, data: FixedSplits, device: torch.device, prompted: set[str]) -> _Bench:
    kind = _Bench if data.pooling is None else _EmbeddingBench
    return kind(report, data, device, prompted)


def _drawn(result: FusionResult) -> list[str]:
    """A few maps that tell the story: the embedding, one block in the middle, the last of the stream."""
    names = [name for name in result.maps if name.startswith("stem.")]
    sections = list(dict.fromkeys(name.rpartition(".")[0] for name in result.maps if not name.startswith("stem.")))
    middle = sections[(len(sections) - 1) // 2]
    return [*names[-1:], *(f"{middle}.{axis}" for axis in ("q", "v", "attn", "ffn")), f"{sections[-1]}.out"]
