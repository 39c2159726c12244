"""What is to be made: what `auto` stands for, and a network like the anchor or of another width."""

import copy
import math
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.errors import FusionError
from fusionpl.families.axes import Binding
from fusionpl.families.binding import bind
from fusionpl.families.canonical import inseparable
from fusionpl.fusion.config import FuseConfig, changed
from fusionpl.fusion.team import Team
from fusionpl.models.classes import missing_classes, whole_heads
from fusionpl.models.resized import resized, untied

# The largest number that is meant as a factor: no stream has so few units.
LARGEST_FACTOR = 8


def resolve(config: FuseConfig, team: Team) -> FuseConfig:
    """The configuration, with `joint` or `transport` in the place of `strategy auto`; whose units are taken is decided
    for parents with heads of their own, who learned different things.

    Raises:
        FusionError: one stream is asked for of parents that lack tokens, a width or units where only transport will do.
    """
    config = _with_strategy(config, team)
    decided = team.heads and config.strategy == "joint" and config.units == "auto"
    return replace(config, units="even") if decided else config


def _with_strategy(config: FuseConfig, team: Team) -> FuseConfig:
    anchor = team.reference
    lacking = [
        f"{network.name} lacks tokens of {anchor.name}"
        for network in team.networks
        if network.missing_tokens is not None
    ]
    if config.strategy in ("joint", "head") and lacking:
        raise FusionError(
            f"{lacking[0]}, and strategy {config.strategy} has nothing to put in their places; use strategy transport"
        )
    if config.strategy != "auto":
        return config
    reasons = [
        f"{network.name}: {reason}" for network in team.networks if (reason := inseparable(untie(network).binding))
    ]
    reasons += lacking
    reasons += [f"align.{name} asks for strategy transport" for name in changed(config.align)]
    if config.refit.method == "none":
        reasons.append("refit.method none asks for strategy transport")
    if config.weights and min(config.weights) <= 0:
        reasons.append("a weight of 0 leaves a parent's stream out")
    deeper = config.depth not in (None, anchor.binding.depth)
    for option, asked in {"width": config.width is not None, "depth": deeper, "units": config.units != "auto"}.items():
        if reasons and asked:
            raise FusionError(f"{option} needs strategy joint, and {reasons[0]}")
    return replace(config, strategy="transport" if reasons else "joint")


def untie(network: SectionedModel) -> SectionedModel:
    """The same network with a decoder of its own, where its decoder is its embedding: what stands at one end of the
    stream alone may move with it. T5, which scales by the tie, stays."""
    if not network.binding.closed or len(network.binding.stacks) > 1:
        return network
    parts = untied(network.module)
    if parts is None:
        return network
    module, sources = parts
    return network.but(
        module=module, binding=bind(module, network.binding.family),
        read=lambda name: network.read(str(sources.get(name, name))),
    )  # fmt: skip


def untie_all(team: Team) -> Team:
    """The same parents, their decoders apart from their embeddings: see `untie`."""
    networks = [untie(network) for network in team.networks]
    return team.of(
        networks,
        (
            f"'{name}' is no longer embedding and decoder in one: the fused model's decoder has parameters of its own, "
            "because what writes the stream and what reads it are moved apart"
            for name in team.binding.closed - networks[team.anchor].binding.closed
        ),
    )


def tie_alike(team: Team) -> Team:
    """The same parents; where the decoder is the embedding in some and not in others, it comes apart in all that
    allow it: see `untie`."""
    return untie_all(team) if len({bool(binding.closed) for binding in team.bindings}) > 1 else team


def target_of(network: SectionedModel, config: FuseConfig) -> SectionedModel:
    """The network that a fusion gives: the anchor, or one whose parameters are still to come, and are 0.

    Args:
        network: the anchor, at the depth of the fused network.
        config: its `width` is that of the stream; heads and hidden units grow and shrink with it.

    Raises:
        FusionError: a width that leaves a part of a head; a library that can't build it.
    """
    # Heads need not divide a width that nobody asked to change.
    times, heads = (Fraction(1), None) if config.width is None else _times(network.binding, config.width)
    partial = missing_classes(network.module) is not None
    if times == 1 and network.cut is None and not partial:
        return network
    module = network.module if times == 1 else resized(network.module, times=times, heads=heads)
    if times == 1 and partial:
        module = whole_heads(copy.deepcopy(module))
    binding = bind(module, network.binding.family)

    def blank(name: str) -> Tensor:
        like = module.get_parameter(name)
        return torch.zeros(like.shape, dtype=like.dtype)

    return SectionedModel(
        module,
        binding,
        "the fused model",
        read=blank,
        device=network.device,
        float32=True,
        missing_tokens=network.missing_tokens,
    )


def _times(binding: Binding, width: float) -> tuple[Fraction, int]:
    """By how much everything grows, and the number of heads that it has now."""
    stream = binding.axes[binding.streams()[0][0]].size
    groups = {binding.axes[axis].groups for attention in binding.attention for axis in attention}
    heads = max(binding.axes[axis].heads for attention in binding.attention for axis in attention)
    step = stream // math.gcd(*groups)
    if width <= LARGEST_FACTOR:
        return Fraction(max(1, round(width * stream / step)) * step, stream), heads
    if width % step:
        below = int(width // step * step)
        near = " or ".join(str(one) for one in (below, below + step) if one)
        raise FusionError(f"width {width:g} leaves a part of a head; with heads like the anchor's it may be {near}")
    return Fraction(int(width), stream), heads
