"""A table is a list of cells; a cell is measured once and kept."""

import csv
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.common import Figures, markdown, mean_and_deviation
from benchmarks.origin import Origin, footer, here
from fusionpl.files import whole

# Metric -> its unit's factor and its axis.
SHOWN: dict[str, tuple[int, str]] = {"accuracy": (100, "test accuracy (%)"), "loss": (1, "test loss (nats)"),
                                   "divergence": (1, "divergence from the ensemble (nats)")}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What one repeat of a row measures.

    Attributes:
        row: the row's name.
        repeat: which pair of seeds, or which seed.
        measure: returns column -> figure.
        metric: what the figures are.
    """

    row: str
    repeat: str
    measure: Callable[[], Figures]
    metric: Literal["accuracy", "loss", "divergence"] = "accuracy"

    def kept_in(self, folder: Path) -> Path:
        """The file of its figures."""
        return folder / f"{self.row} ({self.repeat}).json".replace("/", "-")


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        title: what it shows.
        cells: in the order of the rows.
        curve: columns are epochs; the picture is a line a row.
        cost: what a row of a column costs to run, in FLOPs of one parent; None where it is not shown. With it there is
            a second picture, a line a column.
    """

    title: str
    cells: Sequence[Cell]
    curve: bool = False
    cost: Callable[[str, str], float | None] | None = None


@dataclass(frozen=True, kw_only=True)
class Measured(Origin):
    """A cell's figures, the seconds that they took, and where they come from."""

    figures: Figures
    seconds: float


def known(cell: Cell, folder: Path) -> Measured | None:
    """What was measured before."""
    file = cell.kept_in(folder)
    return Measured(**json.loads(file.read_text())) if file.is_file() else None


def measure(cell: Cell, folder: Path) -> None:
    """Measures a cell and keeps it."""
    start = time.monotonic()
    figures = dict(cell.measure())
    found = Measured(figures=figures, seconds=time.monotonic() - start, **here())
    with whole(cell.kept_in(folder)) as new:
        new.write_text(json.dumps(asdict(found)))


