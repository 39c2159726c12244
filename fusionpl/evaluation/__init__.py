"""Measuring models: metrics, ensemble, cost, loss barrier, and the report that shows them."""

from fusionpl.evaluation.barrier import Curve, interpolation
from fusionpl.evaluation.continuation import continuation
from fusionpl.evaluation.cost import flops, parameters
from fusionpl.evaluation.matched import MatchedAxis
from fusionpl.evaluation.metrics import evaluate, evaluate_ensemble, evaluate_samples
from fusionpl.evaluation.neighbours import agreement, embeddings, probe, similarities
from fusionpl.evaluation.outcomes import Outcomes, load_outcomes, save_outcomes, scored
from fusionpl.evaluation.plots import CAPTIONS
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import FIGURES, HEAD_FITTED, MODEL, PARENT, Needs, Row, best_parent, judged, readable
from fusionpl.evaluation.verdict import Verdict

__all__ = [
    "CAPTIONS",
    "FIGURES",
    "HEAD_FITTED",
    "MODEL",
    "PARENT",
    "Curve",
    "MatchedAxis",
    "Needs",
    "Outcomes",
    "Report",
    "Row",
    "Verdict",
    "agreement",
    "best_parent",
    "continuation",
    "embeddings",
    "evaluate",
    "evaluate_ensemble",
    "evaluate_samples",
    "flops",
    "interpolation",
    "judged",
    "load_outcomes",
    "parameters",
    "probe",
    "readable",
    "save_outcomes",
    "scored",
    "similarities",
]
