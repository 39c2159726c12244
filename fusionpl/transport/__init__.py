"""Optimal transport between sets of units: ground metrics, solvers, TransportMap. Pure tensors, no model."""

from fusionpl.transport.costs import Gram, Metric, Normalize, gram, ground_metric
from fusionpl.transport.least_squares import COMBINATIONS, NormalEquations, fit_ridge
from fusionpl.transport.maps import Scaling, TransportMap, identity, permutation
from fusionpl.transport.products import cross_product, full_float32, self_product
from fusionpl.transport.softmax import LARGEST, Fitted, Link, Reduce, fit_softmax, log_mean, spread
from fusionpl.transport.solvers import Solver, check_one_width, procrustes, procrustes_batch, solve

__all__ = [
    "COMBINATIONS",
    "LARGEST",
    "Fitted",
    "Gram",
    "Link",
    "Reduce",
    "Metric",
    "NormalEquations",
    "Normalize",
    "Scaling",
    "Solver",
    "TransportMap",
    "check_one_width",
    "cross_product",
    "fit_ridge",
    "fit_softmax",
    "full_float32",
    "gram",
    "ground_metric",
    "identity",
    "log_mean",
    "permutation",
    "procrustes",
    "procrustes_batch",
    "self_product",
    "solve",
    "spread",
]
