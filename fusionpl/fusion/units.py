"""Whether classifiers know different things: what decides whose units one stream takes, and what its head fits."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fusionpl.calibration import or_zeros, sum_over_ranks
from fusionpl.families import TAIL
from fusionpl.fusion.config import FuseConfig
from fusionpl.fusion.sweep import Team

# Classifiers of digits and CIFAR-10 of the same data, or of halves that were cut at random, had shares below 0.026;
# those that saw 80 % of half the classes each, from 0.035 on.
SPECIALISED = 0.03
# Classifiers that saw other classes had 99 % and more, those of 80 % of half the classes at most 68 %.
APART = 0.9


def specialisation(team: Team) -> float:
    """How much of what classifiers disagree about is how often each class occurs, from 0 to 1.

    They disagree by the Jensen-Shannon divergence of their predictions on each sample, and of the means of these.
    Parents of the same data agree on how often a class occurs; parents that saw other classes do not. 0 where models
    put out one number, or agree everywhere. No label is read.

    Args:
        team: the parents, which stand before the tail.
    """
    means: Tensor | None = None
    sums = torch.zeros(2, dtype=torch.float64)  # samples, and what all diverge by
    with team.at_work():
        states = [parent.states(TAIL) for parent in team.parents]
        for batch in team.data:
            given = [flow.logits(state, batch) for flow, state in zip(team.flows, states, strict=True)]
            shown = torch.stack([one.float().softmax(-1) for one in given])
            sums += torch.tensor([shown.shape[1], float(_divergence(shown).sum())])
            total = shown.double().sum(1).cpu()
            means = total if means is None else means + total
    means = or_zeros(means)
    sum_over_ranks([sums, means])
    samples, diverged = sums.tolist()
    return float(_divergence(means / samples)) * samples / diverged if diverged > 0 else 0.0


def decided(config: FuseConfig, share: float | None) -> tuple[FuseConfig, list[str]]:
    """The configuration with what `units auto` and `predictions auto` stand for, and why, in a line each.

    Language models disagree about rare tokens by chance, and those of other topics did better with the anchor's units:
    they take what parents of the same data do.

    Args:
        config: what is asked for.
        share: what `specialisation` found of classifiers; None of other models.
    """
    if share is None:
        return replace(
            config,
            units="anchor" if config.units == "auto" else config.units,
            predictions="logits" if config.predictions == "auto" else config.predictions,
        ), []
    why = f"{share:.1%} of their disagreement is about how often each class occurs; the limit is"
    notes = []
    if config.units == "auto":
        units: Literal["anchor", "even"] = "even" if share >= SPECIALISED else "anchor"
        told = {
            "even": "units: as many of each parent's, who know different things",
            "anchor": "units: the anchor's first, for the parents know the same",
        }
        config = replace(config, units=units)
        notes.append(f"{told[units]} ({why} {SPECIALISED:.0%})")
    if config.predictions == "auto":
        apart = share >= APART
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
