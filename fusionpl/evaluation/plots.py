"""The report's pictures, in panels: in files a picture is all of its panels, on the page each stands alone as SVG.

Colours: parents grey, ensemble black, vanilla red, fused blue, other fusions violet, finetuned hatched or hollow.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator
from torch import Tensor

from fusionpl.evaluation.barrier import Curve
from fusionpl.evaluation.matched import MatchedAxis
from fusionpl.evaluation.outcomes import SHARES
from fusionpl.evaluation.rows import (
    MODEL,
    RUN_ALL,
    Row,
    best_parent,
    far_apart,
    known,
    ordered,
    readable,
    shown_metric,
)

GREY, BLACK, RED, BLUE, VIOLET = "#a9adb3", "#2b2f36", "#c94c41", "#2f6fb3", "#8d6bb5"
INK, FAINT, PAPER = "#33373d", "#e3e5e8", "#ffffff"
# What a page calls them, so that it says what they are in the dark.
NAMED = {
    GREY: "grey",
    BLACK: "ink",
    RED: "red",
    BLUE: "blue",
    VIOLET: "violet",
    INK: "ink",
    FAINT: "line",
    PAPER: "paper",
}
# Nothing is transparent: it is the paper, light or dark.
SHADES = LinearSegmentedColormap.from_list("shades", ["#8a4fae00", "#8a4faeff"])
HALO = [withStroke(linewidth=2.5, foreground=PAPER)]
NOTE: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8.5, "path_effects": HALO}
MOST_MAPS = 6  # heat maps in one figure
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    **dict.fromkeys(("axes.labelsize", "axes.titlesize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 8.5),
    "grid.color": FAINT,
    "axes.axisbelow": True,
    "svg.fonttype": "none",
}
TELLS = "tells: "  # what an artist's name begins with if a page shows the rest of it under the pointer

BARS, LINE, MAPS, BLOCKS = "bars.png", "interpolation.png", "transport-maps.png", "blocks.png"
CAPTIONS = {
    BARS: "All models on the same test data. Hatched bars: after finetuning.",
    LINE: "On the straight line between parent A and anchor B: A as trained (vanilla), and A aligned to B.",
    MAPS: "Of which parent units each anchor unit is made, and of how many (partners). "
    "A sharp diagonal is a one-to-one matching.",
    BLOCKS: "Streams of parents of another depth beside the anchor's, and the path along which blocks were matched.",
}


class Panel(NamedTuple):
    """One pair of axes of a picture: width and height in inches, and what draws it."""

    width: float
    height: float
    draw: Callable[[Axes], None]


def figure(panels: Sequence[Panel]) -> Figure:
    """Panels of one size beside and above each other, three to a line."""
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    with rc_context(STYLE):
        made = Figure(figsize=(panels[0].width * columns, panels[0].height * lines), layout="constrained")
        grid = list(made.subplots(lines, columns, squeeze=False).flat)
        for panel, axes in zip(panels, grid, strict=False):
            panel.draw(axes)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
    return made


def png(panels: Sequence[Panel], path: Path) -> None:
    """Panels as a file: the same ones give the same bytes."""
    with rc_context(STYLE):
        figure(panels).savefig(path, dpi=160, metadata={"Software": None})


def svg(panel: Panel, name: str) -> Markup:
    """A panel inside a page, which says how wide it is, in what letters it is written and what its colours are.

    Args:
        panel: what is drawn.
        name: of which there is one on the page; the same panel and name give the same text.
    """
    made, file = figure([panel]), StringIO()
    for text in made.findobj(Text):
        text.set_path_effects([])  # with them it is drawn, not written
    with rc_context(STYLE | {"svg.hashsalt": name}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        made.savefig(file, format="svg", transparent=True, metadata=metadata)
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace("<svg", f'<svg id="{name}"', 1)
    drawn = re.sub(f'<g id="{TELLS}([^"]*)">', r"<g><title>\1</title>", drawn)
    drawn = re.sub('<g id="[^"]*"', "<g", drawn)
    return Markup(re.sub('style="[^"]*"', _of_page, drawn))  # matplotlib has escaped what it was given


def _of_page(style: re.Match[str]) -> str:
    named = re.sub("|".join(NAMED), lambda match: f"var(--{NAMED[match[0]]})", style[0])
    return re.sub("font-family: [^;]*; ", "", named)


def bars(rows: Sequence[Row]) -> list[Panel]:
    """Horizontal bars of the rows' main metric (see `shown_metric`), one-shot above finetuned.

    Rows that lack the metric are left out. The dashed line marks the best parent before finetuning, which
    validation chose.
    """
    metric = shown_metric(rows)
    shown = [row for row in ordered(rows) if known(getattr(row, metric))]
    return [Panel(6.4, 1.2 + 0.28 * len(shown), partial(_bars, shown, metric))] if _together(rows) else []


def _bars(shown: Sequence[Row], metric: str, axes: Axes) -> None:
    values = [_shown(row, metric) for row in shown]
    stages = list(dict.fromkeys(row.stage for row in shown))
    positions = [index + 1.1 * stages.index(row.stage) for index, row in enumerate(shown)]
    for position, row, value in zip(positions, shown, values, strict=True):
        hatch = "/////" if row.stage == "finetuned" else None
        axes.barh(position, value, 0.74, color=colour_of(row.name), hatch=hatch, edgecolor=PAPER, linewidth=0)
        text = readable(metric, getattr(row, metric))
        axes.annotate(text, (value, position), (4, 0), va="center", **NOTE)
    for stage in stages:
        first = positions[[row.stage for row in shown].index(stage)]
        title = "before finetuning" if stage == "one-shot" else "after finetuning"
        # x is a fraction of the axes: a logarithmic axis has no 0.
        place = axes.get_yaxis_transform()
        axes.text(0, first - 0.55, title, transform=place, fontsize=8.5, weight="bold", path_effects=HALO)
    if far_apart(metric, values):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_locator(NullLocator())
    best = best_parent(shown) or best_parent(shown, MODEL)
    if best is not None and best[0].stage == "one-shot":
        at = _shown(best[0], metric)
        axes.axvline(at, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(f"best {best[0].name.partition(' ')[0]}", (at, -1.2), (0, 2), ha="center", va="bottom", **NOTE)
    axes.set_yticks(positions, [row.name for row in shown])
    axes.set_ylim(max(positions, default=0) + 0.6, -1.2)
    axes.margins(x=0.12)
    axes.set_xlabel(_label(metric))
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.spines["bottom"].set_visible(False)


def cost(rows: Sequence[Row]) -> list[Panel]:
    """The rows' main metric (see `shown_metric`) over the operations for a sample.

    Rows that lack one are left out, and the plain average before finetuning, beside which others look alike.
    """
    metric = shown_metric(rows)
    shown = [
        row
        for row in ordered(rows)
        if known(getattr(row, metric))
        and known(row.flops)
        and (_kind(row.name)[0] != "plain average" or row.stage == "finetuned")
    ]
    counted = any(known(row.flops) for row in rows)
    return [Panel(4.2, 3.0, partial(_cost, shown, metric))] if counted and _together(rows) else []


def _together(rows: Sequence[Row]) -> bool:
    """Whether rows have figures over all test data; those of heads that are kept apart have one for each task."""
    return any(row.metrics is None for row in rows)


def _cost(shown: Sequence[Row], metric: str, axes: Axes) -> None:
    named: set[str] = set()
    for row in shown:
        assert row.flops is not None
        kind, marker, colour = _kind(row.name)
        at = row.flops, _shown(row, metric)
        axes.plot(
            *at,
            marker,
            color=colour,
            markersize=8 if kind == "fused" else 6,
            markerfacecolor=PAPER if row.stage == "finetuned" else colour,
            markeredgewidth=1.5,
            label=None if kind in named else kind,
        )
        named.add(kind)
        _tell(axes, at, f"{row.name}, {readable(metric, getattr(row, metric))}, {readable('flops', row.flops)}FLOPs")
    if far_apart(metric, [_shown(row, metric) for row in shown]):
        axes.set_yscale("log")
    axes.margins(x=0.08, y=0.1)
    axes.set_xlim(left=0)
    axes.set_xlabel("FLOPs for one sample")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_ylabel(_label(metric))
    axes.grid()
    if shown:
        _legend(axes, columns=3)


def curves(found: Mapping[str, Curve]) -> list[Panel]:
    """Accuracy and loss along the line between two models; one colour a curve, its barrier marked.

    Args:
        found: for example `{"vanilla": ..., "aligned": ...}`; dashed lines join each curve's two ends.
    """
    metrics: tuple[Literal["accuracy", "loss"], ...] = ("accuracy", "loss")
    return [Panel(3.8, 3.3, partial(_curves, found, metric)) for metric in metrics if found]


def _curves(lines: Mapping[str, Curve], metric: Literal["accuracy", "loss"], axes: Axes) -> None:
    for name, curve in lines.items():
        if metric == "accuracy":
            values, excess = [100 * value for value in curve.accuracy], curve.accuracy_drop
            text, below = f"drop {100 * curve.accuracy_barrier:.1f} points", True
        else:
            values, excess = list(curve.loss), curve.loss_excess
            text, below = f"barrier {curve.barrier:.2f}", False
        colour = colour_of(name)
        axes.plot([0, 1], [values[0], values[-1]], color=colour, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.7)
        axes.plot(curve.lambdas, values, color=colour, linewidth=1.8, marker="o", markersize=3.6, label=name)
        for at, value, summary in zip(curve.lambdas, values, getattr(curve, metric), strict=True):
            _tell(axes, (at, value), f"{name}, λ = {at:g}, {readable(metric, summary)}")
        finite = [value if math.isfinite(value) else -math.inf for value in excess]
        worst = finite.index(max(finite))
        if finite[worst] > 0:  # it is farthest there from the straight line between its ends
            at, value = curve.lambdas[worst], values[worst]
            line = at * values[-1] + (1 - at) * values[0]
            axes.plot([at, at], [value, line], color=colour, linewidth=0.9, linestyle=":")
            axes.plot(at, value, "o", markersize=8, markerfacecolor="none", markeredgecolor=colour)
            place: dict[str, Any] = {"xytext": (0, -7), "va": "top"} if below else {"xytext": (0, 7), "va": "bottom"}
            axes.annotate(text, (at, value), ha="center", color=colour, **place, **NOTE)
    axes.set_xlabel("λ  (weights = λ A + (1 - λ) B)")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\nB (anchor)", "0.25", "0.5", "0.75", "1\nA"])
    axes.set_ylabel(_label(metric))
    axes.margins(y=0.16)
    axes.grid(axis="y")
    _legend(axes, columns=4)


def maps(axes: Mapping[str, MatchedAxis]) -> list[Panel]:
    """Heat maps of transport plans.

    Args:
        axes: name -> how it was matched; of more than six that have a picture, six evenly spread are shown.
    """
    names = [name for name, axis in axes.items() if axis.picture is not None]
    if len(names) > MOST_MAPS:
        names = [names[round(index * (len(names) - 1) / (MOST_MAPS - 1))] for index in range(MOST_MAPS)]
    return [Panel(2.9, 3.5, partial(_map, name, axes[name])) for name in names]


def _map(name: str, axis: MatchedAxis, axes: Axes) -> None:
    assert axis.picture is not None, name
    extent = (0, axis.n_anchor, axis.n_parent, 0)
    norm = PowerNorm(0.4, 0, 1)  # small shares are told apart
    picture = axes.imshow(
        axis.picture.numpy(), cmap=SHADES, norm=norm, extent=extent, interpolation="none", aspect="auto"
    )
    axes.set_title(f"{name}\n{axis.words}")
    axes.set_box_aspect(1)
    axes.set_xticks([0, axis.n_anchor])
    axes.set_yticks([0, axis.n_parent])
    axes.set_xlabel("anchor units", labelpad=-4)
    axes.set_ylabel("parent units", labelpad=-4)
    _scale(axes, picture, "share of the anchor unit", [0, 0.01, 0.05, 0.2, 0.5, 1])


def blocks(matchings: Mapping[str, tuple[Tensor, Sequence[int]]]) -> list[Panel]:
    """For each parent of another depth, how much its streams are like the anchor's (linear CKA), and the path along
    which their boundaries were matched.

    Args:
        matchings: parent -> likeness [boundaries of the fused model, boundaries of the parent], and for each of the
            former the parent's.
    """
    return [Panel(3.6, 3.8, partial(_blocks, name, *match)) for name, match in matchings.items()]


def _blocks(name: str, alike: Tensor, path: Sequence[int], axes: Axes) -> None:
    picture = axes.imshow(
        alike.numpy(), cmap=SHADES, vmin=0, vmax=1, origin="lower", interpolation="none", aspect="auto"
    )
    axes.plot(path, range(len(path)), marker="o", markersize=4, color=RED, linewidth=1.2)
    axes.set_title(name)
    axes.set_xlabel("blocks of the parent")
    axes.set_ylabel("blocks of the fused model")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _scale(axes, picture, "likeness of the streams (CKA)")


def colour_of(name: str) -> str:
    """The colour of a row or a curve of this name."""
    if name in RUN_ALL:
        return BLACK
    return {"parent": GREY, "head-fitted": GREY, "model": GREY, "ensemble": BLACK, "vanilla": RED}.get(
        name.split(" ")[0], BLUE
    )


def _kind(name: str) -> tuple[str, str, str]:
    """What a row is of, its marker and its colour."""
    kinds = {"parent": ("parents", "o"), "model": ("models", "o"), "ensemble": ("ensemble", "s"),
             "vanilla": ("plain average", "X"), "fused": ("fused", "D")}  # fmt: skip
    if name in RUN_ALL:
        return "all parents run", "s", BLACK
    first = name if name == "fused" else name.split(" ")[0]
    return (*kinds[first], colour_of(name)) if first in kinds else ("other fusions", "o", VIOLET)


def _shown(row: Row, metric: str) -> float:
    return (100.0 if metric in SHARES else 1.0) * float(getattr(row, metric))


def _label(metric: str) -> str:
    return {"accuracy": "accuracy (%)", "loss": "loss (nats)"}.get(metric, metric)


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderpad=0, columnspacing=1.2)


def _scale(axes: Axes, picture: ScalarMappable, label: str, ticks: Sequence[float] | None = None) -> None:
    bar = axes.figure.colorbar(picture, ax=axes, location="bottom", aspect=40, pad=0.02, ticks=ticks)
    bar.set_label(label)
    bar.outline.set_visible(False)


def _tell(axes: Axes, at: tuple[float, float], words: str) -> None:
    """What a page says under the pointer at a point."""
    axes.plot(*at, "o", markersize=10, color=INK, alpha=0, gid=TELLS + words)
