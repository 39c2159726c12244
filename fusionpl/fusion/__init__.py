"""Fusion: align parents to an anchor and average them into one model."""

from fusionpl.fusion.advice import ADVISED, Advice, advise
from fusionpl.fusion.answers import log_odds
from fusionpl.fusion.average import mixing_weights, vanilla
from fusionpl.fusion.config import FuseConfig, RefineConfig, RefitConfig, load_config
from fusionpl.fusion.estimate import Estimate, estimate
from fusionpl.fusion.forms import folding_error
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
from fusionpl.fusion.goal import settled, tied_alike
from fusionpl.fusion.heads import fit_head
from fusionpl.fusion.kin import ALIKE, weights_alike
from fusionpl.fusion.parents import AlignedParent
from fusionpl.fusion.plan import Plan, describe, make_plan
from fusionpl.fusion.result import FusionResult
from fusionpl.fusion.teaching import loss_to_mean
from fusionpl.fusion.units import trial_of

__all__ = [
    "ADVISED",
    "ALIKE",
    "Advice",
    "advise",
    "weights_alike",
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
    "folding_error",
    "fuse",
    "load_config",
    "log_odds",
    "loss_to_mean",
    "make_plan",
    "match_parents",
    "mixing_weights",
    "open_parents",
    "plan_of",
    "ready",
    "resolve_anchor",
    "settled",
    "tied_alike",
    "trial_of",
    "vanilla",
]
