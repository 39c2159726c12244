"""Parents made ready for a fusion, with no weight read where their library allows that."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.errors import FusionError
from fusionpl.families.compatible import check_compatible, check_tied
from fusionpl.families.family import Family, is_bare, read_family
from fusionpl.fusion.config import FuseConfig, mixing_weights, resolve_anchor
from fusionpl.fusion.depth import Matching, match_depths
from fusionpl.fusion.kin import kinship
from fusionpl.fusion.matching import matched
from fusionpl.fusion.methods import METHODS
from fusionpl.fusion.methods.refinement import check_start
from fusionpl.fusion.target import tie_alike, untie_all
from fusionpl.fusion.team import (
    Parent,
    Team,
    check_count,
    check_devices,
    differing_settings,
    open_parents,
)
from fusionpl.models.classes import missing_classes
from fusionpl.models.preprocessing import ImageProcessing


def open_team(
    parents: Sequence[Parent],
    config: FuseConfig,
    *,
    names: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    processing: ImageProcessing | None = None,
    allow_pickle: bool = False,
    family: Family | str | Path | None = None,
) -> Team:
    """Opens parents, brings them to one numbering of tokens and one preparation of images, and compares them.

    Raises:
        FusionError: see `fuse`.
    """
    check_count(len(parents))
    anchor = resolve_anchor(config, len(parents))
    mixing_weights(config.weights, len(parents))
    names = list(names or (f"parent {index}" for index in range(len(parents))))
    opened = open_parents(parents, names, anchor, device, allow_pickle=allow_pickle, family=read_family(family))
    team = tie_alike(matched(opened, processing, config.labels))
    check_devices(team)
    if not config.align.classifier and missing_classes(team.reference.module) is not None:
        raise FusionError(
            f"align.classifier false keeps the head of {team.reference.name}, which has not the outputs of the others; "
            "leave align.classifier at true, or use labels anchor"
        )
    check_compatible(dict(zip(team.names, team.bindings, strict=True)))
    return team.noting(differing_settings(team)).noting(kinship(team.networks, team.sources, anchor))


def check_taught(team: Team, config: FuseConfig) -> None:
    """Raises FusionError where refinement is asked for, and there is nothing that can be taught so."""
    if config.refine.asked and is_bare(team.reference.module):
        raise FusionError("encoders without a head have no outputs to be taught; leave refine.method at none")
    check_start(config, [network.module for network in team.networks], team.binding)


def in_form(team: Team, config: FuseConfig, data: CalibrationSet | None = None) -> tuple[Team, list[Matching]]:
    """Parents in the form in which their method takes them, all of one depth.

    Args:
        team: the parents, or what this made of them before.
        config: see `resolve`.
        data: what blocks are matched by; without it they are matched evenly.

    Returns:
        The parents, and a matching for each of another depth than the fused model's.
    """
    team = team.of(network.original.prepared(None) for network in team.networks)
    team = untie_all(team) if config.canonical else team
    networks, matchings = match_depths(team.networks, team.anchor, config, data)
    check_tied({network.name: network.binding for network in networks})
    form = METHODS[config.strategy].form(config) if config.strategy in METHODS else None
    return team.of(network.prepared(form) for network in networks), matchings
