"""How the units of a parent were matched, axis by axis, small enough to keep beside a report."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from fusionpl.evaluation.rows import known, readable
from fusionpl.transport.maps import TransportMap

MOST_CELLS = 96  # larger maps are max-pooled: a permutation's single entries would vanish


@dataclass(frozen=True)
class MatchedAxis:
    """How the units of a parent were matched with the anchor's along one axis; what is not known is None.

    Attributes:
        n_parent, n_anchor: how many units.
        partners: of how many parent units an anchor unit is made, 1 where the matching is hard: exp(entropy) of its
            shares, mean over anchor units.
        solver, cost, iterations, converged, marginal_error: see `fusionpl.transport.maps.TransportMap`.
        picture: the map, sorted so that structure shows, float32 [parent's cells, anchor's cells]; None where it is not
            drawn. A column shows of which parent units an anchor unit is made (shares add up to 1; for a map with
            negative entries, an orthogonal one, shares are the squares), a cell of several units the largest share
            among them. The side with fewer units is sorted by its largest shares, the other by the unit it belongs to
            most: a one-to-one matching is a sharp diagonal.
    """

    n_parent: int
    n_anchor: int
    partners: float | None
    solver: str
    cost: float | None
    iterations: int | None
    converged: bool
    marginal_error: float | None
    picture: Tensor | None = None

    @classmethod
    def of(cls, found: TransportMap, *, drawn: bool) -> "MatchedAxis":
        """What a report shows of a map, with its picture if it is `drawn`."""
        plan = found.plan.detach().cpu().double()
        weights = plan.square() if bool((plan < 0).any()) else plan
        shares = weights / weights.sum(0).clamp_min(torch.finfo(weights.dtype).tiny)
        n_parent, n_anchor = shares.shape
        return cls(
            n_parent,
            n_anchor,
            float(torch.special.entr(shares).sum(0).exp().mean()),
            found.solver,
            found.cost,
            found.iterations,
            found.converged,
            found.marginal_error,
            _picture(shares) if drawn else None,
        )

    @property
    def words(self) -> str:
        """`384 → 192 units, 1.7 partners each`."""
        return f"{self.n_parent} → {self.n_anchor} units, {readable('partners', self.partners)} partners each"

    def as_dict(self) -> dict[str, Any]:
        """All but the picture, for JSON."""
        return {key: value if known(value) else None for key, value in vars(self).items() if key != "picture"}


def matched_axes(maps: Mapping[str, TransportMap]) -> dict[str, MatchedAxis]:
    """What a report shows of maps, by axis; a few that tell the story have pictures: the embedding, one block in the
    middle, the last of the stream."""
    drawn = [name for name in maps if name.startswith("stem.")][-1:]
    sections = list(dict.fromkeys(name.rpartition(".")[0] for name in maps if not name.startswith("stem.")))
    middle = sections[(len(sections) - 1) // 2]
    drawn += [*(f"{middle}.{axis}" for axis in ("q", "v", "attn", "ffn")), f"{sections[-1]}.out"]
    return {name: MatchedAxis.of(transport, drawn=name in drawn) for name, transport in maps.items()}


def _picture(shares: Tensor) -> Tensor:
    rows, columns = _order(shares)
    size = [min(length, MOST_CELLS) for length in shares.shape]
    return adaptive_max_pool2d(shares[rows][:, columns][None], size)[0].float()


def _order(shares: Tensor) -> tuple[Tensor, Tensor]:
    if shares.shape[0] < shares.shape[1]:
        columns, rows = _order(shares.T)
        return rows, columns
    columns = shares.amax(0).argsort(descending=True, stable=True)
    return shares[:, columns].argmax(1).argsort(stable=True), columns
