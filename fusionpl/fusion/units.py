"""Whose units one stream takes: what classifiers know decides, or two fusions on trial."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from fusionpl.calibration.cursor import Cursor, sum_over_ranks
from fusionpl.families.family import TAIL
from fusionpl.fusion.answers import log_probabilities
from fusionpl.fusion.config import FuseConfig
from fusionpl.fusion.fitting import held_out
from fusionpl.fusion.survey import APART, LOOKED_AT, predictions
from fusionpl.fusion.voting import Voting
from fusionpl.fusion.walk import Walk

# Classifiers of digits and CIFAR-10 of the same data, or of halves that were cut at random, had shares below 0.026;
# those that saw 80 % of half the classes each, from 0.035 on.
SPECIALISED = 0.03
# Samples from which on both are tried, on a part of them.
TRIED = 2 * LOOKED_AT
# The standard errors by which the anchor's units have to lead. In 13 teams of digits and CIFAR-10 that decides as the
# test data do: at 2.7 in one of better parents, at most 1.0 in all others.
ERRORS = 2.0

_WHOSE = {"anchor": "the anchor's first", "even": "as many of each parent's"}


def candidates(config: FuseConfig, share: float | None, samples: int) -> tuple[list[FuseConfig], list[str]]:
    """The configurations that `units auto` may stand for, and why, in a line each.

    Parents of the same data take the anchor's units, those that know other classes each other's alike. In between both
    are candidates: the better the parents, the more their heads need each other. On few samples a trial never could
    tell them apart, and each other's do better more often. Language models disagree about rare tokens by chance, and
    those of other topics did better with the anchor's units: they take what parents of the same data do.

    Args:
        config: what is asked for.
        share: what `specialisation` found of classifiers; None of other models.
        samples: of the calibration set.
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
    if samples < TRIED:
        few = f"both ways are tried with {TRIED:,} samples or more, and here are {samples:,}"
        return [even], [f"units: {_WHOSE['even']}, who saw other data ({why} {SPECIALISED:.0%}); {few}"]
    return [anchor, even], []


def nearer(anchor: Tensor, even: Tensor) -> tuple[bool, str]:
    """Whether the fusion with the anchor's units predicts held-out samples clearly nearer to the mean of the parents'
    predictions than that with each parent's, and a line that says so.

    Args:
        anchor, even: of each sample, see `distances_of`.
    """
    lead = even - anchor
    sums = torch.stack([torch.ones_like(lead), anchor, even, lead, lead.square()]).sum(1)
    sum_over_ranks([sums])
    samples = max(float(sums[0]), 2.0)
    first, second, mean, squares = (sums[1:] / samples).tolist()
    limit = ERRORS * math.sqrt(max(squares - mean**2, 0.0) / (samples - 1))
    clear = mean > limit
    chosen, with_them = ("anchor", "with them") if clear else ("even", f"with {_WHOSE['anchor']}")
    return clear, (
        f"units: {_WHOSE[chosen]}; {with_them}, predictions of held-out samples are {'' if clear else 'not '}clearly "
        f"nearer to the mean of the parents' ({max(first, 0.0):.3f} nats away, with {_WHOSE['even']} {second:.3f}; "
        f"{ERRORS:g} standard errors of the difference are {limit:.3f})"
    )


def distances_of(walk: Walk, fused: Cursor, voting: Voting) -> Tensor:
    """The Kullback-Leibler divergence, in nats, of what a fused classifier predicts for each held-out sample from the
    mean of what its parents do.

    Args:
        walk: the parents before the tail.
        fused: the fused network there.
        voting: who says what it is to predict.
    """
    kind, device = walk.team.kind, walk.team.reference.device
    distances, state = [torch.zeros(0, dtype=torch.float64)], fused.network.states(TAIL)
    with walk.at_work():
        for batch, shown in predictions(walk):
            weights = voting.on(walk.data.owners[batch])
            assert weights is not None  # parents of several heads take no trial
            shares = [weight[:, None].to(device) if isinstance(weight, Tensor) else weight for weight in weights]
            mean = torch.stack([share * own for share, own in zip(shares, shown, strict=True)]).sum(0)
            predicted = log_probabilities(fused.logits(state, batch), kind)
            far = (torch.special.xlogy(mean, mean) - mean * predicted).flatten(1).sum(1).double().cpu()
            distances.append(far[held_out(walk.data.firsts[batch], len(far))])
    return torch.cat(distances)
