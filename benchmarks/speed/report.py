"""Writes the tables as Markdown and CSV, and one picture of all of them."""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.common import Figures, markdown
from benchmarks.origin import footer
from benchmarks.paper.cells import Measured, bars, known
from benchmarks.speed.tables import PLAIN, REFIT, Entry, Table

Found = list[tuple[Entry, Measured]]
PICTURE = "speed.png"
AIMS = {"paper": 2.0, REFIT: 4.0}  # times the parents' forward passes, from 384x12 on
_MIB = 2**20


def _memory(size: float) -> str:
    return f"{size / _MIB:,.0f} MiB" if size < 1024 * _MIB else f"{size / _MIB / 1024:.2f} GiB"


# Column -> its heading, and how a figure is written.
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "forward": ("forward passes", "{:.2f} s".format),
    "seconds": ("fusion", "{:.2f} s".format),
    "ratio": ("ratio", "{:.2f}".format),
    "extra": ("memory beyond the parents'", _memory),
    "most": ("memory in all", _memory),
    "faster": ("times faster", "{:.1f}".format),
    "share": ("share of the memory", lambda value: f"{100 * value:.1f} %"),
}


def measured_of(table: Table, folder: Path) -> Found:
    """The entries of a table that are known."""
    return [(entry, one) for entry in table.entries if (one := known(entry.cell, folder))]


def with_comparison(found: Found) -> list[Figures]:
    """The figures of each entry; where the plain recipe was measured on the same model, compared with it."""
    baseline = {entry.model: one.figures for entry, one in found if entry.setting == PLAIN}
    figures: list[Figures] = []
    for entry, one in found:
        other = baseline.get(entry.model)
        if other is None or entry.setting == PLAIN:
            figures.append(one.figures)
        else:
            share = max(one.figures["extra"], 0) / max(other["extra"], 1)
            figures.append({**one.figures, "faster": other["seconds"] / one.figures["seconds"], "share": share})
    return figures


def write(name: str, table: Table, folder: Path, output: Path, command: str) -> str:
    """Writes `output`/NAME.md and .csv from the cells that are there; returns the Markdown."""
    found = measured_of(table, folder)
    figures = with_comparison(found)
    rows = []
    for (entry, _), of in zip(found, figures, strict=True):
        summary = [COLUMNS[column][1](of[column]) if column in of else "" for column in table.columns]
        rows.append([entry.model, entry.setting, str(entry.request.samples), str(entry.request.threads), *summary])
    header = ["", "setting", "samples", "threads", *(COLUMNS[column][0] for column in table.columns)]
    missing = len(table.entries) - len(found)

    text = "\n".join([
        table.title + " Random weights; images of 32x32 in patches of 4 (65 tokens), sequences of 64 tokens.",
        "",
        markdown(header, rows),
        "",
        f"![speed]({PICTURE})",
        "",
        footer(
            command, [one for _, one in found], ["weights 1 and 2, samples 0"],
            ("; each cell in a process of its own, " if table.entries[0].fresh else "; all cells in one process, ")
            + "forward passes the faster of one before and one after the fusion"
            + (f"; missing cells: {missing}" if missing else ""),
        ),
    ])  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.md").write_text(text)
    with (output / f"{name}.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["model", "setting", "samples", "threads", *table.columns, "machine", "date", "commit"])
        for (entry, one), of in zip(found, figures, strict=True):
            values = [f"{of[column]:.6g}" if column in of else "" for column in table.columns]
            request = entry.request
            lines.writerow([
                entry.model, entry.setting, request.samples, request.threads, *values,
                one.machine, one.date, one.commit,
            ])  # fmt: skip
    return text


def draw(found: Mapping[str, Found], file: Path) -> None:
    """One picture: the ratio by model, seconds by depth, memory by samples; a panel without cells stays empty."""
    picture, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 5.5), layout="constrained", width_ratios=(2, 1, 1))
    _ratios(left, found.get("ratio", []))
    for axes, name, figure, scale in (
        (middle, "depth", "seconds", 1.0), (right, "samples", "extra", float(_MIB)),
    ):  # fmt: skip
        lines: dict[str, list[tuple[float, float]]] = {}
        for entry, one in found.get(name, []):
            at = entry.request.shape.depth if name == "depth" else entry.request.samples
            lines.setdefault(entry.setting, []).append((at, one.figures[figure] / scale))
        for setting, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=setting)
        if lines:
            ticks = sorted({at for points in lines.values() for at, _ in points})
            axes.set_xscale("linear" if name == "depth" else "log")
            axes.set_xticks(ticks, [f"{at:,g}" for at in ticks])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False, fontsize=8)
    middle.set(xlabel="blocks", ylabel="seconds of the fusion", title="depth")
    right.set(xlabel="samples", ylabel="memory beyond the parents' (MiB)", title="samples")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    picture.savefig(file, dpi=150)
    plt.close(picture)


def _ratios(axes: Axes, found: Found) -> None:
    rows: dict[str, dict[str, list[float]]] = {}
    for entry, one in found:
        row = f"{entry.model}, {entry.request.threads} thread{'s' if entry.request.threads > 1 else ''}"
        rows.setdefault(row, {})[entry.setting] = [one.figures["ratio"]]
    if rows:
        bars(axes, rows, "%.1f")
        for aim in AIMS.values():
            axes.axvline(aim, color="0.5", linestyle=":", linewidth=1)
    summary = ", ".join(f"{setting} {aim:g}" for setting, aim in AIMS.items())
    axes.set(xlabel=f"fusion / both parents' forward passes (dotted, the aims from 384x12 on: {summary})")
