"""Fusion: align parents to an anchor and average them into one model."""

from fusionpl.fusion.average import mixing_weights
from fusionpl.fusion.baselines import vanilla
from fusionpl.fusion.config import FuseConfig, RefineConfig, RefitConfig, load_config
from fusionpl.fusion.fuse import Calibrated, FusionResult, check_parents, fuse, resolve_anchor
from fusionpl.fusion.plan import plan
from fusionpl.fusion.refit import AlignedParent

__all__ = [
    "AlignedParent",
    "Calibrated",
    "FuseConfig",
    "FusionResult",
    "RefineConfig",
    "RefitConfig",
    "check_parents",
    "fuse",
    "load_config",
    "mixing_weights",
    "plan",
    "resolve_anchor",
    "vanilla",
]
