"""The rows of a report: what one model measured, and how rows become tables."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Stage = Literal["one-shot", "finetuned"]


@dataclass(frozen=True)
class Row:
    """One model of the report; what was not measured is None.

    Attributes:
        name: "parent seed-1", "ensemble", "vanilla", "fused", or another fused variant's name.
        stage: "finetuned", or "one-shot" for everything before that (parents and ensemble too).
        accuracy: in [0, 1].
        f1, matthews, pearson, spearman: what GLUE measures on some of its tasks.
        loss: mean cross-entropy in nats; of regression, mean squared error.
        perplexity: exp(loss), of language models.
        bits_per_byte: negative log2-likelihood over the bytes of the text, of causal language models.
        parameters: how many.
        flops: floating-point operations for one sample.
        epochs: training epochs that led to this stage.
        seconds: wall time that led to this stage.
    """

    name: str
    stage: Stage = "one-shot"
    accuracy: float | None = None
    f1: float | None = None
    matthews: float | None = None
    pearson: float | None = None
    spearman: float | None = None
    loss: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    parameters: int | None = None
    flops: int | None = None
    epochs: float | None = None
    seconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row for JSON: without what was not measured or is not a finite number."""
        return {key: value for key, value in asdict(self).items() if known(value)}


def known(value: Any) -> bool:
    """Whether a value was measured and is a finite number."""
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def ordered(rows: Sequence[Row]) -> list[Row]:
    """One-shot rows, then finetuned ones, each in the order they came."""
    return sorted(rows, key=lambda row: row.stage == "finetuned")


def shown_metric(rows: Sequence[Row]) -> Literal["accuracy", "perplexity", "loss"]:
    """The metric where there is room for one: perplexity if any row holds it, else accuracy, else loss."""
    if any(row.perplexity is not None for row in rows):
        return "perplexity"
    return "accuracy" if any(row.accuracy is not None for row in rows) else "loss"


def best_of(rows: Sequence[Row]) -> Row:
    """The row with the lowest perplexity, or else the highest accuracy, or else the lowest loss."""
    metric = shown_metric(rows)
    sign = 1 if metric == "accuracy" else -1
    return max(rows, key=lambda row: sign * float(getattr(row, metric) or 0.0))


def as_table(rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    """Column names (those that any row holds) and raw values, one list a row, in table order."""
    columns = [
        field.name
        for field in fields(Row)
        if field.name in ("name", "stage") or any(getattr(row, field.name) is not None for row in rows)
    ]
    return columns, [[getattr(row, column) for column in columns] for row in ordered(rows)]


def as_text_cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table as readable text, header first."""
    columns, data = as_table(rows)
    header = ["FLOPs" if column == "flops" else column for column in columns]
    return [header, *([readable(*cell) for cell in zip(columns, row, strict=True)] for row in data)]


def readable(column: str, value: Any) -> str:
    """One value as a person reads it: 0.9725 accuracy is `97.25 %`, 1234567 parameters are `1.23 M`."""
    if not known(value):
        return "-"
    match column:
        case "accuracy":
            return f"{100 * value:.2f} %"
        case "f1" | "matthews" | "pearson" | "spearman" | "loss" | "unigram_loss" | "bits_per_byte":
            return f"{value:.4f}"
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
