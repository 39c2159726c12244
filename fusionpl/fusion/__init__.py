"""Fusion: align parents to an anchor and average them into one model."""

from fusionpl.fusion.advice import ADVISED, Advice, advise
from fusionpl.fusion.answers import log_odds
from fusionpl.fusion.average import mixing_weights, vanilla
from fusionpl.fusion.config import FuseConfig, RefineConfig, RefitConfig, load_config
from fusionpl.fusion.forms import folding_error
from fusionpl.fusion.fuse import Fusion, fuse, prepare, prepare_team
from fusionpl.fusion.heads import fit_head
from fusionpl.fusion.kin import ALIKE, weights_alike
from fusionpl.fusion.parents import AlignedParent
from fusionpl.fusion.prepare import open_team
from fusionpl.fusion.result import FusionResult
from fusionpl.fusion.teaching import loss_to_mean
from fusionpl.fusion.team import Team, resolve_anchor

__all__ = [
    "ADVISED",
    "ALIKE",
    "Advice",
    "AlignedParent",
    "FuseConfig",
    "Fusion",
    "FusionResult",
    "RefineConfig",
    "RefitConfig",
    "Team",
    "advise",
    "fit_head",
    "folding_error",
    "fuse",
    "load_config",
    "log_odds",
    "loss_to_mean",
    "mixing_weights",
    "open_team",
    "prepare",
    "prepare_team",
    "resolve_anchor",
    "vanilla",
    "weights_alike",
]
