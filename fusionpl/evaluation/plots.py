"""The report's pictures. Colours: parents grey, ensemble black, vanilla red, fused blue, finetuned hatched."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullLocator
from torch import Tensor

from fusionpl.evaluation.barrier import Curve
from fusionpl.evaluation.matched import MatchedAxis
from fusionpl.evaluation.outcomes import SHARES
from fusionpl.evaluation.rows import MODEL, Row, best_parent, far_apart, known, ordered, readable, shown_metric

GREY, BLACK, RED, BLUE = "#a9adb3", "#2b2f36", "#c94c41", "#2f6fb3"
INK, FAINT = "#33373d", "#e3e5e8"
HALO = [withStroke(linewidth=2.5, foreground="white")]
MOST_MAPS = 6  # heat maps in one figure

BARS, LINE, MAPS, BLOCKS = "bars.png", "interpolation.png", "transport-maps.png", "blocks.png"
CAPTIONS = {
    BARS: "All models on the same test data. Hatched bars: after finetuning.",
    LINE: "On the straight line between parent A and anchor B: A as trained (vanilla), and A aligned to B.",
    MAPS: "Of which parent units each anchor unit is made, and of how many (partners). "
    "A sharp diagonal is a one-to-one matching.",
    BLOCKS: "Streams of parents of another depth beside the anchor's, and the path along which blocks were matched.",
}


def metric_bars(rows: Sequence[Row]) -> Figure:
    """Horizontal bars of the rows' main metric (see `shown_metric`), one-shot above finetuned.

    Rows that lack the metric are left out. The dashed line marks the best parent before finetuning, which
    validation chose.
    """
    metric = shown_metric(rows)
    scale = 100.0 if metric in SHARES else 1.0
    shown = [row for row in ordered(rows) if known(getattr(row, metric))]
    values = [scale * getattr(row, metric) for row in shown]
    figure = Figure(figsize=(6.4, 1.2 + 0.28 * len(shown)), layout="constrained")
    axes = figure.subplots()
    stages = list(dict.fromkeys(row.stage for row in shown))
    positions = [index + 1.1 * stages.index(row.stage) for index, row in enumerate(shown)]
    for position, row, value in zip(positions, shown, values, strict=True):
        hatch = "/////" if row.stage == "finetuned" else None
        axes.barh(position, value, 0.74, color=colour_of(row.name), hatch=hatch, edgecolor="white", linewidth=0)
        text = readable(metric, getattr(row, metric))
        _note(axes, text, (value, position), (4, 0), INK, ha="left", va="center")
    for stage in stages:
        first = positions[[row.stage for row in shown].index(stage)]
        title = "before finetuning" if stage == "one-shot" else "after finetuning"
        # x is a fraction of the axes: a logarithmic axis has no 0.
        place = axes.get_yaxis_transform()
        axes.text(0, first - 0.55, title, transform=place, color=INK, fontsize=8.5, weight="bold", path_effects=HALO)
    if far_apart(metric, values):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_locator(NullLocator())
    best = best_parent(shown) or best_parent(shown, MODEL)
    if best is not None and best[0].stage == "one-shot":
        at = scale * getattr(best[0], metric)
        axes.axvline(at, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        _note(axes, f"best {best[0].name.partition(' ')[0]}", (at, -1.2), (0, 2), INK, ha="center", va="bottom")
    axes.set_yticks(positions, [row.name for row in shown])
    axes.set_ylim(max(positions, default=0) + 0.6, -1.2)
    axes.margins(x=0.12)
    axes.set_xlabel({"accuracy": "accuracy (%)", "loss": "loss (nats)"}.get(metric, metric))
    _tidy(axes, grid="x")
    axes.tick_params(axis="y", length=0)
    axes.spines["bottom"].set_visible(False)
    return figure


def interpolation_figure(curves: Mapping[str, Curve]) -> Figure:
    """Accuracy and loss along the line between two models; one colour a curve, its barrier marked.

    Args:
        curves: for example `{"vanilla": ..., "aligned": ...}`; dashed lines join each curve's two ends.
    """
    figure = Figure(figsize=(7.6, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in curves.items():
        accuracy = [100 * value for value in curve.accuracy]
        colour = colour_of(name)
        drop = f"drop {100 * curve.accuracy_barrier:.1f} points"
        _curve(left, name, curve.lambdas, accuracy, curve.accuracy_drop, colour, drop, below=True)
        excess = f"barrier {curve.barrier:.2f}"
        _curve(right, name, curve.lambdas, curve.loss, curve.loss_excess, colour, excess, below=False)
    left.set_ylabel("accuracy (%)")
    right.set_ylabel("loss (nats)")
    for axes in (left, right):
        axes.set_xlabel("λ  (weights = λ A + (1 - λ) B)")
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\nB (anchor)", "0.25", "0.5", "0.75", "1\nA"])
        axes.margins(y=0.16)
        _tidy(axes, grid="y")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def _curve(
    axes: Axes,
    name: str,
    lambdas: Sequence[float],
    values: Sequence[float],
    excess: Sequence[float],
    colour: str,
    text: str,
    below: bool,
) -> None:
    """One curve, the straight line between its ends, and the point where it is farthest from that line."""
    axes.plot([0, 1], [values[0], values[-1]], color=colour, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.7)
    axes.plot(lambdas, values, color=colour, linewidth=1.8, marker="o", markersize=3.6, label=name)
    finite = [value if math.isfinite(value) else -math.inf for value in excess]
    worst = finite.index(max(finite))
    if finite[worst] <= 0:
        return
    at = lambdas[worst]
    line = at * values[-1] + (1 - at) * values[0]
    axes.plot([at, at], [values[worst], line], color=colour, linewidth=0.9, linestyle=":")
    axes.plot(at, values[worst], "o", markersize=8, markerfacecolor="none", markeredgecolor=colour)
    if below:
        _note(axes, text, (at, values[worst]), (0, -7), colour, ha="center", va="top")
    else:
        _note(axes, text, (at, values[worst]), (0, 7), colour, ha="center", va="bottom")


def map_figure(maps: Mapping[str, MatchedAxis]) -> Figure:
    """Heat maps of transport plans on one colour scale.

    Args:
        maps: axis name -> how it was matched, with its picture; of more than six, six evenly spread are shown.
    """
    names = list(maps)
    if len(names) > MOST_MAPS:
        names = [names[round(index * (len(names) - 1) / (MOST_MAPS - 1))] for index in range(MOST_MAPS)]
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(2.55 * columns + 0.9, 2.75 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    norm = PowerNorm(0.4, 0, 1)
    for axes, name in zip(grid.flat, names, strict=False):
        axis = maps[name]
        assert axis.picture is not None, name
        picture = axes.imshow(
            axis.picture.shares.numpy(),
            cmap="BuPu",
            norm=norm,
            extent=(0, axis.n_anchor, axis.n_parent, 0),
            interpolation="nearest",
            aspect="auto",
        )
        axes.set_title(f"{name}\n{axis.words}", fontsize=8.5)
        axes.set_box_aspect(1)
        axes.set_xticks([0, axis.n_anchor])
        axes.set_yticks([0, axis.n_parent])
        axes.tick_params(labelsize=7.5, colors=INK, length=2)
        axes.set_xlabel("anchor units", fontsize=8, labelpad=-4)
        axes.set_ylabel("parent units", fontsize=8, labelpad=-4)
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    bar = figure.colorbar(picture, ax=grid, shrink=0.8, aspect=30, pad=0.02, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.set_label("share of the anchor unit", fontsize=8)
    bar.ax.tick_params(labelsize=7.5, colors=INK, length=2)
    return figure


def blocks_figure(matchings: Mapping[str, tuple[Tensor, Sequence[int]]]) -> Figure:
    """For each parent of another depth, how much its streams are like the anchor's (linear CKA), and the path along
    which their boundaries were matched.

    Args:
        matchings: parent -> likeness [boundaries of the fused model, boundaries of the parent], and for each of the
            former the parent's.
    """
    figure = Figure(figsize=(3.1 * len(matchings) + 0.9, 3.2), layout="constrained")
    grid = figure.subplots(1, len(matchings), squeeze=False)[0]
    for axes, (name, (alike, path)) in zip(grid, matchings.items(), strict=True):
        picture = axes.imshow(alike.numpy(), cmap="BuPu", vmin=0, vmax=1, origin="lower", aspect="auto")
        axes.plot(path, range(len(path)), marker="o", markersize=4, color=RED, linewidth=1.2)
        axes.set_title(name, fontsize=8.5)
        axes.set_xlabel("blocks of the parent", fontsize=8)
        axes.set_ylabel("blocks of the fused model", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=7.5, colors=INK, length=2)
    bar = figure.colorbar(picture, ax=grid, shrink=0.8, aspect=30, pad=0.02)
    bar.set_label("likeness of the streams (CKA)", fontsize=8)
    bar.ax.tick_params(labelsize=7.5, colors=INK, length=2)
    return figure


def colour_of(name: str) -> str:
    """The colour of a row or a curve of this name."""
    return {"parent": GREY, "head-fitted": GREY, "model": GREY, "ensemble": BLACK, "vanilla": RED}.get(
        name.split(" ")[0], BLUE
    )


def _note(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    offset: tuple[float, float],
    colour: str,
    ha: Literal["left", "center", "right"],
    va: Literal["top", "center", "bottom"],
) -> None:
    """Small text at a point in data coordinates, moved by an offset in points."""
    axes.annotate(
        text,
        at,
        xytext=offset,
        textcoords="offset points",
        ha=ha,
        va=va,
        color=colour,
        fontsize=8.5,
        path_effects=HALO,
    )


def _tidy(axes: Axes, grid: Literal["x", "y"]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=8.5)
    axes.grid(axis=grid, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=9)
