"""Alignment: a TransportMap for every axis of a parent, from evidence about its units."""

from fusionpl.alignment.blocks import likeness, matched, spread, telling
from fusionpl.alignment.config import AlignConfig, Residual, residual_of
from fusionpl.alignment.evidence import ActivationEvidence, Evidence, WeightEvidence
from fusionpl.alignment.grouped import grouped_heads, needs_groups
from fusionpl.alignment.maps import Found, Maps, Plans
from fusionpl.alignment.problem import Observed, Problem, seen_at, sizes_in, solve_all
from fusionpl.alignment.problems import Gated, Heads, Joined, Joint, Order, Stream, Units

__all__ = [
    "ActivationEvidence",
    "AlignConfig",
    "Evidence",
    "Found",
    "Gated",
    "Heads",
    "Joined",
    "Joint",
    "Maps",
    "Observed",
    "Order",
    "Plans",
    "Problem",
    "Residual",
    "Stream",
    "Units",
    "WeightEvidence",
    "grouped_heads",
    "likeness",
    "matched",
    "needs_groups",
    "residual_of",
    "seen_at",
    "sizes_in",
    "solve_all",
    "spread",
    "telling",
]
