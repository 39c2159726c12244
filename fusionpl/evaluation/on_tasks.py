"""The verdict on a fused network whose heads are kept apart: on each parent's task beside all parents run, and beside
the one parent's trunk that serves all tasks best once their heads are fitted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusionpl.evaluation.keeping import share_of_cost
from fusionpl.evaluation.outcomes import Difference
from fusionpl.evaluation.rows import ALL_PARENTS, HEAD_FITTED, PARENT, Row, Stage, known, readable
from fusionpl.evaluation.scores import ACCURACY, Scores
from fusionpl.evaluation.verdict import LEVEL, LOST, SIGNIFICANT, WON, Outcome, summary_of


@dataclass(frozen=True)
class OnTask:
    """A fused network beside another row, on one parent's test data.

    Attributes:
        stage: of the fused network.
        task: the parent's name.
        metric: accuracy, f1 or pearson.
        against: the name of the row.
        fused, other: their figures.
        difference: of these, paired.
    """

    stage: Stage
    task: str
    metric: str
    against: str
    fused: float
    other: float
    difference: Difference

    @property
    def summary(self) -> str:
        """`+2.9 ± 0.5 points`: the difference and its standard error."""
        if not known(self.difference.value):
            return "not a number"
        return summary_of(self.difference, "points" if self.metric == ACCURACY else self.metric, self.metric)

    @property
    def outcome(self) -> str:
        """`gained`, `lost`, or `not to be told apart`."""
        if not self.difference.chance < SIGNIFICANT:  # also where it is not a number
            return "not to be told apart"
        return "gained" if self.difference.value > 0 else "lost"

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON; null for what is not known."""
        difference = self.difference
        numbers = {"fused": self.fused, "other": self.other, "difference": difference.value,
                   "standard_error": difference.error, "p_value": difference.chance}  # fmt: skip
        return {
            "stage": self.stage,
            "task": self.task,
            "metric": self.metric,
            "against": self.against,
            **{key: value if known(value) else None for key, value in numbers.items()},
            "samples": difference.samples,
            "words": f"{self.task} {self.outcome} against {named(self.against)} ({self.summary})",
        }


Found = Mapping[tuple[str, Stage], Mapping[str, Scores]]


def on_tasks(rows: Sequence[Row], scores: Found) -> list[OnTask]:
    """The fused network beside all parents and beside the head-fitted trunk, task by task, before finetuning and after.

    Args:
        rows: of a report.
        scores: (name, stage) of a row -> for each parent, what it did on that one's data.
    """
    fitted = [row.name for row in rows if row.name.startswith(HEAD_FITTED)]
    stages: tuple[Stage, ...] = ("one-shot", "finetuned")
    return [
        OnTask(stage, task, ours.metric, name, ours.figure, theirs.figure, ours.better(theirs))
        for stage in stages
        for name in (ALL_PARENTS, *fitted)
        for task, ours in scores.get(("fused", stage), {}).items()
        if (theirs := scores.get((name, "one-shot"), {}).get(task)) is not None and theirs.metric == ours.metric
    ]


def outcome_of(found: Sequence[OnTask], stage: Stage) -> Outcome | None:
    """What the fused network is beside the head-fitted trunk: better on a task, level, or worse; None without one."""
    beside = {one.outcome for one in found if one.stage == stage and one.against.startswith(HEAD_FITTED)}
    if not beside:
        return None
    return WON if "gained" in beside else LOST if "lost" in beside else LEVEL


def named(row: str) -> str:
    """A row as sentences call it."""
    if row.startswith(HEAD_FITTED):
        return f"the trunk of {row.removeprefix(HEAD_FITTED + PARENT)} with all heads fitted"
    return "running all parents"


def in_sentences(rows: Sequence[Row], found: Sequence[OnTask]) -> list[str]:
    """What is lost or gained on which task, a sentence for each row and stage."""
    parents = [row for row in rows if row.name.startswith(PARENT) and row.stage == "one-shot"]
    sentences = []
    for stage, against in dict.fromkeys((one.stage, one.against) for one in found):
        beside = [one for one in found if (one.stage, one.against) == (stage, against)]
        outcomes = dict.fromkeys(one.outcome for one in beside)
        parts = [
            f"{outcome}: {', '.join(f'{one.task} ({one.summary})' for one in beside if one.outcome == outcome)}"
            for outcome in outcomes
        ]
        fused = next(row for row in rows if (row.name, row.stage) == ("fused", stage))
        share = share_of_cost(fused, parents) if against == ALL_PARENTS else None
        cost = "" if share is None else f", at {100 * share:.0f} % of their operations"
        # A fusion has to beat what takes seconds; what all parents together do is what it comes close to.
        keep = against != ALL_PARENTS and "gained" not in outcomes
        name = "fused, finetuned" if stage == "finetuned" else "fused"
        sentences.append(
            f"{name}, against {named(against)}{cost}: {'; '.join(parts)}" + ": keep that one (--strategy head)" * keep
        )
    return sentences


def task_cells(found: Sequence[OnTask]) -> list[list[str]]:
    """The same as a table of text, header first, a line a task."""
    stage, rows = found[-1].stage, list(dict.fromkeys(one.against for one in found))
    last = [one for one in found if one.stage == stage]
    body = []
    for task in dict.fromkeys(one.task for one in last):
        beside = {one.against: one for one in last if one.task == task}
        first = next(iter(beside.values()))
        cells = [text for one in beside.values() for text in (readable(one.metric, one.other), one.summary)]
        body.append([task, first.metric, readable(first.metric, first.fused), *cells])
    return [["name", "", "fused", *(cell for row in rows for cell in (row, "fused to that"))], *body]


def samples_in_words(found: Sequence[OnTask]) -> str:
    """What ± means, and of how many samples it is."""
    counts = dict.fromkeys(f"{one.difference.samples:,} of {one.task}" for one in found)
    return f"± is one standard error, from the same test samples: {', '.join(counts)}."
