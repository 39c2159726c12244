"""Alignment: a TransportMap for every axis of a parent, from evidence about its units."""

from fusionpl.alignment.config import AlignConfig, Residual
from fusionpl.alignment.evidence import ActivationEvidence, Evidence, WeightEvidence
from fusionpl.alignment.walk import Alignment, align, evidence_keys

__all__ = [
    "ActivationEvidence",
    "AlignConfig",
    "Alignment",
    "Evidence",
    "Residual",
    "WeightEvidence",
    "align",
    "evidence_keys",
]
