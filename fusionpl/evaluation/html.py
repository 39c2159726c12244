"""The report's page: a single file that loads and runs nothing."""

from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from fusionpl.evaluation.matched import MatchedAxis
from fusionpl.evaluation.rows import readable


def page(**shown: Any) -> str:
    """The template with what it shows; every text is escaped."""
    source = (resources.files("fusionpl.evaluation") / "report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(source).render(shown)


def axes_cells(axes: Mapping[str, MatchedAxis]) -> list[tuple[dict[str, int], list[str]]]:
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
