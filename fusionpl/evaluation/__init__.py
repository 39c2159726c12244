"""Measuring models: metrics, ensemble, cost, loss barrier, and the report that shows them."""

from fusionpl.evaluation.barrier import Curve, interpolation
from fusionpl.evaluation.continuation import continuation
from fusionpl.evaluation.cost import flops, parameters
from fusionpl.evaluation.metrics import evaluate, evaluate_ensemble
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import Row, best_of, readable

__all__ = [
    "Curve",
    "Report",
    "Row",
    "best_of",
    "continuation",
    "evaluate",
    "evaluate_ensemble",
    "flops",
    "interpolation",
    "parameters",
    "readable",
]
