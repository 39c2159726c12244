"""Whether parents know different things: what decides which units one stream takes, and what its classifier fits."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fusionpl.calibration import or_zeros, sum_over_ranks
from fusionpl.families import TAIL, boundary
from fusionpl.fusion.config import FuseConfig
from fusionpl.fusion.sweep import Team

# Classifiers of digits and CIFAR-10 of the same data, or of halves that were cut at random, had shares below 0.026;
# those that saw 80 % of half the classes each, from 0.035 on. Language models disagree about rare tokens by chance (up
# to 0.06 of the same data), and those of other topics (up to 0.18) did better with the anchor's: never evenly.
SPECIALISED = {"samples": 0.03, "tokens": 1.0}
# Classifiers that saw other classes had 99 % and more, those of 80 % of half the classes at most 68 %.
APART = 0.9
_TOKENS = 1024  # whose predictions are held at once


@dataclass(frozen=True)
class Specialisation:
    """How much of what parents disagree about is how often each class occurs.

    Attributes:
        share: from 0 to 1; 0 where models put out one number, or agree everywhere.
        of: what is classified.
    """

    share: float
    of: Literal["samples", "tokens"]


def specialisation(team: Team) -> Specialisation:
    """How much of what the parents disagree about is how often each class occurs, from 0 to 1.

    They disagree by the Jensen-Shannon divergence of their predictions on each sample (or token), and of the means of
    these. Parents of the same data agree on how often a class occurs; parents that saw other classes do not. No label
    is read.

    Args:
        team: the parents, which stand before the tail.
    """
    means: Tensor | None = None
    sums = torch.zeros(3, dtype=torch.float64)  # rows, those of tokens, and what all diverge by
    with team.at_work():
        states = [parent.states(TAIL) for parent in team.parents]
        for batch in team.data:
            mask = team.data.mask(batch, team.binding, boundary(team.binding.blocks[-1]))
            each = [flow.logits(state, batch, _TOKENS) for flow, state in zip(team.flows, states, strict=True)]
            for given in zip(*each, strict=True):
                part = given[0][0]
                rows = [
                    one[mask[part].to(one.device)] if mask is not None and one.ndim == 3 else one.flatten(0, -2)
                    for _, one in given
                ]
                shown = torch.stack([one.float().softmax(-1) for one in rows])
                count = shown.shape[1]
                sums += torch.tensor([count, count * (given[0][1].ndim == 3), float(_divergence(shown).sum())])
                total = shown.double().sum(1).cpu()
                means = total if means is None else means + total
    means = or_zeros(means)
    sum_over_ranks([sums, means])
    rows_seen, of_tokens, diverged = sums.tolist()
    share = float(_divergence(means / rows_seen)) * rows_seen / diverged if diverged > 0 else 0.0
    return Specialisation(share, "tokens" if of_tokens else "samples")


def decided(config: FuseConfig, found: Specialisation) -> tuple[FuseConfig, list[str]]:
    """The configuration with what `units auto` and `predictions auto` stand for, and why, in a line each.

    Args:
        config: what is asked for.
        found: what the parents were found to be.
    """
    kind = "class" if found.of == "samples" else "token"
    why = f"{found.share:.1%} of their disagreement is about how often each {kind} occurs; the limit is"
    notes = []
    if config.units == "auto":
        limit = SPECIALISED[found.of]
        units: Literal["anchor", "even"] = "even" if found.share >= limit else "anchor"
        told = {
            "even": "units: as many of each parent's, who know different things",
            "anchor": "units: the anchor's first, for the parents know the same",
        }
        config = replace(config, units=units)
        notes.append(f"{told[units]} ({why} {limit:.0%})")
    if config.predictions == "auto":
        apart = found.of == "samples" and found.share >= APART
        config = replace(config, predictions="probabilities" if apart else "logits")
        if apart:
            notes.append(
                f"predictions: the mean of the parents' probabilities, who know other classes ({why} {APART:.0%})"
            )
    return config, notes


def _divergence(shown: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of distributions [parents, ..., classes], in nats."""
    found: Tensor = torch.special.entr(shown.mean(0)).sum(-1) - torch.special.entr(shown).sum(-1).mean(0)
    return found
