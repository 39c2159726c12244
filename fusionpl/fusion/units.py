"""Whether classifiers know different things: what decides whose units one stream takes."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fusionpl.calibration.flow import or_zeros, sum_over_ranks
from fusionpl.families import TAIL
from fusionpl.fusion.answers import log_probabilities
from fusionpl.fusion.config import FuseConfig, RefineConfig
from fusionpl.fusion.refit import held_out
from fusionpl.fusion.sweep import Sweep, Team

# Classifiers of digits and CIFAR-10 of the same data, or of halves that were cut at random, had shares below 0.026;
# those that saw 80 % of half the classes each, from 0.035 on.
SPECIALISED = 0.03
# Classifiers that saw other classes had 99 % and more, those of 80 % of half the classes at most 68 %.
APART = 0.9
# Samples that a trial takes at most, and the standard errors by which the anchor's units have to lead. In 13 teams of
# digits and CIFAR-10 that decides as the test data do: at 2.7 in one of better parents, at most 1.0 in all others.
TRIAL, ERRORS = 512, 2.0

_WHOSE = {"anchor": "the anchor's first", "even": "as many of each parent's"}


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
        for _, shown in _shown(team):
            sums += torch.tensor([shown.shape[1], float(divergence(shown).sum())])
            total = shown.double().sum(1).cpu()
            means = total if means is None else means + total
    means = or_zeros(means)
    sum_over_ranks([sums, means])
    samples, diverged = sums.tolist()
    return float(divergence(means / samples).sum()) * samples / diverged if diverged > 0 else 0.0


def knowledge(team: Team) -> Tensor:
    """How much parents that give tags know of each, [parents, tags]: the variance over samples of the probability that
    they give it. Who never saw a tag gives it to none, or to all alike. No label is read.

    Args:
        team: the parents; they are run whole, on as many samples as a trial takes.
    """
    found: Tensor | None = None
    data = team.data.head(TRIAL)
    with team.at_work():
        for batch in data:
            holds = torch.stack([parent.logits(data[batch]).double().cpu().sigmoid() for parent in team.parents])
            sums = torch.stack([torch.ones_like(holds).sum(1), holds.sum(1), holds.square().sum(1)])
            found = sums if found is None else found + sums
    found = or_zeros(found)
    sum_over_ranks([found])
    samples, total, squares = found
    variance: Tensor = squares / samples - (total / samples).square()
    return variance.clamp_min(0.0)


def candidates(config: FuseConfig, share: float | None) -> tuple[list[FuseConfig], list[str]]:
    """The configurations that `units auto` may stand for, and why, in a line each.

    Parents of the same data take the anchor's units, those that know other classes each other's alike. In between both
    are candidates: the better the parents, the more their heads need each other. Language models disagree about rare
    tokens by chance, and those of other topics did better with the anchor's units: they take what parents of the same
    data do.

    Args:
        config: what is asked for.
        share: what `specialisation` found of classifiers; None of other models.
    """
    if config.units != "auto":
        return [config], []
    anchor, even = replace(config, units="anchor"), replace(config, units="even")
    if share is None:
        return [anchor], []
    why = f"{share:.1%} of their disagreement is about how often each class occurs; the limit is"
    if share >= APART:
        return [even], [f"units: {_WHOSE['even']}, who know other classes ({why} {APART:.0%})"]
    if share < SPECIALISED:
        return [anchor], [f"units: {_WHOSE['anchor']}, for the parents know the same ({why} {SPECIALISED:.0%})"]
    return [anchor, even], []


def trial_of(config: FuseConfig, classifies: bool) -> FuseConfig | None:
    """What each of two trials would be asked for, of models that classify or do not; None where nothing is tried."""
    if config.strategy != "joint" or config.units != "auto" or not classifies:
        return None
    few = min(TRIAL, config.calibration.samples)
    return replace(config, calibration=replace(config.calibration, samples=few), refine=RefineConfig("none"))


def preferred(anchor: Sweep, even: Sweep) -> tuple[FuseConfig, list[str]]:
    """Fuses classifiers under both candidates, on trial: with the anchor's units first, and with each parent's.

    Returns:
        The candidate with each parent's, unless the other predicts held-out samples clearly nearer to the mean of the
        parents' predictions; and a line that says so.
    """
    distances = []
    for sweep in (anchor, even):
        sweep.run()
        distances.append(_distances(sweep))
    lead = distances[1] - distances[0]
    sums = torch.stack([torch.ones_like(lead), *distances, lead, lead.square()]).sum(1)
    sum_over_ranks([sums])
    samples = max(float(sums[0]), 2.0)
    first, second, mean, squares = (sums[1:] / samples).tolist()
    limit = ERRORS * math.sqrt(max(squares - mean**2, 0.0) / (samples - 1))
    clear = mean > limit
    chosen, with_them = ("anchor", "with them") if clear else ("even", f"with {_WHOSE['anchor']}")
    return (anchor if clear else even).config, [
        f"units: {_WHOSE[chosen]}; {with_them}, predictions of held-out samples are {'' if clear else 'not '}clearly "
        f"nearer to the mean of the parents' ({max(first, 0.0):.3f} nats away, with {_WHOSE['even']} {second:.3f}; "
        f"{ERRORS:g} standard errors of the difference are {limit:.3f})"
    ]


def _distances(sweep: Sweep) -> Tensor:
    """The Kullback-Leibler divergence, in nats, of what a fused classifier predicts for each held-out sample from the
    mean of what its parents do."""
    found, state = [torch.zeros(0, dtype=torch.float64)], sweep.fused.network.states(TAIL)
    by_tag = sweep.team.tag_weights(sweep.weights)
    weights = sweep.weights if by_tag is None else [one[:, None].to(sweep.team.parents[0].device) for one in by_tag]
    with sweep.team.at_work():
        for batch, shown in _shown(sweep.team):
            mean = torch.stack([weight * one for weight, one in zip(weights, shown, strict=True)]).sum(0)
            predicted = log_probabilities(sweep.fused.logits(state, batch), sweep.team.kind)
            far = (torch.special.xlogy(mean, mean) - mean * predicted).flatten(1).sum(1).double().cpu()
            found.append(far[held_out(sweep.team.data.firsts[batch], len(far))])
    return torch.cat(found)


def _shown(team: Team) -> Iterator[tuple[int, Tensor]]:
    """Each batch with the parents' probabilities [parents, B, ..., classes], or of tags [parents, B, tags, 2]."""
    states = [parent.states(TAIL) for parent in team.parents]
    for batch in team.data:
        given = [flow.logits(state, batch) for flow, state in zip(team.flows, states, strict=True)]
        yield batch, torch.stack([log_probabilities(one, team.kind).exp() for one in given])


def divergence(shown: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of distributions [parents, ..., classes], in nats."""
    found: Tensor = torch.special.entr(shown.mean(0)).sum(-1) - torch.special.entr(shown).sum(-1).mean(0)
    return found
