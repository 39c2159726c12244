"""How much what each parent predicts for a sample counts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = Sequence[float | Tensor]


@dataclass(frozen=True)
class Voting:
    """Parents that vote: on a sample of one of their data sets its owner alone, on others all by their weights.

    Attributes:
        weights: one a parent, or for each of its tags [tags], summing to 1.
        knows: for each parent, which of all tags it has an output for, bool [tags]; None where all have all. Of a tag
            that the owner of a sample does not know, the others say whether it holds.
    """

    weights: Weights
    knows: Sequence[Tensor] | None = None

    def on(self, owner: int | None) -> Weights:
        """The parents' weights on samples of a data set.

        Args:
            owner: the index of the parent whose data they are; None where nobody said.
        """
        if owner is None:
            return self.weights
        alone = [float(index == owner) for index in range(len(self.weights))]
        if self.knows is None:
            return alone
        own = self.knows[owner]
        return [
            torch.where(own, torch.full_like(own, vote, dtype=torch.float64), torch.as_tensor(weight).double())
            for vote, weight in zip(alone, self.weights, strict=True)
        ]
