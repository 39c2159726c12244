"""The rows of a report: what one model measured, and how rows become tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from fusionpl.evaluation.outcomes import SHARES, Metric

Stage = Literal["one-shot", "finetuned"]
Needs = Literal["unlabelled data", "labels"]
FIGURES = (
    "agreement", "probe", "accuracy", "f1", "matthews", "pearson", "spearman", "loss", "perplexity", "bits_per_byte",
)  # fmt: skip
ELSEWHERE = ("metrics", "validation")  # in names of columns, and what chooses the best parent


@dataclass(frozen=True)
class Row:
    """One model of the report; what was not measured is None.

    Attributes:
        name: "parent seed-1", "ensemble", "vanilla", "fused", or another fused variant's name.
        stage: "finetuned", or "one-shot" for everything before that (parents and ensemble too).
        agreement: of encoders without a head, the share of the nearest neighbours that are those of all parents
            together, see `agreement`.
        probe: accuracy of a linear probe on such an encoder's embeddings.
        accuracy: in [0, 1].
        f1, matthews, pearson, spearman: what GLUE measures on some of its tasks.
        loss: mean cross-entropy in nats; of regression, mean squared error.
        perplexity: exp(loss), of language models.
        bits_per_byte: negative log2-likelihood over the bytes of the text, of causal language models.
        tasks: of parents with data of their own, for each the accuracy on its test data when only the classes that it
            knows may be answered; the other figures are then means over the parents' test sets, over the classes of
            all. Of heads that are kept apart there are no others.
        metrics: what a task is measured by, where heads are kept apart.
        parameters: how many.
        flops: floating-point operations for one sample.
        epochs: training epochs that led to this stage.
        seconds: wall time that led to this stage.
        steps: optimiser steps of a wall time.
        needs: what that took, "unlabelled data" or "labels".
        validation: accuracy, or else loss, on the validation data; of parents.
    """

    name: str
    stage: Stage = "one-shot"
    agreement: float | None = None
    probe: float | None = None
    accuracy: float | None = None
    f1: float | None = None
    matthews: float | None = None
    pearson: float | None = None
    spearman: float | None = None
    loss: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    tasks: Mapping[str, float] | None = None
    metrics: Mapping[str, str] | None = None
    parameters: int | None = None
    flops: int | None = None
    epochs: float | None = None
    seconds: float | None = None
    steps: int | None = None
    needs: Needs | None = None
    validation: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row for JSON: without what was not measured or is not a finite number."""
        values = asdict(self)
        values["tasks"] = self.tasks and {task: value for task, value in self.tasks.items() if known(value)}
        return {key: value for key, value in values.items() if known(value)}


def known(value: Any) -> bool:
    """Whether a value was measured and is a finite number."""
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


FIELDS = {field.name for field in fields(Row)}

# What the names of rows begin with: parents of a fusion, and models that are compared without one.
PARENT, MODEL = "parent ", "model "
HEAD_FITTED = "head-fitted "  # and of a parent, its head fitted to what all predict
SIDE_BY_SIDE, CEILING = "logits side by side", "all trunks, one head"  # all parents run
ALL_PARENTS, CEILINGS = "all parents", "all trunks, one head each"  # likewise, with heads that are kept apart
RUN_ALL = (SIDE_BY_SIDE, CEILING, ALL_PARENTS, CEILINGS)
TASK = "on "  # what the columns of tasks begin with, behind their metric where it is not the accuracy


def ordered(rows: Sequence[Row]) -> list[Row]:
    """One-shot rows, then finetuned ones, each in the order they came."""
    return sorted(rows, key=lambda row: row.stage == "finetuned")


def shown_metric(rows: Sequence[Row]) -> Literal["perplexity", "agreement", "accuracy", "loss"]:
    """The metric where there is room for one: the first of these that any row holds."""
    metrics: tuple[Literal["perplexity", "agreement", "accuracy"], ...] = ("perplexity", "agreement", "accuracy")
    return next((name for name in metrics if any(getattr(row, name) is not None for row in rows)), "loss")


def far_apart(metric: str, values: Sequence[float]) -> bool:
    """Whether values of a metric are shown on a logarithmic axis."""
    return bool(values) and metric not in SHARES and min(values) > 0 and max(values) > 50 * min(values)


def judged_metric(rows: Sequence[Row]) -> Metric:
    """What models are judged by, because it adds up over samples: a share of SHARES, or the loss of language and
    regression."""
    shown = shown_metric(rows)
    return "loss" if shown == "perplexity" else shown


def judged(figures: Mapping[str, float]) -> float:
    """What a model is judged by (see `judged_metric`), of the figures that `evaluate` gives."""
    return figures["accuracy" if "accuracy" in figures and "perplexity" not in figures else "loss"]


