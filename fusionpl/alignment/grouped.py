"""Heads whose queries and keys may not be renumbered: rotary heads, and groups of queries that share one key.

A rotary head turns unit i with unit i + r/2 by an angle that grows with the position, so inside a head only a rotation
and a scaling of each such pair keeps the scores, with the inverse scaling on the keys. Heads are therefore compared by
what they compute: the inner products of their queries and keys after the best rotation of each pair, and the alignment
of their values. Source of the symmetry: Su et al., "RoFormer" (arXiv 2104.09864), equation 34.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionpl.alignment.config import AlignConfig
from fusionpl.alignment.heads import assembled, head_map, pairs_of, unit_costs, used
from fusionpl.alignment.maps import Found, Pair
from fusionpl.alignment.problem import Comparison, Pairwise, seen_at
from fusionpl.alignment.rotation import dissimilarity, rotate_units
from fusionpl.errors import FusionError
from fusionpl.families.axes import Axis, Binding
from fusionpl.transport.costs import Gram
from fusionpl.transport.maps import TransportMap
from fusionpl.transport.solvers import check_one_width, solve

_TINY = 1e-300
_ROUNDS = 3  # of matching the queries of a group and turning their pairs


def needs_groups(binding: Binding, group: Sequence[str]) -> bool:
    """Whether the axes of an attention are matched in groups, whatever is wanted."""
    axes = [binding.axes[name] for name in group]
    return any(axis.kind != "permutation" or axis.members > 1 or axis.repeats for axis in axes)


def grouped_heads(binding: Binding, group: Sequence[str], config: AlignConfig) -> "GroupedHeads":
    """The problem that matches the heads of one attention in groups; see `needs_groups`."""
    q, k = next(circuit for circuit in binding.circuits if circuit[0] in group)
    rest = [name for name in group if name not in (q, k)]
    v = next(name for name in rest if not binding.axes[name].repeats)
    out = next((name for name in rest if binding.axes[name].repeats), None)
    keys = ((q,), (k,), (v,)) if config.evidence == "activations" else ()
    return GroupedHeads(tuple(group), keys, q=q, k=k, v=v, out=out, rotation=config.stream == "rotation")


@dataclass(frozen=True, kw_only=True)
class GroupedHeads(Pairwise):
    """Groups of heads matched, then the queries inside each group, then the units of each head.

    Attributes:
        q, k, v: queries, keys and values.
        out: what attention puts out, where that repeats the values.
        rotation: values, and the units of queries and keys that are not rotary, take an orthogonal map.
    """

    q: str
    k: str
    v: str
    out: str | None
    rotation: bool

    def check_for(self, parent: Binding, target: Binding, config: AlignConfig) -> None:
        """Raises FusionError where rotary heads differ, or where the solver needs heads of one width."""
        ours, theirs = (binding.axes[self.k] for binding in (parent, target))
        if ours.pairs and (ours.width, ours.pairs) != (theirs.width, theirs.pairs):
            raise FusionError(
                f"parents of different rotary heads: {ours.width} units with {ours.pairs} frequency pairs and "
                f"{theirs.width} with {theirs.pairs}, whose angles differ; train parents of one head_dim"
            )
        if config.solver == "identity":
            check_one_width("identity", parent.axes[self.q].size, target.axes[self.q].size)
        if not self.rotation:
            for axis in (self.k, self.v):
                check_one_width(config.solver, *(binding.axes[axis].width for binding in (parent, target)))

    def solve_for(self, pair: Comparison, maps: Mapping[str, TransportMap]) -> Found:
        """Matches groups by the cost of their best alignment."""
        scores = _Scores.of(pair, maps, self.q, self.k)
        groups = scores.parent.groups, scores.anchor.groups
        config = pair.config
        values = pairs_of(
            pair.activations.unscaled((self.v,)) if self.rotation else pair.evidence.stacked((self.v,), maps), groups
        )
        others = self._others(pair, maps, scores)
        if config.solver == "identity":
            plan = torch.eye(len(values), dtype=torch.float64, device=scores.k.device) / len(values)
            scores = scores.still()
        else:
            compare = dissimilarity if self.rotation else lambda pairs: unit_costs(pairs, config)
            costs = [compare(pairs) for pairs in (values, *([others] if others else []))]
            plan = head_map([*costs, *([1 - scores.likeness] if scores.pairs else [])]).plan
        places = used(plan)
        vo = dict(zip(places, self._units([values[i][j] for i, j in places], pair), strict=True))
        qk = None
        if others:
            qk = dict(zip(places, self._units([others[i][j] for i, j in places], pair), strict=True))
        solutions: dict[str | Pair, TransportMap] = {self.v: assembled(plan, vo)}
        if self.out is not None:
            members = plan[:, None, :, None] * scores.members.transpose(1, 2)
            n, m = (count * each for count, each in zip(plan.shape, scores.members.shape[2:], strict=True))
            whole = members.reshape(n, m)
            ours, theirs = scores.members.shape[2:]
            solutions[self.out] = assembled(whole, {(i, j): vo[i // ours, j // theirs] for i, j in used(whole)})
        for axis, keys in ((self.q, False), (self.k, True)):
            solutions[axis] = scores.map_of(plan, qk, keys=keys)
        return solutions

    def _others(self, pair: Comparison, maps: Mapping[str, TransportMap], scores: "_Scores") -> list[list[Gram]]:
        """The Gram of the units that no angle turns, of each pair of groups: keys with the matched queries."""
        ours, theirs = (binding.axes[self.q] for binding in (pair.parent, pair.target))
        first = 2 * ours.pairs
        if first >= ours.width:
            return []
        if self.rotation:
            queries, keys = (pair.activations.unscaled((axis,)) for axis in (self.q, self.k))
        else:
            queries, keys = (pair.evidence.stacked((axis,), maps) for axis in (self.q, self.k))
        k, q = pairs_of(keys, (ours.groups, theirs.groups)), pairs_of(queries, (ours.heads, theirs.heads))
        free = slice(first, None)

        def together(i: int, j: int) -> Gram:
            gram = k[i][j].block(free, free)
            for g, h in used(scores.members[i, j]):
                gram = gram + q[i * ours.members + g][j * theirs.members + h].block(free, free)
            return gram

        return [[together(i, j) for j in range(theirs.groups)] for i in range(ours.groups)]

    def _units(self, grams: list[Gram], pair: Comparison) -> list[TransportMap]:
        return rotate_units(grams) if self.rotation else [pair.solved(gram) for gram in grams]

    def summary(self, axis: str, binding: Binding) -> str:
        """Where the units are seen, and how heads are matched."""
        if axis == self.out:
            return f"the heads of {self.v}, in the order of the queries"
        units = binding.axes[axis]
        pairs = f"{units.pairs} frequency pairs a head"
        inside = {
            "pairs": f", {pairs} rotated and scaled",
            "signs": f", signs of {pairs} and scale",
        }.get(units.kind, ", rotated" if self.rotation else "")
        inside += f" with {self.k if axis == self.q else self.q}" if axis != self.v else ""
        grouped = f", queries in groups of {units.members}" if units.members > 1 else ""
        return f"{seen_at(axis, binding, self.keys)}, heads matched{grouped}{inside}"


@dataclass(frozen=True)
class _Scores:
    """How alike the queries and keys of groups are: [groups of the parent, of the anchor, ...].

    Attributes:
        parent, anchor: the axis of queries of each.
        q: [.., members of the parent, of the anchor, pairs], complex: the inner product of two heads' pair of units, as
            plane vectors; its angle is that of the best rotation.
        k: [.., pairs], the same of keys.
        sizes: squared norms of q (parent's [groups, members, pairs], anchor's) and of k ([groups, pairs] each).
        members: [.., members of the parent, of the anchor], the plan between the queries of two groups.
        turns: [.., pairs], complex numbers of modulus 1.
        likeness: [groups, groups], from 0 to 1.
    """

    parent: Axis
    anchor: Axis
    q: Tensor
    k: Tensor
    sizes: tuple[Tensor, ...]
    members: Tensor
    turns: Tensor
    likeness: Tensor

    @property
    def pairs(self) -> int:
        return self.parent.pairs

    @classmethod
    def of(cls, pair: Comparison, maps: Mapping[str, TransportMap], q: str, k: str) -> "_Scores":
        axes = pair.parent.axes[q], pair.target.axes[q]
        queries, keys = pair.evidence.raw(q, maps), pair.evidence.raw(k, maps)
        (zq, rest), (zk, _) = (_planes(inner, *(binding.axes[name] for binding in (pair.parent, pair.target)))
                               for inner, name in ((queries, q), (keys, k)))  # fmt: skip
        of_keys = _squares(keys.parent, pair.parent.axes[k]), _squares(keys.anchor, pair.target.axes[k])
        sizes = (
            _squares(queries.parent, axes[0]),
            _squares(queries.anchor, axes[1]),
            *(squares[:, 0] for squares in of_keys),
        )
        zk = zk[:, :, 0, 0]
        by_q, by_k = cls._weights(axes[0], sizes)
        zq, zk = zq * by_q, zk * by_k
        ours, theirs = axes[0].members, axes[1].members
        members = torch.full((*zk.shape[:2], ours, theirs), 1 / (ours * theirs), dtype=torch.float64, device=zk.device)
        count = (ours * theirs) ** 0.5
        turns = _turn(zk, axes[0])
        for _ in range(_ROUNDS if ours * theirs > 1 else 1):
            if ours * theirs > 1:
                gain = (turns.conj()[:, :, None, None] * zq).real.sum(-1) + rest
                for i, row in enumerate(gain):
                    for j, gains in enumerate(row):
                        members[i, j] = solve(-gains, "assignment" if ours == theirs else "emd").plan
            total = zk + count * (members[..., None] * zq).sum((2, 3))
            turns = _turn(total, axes[0])
        reached = (turns.conj() * total).real.sum(-1)
        if axes[0].kind == "signs":
            likeness = reached / (1 + count)
        else:
            norms = [2 * (a.sum(1) * b).sqrt().sum(-1) for a, b in ((sizes[0], sizes[2]), (sizes[1], sizes[3]))]
            likeness = reached / (norms[0][:, None] * norms[1]).sqrt().clamp_min(_TINY)
        return cls(*axes, zq, zk, sizes, members, turns, likeness)

    @staticmethod
    def _weights(axis: Axis, sizes: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """What brings queries and keys to one scale, which is free: that of a pair, or, behind norms, of each head."""
        if axis.kind == "signs":
            q, k = (
                (ours.sum(-1)[:, None, :, None] * theirs.sum(-1)[None, :, None]).sqrt().clamp_min(_TINY)
                for ours, theirs in (sizes[:2], (sizes[2][:, None], sizes[3][:, None]))
            )
            return 1 / q[..., None], 1 / k[:, :, 0, :1]
        qa, qb, ka, kb = sizes[0].sum(1), sizes[1].sum(1), sizes[2], sizes[3]
        ratio = _root((ka[:, None] * kb), (qa[:, None] * qb))
        return ratio[:, :, None, None], 1 / ratio

    def still(self) -> "_Scores":
        """The same heads with nothing moved."""
        count = self.parent.members
        eye = torch.eye(count, dtype=torch.float64, device=self.turns.device) / count
        return _Scores(
            self.anchor, self.anchor, self.q, self.k, (self.sizes[1], self.sizes[1], self.sizes[3], self.sizes[3]),
            eye.expand_as(self.members), torch.ones_like(self.turns), self.likeness,
        )  # fmt: skip

    def map_of(self, plan: Tensor, rest: dict[tuple[int, int], TransportMap] | None, *, keys: bool) -> TransportMap:
        """The map of all queries, or of all keys: what is written is all there is, so it is the output view itself."""
        p, width = self.pairs, (self.parent.width, self.anchor.width)
        ours, theirs = (1, 1) if keys else (self.parent.members, self.anchor.members)
        whole = torch.zeros(
            plan.shape[0], ours, width[0], plan.shape[1], theirs, width[1], dtype=torch.float64, device=plan.device
        )
        share = plan / plan.sum(0).clamp_min(_TINY)
        first, second = torch.arange(p, device=plan.device), torch.arange(p, 2 * p, device=plan.device)
        for i, j in used(plan):
            inside = torch.zeros(width, dtype=torch.float64, device=plan.device)
            turn = self.turns[i, j] * self._scale(i, j, keys=keys)
            inside[first, first] = inside[second, second] = turn.real
            inside[first, second], inside[second, first] = turn.imag, -turn.imag
            if rest is not None:
                inside[2 * p :, 2 * p :] = rest[i, j].to_output
            members = self.members[i, j]
            heads = torch.ones_like(members[:1, :1]) if keys else members / members.sum(0).clamp_min(_TINY)
            heads = share[i, j] * heads * self._head_scale(i, j, keys=keys)
            whole[i, :, :, j] = heads[:, None, :, None] * inside[:, None]
        transport = TransportMap(whole.flatten(3).flatten(0, 2), "heads", "orthogonal")
        if rest is None:
            return transport
        return TransportMap(
            transport.plan, "heads", "orthogonal",
            cost=sum(float(plan[place]) * (unit_map.cost or 0.0) for place, unit_map in rest.items()),
            converged=all(unit_map.converged for unit_map in rest.values()),
            marginal_error=max(unit_map.marginal_error for unit_map in rest.values()),
        )  # fmt: skip

    def _scale(self, i: int, j: int, *, keys: bool) -> Tensor:
        """[pairs]: what gives the parent's queries the size that the anchor's have against its keys."""
        qa, qb = self.sizes[0][i].mean(0), self.sizes[1][j].mean(0)
        if self.parent.kind != "pairs":
            return torch.ones_like(qa)
        ratio = _root(qb * self.sizes[2][i], self.sizes[3][j] * qa)
        return 1 / ratio if keys else ratio

    def _head_scale(self, i: int, j: int, *, keys: bool) -> Tensor:
        """[members of the parent, of the anchor]: behind norms the size of a head is free."""
        if self.parent.kind != "signs":
            return torch.ones((), dtype=torch.float64, device=self.turns.device)
        ours, theirs = (
            (self.sizes[2][i][None], self.sizes[3][j][None]) if keys else (self.sizes[0][i], self.sizes[1][j])
        )
        return (theirs.sum(-1) / ours.sum(-1)[:, None].clamp_min(_TINY)).sqrt()


def _planes(inner: Gram, ours: Axis, theirs: Axis) -> tuple[Tensor, Tensor]:
    """Inner products of heads: of their pairs as plane vectors, [groups, groups, members, members, pairs], complex, and
    of their other units at the best rotation, without the last dimension."""
    p = ours.pairs
    cross = inner.cross.view(
        ours.groups, ours.members, ours.width, theirs.groups, theirs.members, theirs.width
    ).permute(0, 3, 1, 4, 2, 5)  # fmt: skip

    def across(rows: slice, columns: slice) -> Tensor:
        return cross[..., rows, columns].diagonal(dim1=-2, dim2=-1)

    u, w = slice(p), slice(p, 2 * p)
    planes = torch.complex(across(u, u) + across(w, w), across(u, w) - across(w, u))
    other = cross[..., 2 * p :, 2 * p :]
    rest = torch.linalg.svdvals(other).sum(-1) if other.shape[-1] else torch.zeros_like(planes[..., :1].real.sum(-1))
    return planes, rest


def _squares(squares: Tensor, axis: Axis) -> Tensor:
    """Squared norms of the pairs, [groups, members, pairs]."""
    p = axis.pairs
    units = squares.view(axis.groups, axis.members, axis.width)
    return units[..., :p] + units[..., p : 2 * p]


def _turn(product: Tensor, axis: Axis) -> Tensor:
    if axis.kind == "signs":
        product = product.real.to(product)
    size = product.abs()
    return torch.where(size > 0, product / size.clamp_min(_TINY), torch.ones_like(product))


def _root(above: Tensor, below: Tensor) -> Tensor:
    """The fourth root of a ratio of products of squared norms; 1 where one of them is zero."""
    bad = (above <= 0) | (below <= 0)
    return torch.where(bad, 1.0, above.clamp_min(_TINY) / below.clamp_min(_TINY)) ** 0.25
