"""Alignment: a TransportMap for every axis of a parent, from evidence about its units."""

from fusionpl.alignment.aligner import Aligner
from fusionpl.alignment.config import AlignConfig, Residual
from fusionpl.alignment.evidence import ActivationEvidence, Evidence, WeightEvidence
from fusionpl.alignment.maps import Alignment, Maps
from fusionpl.alignment.problem import Problem
from fusionpl.alignment.problems import problems

__all__ = [
    "ActivationEvidence",
    "AlignConfig",
    "Aligner",
    "Alignment",
    "Evidence",
    "Maps",
    "Problem",
    "Residual",
    "WeightEvidence",
    "problems",
]
