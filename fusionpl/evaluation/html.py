"""The report as one page to look at: a single file that loads nothing, with figures to hover over."""

from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Literal

import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from fusionpl.evaluation import figures
from fusionpl.evaluation.matched import MatchedAxis
from fusionpl.evaluation.plots import BLOCKS, CAPTIONS, LINE, MAPS
from fusionpl.evaluation.rows import MODEL, as_text_cells, best_parent, known, readable
from fusionpl.evaluation.text import CONTINUED, EQUAL_COST, WORDS
from fusionpl.evaluation.verdict import compared_cells, verdict_cells

if TYPE_CHECKING:
    from fusionpl.evaluation.report import Report

METRICS: tuple[Literal["accuracy", "loss"], ...] = ("accuracy", "loss")


def page(report: "Report") -> str:
    """The report as HTML, with all that it shows in it; every text of the report is escaped."""
    source = (resources.files("fusionpl.evaluation") / "report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    drawn, found = _drawn(report), report.verdicts
    return environment.from_string(source).render(
        report=report,
        best=best_parent(report.rows, MODEL),
        verdicts=found,
        rows=as_text_cells(report.rows),
        judged=verdict_cells(found) if found else [],
        compared=compared_cells(report.rows, report.outcomes),
        alternatives=report.alternatives(found),
        axes=_axes(report.axes),
        words=WORDS,
        equal_cost=EQUAL_COST.replace("`", ""),
        continued=CONTINUED,
        captions={"barrier": CAPTIONS[LINE], "blocks": CAPTIONS[BLOCKS], "maps": CAPTIONS[MAPS]},
        drawn=drawn,
        plotly=Markup(get_plotlyjs()) if drawn else "",
    )


def _drawn(report: "Report") -> dict[str, list[tuple[str, Markup]]]:
    """Section -> its figures, each with what stands above it; only sections that have one."""
    sections: dict[str, list[tuple[str, go.Figure]]] = {
        "cost": [("", figures.cost_figure(report.rows))] if any(known(row.flops) for row in report.rows) else [],
        "barrier": [(metric, figures.curve_figure(report.barrier, metric)) for metric in METRICS if report.barrier],
        "blocks": [(name, figures.blocks_figure(*match)) for name, match in report.blocks.items()],
        "maps": [(f"{name}: {axis.words}", figures.map_figure(axis)) for name, axis in report.drawn.items()],
    }
    return {
        section: [(above, _embedded(figure, f"{section}-{number}")) for number, (above, figure) in enumerate(every)]
        for section, every in sections.items()
        if every
    }


def _embedded(figure: go.Figure, name: str) -> Markup:
    # Without a name of ours it has a random one, and the same report other bytes each time.
    settings = {"displayModeBar": False, "responsive": True}
    return Markup(figure.to_html(settings, full_html=False, include_plotlyjs=False, div_id=name))


def _axes(axes: Mapping[str, MatchedAxis]) -> list[tuple[dict[str, int], list[str]]]:
    """For each axis its place in each order, and its cells. All orders but the model's put the hardest first."""
    orders = {
        "model": list(axes),
        "partners": sorted(axes, key=lambda name: -(axes[name].partners or 0)),
        "cost": sorted(axes, key=lambda name: -(axes[name].cost or 0)),
        "error": sorted(axes, key=lambda name: (axes[name].converged, -(axes[name].marginal_error or 0))),
    }
    places = {order: {name: place for place, name in enumerate(names)} for order, names in orders.items()}
    return [
        (
            {order: place[name] for order, place in places.items()},
            [
                name,
                f"{axis.n_parent} → {axis.n_anchor}",
                axis.solver,
                readable("partners", axis.partners),
                readable("cost", axis.cost),
                readable("iterations", axis.iterations),
                readable("marginal error", axis.marginal_error) + ("" if axis.converged else " (not converged)"),
            ],
        )
        for name, axis in axes.items()
    ]
