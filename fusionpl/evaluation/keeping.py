"""What a fused model keeps of each parent that has data of its own, and at which share of the cost of all parents."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fusionpl.evaluation.outcomes import Outcomes
from fusionpl.evaluation.rows import PARENT, Row, Stage, known, readable


@dataclass(frozen=True)
class Kept:
    """A fused model beside a parent on that one's own test data, when only the classes that it knows may be answered.

    Attributes:
        stage: of the fused model.
        task: the parent's name.
        parent, fused: accuracies.
        kept: their ratio.
        error: its standard error.
        cost: operations of the fused model over those of all parents.
    """

    stage: Stage
    task: str
    parent: float
    fused: float
    kept: float
    error: float
    cost: float | None

    @property
    def words(self) -> str:
        """All of it in one sentence."""
        name = "fused, finetuned" if self.stage == "finetuned" else "fused"
        figures = f"{readable('accuracy', self.fused)} where that has {readable('accuracy', self.parent)}"
        cost = "" if self.cost is None else f", at {100 * self.cost:.0f} % of the operations of all parents"
        kept = f"{100 * self.kept:.1f} ± {100 * self.error:.1f} %"
        return f"{name}: keeps {kept} of {self.task} on its own data ({figures}){cost}"

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON; null for what is not known."""
        values = asdict(self) | {"standard_error": self.error, "words": self.words}
        return {key: value if known(value) else None for key, value in values.items() if key != "error"}


def kept(rows: Sequence[Row], tasks: Mapping[tuple[str, Stage], Mapping[str, Outcomes]]) -> list[Kept]:
    """What the fused model keeps of each parent, before finetuning and after it.

    Args:
        rows: of a report.
        tasks: (name, stage) of a row -> for each parent, what it did on that one's data.
    """
    by_key = {(row.name, row.stage): row for row in rows}
    parents = [row for row in rows if row.name.startswith(PARENT) and row.stage == "one-shot"]
    found = []
    stages: tuple[Stage, ...] = ("one-shot", "finetuned")
    for stage in stages:
        for task, ours in tasks.get(("fused", stage), {}).items():
            theirs = tasks.get((f"{PARENT}{task}", "one-shot"), {}).get(task)
            if theirs is not None and theirs.figures["accuracy"] > 0:
                cost = _share(by_key["fused", stage], parents)
                before, after = (one.figures["accuracy"] for one in (theirs, ours))
                found.append(Kept(stage, task, before, after, *_ratio(ours, theirs), cost))
    return found


def _share(fused: Row, parents: Sequence[Row]) -> float | None:
    every = [row.flops for row in parents]
    counts = [count for count in every if count is not None]
    return fused.flops / sum(counts) if fused.flops and len(counts) == len(every) else None


def _ratio(ours: Outcomes, theirs: Outcomes) -> tuple[float, float]:
    """The ratio R of what two models have right on the same N samples, and its standard error: linearised and paired,
    sqrt(N / (N - 1) sum (r_i - R s_i)^2) / sum s_i (Cochran, "Sampling Techniques", 6.4)."""
    mine, other = (one.values[:, 2].double() for one in (ours, theirs))
    ratio = float(mine.sum() / other.sum())
    samples = len(mine)
    if samples < 2:
        return ratio, float("nan")
    spread = (mine - ratio * other).square().sum() * samples / (samples - 1)
    return ratio, float(torch.sqrt(spread) / other.sum())
