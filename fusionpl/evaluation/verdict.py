"""Whether a fused model is worth having: judged beside its best parent, which its user has for nothing, or that parent
with its head alone fitted to the ensemble, which takes seconds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fusionpl.evaluation.outcomes import SHARES, Difference, Metric, Outcomes
from fusionpl.evaluation.rows import (
    HEAD_FITTED,
    MODEL,
    PARENT,
    Row,
    Stage,
    baseline,
    best_parent,
    judged_metric,
    known,
)

SIGNIFICANT = 0.05
MINUS = "−"
Outcome = Literal["won", "level", "lost"]
WON: Outcome = "won"
LEVEL: Outcome = "level"
LOST: Outcome = "lost"


@dataclass(frozen=True)
class Verdict:
    """A fused model beside its best parent and the ensemble, on the same test samples.

    Attributes:
        stage: of the fused model and, where it was finetuned too, of the parent.
        metric: accuracy, or the loss where that is what adds up over samples.
        unit: of a difference in words: points (of per cent), nats, or squared error.
        parent: the best parent's name.
        chosen: the data it was chosen on, validation or test.
        best, ensemble, fused: test figures; the ensemble is that of the parents before finetuning.
        difference: fused and best parent, paired.
        head_fitted: whether `best` is a parent with its head fitted, which was the better one there.
        beside_all: fused and ensemble, paired, where parents know different things: to run all is the other way to
            have that.
    """

    stage: Stage
    metric: Metric
    unit: str
    parent: str
    chosen: str
    best: float | None
    ensemble: float | None
    fused: float | None
    difference: Difference
    head_fitted: bool = False
    beside_all: Difference | None = None

    @property
    def row(self) -> str:
        """The name of the row that it is judged beside."""
        return f"{HEAD_FITTED * self.head_fitted}{PARENT}{self.parent}"

    @property
    def share(self) -> float | None:
        """(fused - best parent) / (ensemble - best parent); None where no ensemble was measured or it gains nothing."""
        gain = self._gain(self.ensemble)
        mine = self._gain(self.fused)
        return mine / gain if gain is not None and mine is not None and gain > 0 else None

    @property
    def outcome(self) -> Outcome:
        """How the fused model did beside its best parent; a difference that may be chance is none."""
        if math.isnan(self.difference.value):
            return LOST
        if not self.difference.chance < SIGNIFICANT:
            return LEVEL
        return WON if self.difference.value > 0 else LOST

    @property
    def words(self) -> str:
        """The verdict in one sentence."""
        name = "fused, finetuned" if self.stage == "finetuned" else "fused"
        if self.beside_all is None or not self.beside_all.chance < SIGNIFICANT:
            return f"{name}: {self._beside_best}"
        more, less = ("above", "below") if self.metric in SHARES else ("better than", "worse than")
        which = more if self.beside_all.value > 0 else less
        return f"{name}: {self._size(self.beside_all)} {which} running all parents; {self._beside_best}"

    @property
    def share_in_words(self) -> str:
        """The share of the ensemble's gain in a sentence; empty where there is none, and where parents know different
        things, whose ensemble is no measure of what there is to gain."""
        if self.share is None or self.beside_all is not None:
            return ""
        name = "fused, finetuned" if self.stage == "finetuned" else "fused"
        share = f"{self.share:.2f}".replace("-", MINUS)
        return f"{name}: share of the gain {share}, of the way from the best parent to the ensemble"

    @property
    def _beside_best(self) -> str:
        difference = self.difference
        best = "the best parent finetuned alike" if self.stage == "finetuned" else "the best parent"
        best += " with its head fitted" * self.head_fitted
        if math.isnan(difference.value):
            return f"its {self.metric} is not a number: keep {best}"
        if math.isnan(difference.error):
            return f"not to be told apart from {best} (one test sample): keep that one"
        if not difference.chance < SIGNIFICANT:
            return f"not to be told apart from {best} ({self.summary(difference)}): keep that one"
        size = self._size(difference)
        if self.metric in SHARES:
            return f"{size} {'above' if difference.value > 0 else 'below'} {best}" + self._advice
        return f"{size} {'better' if difference.value > 0 else 'worse'} than {best}" + self._advice

    def _size(self, difference: Difference) -> str:
        """A difference without its sign."""
        size = Difference(abs(difference.value), difference.error, difference.chance, difference.samples)
        return self.summary(size).removeprefix("+")

    @property
    def _advice(self) -> str:
        return "" if self.difference.value > 0 else ": keep that one"

    def summary(self, difference: Difference) -> str:
        """`+2.9 ± 0.5 points`: a difference and its standard error; positive is better, of losses too."""
        return summary_of(difference, self.unit, self.metric)

    def as_dict(self) -> dict[str, Any]:
        """The verdict for JSON; null for what is not known."""
        difference = self.difference
        numbers = {"best_parent": self.best, "ensemble": self.ensemble, "fused": self.fused, "share": self.share,
                   "difference": difference.value, "standard_error": difference.error,
                   "p_value": difference.chance}  # fmt: skip
        if self.beside_all is not None:
            numbers |= {"difference_to_all": self.beside_all.value, "standard_error_to_all": self.beside_all.error}
        return {
            "stage": self.stage,
            "metric": self.metric,
            "parent": self.parent,
            "chosen_on": self.chosen,
            "head_fitted": self.head_fitted,
            **{key: value if known(value) else None for key, value in numbers.items()},
            "samples": difference.samples,
            "words": self.words,
        }

    def _gain(self, value: float | None) -> float | None:
        if value is None or self.best is None:
            return None
        return value - self.best if self.metric in SHARES else self.best - value


def summary_of(difference: Difference, unit: str, metric: str) -> str:
    """`+2.9 ± 0.5 points`: a difference of a metric and its standard error."""
    scale, digits = (100, 1) if metric in SHARES else (1, 4)
    value = f"{abs(scale * difference.value):.{digits}f}"
    sign = "" if not float(value) else "+" if difference.value > 0 else MINUS
    return f"{sign}{value} ± {scale * difference.error:.{digits}f} {unit}"


def _unit(metric: Metric, row: Row) -> str:
    return "points" if metric in SHARES else "of squared error" if row.pearson is not None else "nats"


def in_a_cell(difference: Difference, unit: str, metric: str) -> str:
    """`better, +2.9 ± 0.5 points`; `level` where the difference may be chance."""
    if not known(difference.value):
        return "not a number"
    level = not difference.chance < SIGNIFICANT
    word = "level" if level else "better" if difference.value > 0 else "worse"
    return f"{word}, {summary_of(difference, unit, metric)}"


def beside_best(
    rows: Sequence[Row], outcomes: Mapping[tuple[str, Stage], Outcomes], found: Sequence["Verdict"]
) -> dict[tuple[str, Stage], str]:
    """How each row does beside the best parent of its stage, or beside the best of models that are no parents, on the
    same test samples: (name, stage) -> cell of a table.

    Args:
        rows: of a report.
        outcomes: (name, stage) of a row -> what it did on each test sample.
        found: the verdicts.
    """
    metric = judged_metric(rows)
    held = {verdict.stage: verdict.row for verdict in found}
    chosen = best_parent(rows, MODEL)
    if chosen is not None:
        held[chosen[0].stage] = chosen[0].name
    units = {(row.name, row.stage): _unit(metric, row) for row in rows}
    cells = {}
    for (name, stage), outcome in outcomes.items():
        if stage in held and (name, stage) in units:
            difference = outcome.better(outcomes[held[stage], stage], metric)
            itself = name == held[stage]
            cells[name, stage] = "itself" if itself else in_a_cell(difference, units[name, stage], metric)
    return cells


def verdicts(rows: Sequence[Row], outcomes: Mapping[tuple[str, Stage], Outcomes]) -> list[Verdict]:
    """The verdict on the fused model before finetuning and on the finetuned one, where the best parent is beside it.

    Args:
        rows: of a report.
        outcomes: (name, stage) of a row -> what it did on each test sample.
    """
    chosen = best_parent(rows)
    if chosen is None:
        return []
    parent, data = chosen
    by_key = {(row.name, row.stage): row for row in rows}
    ensemble = by_key.get(("ensemble", "one-shot"))
    metric = judged_metric(rows)
    unit = _unit(metric, parent)
    judgements = []
    stages: tuple[Stage, ...] = ("one-shot", "finetuned")
    held = baseline(rows) or parent
    every = outcomes.get(("ensemble", "one-shot")) if any(row.tasks for row in rows) else None
    for stage in stages:
        beside = held if (held.name, stage) in outcomes else parent
        ours, theirs = (outcomes.get((name, stage)) for name in ("fused", beside.name))
        if ours is not None and theirs is not None:
            best, fused = (getattr(by_key[name, stage], metric) for name in (beside.name, "fused"))
            judgements.append(
                Verdict(
                    stage, metric, unit, beside.name.removeprefix(HEAD_FITTED).removeprefix(PARENT), data, best,
                    None if ensemble is None else getattr(ensemble, metric), fused, ours.better(theirs, metric),
                    beside is not parent, None if every is None else ours.better(every, metric),
                )
            )  # fmt: skip
    return judgements
