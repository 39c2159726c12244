"""The figures of the report's page, to hover over; `plots` draws those for files."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Literal

import plotly.graph_objects as go
from plotly.colors import sequential
from torch import Tensor

from fusionpl.evaluation.barrier import Curve
from fusionpl.evaluation.matched import MatchedAxis
from fusionpl.evaluation.outcomes import SHARES as RIGHT
from fusionpl.evaluation.plots import FAINT, INK, RED, colour_of
from fusionpl.evaluation.rows import Row, Stage, far_apart, known, ordered, readable, shown_metric

OTHER = "#8d6bb5"  # fusions beside the fused model
MARKERS = {"parents": "circle", "models": "circle", "ensemble": "square", "plain average": "x", "fused": "diamond"}
# Small shares are told apart: the scale of the pictures in files, share^0.4.
SHARES = [[(index / 8) ** 2.5, shade] for index, shade in enumerate(sequential.BuPu)]


def cost_figure(rows: Sequence[Row]) -> go.Figure:
    """The rows' main metric (see `shown_metric`) over the operations for a sample; rows that lack one are left out."""
    metric = shown_metric(rows)
    shown = [row for row in ordered(rows) if known(getattr(row, metric)) and known(row.flops)]
    kinds: dict[tuple[str, Stage], list[Row]] = {}
    for row in shown:
        kinds.setdefault((_kind(row.name), row.stage), []).append(row)
    figure = _figure("FLOPs for one sample", {"accuracy": "accuracy", "loss": "loss (nats)"}.get(metric, metric), 384)
    for (kind, stage), members in kinds.items():
        finetuned = stage == "finetuned"
        figure.add_scatter(
            x=[row.flops for row in members],
            y=[getattr(row, metric) for row in members],
            name=f"{kind}, finetuned" if finetuned else kind,
            visible="legendonly" if kind == "plain average" and not finetuned else True,
            mode="markers",
            marker={
                "symbol": MARKERS.get(kind, "circle") + ("-open" if finetuned else ""),
                "color": colour_of(members[0].name) if kind in MARKERS else OTHER,
                "size": 13 if kind == "fused" else 10,
                "line": {"width": 2.5 if finetuned else 0},
            },
            hovertext=[
                f"{escape(row.name)}<br>{readable(metric, getattr(row, metric))}, {readable('flops', row.flops)}FLOPs"
                for row in members
            ],
            hoverinfo="text",
        )
    logarithmic = far_apart(metric, [getattr(row, metric) for row in shown])
    figure.update_xaxes(rangemode="tozero", tickformat="~s")
    figure.update_yaxes(tickformat="~%" if metric in RIGHT else "", type="log" if logarithmic else "linear")
    return figure


def curve_figure(curves: Mapping[str, Curve], metric: Literal["accuracy", "loss"]) -> go.Figure:
    """Accuracy or loss along the line between two models; dotted lines join each curve's two ends."""
    figure = _figure("λ  (weights = λ A + (1 − λ) B)", {"accuracy": "accuracy", "loss": "loss (nats)"}[metric])
    for name, curve in curves.items():
        values, colour = getattr(curve, metric), colour_of(name)
        figure.add_scatter(
            x=[0, 1], y=[values[0], values[-1]], mode="lines", line={"color": colour, "width": 1, "dash": "dot"},
            showlegend=False, hoverinfo="skip",
        )  # fmt: skip
        figure.add_scatter(
            x=curve.lambdas, y=values, name=escape(name), mode="lines+markers", line={"color": colour, "width": 2},
            hovertext=[f"{escape(name)}, λ = {at:g}<br>{readable(metric, value)}" for at, value in
                       zip(curve.lambdas, values, strict=True)], hoverinfo="text",
        )  # fmt: skip
    figure.update_xaxes(tickvals=[0, 0.25, 0.5, 0.75, 1], ticktext=["0: B", "0.25", "0.5", "0.75", "1: A"])
    figure.update_yaxes(tickformat="~%" if metric == "accuracy" else "")
    return figure


def blocks_figure(alike: Tensor, path: Sequence[int]) -> go.Figure:
    """How much the streams of a parent of another depth are like the anchor's, and the path along which their
    boundaries were matched; see `plots.blocks_figure`."""
    figure = _figure("blocks of the parent", "blocks of the fused model")
    figure.add_heatmap(
        z=alike.numpy(), colorscale="BuPu", zmin=0, zmax=1, colorbar={"thickness": 10, "outlinewidth": 0},
        hovertemplate="after block %{y} of the fused model and %{x} of the parent<br>CKA %{z:.3f}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=list(path), y=list(range(len(path))), mode="lines+markers", line={"color": RED}, hoverinfo="skip",
    )  # fmt: skip
    figure.update_layout(showlegend=False)
    return figure


def map_figure(axis: MatchedAxis) -> go.Figure:
    """The picture of a transport map; each cell names the two units."""
    assert axis.picture is not None
    figure = _figure("anchor units, sorted", "parent units, sorted")
    figure.add_heatmap(
        z=axis.picture.shares.numpy(), customdata=axis.picture.units.numpy(), colorscale=SHARES, zmin=0, zmax=1,
        showscale=False, hovertemplate="anchor unit %{customdata[1]}: %{z:.1%} of it is parent unit %{customdata[0]}"
        "<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(showticklabels=False, ticks="")
    figure.update_yaxes(showticklabels=False, ticks="", autorange="reversed")
    return figure


def _kind(name: str) -> str:
    kinds = {"parent": "parents", "model": "models", "ensemble": "ensemble", "vanilla": "plain average"}
    return "fused" if name == "fused" else kinds.get(name.split(" ")[0], "other fusions")


def _figure(x: str, y: str, height: int = 320) -> go.Figure:
    """An empty figure with titles for its axes, `height` pixels high. A finger that moves on it scrolls the page."""
    axis: dict[str, Any] = {"gridcolor": FAINT, "linecolor": FAINT, "zeroline": False, "automargin": True,
                            "fixedrange": True}  # fmt: skip
    return go.Figure(
        layout={
            "template": "none",
            "height": height,
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
            "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "hoverlabel": {"align": "left"},
            "dragmode": False,
            "xaxis": {**axis, "title": {"text": x}},
            "yaxis": {**axis, "title": {"text": y}},
        }
    )
