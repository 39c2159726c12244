"""What fuse.py measures: a fused model, its parents, and what it is compared with, whole models on the test data."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fusionpl.datamodules import FixedSplits
from fusionpl.evaluation import (
    Curve,
    Needs,
    Report,
    Row,
    best_parent,
    continuation,
    evaluate,
    evaluate_samples,
    flops,
    interpolation,
    judged,
    parameters,
)
from fusionpl.fusion import FusionResult, mixing_weights, vanilla

Depth = Literal["full", "rows", "none"]
CURVE_BATCHES = 4


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
Alternative = Callable[[nn.Module, Sequence[nn.Module]], Made]


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
        alternatives: row -> what makes a model of the best parent, which is its own, and of all parents.
        data: its test split decides the rows, its validation split the best parent and the curves.
        device: where models are run.
        settings: shown in the report.
        depth: `full` adds the curves, and what is made of aligned parents: their average and the maps (with strategy
            joint no parent is a model of its own there); `none` measures nothing.
    """
    report = Report(config=settings, notes=[*result.warnings, *result.notes])
    if depth == "none":
        return report
    batches, prompt = list(data.test_dataloader()), data.prompt
    report.prompt = "" if prompt is None else data.tokenizer.decode(prompt)

    def add(name: str, models: Sequence[nn.Module], **more: Any) -> None:
        models = [model.to(device) for model in models]
        measured, outcomes = evaluate_samples(models, batches)
        metrics: dict[str, Any] = {**measured, **data.derived(measured), **more}
        row = Row(
            name=name,
            parameters=sum(parameters(model) for model in models),
            flops=sum(flops(model, batches[0]) for model in models),
            **metrics,
        )
        report.add(row, outcomes)
        if prompt is not None and name in told:
            report.continuations[name] = continuation(models[0], data.tokenizer, prompt)

    def add_made(name: str, model: nn.Module, cost: Cost) -> None:
        add(name, [model], needs=cost.needs, seconds=round(cost.seconds, 1), steps=cost.steps)

    told = {*(f"parent {name}" for name in names), "vanilla", *others, *alternatives, "fused"}
    models = {name: load(name) for name in names}
    plain = vanilla(list(models.values()), mixing_weights(result.config.weights, len(models)))  # where float64 is
    for name, model in models.items():
        add(f"parent {name}", [model], validation=_validated(model.to(device), data))
    add("ensemble", list(models.values()))
    chosen = best_parent(report.rows)
    assert chosen is not None
    best = chosen[0].name.removeprefix("parent ")
    trained = {name: make(load(best), list(models.values())) for name, make in alternatives.items()}
    models.clear()
    if plain is not None:
        add("vanilla", [plain])
    for one in result.matchings:
        if one.reduced and depth == "full":
            parent = result.parents[names.index(one.parent)]
            add(f"{one.parent} in {result.binding.depth} blocks", [parent.network.whole()])
    for name, made in {**others, **trained}.items():
        add_made(name, *made)
    aligned = depth == "full" and result.config.strategy == "transport"
    if aligned and (result.config.refit.method != "none" or result.refitted is not None):
        add("aligned average", [result.average()])
    if result.refitted is not None and result.config.refit.method != "none":
        add("refitted", [result.refitted])
    add_made("fused", result.model, cost)
    if aligned:
        report.maps = dict(_shown_maps(result))
    report.blocks = {one.parent: (one.alike, one.path) for one in result.matchings if one.alike is not None}
    if depth == "full" and report.rows[0].accuracy is not None:  # the curve of a regression has no accuracy to show
        seen = list(islice(data.val_dataloader(), CURVE_BATCHES))
        report.barrier = _curves(names, load, result, seen, device, plain)
    return report


def _validated(model: nn.Module, data: FixedSplits) -> float | None:
    """The figure by which the best parent is chosen; None without validation data."""
    if not len(data.dataset("validation")):  # type: ignore[arg-type]  # all have a length
        return None
    return judged(evaluate(model, data.val_dataloader()))


def card(report: Report, names: Sequence[str], strategy: str) -> str:
    """The model card of a fused model."""
    how = {
        "transport": "Aligned with optimal transport and averaged by fusionpl "
        "([Transformer Fusion with Optimal Transport](https://arxiv.org/abs/2310.05719)).",
        "joint": "Fitted by fusionpl to one residual stream that holds the parents' streams.",
    }
    return f"# Fused from {', '.join(names)}\n\n{how[strategy]}\n\n" + report.markdown().partition("\n")[2].lstrip()


def _curves(
    names: Sequence[str],
    load: Callable[[str], nn.Module],
    result: FusionResult,
    batches: Iterable[Mapping[str, Any]],
    device: torch.device,
    plain: nn.Module | None,
) -> dict[str, Curve]:
    """The way from the anchor to the first other parent, as it is (if the widths agree), and aligned where it is."""
    other = next(index for index in range(len(names)) if index != result.anchor)
    ends: dict[str, Callable[[int], nn.Module]] = {}
    if plain is not None:
        ends["vanilla"] = lambda index: load(names[index])
    if result.config.strategy == "transport":
        ends["aligned"] = result.aligned_parent
    found = {}
    for name, end in ends.items():
        a, b = (end(index).to(device) for index in (other, result.anchor))
        found[name] = interpolation(a, a.state_dict(), b.state_dict(), batches)
    return found


def _shown_maps(result: FusionResult) -> Iterator[tuple[str, Tensor]]:
    """A few maps that tell the story: the embedding, one block in the middle, the last of the stream."""
    names = [name for name in result.maps if name.startswith("stem.")]
    sections = list(dict.fromkeys(name.rpartition(".")[0] for name in result.maps if not name.startswith("stem.")))
    middle = sections[(len(sections) - 1) // 2]
    names = [*names[-1:], *(f"{middle}.{axis}" for axis in ("q", "v", "attn", "ffn")), f"{sections[-1]}.out"]
    for name in names:
        if name in result.maps:
            yield name, result.maps[name].plan
