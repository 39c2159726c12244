"""Optimal transport between sets of units: ground metrics, solvers, TransportMap. Pure tensors, no model."""

from fusionpl.transport.costs import Gram, Metric, Normalize, gram, ground_metric
from fusionpl.transport.maps import Scaling, TransportMap, identity, permutation
from fusionpl.transport.solvers import Solver, solve

__all__ = [
    "Gram",
    "Metric",
    "Normalize",
    "Scaling",
    "Solver",
    "TransportMap",
    "gram",
    "ground_metric",
    "identity",
    "permutation",
    "solve",
]
