"""TransportMap: a transport plan between the units of two networks, how it was found, and its two views."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

_TINY = 1e-300


@dataclass(frozen=True)
class TransportMap:
    """How the units of a parent become the units of the anchor along one axis.

    Attributes:
        plan: [n_parent, n_anchor], float64. A coupling of total mass 1, or a (semi-)orthogonal matrix.
        solver: what found it, e.g. `emd`, `sinkhorn`, `permutation`, `join`, `procrustes`.
        scaling: `two_sided` normalises each view by its own marginal; `source` multiplies both by n_parent, as the
            paper's released code does (the two agree for equal widths); `orthogonal` uses the plan as it is.
        cost: <plan, ground metric>; None for maps that no solver found.
        gain: what the output view is multiplied by. Attention divides scores by the root of the heads' width, so
            queries and keys that move to heads of another width are rescaled to keep the scores.
        read_gain: the same for the input view of an orthogonal map, which no marginal normalises.
        norm_gain: what the norms that read the units are multiplied by: they divide by the root mean square over the
            units, of which there may be more or fewer than before.
        sizes: of the parent's units [n_parent] and of the anchor's [n_anchor], where the scale of a unit is free: what
            is written goes from the one to the other, what is read back. The entries of such a plan may carry signs.
        iterations, converged, marginal_error: of the solver; the error is the L2 violation of the column marginal.

    >>> both = TransportMap(torch.tensor([[0.5, 0.0], [0.25, 0.25]], dtype=torch.float64), "emd")
    >>> both.to_output.sum(0).tolist(), both.to_input.sum(1).tolist()
    ([1.0, 1.0], [1.0, 1.0])
    """

    plan: Tensor
    solver: str
    scaling: Literal["two_sided", "source", "orthogonal"] = "two_sided"
    gain: float = 1.0
    read_gain: float = 1.0
    norm_gain: float = 1.0
    sizes: tuple[Tensor, Tensor] | None = None
    cost: float | None = None
    iterations: int | None = None
    converged: bool = True
    marginal_error: float = 0.0

    @property
    def to_output(self) -> Tensor:
        """[n_parent, n_anchor] for a dimension that is written: each anchor unit is a convex combination of the
        parent's units, so columns sum to 1."""
        view = self.gain * self._view(dim=0)
        return view if self.sizes is None else view * self.sizes[1] / self.sizes[0][:, None]

    @property
    def to_input(self) -> Tensor:
        """[n_parent, n_anchor] for a dimension that is read: each unit of the parent is predicted as a convex
        combination of the anchor's, so rows sum to 1."""
        view = self.read_gain * self._view(dim=1)
        return view if self.sizes is None else view / self.sizes[1] * self.sizes[0][:, None]

    def _view(self, dim: int) -> Tensor:
        if self.scaling == "orthogonal":
            return self.plan
        if self.scaling == "source":
            return self.plan * self.plan.shape[0]
        return self.plan / self.plan.abs().sum(dim, keepdim=True).clamp_min(_TINY)

    def block(self, row: slice, column: slice) -> "TransportMap":
        """The part of the map between some of the parent's units and some of the anchor's."""
        return replace(self, plan=self.plan[row, column])


def permutation(order: Tensor) -> TransportMap:
    """The hard map that makes anchor unit j from parent unit `order[j]`; `order` is [n], integer.

    >>> permutation(torch.tensor([1, 0])).to_output.tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    n = len(order)
    plan = torch.zeros(n, n, dtype=torch.float64, device=order.device)
    plan[order, torch.arange(n, device=order.device)] = 1 / n
    return TransportMap(plan, "permutation")


def identity(n: int, *, device: torch.device | str = "cpu") -> TransportMap:
    """The map that moves nothing."""
    return permutation(torch.arange(n, device=device))
