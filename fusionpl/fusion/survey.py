"""What is known of whole networks before any section is fused: a first walk through the parents alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fusionpl.calibration.batches import Progress, no_progress
from fusionpl.calibration.cursor import or_zeros, sum_over_ranks
from fusionpl.calibration.kept import Kept, Store
from fusionpl.calibration.moments import Key, Moments
from fusionpl.calibration.observe import Statistics, Wanted
from fusionpl.families.axes import section_of
from fusionpl.families.family import TAIL
from fusionpl.fusion.answers import log_probabilities
from fusionpl.fusion.plan import Plan
from fusionpl.fusion.voting import Voting, votings_apart
from fusionpl.fusion.walk import Walk
from fusionpl.models.classes import missing_classes
from fusionpl.models.labels import TAGS, Kind
from fusionpl.models.save import class_names
from fusionpl.models.separate import Head

# Classifiers that saw other classes had 99 % and more, those of 80 % of half the classes at most 68 %.
APART = 0.9
# What parents are is decided on so many samples at most: one stream's basis, what they know, whose units are taken.
LOOKED_AT = 512
# Parents whose numbers mean other classes agree on so many samples in the best order, and on so many more in it than as
# they are, which is also more than chance gives few samples.
AGREE, CLEARLY = 0.5, 0.05
MOST_CLASSES = 2048  # among which an order is looked for: their products are a table
SHOWN = 3  # classes in a line


@dataclass(frozen=True)
class Survey:
    """What a walk through the parents alone has shown.

    Attributes:
        kind: what parents put out.
        moments: for each parent, key -> its moments with the anchor, which are read when they are asked for.
        streams: first axis of a stream -> the products of its units with those of all parents', side by side, added up
            over its joins, those of each join with unit energy.
        share: of what classifiers disagree about, how much is how often each class occurs: see `specialisation`. None
            where that was not asked for.
        knowledge: how much each parent knows of each tag, [parents, tags]; None where nobody asked, or they give no
            tags.
        outputs: for each parent, which tags it has an output for, bool [tags]; None where it has not been asked.
        heads: of the parents, where they have their own.
        warnings: what speaks against taking the parents' outputs for the same.
    """

    kind: Kind
    moments: Sequence[Mapping[Key, Moments]]
    streams: Mapping[str, Tensor] = field(default_factory=dict)
    share: float | None = None
    knowledge: Tensor | None = None
    outputs: Sequence[Tensor] | None = None
    heads: Sequence[Head] = ()
    warnings: Sequence[str] = ()

    @property
    def apart(self) -> bool:
        """Whether the parents know other classes."""
        return self.share is not None and self.share >= APART and self.knowledge is None

    @property
    def notes(self) -> list[str]:
        """What a reader should know of it, a line each."""
        return (
            ["each tag is fitted to what the parents give it, mostly those that know it"]
            if self.knowledge is not None
            else []
        )

    def votings(self, weights: Sequence[float]) -> list[Voting]:
        """Who says what the fused model is to predict: of heads of their own each parent, of a tag mostly those that
        know it.

        Args:
            weights: one a parent, summing to 1.
        """
        if self.heads:
            return votings_apart(self.heads, weights)
        if self.knowledge is None:
            return [Voting(weights, self.kind)]
        own = torch.tensor(weights, dtype=torch.float64)[:, None]
        weighted = own * self.knowledge
        known = weighted.sum(0) > 0
        shares = torch.where(known, weighted, own.expand_as(weighted)) / torch.where(known, weighted.sum(0), 1)
        return [Voting(list(shares), self.kind, self.outputs)]


def survey_streams(walk: Walk, plan: Plan, kept: Kept, progress: Progress = no_progress) -> Survey:
    """Walks through the parents as far as the plan asks for, and asks classifiers what they know; of one stream with
    the first samples alone, of which all it takes are sums that hardly change with more.

    Args:
        walk: the parents before the stem.
        plan: of the fusion.
        kept: where moments are kept.
        progress: wraps the sections.
    """
    moments = [_Kept(kept, index) for index in range(len(walk.team))]
    streams: dict[str, Tensor] = {}
    wanted = [
        Wanted(
            name,
            tuple(key for key in plan.survey if section_of(key[0]) == name),
            together=tuple(axis for axis in plan.together if section_of(axis) == name),
            tokens=plan.config.calibration.tokens,
        )
        for name in walk.team.binding.sections
    ]
    last = max((at for at, each in enumerate(wanted) if each.keys or each.together), default=-1)
    joint = plan.config.strategy == "joint"
    walk = walk.head(LOOKED_AT) if joint else walk
    with walk.at_work():
        for each in progress(wanted[: last + 1], "look"):
            # No name for what is shown: the next section's is not in memory beside it.
            _add(moments, streams, plan, walk.observe(each, walk.states(each.section), others=True))
    looks = joint and walk.team.classifies
    share = specialisation(walk) if looks else None
    # Who knows other classes agrees on none, in whatever order.
    warnings = misnumbered(walk) if looks and share is not None and share < APART else []
    if walk.team.heads:
        return Survey(walk.team.kind, moments, streams, heads=walk.team.heads)
    fits = plan.config.strategy == "head" or plan.config.refit.method != "none" or plan.config.refine.asked
    if walk.team.kind != TAGS or not fits:
        return Survey(walk.team.kind, moments, streams, share, warnings=warnings)
    known = knowledge(walk)
    missing = [missing_classes(network.original.module) for network in walk.team.networks]
    outputs = [torch.ones(known.shape[1], dtype=torch.bool) if own is None else ~own for own in missing]
    return Survey(walk.team.kind, moments, streams, share, known, outputs, warnings=warnings)


def _add(moments: Sequence["_Kept"], streams: dict[str, Tensor], plan: Plan, shown: Statistics) -> None:
    for own, seen in zip(moments, shown.moments, strict=True):
        own.add(seen)
    for join, products in shown.together.items():
        streams[plan.together[join]] = streams.get(plan.together[join], 0) + products / products.trace()


def specialisation(walk: Walk) -> float:
    """How much of what classifiers disagree about is how often each class occurs, from 0 to 1.

    They disagree by the Jensen-Shannon divergence of their predictions on each sample, and of the means of these.
    Parents of the same data agree on how often a class occurs; parents that saw other classes do not. 0 where models
    put out one number, or agree everywhere. No label is read.

    Args:
        walk: the parents before the tail.
    """
    means: Tensor | None = None
    sums = torch.zeros(2, dtype=torch.float64)  # samples, and what all diverge by
    with walk.at_work():
        for batch, shown in predictions(walk):
            weight = walk.data.weight(batch)
            sums += weight * torch.tensor([shown.shape[1], float(divergence(shown).sum())])
            total = weight * shown.double().sum(1).cpu()
            means = total if means is None else means + total
    means = or_zeros(means)
    sum_over_ranks([sums, means])
    samples, diverged = sums.tolist()
    return float(divergence(means / samples).sum()) * samples / diverged if diverged > 0 else 0.0


def misnumbered(walk: Walk) -> list[str]:
    """A line for each parent that clearly agrees with the anchor more often when its classes are put in another order,
    where one of the two has no names for them.

    Two parents agree on a class as often as the mean over samples of the product of what both give it; the order in
    which they agree most is an assignment. Of tags, of which few hold, nothing is said.

    Args:
        walk: the parents before the tail.
    """
    team, count = walk.team, walk.team.binding.axes["classes"].size
    named = [class_names(network.original.module) is not None for network in team.networks]
    others = [at for at in range(len(team)) if at != team.anchor and not (named[at] and named[team.anchor])]
    if team.kind == TAGS or count > MOST_CLASSES or not others:
        return []
    sums = torch.zeros(len(others), count, count, dtype=torch.float64)
    samples = torch.zeros(1, dtype=torch.float64)
    with walk.at_work():
        for batch, shown in predictions(walk):
            weight, given = walk.data.weight(batch), shown.double().cpu()
            samples += weight * given.shape[1]
            sums += weight * torch.einsum("nc,pnd->pcd", given[team.anchor], given[others])
    sum_over_ranks([sums, samples])
    if not bool(sums.isfinite().all()):  # which the fit says
        return []
    lines = []
    for at, table in zip(others, sums / samples, strict=True):
        rows, columns = (one.tolist() for one in linear_sum_assignment(table.numpy(), maximize=True))
        now, best = float(table.trace()), float(table[rows, columns].sum())
        if best >= AGREE and best - now > max(CLEARLY, float(samples) ** -0.5):
            pairs = [f"{theirs} is {ours}" for ours, theirs in zip(rows, columns, strict=True) if ours != theirs]
            more = ", ..." if len(pairs) > SHOWN else ""
            lines.append(
                f"{team.names[at]} seems to number its classes in another order than {team.reference.name}: they agree "
                f"on {now:.0%} of the samples, and on {best:.0%} where its {', its '.join(pairs[:SHOWN])}{more}; name "
                "the classes of both in id2label (of timm in label_names)"
            )
    return lines


def knowledge(walk: Walk) -> Tensor:
    """How much parents that give tags know of each, [parents, tags]: the variance over samples of the probability that
    they give it. Who never saw a tag gives it to none, or to all alike. No label is read.

    Args:
        walk: the parents; they are run whole, on the first samples.
    """
    total: Tensor | None = None
    data = walk.data.head(LOOKED_AT)
    with walk.at_work():
        for batch in data:
            given = [network.original.logits(data[batch]) for network in walk.team.networks]
            holds = torch.stack([logits.double().cpu().sigmoid() for logits in given])
            sums = torch.stack([torch.ones_like(holds).sum(1), holds.sum(1), holds.square().sum(1)])
            sums *= data.weight(batch)
            total = sums if total is None else total + sums
    total = or_zeros(total)
    sum_over_ranks([total])
    samples, first, squares = total
    variance: Tensor = squares / samples - (first / samples).square()
    return variance.clamp_min(0.0)


def predictions(walk: Walk) -> Iterator[tuple[int, Tensor]]:
    """Each batch with the parents' probabilities [parents, B, ..., classes], or of tags [parents, B, tags, 2]; the
    parents stand before the tail."""
    states = [network.states(TAIL) for network in walk.team.networks]
    for batch in walk.data:
        given = [cursor.logits(state, batch) for cursor, state in zip(walk.cursors, states, strict=True)]
        yield batch, torch.stack([log_probabilities(logits, walk.team.kind).exp() for logits in given])


def divergence(shown: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of distributions [parents, ..., classes], in nats.

    >>> divergence(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))  # two that share nothing: log 2
    tensor(0.6931)
    """
    between: Tensor = torch.special.entr(shown.mean(0)).sum(-1) - torch.special.entr(shown).sum(-1).mean(0)
    return between


class _Kept(Mapping[Key, Moments]):
    """The moments of a parent, read when they are asked for."""

    def __init__(self, kept: Kept, parent: int) -> None:
        self._store, self._keys = Store[Key, dict[str, Any]](kept, ("moments", parent)), dict[Key, None]()

    def add(self, moments: Mapping[Key, Moments]) -> None:
        """Keeps the moments of a section."""
        for key, own in moments.items():
            self._store[key] = vars(own)
            self._keys[key] = None

    def __getitem__(self, key: Key) -> Moments:
        if key not in self._keys:
            raise KeyError(key)
        return Moments(**self._store[key])

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