def write(name: str, table: Table, folder: Path, output: Path, command: str) -> str:
    """Writes `output`/NAME.md, .csv and .png from the cells that are there; returns the Markdown."""
    found = [(cell, one) for cell in table.cells if (one := known(cell, folder))]
    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell, one in found:
        for column, value in one.figures.items():
            figures[cell.row][column].append(value)
    metrics = {cell.row: cell.metric for cell, _ in found}
    columns = list(dict.fromkeys(column for row in figures.values() for column in row))
    rows = [[row, *(mean_and_deviation(of.get(column, []), metrics[row]) for column in columns)]
            for row, of in figures.items()]  # fmt: skip
    missing = len(table.cells) - len(found)

    repeats = max((len(values) for row in figures.values() for values in row.values()), default=0)
    hours = sum(one.seconds for _, one in found) / 3600
    text = "\n".join([
        f"{table.title} Mean ± standard deviation over {repeats} repeats.",
        "",
        markdown(["", *columns], rows),
        "",
        f"![{name}]({name}.png)",
        *(["", f"![{name} over FLOPs]({name}-flops.png)"] if table.cost else []),
        "",
        footer(
            command, [one for _, one in found], (cell.repeat for cell, _ in found),
            f"; {hours:.1f} hours for the cells, parents that were trained for them included"
            + (f"; missing cells: {missing}" if missing else ""),
        ),
    ])  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.md").write_text(text)
    with (output / f"{name}.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["row", "repeat", "column", "metric", "value"])
        lines.writerows(
            [cell.row, cell.repeat, column, cell.metric, f"{value:.6f}"]
            for cell, one in found
            for column, value in one.figures.items()
        )
    plot(table, figures, columns, metrics, output / f"{name}.png")
    if table.cost:
        plot_over_cost(table.cost, figures, columns, metrics, output / f"{name}-flops.png")
    return text


def plot(
    table: Table, figures: Mapping[str, Mapping[str, list[float]]], columns: list[str],
    metrics: Mapping[str, str], file: Path,
) -> None:  # fmt: skip
    """Bars of the columns by row, or a line a row over the columns' epochs; one panel a metric."""
    kinds = list(dict.fromkeys(metrics.values()))
    if not kinds:
        return
    height = 4.0 if table.curve else 1.2 + len(figures) * max(0.3, 0.15 * max(map(len, figures.values())))
    panels, every = plt.subplots(1, len(kinds), figsize=(8 * len(kinds), height), layout="constrained", squeeze=False)
    for kind, axes in zip(kinds, every[0], strict=True):
        scale, label = SHOWN[kind]
        rows = {
            name: {column: [scale * value for value in row[column]] for column in columns if column in row}
            for name, row in figures.items()
            if metrics[name] == kind
        }
        if table.curve:
            _curves(axes, rows, columns)
        else:
            bars(axes, rows, "%.1f" if kind == "accuracy" else "%.2f")
        (axes.set_ylabel if table.curve else axes.set_xlabel)(label)
        axes.spines[["top", "right"]].set_visible(False)
    panels.savefig(file, dpi=150)
    plt.close(panels)


def plot_over_cost(
    cost: Callable[[str, str], float | None], figures: Mapping[str, Mapping[str, list[float]]], columns: Sequence[str],
    metrics: Mapping[str, str], file: Path,
) -> None:  # fmt: skip
    """The test figure over the cost of running a model, a line a column through what was fused; what its user has for
    nothing or for seconds has marks of its own."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    (metric,) = set(metrics.values())
    scale, label = SHOWN[metric]
    for number, column in enumerate(columns):
        shown = {row: scale * statistics.mean(of[column]) for row, of in figures.items() if column in of}
        at = {row: found for row in shown if (found := cost(row, column)) is not None}
        marks = {"best parent": "s", "best parent, head fitted": "P", "all trunks, one head": "X", "ensemble": "D"}
        fused = sorted((at[row], shown[row]) for row in at if row not in marks)
        axes.plot(*zip(*fused, strict=True), color=f"C{number}", marker="o", markersize=4, label=column)
        for row, mark in marks.items():
            if row in at:
                axes.plot(at[row], shown[row], color=f"C{number}", marker=mark, markersize=6, fillstyle="none")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(
        "FLOPs of a sample, in multiples of a parent's\n"
        "square: best parent, plus: its head fitted, cross: all trunks, diamond: ensemble"
    )
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _curves(axes: Axes, rows: Mapping[str, Mapping[str, list[float]]], columns: Sequence[str]) -> None:
    axes.set_xticks([int(column) for column in columns])
    for name, row in rows.items():
        means = [statistics.mean(values) for values in row.values()]
        if len(means) == 1:  # not finetuned: the parents' mean, the ensemble
            axes.axhline(means[0], color="0.3", linestyle="--" if "parents" in name else ":", linewidth=1, label=name)
        else:
            errors = [_spread(values) for values in row.values()]
            axes.errorbar(
                [int(column) for column in row], means, errors, marker="o", markersize=4, capsize=2, label=name
            )
    axes.set_xlabel("epochs of finetuning")
    axes.legend(frameon=False, fontsize=8)


def bars(axes: Axes, rows: Mapping[str, Mapping[str, list[float]]], digits: str) -> None:
    """Horizontal bars of the columns by row: row -> column -> the values of its repeats."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    thickness = 0.8 / max(map(len, rows.values()))
    for column in columns:
        # the bars of a row stand side by side around its name, also where it lacks a column
        at = [index + (list(row).index(column) + 0.5 - len(row) / 2) * thickness
              for index, row in enumerate(rows.values()) if column in row]  # fmt: skip
        values = [row[column] for row in rows.values() if column in row]
        bars = axes.barh(
            at, [statistics.mean(one) for one in values],
            thickness, xerr=[_spread(one) for one in values], label=column,
        )  # fmt: skip
        axes.bar_label(bars, fmt=digits, padding=3, fontsize=7)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.02)
    if len(columns) > 1:
        axes.legend(frameon=False, fontsize=8, ncols=min(len(columns), 4), loc="lower left", bbox_to_anchor=(0, 1))
