"""What a fused model keeps of each parent that has data of its own, and at which share of the cost of all parents."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fusionpl.evaluation.rows import PARENT, Row, Stage, known, readable
from fusionpl.evaluation.scores import ACCURACY, Scores


@dataclass(frozen=True)
class Kept:
    """A fused model beside a parent on that one's own test data, when only the classes that it knows may be answered.

    Attributes:
        stage: of the fused model.
        task: the parent's name.
        parent, fused: their figures.
        kept: the ratio of these.
        error: its standard error.
        cost: operations of the fused model over those of all parents.
        metric: what the figures are.
    """

    stage: Stage
    task: str
    parent: float
    fused: float
    kept: float
    error: float
    cost: float | None
    metric: str = ACCURACY

    @property
    def words(self) -> str:
        """All of it in one sentence."""
        name = "fused, finetuned" if self.stage == "finetuned" else "fused"
        figures = f"{readable(self.metric, self.fused)} where that has {readable(self.metric, self.parent)}"
        figures = figures if self.metric == ACCURACY else f"{self.metric} {figures}"
        cost = "" if self.cost is None else f", at {100 * self.cost:.0f} % of the operations of all parents"
        kept = f"{100 * self.kept:.1f} ± {100 * self.error:.1f} %"
        return f"{name}: keeps {kept} of {self.task} on its own data ({figures}){cost}"

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON; null for what is not known."""
        values = asdict(self) | {"standard_error": self.error, "words": self.words}
        return {key: value if known(value) else None for key, value in values.items() if key != "error"}


def kept(rows: Sequence[Row], tasks: Mapping[tuple[str, Stage], Mapping[str, Scores]]) -> list[Kept]:
    """What the fused model keeps of each parent, before finetuning and after it.

    Args:
        rows: of a report.
        tasks: (name, stage) of a row -> for each parent, what it did on that one's data.
    """
    by_key = {(row.name, row.stage): row for row in rows}
    parents = [row for row in rows if row.name.startswith(PARENT) and row.stage == "one-shot"]
    sentences = []
    stages: tuple[Stage, ...] = ("one-shot", "finetuned")
    for stage in stages:
        for task, ours in tasks.get(("fused", stage), {}).items():
            theirs = tasks.get((f"{PARENT}{task}", "one-shot"), {}).get(task)
            if theirs is not None and theirs.metric == ours.metric and theirs.figure > 0:
                cost = share_of_cost(by_key["fused", stage], parents)
                ratio = ours.ratio(theirs)
                if ratio[1] >= 1:  # of a parent that knows next to nothing there is nothing to keep
                    continue
                sentences.append(Kept(stage, task, theirs.figure, ours.figure, *ratio, cost, ours.metric))
    return sentences


def share_of_cost(fused: Row, parents: Sequence[Row]) -> float | None:
    """The operations of the fused model over those of all parents; None where they are not known."""
    every = [row.flops for row in parents]
    counts = [count for count in every if count is not None]
    return fused.flops / sum(counts) if fused.flops and counts and len(counts) == len(every) else None
