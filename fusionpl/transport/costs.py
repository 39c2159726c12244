"""Ground metrics between units, from inner products alone.

Every Euclidean, cosine and correlation distance between the rows of A and B follows from the squared norms of
the rows and the inner products between them, so the rows themselves never have to be kept.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionpl.transport.names import Metric, Normalize

_TINY = 1e-300


@dataclass(frozen=True)
class Gram:
    """Inner products of a parent's units with the anchor's.

    Attributes:
        parent: [n_parent], squared norms.
        anchor: [n_anchor], squared norms.
        cross: [n_parent, n_anchor], inner products.
        scalar: the units are described by one number each, of which a direction would leave only the sign: such units
            are never scaled to unit length, and compared by distance whatever the metric.
    """

    parent: Tensor
    anchor: Tensor
    cross: Tensor
    scalar: bool = False

    def __add__(self, other: "Gram") -> "Gram":
        """Features side by side: inner products add."""
        return Gram(self.parent + other.parent, self.anchor + other.anchor, self.cross + other.cross)

    def block(self, rows: slice, columns: slice) -> "Gram":
        """The part between some of the parent's units and some of the anchor's."""
        return Gram(self.parent[rows], self.anchor[columns], self.cross[rows, columns], self.scalar)

    def normalized(self) -> "Gram":
        """Both sides scaled so that their units' squared norms sum to 1."""
        p, a = self.parent.sum(), self.anchor.sum()
        return Gram(self.parent / p, self.anchor / a, self.cross / (p * a).sqrt(), self.scalar)

    def unit(self) -> "Gram":
        """Every unit's vector scaled to length 1; a zero vector stays zero."""
        p, a = _inverse_root(self.parent), _inverse_root(self.anchor)
        return Gram(self.parent * p**2, self.anchor * a**2, self.cross * p[:, None] * a[None, :])


def gram(parent: Tensor, anchor: Tensor) -> Gram:
    """The Gram of explicit feature rows: parent [n_parent, features], anchor [n_anchor, features]."""
    return Gram(parent.square().sum(1), anchor.square().sum(1), parent @ anchor.T, scalar=parent.shape[1] == 1)


def _inverse_root(squares: Tensor) -> Tensor:
    return torch.where(squares > 0, squares.clamp_min(_TINY).rsqrt(), torch.zeros_like(squares))


def ground_metric(inner: Gram, metric: Metric, normalize: Normalize) -> Tensor:
    """The cost matrix [n_parent, n_anchor] of a transport problem.

    `correlation` is the cosine distance of centred features: centring is the business of whoever made the Gram.
    A unit of zero length is at cosine distance 1 from all others.

    >>> ours, theirs = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 4.0]])
    >>> ground_metric(gram(ours, theirs), "euclidean", "none").flatten().tolist()
    [4.0, 4.242640495300293]
    >>> ground_metric(gram(ours, theirs), "cosine", "none").flatten()
    tensor([0.4000, 0.2000])
    """
    if metric in ("cosine", "correlation") and not inner.scalar:
        cost = 1 - inner.unit().cross
    else:
        squared = inner.parent[:, None] + inner.anchor[None, :] - 2 * inner.cross
        cost = squared.clamp_min(0) if metric == "sqeuclidean" else squared.clamp_min(0).sqrt()
    return _normalized(cost, normalize)


def _normalized(cost: Tensor, normalize: Normalize) -> Tensor:
    if normalize == "none":
        return cost
    if normalize == "log":
        return cost.log1p()
    statistic: dict[str, Callable[[], Tensor]] = {"max": cost.max, "mean": cost.mean, "median": cost.median}
    scale = statistic[normalize]()
    return cost / scale if scale > 0 else cost
