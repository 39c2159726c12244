"""Who says what a model is to predict for a sample, and how much each parent's word counts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fusionpl.models.classes import missing_classes
from fusionpl.models.labels import CLASSES, TAGS, Kind, kind_of
from fusionpl.models.separate import Head
from fusionpl.transport.softmax import Link

Weights = Sequence[float | Tensor]


@dataclass(frozen=True)
class Voting:
    """Parents that vote on outputs: on a sample of one of their data sets its owner alone, on others all by their
    weights.

    Attributes:
        weights: one a parent, or for each of its tags [tags], summing to 1.
        kind: what the outputs mean.
        knows: for each parent, which of all tags it has an output for, bool [tags]; None where all have all. Of a tag
            that the owner of a sample does not know, the others say whether it holds.
        columns: the outputs that it is about, where a model has several heads side by side.
        head: the parent whose head these are: it alone says what they are, and is not asked on data of another.
    """

    weights: Weights
    kind: Kind = CLASSES
    knows: Sequence[Tensor] | None = None
    columns: slice = field(default_factory=lambda: slice(None))
    head: int | None = None

    @property
    def link(self) -> Link:
        """What makes probabilities of the outputs."""
        return "sigmoid" if self.kind == TAGS else "softmax"

    def on(self, owner: int | None) -> Weights | None:
        """The parents' weights on samples of a data set; None where nobody is asked.

        Args:
            owner: the index of the parent whose data they are; None where nobody said.

        >>> Voting([0.3, 0.7]).on(None), Voting([0.3, 0.7]).on(1)
        ([0.3, 0.7], [0.0, 1.0])
        """
        if self.head is not None:
            return self._alone(self.head) if owner in (None, self.head) else None
        if owner is None:
            return self.weights
        if self.knows is None:
            return self._alone(owner)
        own = self.knows[owner]
        return [
            torch.where(own, torch.full_like(own, vote, dtype=torch.float64), torch.as_tensor(weight).double())
            for vote, weight in zip(self._alone(owner), self.weights, strict=True)
        ]

    def voters(self, owner: int | None) -> dict[int, float | Tensor]:
        """Those whose word counts on samples of a data set -> how much; nobody where none is asked.

        >>> Voting([0.3, 0.7]).voters(1)
        {1: 1.0}
        """
        weights = enumerate(self.on(owner) or ())
        return {parent: weight for parent, weight in weights if isinstance(weight, Tensor) or weight > 0}

    def _alone(self, parent: int) -> list[float]:
        return [float(index == parent) for index in range(len(self.weights))]


def votings_of(models: Sequence[nn.Module], weights: Sequence[float]) -> list[Voting]:
    """Who says what a model is to predict, of models brought to the classes, or tags, of all; what a tag is, of those
    that know it.

    Args:
        models: the parents.
        weights: one a parent, summing to 1.
    """
    kind, missing = kind_of(models[0]), [missing_classes(model) for model in models]
    if kind != TAGS or all(own is None for own in missing):
        return [Voting(weights, kind)]
    nothing = torch.zeros_like(next(own for own in missing if own is not None))
    knows = [~(nothing if own is None else own).cpu() for own in missing]
    shares = torch.stack([weight * own.double() for weight, own in zip(weights, knows, strict=True)])
    return [Voting(list(shares / shares.sum(0)), kind, knows)]


def votings_apart(heads: Sequence[Head], weights: Sequence[float]) -> list[Voting]:
    """Who says what a model with heads of all parents side by side is to predict: of each head its parent.

    Args:
        heads: in the parents' order.
        weights: one a parent, summing to 1.
    """
    return [Voting(weights, head.kind, None, head.columns, at) for at, head in enumerate(heads)]
