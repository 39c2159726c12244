"""What options call metrics, normalisations, solvers and scalings."""

from typing import Literal

Metric = Literal["euclidean", "sqeuclidean", "cosine", "correlation"]
Normalize = Literal["max", "mean", "median", "log", "none"]
Scaling = Literal["two_sided", "source"]
Solver = Literal["sinkhorn", "emd", "assignment", "identity"]
