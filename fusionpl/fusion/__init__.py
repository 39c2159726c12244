"""Fusion: align parents to an anchor and average them into one model."""

from fusionpl.fusion.average import mixing_weights, vanilla
from fusionpl.fusion.config import FuseConfig, RefineConfig, RefitConfig, load_config
from fusionpl.fusion.estimate import Estimate, estimate
from fusionpl.fusion.fuse import (
    Calibrated,
    check_parents,
    fuse,
    match_parents,
    open_parents,
    plan_of,
    ready,
    resolve_anchor,
)
from fusionpl.fusion.goal import settled
from fusionpl.fusion.heads import fit_head
from fusionpl.fusion.parents import AlignedParent
from fusionpl.fusion.plan import Plan, describe, make_plan
from fusionpl.fusion.result import FusionResult
from fusionpl.fusion.teaching import loss_to_mean
from fusionpl.fusion.units import trial_of

__all__ = [
    "AlignedParent",
    "Calibrated",
    "Estimate",
    "FuseConfig",
    "FusionResult",
    "Plan",
    "RefineConfig",
    "RefitConfig",
    "check_parents",
    "describe",
    "estimate",
    "fit_head",
    "fuse",
    "load_config",
    "loss_to_mean",
    "make_plan",
    "match_parents",
    "mixing_weights",
    "open_parents",
    "plan_of",
    "ready",
    "resolve_anchor",
    "settled",
    "trial_of",
    "vanilla",
]
