"""Optimal transport between sets of units: ground metrics, solvers, TransportMap. Pure tensors, no model."""

from fusionpl.transport.costs import Gram, Metric, Normalize, gram, ground_metric
from fusionpl.transport.least_squares import NormalEquations, fit_ridge
from fusionpl.transport.maps import Scaling, TransportMap, identity, permutation
from fusionpl.transport.solvers import Solver, procrustes, solve

__all__ = [
    "Gram",
    "Metric",
    "NormalEquations",
    "Normalize",
    "Scaling",
    "Solver",
    "TransportMap",
    "fit_ridge",
    "gram",
    "ground_metric",
    "identity",
    "permutation",
    "procrustes",
    "solve",
]