def best_parent(rows: Sequence[Row], kind: str = PARENT) -> tuple[Row, Literal["validation", "test"]] | None:
    """The best parent and the data it was chosen on: validation where that was measured, else test.

    Among equals in validation it is the one that is better on the test data: the judgement then is no kinder.

    Args:
        rows: of a report; parents before finetuning if there are any, else finetuned ones.
        kind: what the names of their rows begin with.
    """
    parents = [row for row in ordered(rows) if row.name.startswith(kind)]
    parents = [row for row in parents if row.stage == parents[0].stage]
    if not parents:
        return None
    metric = judged_metric(rows)
    validated = all(row.validation is not None for row in parents)

    def worth(row: Row) -> list[float]:
        figures = [row.validation if validated else None, getattr(row, metric)]
        return [(figure if metric in SHARES else -figure) if known(figure) else -math.inf for figure in figures]

    return max(parents, key=worth), "validation" if validated else "test"


def baseline(rows: Sequence[Row]) -> Row | None:
    """What a fused model has to beat: the best parent, or the one whose head alone is fitted to the predictions of all,
    whichever is better on the data by which the best parent was chosen."""
    choice = best_parent(rows)
    if choice is None:
        return None
    best, chosen = choice
    metric = judged_metric(rows)
    column = "validation" if chosen == "validation" else metric
    for row in rows:
        if row.name.startswith(HEAD_FITTED) and known(getattr(row, column)):
            gain = getattr(row, column) - getattr(best, column)
            return row if (gain if metric in SHARES else -gain) > 0 else best
    return best


def as_table(rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    """Column names (those that any row holds) and raw values, one list a row, in table order."""
    shown = [
        field.name
        for field in fields(Row)
        if field.name in ("name", "stage")
        or (field.name not in ELSEWHERE and any(getattr(row, field.name) is not None for row in rows))
    ]
    fullest = sorted(rows, key=lambda row: -len(row.tasks or ()))  # has all in their order
    tasks = list(dict.fromkeys(_of_task(row, name) for row in fullest for name in row.tasks or ()))
    columns = [column for name in shown for column in (tasks if name == "tasks" else [name])]
    return columns, [[_cell(row, column) for column in columns] for row in ordered(rows)]


def _cell(row: Row, column: str) -> Any:
    if column in FIELDS:
        return getattr(row, column)
    return next((value for name, value in (row.tasks or {}).items() if _of_task(row, name) == column), None)


def _of_task(row: Row, name: str) -> str:
    """The column of a task: `on films`, `pearson on films`."""
    metric = (row.metrics or {}).get(name, "accuracy")
    return f"{TASK}{name}" if metric == "accuracy" else f"{metric} {TASK}{name}"


def as_text_cells(
    rows: Sequence[Row], against: Mapping[tuple[str, Stage], str] | None = None, best: str = ""
) -> list[list[str]]:
    """The table as readable text, header first; without `stage` and `needs` where these are all the same.

    Args:
        rows: of a report.
        against: (name, stage) of a row -> how it does beside the best parent, which stands first.
        best: the header of that.
    """
    columns, data = as_table(rows)
    finetuned = any(row.stage == "finetuned" for row in rows)
    same = {name for name, differs in (("stage", finetuned), ("needs", len(needed(rows)) > 1)) if not differs}
    shown = [index for index, column in enumerate(columns) if column not in same]
    once = _parents_flops(rows)
    body = []
    for row, values in zip(ordered(rows), data, strict=True):
        cells = [readable(columns[index], values[index]) for index in shown]
        if once and known(row.flops):
            cells[shown.index(columns.index("flops"))] += f" ({(row.flops or 0) / once:.2g}×)"
        body.append((row, cells))
    header = ["FLOPs" if columns[index] == "flops" else columns[index] for index in shown]
    if not against:
        return [header, *(cells for _, cells in body)]
    place = 1 + finetuned
    lines = [[*cells[:place], against.get((row.name, row.stage), "-"), *cells[place:]] for row, cells in body]
    return [[*header[:place], best, *header[place:]], *lines]


def needed(rows: Sequence[Row]) -> set[Needs | None]:
    """What the rows needed that took time behind the parents' training."""
    return {row.needs for row in rows if row.seconds is not None}


def _parents_flops(rows: Sequence[Row]) -> int | None:
    """What running the best parent takes; None where there are no parents or it is not known."""
    chosen = best_parent(rows)
    return None if chosen is None else chosen[0].flops


def readable(column: str, value: Any) -> str:
    """One value as a person reads it: 0.9725 accuracy is `97.25 %`, 1234567 parameters are `1.23 M`."""
    if not known(value):
        return "-"
    if column.startswith(TASK):
        column = "accuracy"
    column = column.partition(f" {TASK}")[0]
    match column:
        case "accuracy" | "agreement" | "probe":
            return f"{100 * value:.2f} %"
        case "f1" | "matthews" | "pearson" | "spearman" | "loss" | "unigram_loss" | "cost" | "bits_per_byte":
            return f"{value:.4f}"
        case "partners":
            return f"{value:.1f}"
        case "marginal error":
            return f"{value:.2g}"
        case "perplexity":
            return f"{value:.2f}" if value < 1000 else _with_prefix(value)
        case "parameters" | "flops":
            return _with_prefix(value)
        case "epochs":
            return f"{value:g}"
        case "seconds":
            return f"{value:.1f}"
    return str(value)


def _with_prefix(value: float) -> str:
    for size, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:g}"
