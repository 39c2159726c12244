"""What is measured of a fused model beside its parents, or of models alone, whole and on the test data."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from fusionpl.datamodules.base import FixedSplits, calibration_of
from fusionpl.errors import FusionError
from fusionpl.evaluation.bench import Bench, Cost, Load, Made
from fusionpl.evaluation.joint import JointBench
from fusionpl.evaluation.matched import matched_axes
from fusionpl.evaluation.rows import HEAD_FITTED, MODEL, PARENT, best_parent
from fusionpl.fusion.config import mixing_weights
from fusionpl.fusion.heads import fit_head
from fusionpl.fusion.result import FusionResult
from fusionpl.fusion.voting import votings_of
from fusionpl.models.classes import missing_classes

UNMEASURED = "nothing was measured: the data are so few that all of them were used for calibration"
Alternative = Callable[[int, Sequence[nn.Module]], Made]


@dataclass(frozen=True)
class Beside:
    """What a fused model is measured beside.

    Attributes:
        parents: name -> gives the parent.
        others: row -> a model to compare with, and its cost.
        alternatives: row -> what makes a model of the best parent, by its index, and of all parents.
    """

    parents: Mapping[str, Load]
    others: Mapping[str, Made] = field(default_factory=dict)
    alternatives: Mapping[str, Alternative] = field(default_factory=dict)


def measure(bench: Bench, result: FusionResult, cost: Cost, beside: Beside, *, full: bool = True) -> None:
    """Measures parents, their ensemble, the plain average, other fusions, alternatives and the fused model.

    Causal language models go on with a prompt, too. Where the data leave nothing to test on, the report gets a note and
    no rows.

    Args:
        bench: whose report gets the rows.
        result: of the fusion.
        cost: of the fusion.
        beside: parents, and what else to compare with.
        full: adds the curves, and what is made of aligned parents: their average and the maps (with strategy joint no
            parent is a model of its own there).
    """
    report = bench.report
    if bench.empty:
        print(UNMEASURED)
        report.notes.append(UNMEASURED)
        return
    plain, trained = _measure_parents(bench, result, beside)
    if plain is not None:
        bench.add("vanilla", [plain], prompted=True)
    if full:
        _measure_stretched(bench, result, list(beside.parents))
    for name, made in {**beside.others, **trained}.items():
        bench.add_made(name, made)
    aligned = full and result.config.strategy == "transport"
    refits = result.config.refit.method != "none"
    if aligned and (refits or result.refitted is not None):
        bench.add("aligned average", [result.average()])
    if refits and result.refitted is not None:
        bench.add("refitted", [result.refitted])
    bench.add_made("fused", (result.model, cost))
    if aligned:
        report.axes = matched_axes(result.maps)
    report.blocks = {one.parent: (one.alike, one.path) for one in result.matchings if one.alike is not None}
    # The curve of a regression has no accuracy to show, and heads that know other classes have no straight way between.
    apart = any(missing_classes(parent.network.original.module) is not None for parent in result.parents)
    if full and not apart and report.rows[0].accuracy is not None:
        report.barrier = bench.curves(_ends(result, list(beside.parents.values()), averaged=plain is not None))


def measure_models(bench: Bench, models: Mapping[str, Load]) -> None:
    """Measures models of one task, their ensemble, and where they have one shape their plain average and the way from
    the second to the first.

    Args:
        bench: whose report gets the rows.
        models: name -> gives the model.

    Raises:
        FusionError: there is nothing to test on.
    """
    loaded = {name: load() for name, load in models.items()}  # first: images are brought to their size
    if bench.empty:
        raise FusionError(f"'{bench.data.config.path}' has too few data to measure on; give more with --data.path")
    plain = bench.add_models(MODEL, loaded)
    if plain is not None:
        bench.add("vanilla", [plain], prompted=True)
        apart = any(missing_classes(model) is not None for model in loaded.values())  # see `measure`
        if not apart and bench.report.rows[0].accuracy is not None:
            first, second, *_ = models.values()
            bench.report.barrier = bench.curves({"vanilla": (second, first)})


def _measure_parents(bench: Bench, result: FusionResult, beside: Beside) -> tuple[nn.Module | None, dict[str, Made]]:
    """Adds what needs all parents in memory; returns their plain average, where they have one shape, and what the
    alternatives make, which stand further down."""
    parents = {name: load() for name, load in beside.parents.items()}
    plain = bench.add_models(PARENT, parents, result.config.weights)
    chosen = best_parent(bench.report.rows)
    assert chosen is not None
    row = chosen[0].name
    models = list(parents.values())
    best = list(parents).index(row.removeprefix(PARENT))
    if isinstance(bench, JointBench):
        best = bench.add_bounds(parents, best, calibration_of(bench.data, result.config.calibration), result)
    trained = {name: make(best, models) for name, make in beside.alternatives.items()}
    fitted = None if isinstance(bench, JointBench) else _head_fitted(bench.data, models, best, result)
    parents.clear()  # before more is loaded
    models.clear()
    if fitted is not None:
        bench.add_made(f"{HEAD_FITTED}{row}", fitted, prompted=False, validation=bench.validated(fitted[0]))
    return plain, trained


def _measure_stretched(bench: Bench, result: FusionResult, names: Sequence[str]) -> None:
    """Adds parents that were brought to the fused model's depth."""
    for matching in result.matchings:
        if matching.reduced:
            parent = result.parents[names.index(matching.parent)]
            bench.add(f"{matching.parent} in {result.binding.depth} blocks", [parent.network.whole()])


def _head_fitted(data: FixedSplits, parents: Sequence[nn.Module], best: int, result: FusionResult) -> Made | None:
    """The best parent, its head alone fitted to what all predict on the calibration data; None where it has none."""
    started, votings = time.monotonic(), votings_of(parents, mixing_weights(result.config.weights, len(parents)))
    calibration = calibration_of(data, result.config.calibration)
    fitted = fit_head(parents[best], parents, votings, calibration, family=result.binding.family)
    return (fitted[0], Cost("unlabelled data", time.monotonic() - started)) if fitted else None


def _ends(result: FusionResult, parents: Sequence[Load], *, averaged: bool) -> dict[str, tuple[Load, Load]]:
    """Curve -> the parents between which it goes: another one and the anchor, as they are and aligned."""
    other = next(index for index in range(len(parents)) if index != result.anchor)
    ends: dict[str, tuple[Load, Load]] = {}
    if averaged:
        ends["vanilla"] = parents[other], parents[result.anchor]
    if result.config.strategy == "transport":
        ends["aligned"] = partial(result.aligned_parent, other), partial(result.aligned_parent, result.anchor)
    return ends
