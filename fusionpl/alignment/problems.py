"""What has to be solved for an alignment: which axes take their maps together, of which kind, from what evidence."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusionpl.alignment.aligner import Aligner
from fusionpl.alignment.config import AlignConfig, Residual, residual_of
from fusionpl.alignment.evidence import WeightEvidence
from fusionpl.alignment.grouped import grouped_heads, needs_groups
from fusionpl.alignment.heads import head_map, match_heads, pairs_of, unit_costs
from fusionpl.alignment.problem import Problem, Size, seen_at, sizes_in
from fusionpl.alignment.rotation import dissimilarity, rotate_stream, rotate_units
from fusionpl.calibration.moments import Key
from fusionpl.errors import FusionError
from fusionpl.families import Binding, Join, section_of
from fusionpl.transport.costs import Gram, ground_metric
from fusionpl.transport.maps import TransportMap, identity
from fusionpl.transport.solvers import check_one_width

# With weights as evidence a tied stream needs the maps that depend on it: rounds of coordinate descent.
_TIE_ROUNDS = 3


class Units(Problem):
    """One map from the units of one axis, or of all axes of a circuit together."""

    def check(self, parent: Binding, anchor: Binding, config: AlignConfig) -> None:
        """Solvers that pair units one by one need as many on both sides; flat heads need equal numbers of heads."""
        check_one_width(config.solver, parent.axes[self.axes[0]].size, anchor.axes[self.axes[0]].size)
        _check_heads(self.axes[0], parent, anchor)

    def solve(self, work: Aligner) -> None:
        """Compares the units by what describes them."""
        found = work.solved(work.alike(self.axes))
        work.maps.give(self.axes, work.rescaled(self.axes[0], found) if work.in_circuit(self.axes[0]) else found)

    def solves(self, parent: Binding, anchor: Binding) -> Iterable[Size]:
        """One."""
        yield Size("transport", *sizes_in(self.axes[:1], parent, anchor))

    def told(self, axis: str, binding: Binding) -> str:
        """Where the units are seen."""
        others = [other for other in self.axes if other != axis]
        return seen_at(axis, binding, self.keys) + (f", shared with {' and '.join(others)}" if others else "")


class Gated(Problem):
    """A gate and what it multiplies, which move alike; the scale and the sign of what is multiplied are free."""

    def check(self, parent: Binding, anchor: Binding, config: AlignConfig) -> None:
        """See Units."""
        check_one_width(config.solver, parent.axes[self.axes[0]].size, anchor.axes[self.axes[0]].size)

    def solve(self, work: Aligner) -> None:
        """Compares gates, and what they multiply whatever its sign."""
        gate, partner = self.axes
        first, second = work.alike([gate]), work.alike([partner])
        found = work.solved(first + replace(second, cross=second.cross.abs()))
        work.maps.give([gate], found)
        if work.config.solver != "identity":
            plain = work.plain(partner)
            ours, theirs = (torch.where(one > 0, one, 1.0).sqrt() for one in (plain.parent, plain.anchor))
            signs = torch.where(second.cross < 0, -1.0, 1.0)
            found = replace(found, plan=found.plan * signs, sizes=(ours, theirs))
        work.maps.give([partner], found)

    def solves(self, parent: Binding, anchor: Binding) -> Iterable[Size]:
        """One."""
        yield Size("transport", *sizes_in(self.axes[:1], parent, anchor))

    def told(self, axis: str, binding: Binding) -> str:
        """Where the units are seen."""
        gate, partner = self.axes
        if axis == gate:
            return f"{seen_at(axis, binding, self.keys)}, with {partner}"
        return f"{seen_at(axis, binding, self.keys)}, as {gate}, scaled and signed as the anchor's"


class Joint(Problem):
    """One map over the units of both axes of a circuit, which may exchange them."""

    def check(self, parent: Binding, anchor: Binding, config: AlignConfig) -> None:
        """See Units."""
        check_one_width(
            config.solver, *(sum(one.axes[axis].size for axis in self.axes) for one in (parent, anchor))
        )  # fmt: skip
        _check_heads(self.axes[0], parent, anchor)

    def solve(self, work: Aligner) -> None:
        """Compares all units with all."""
        first, second = self.axes
        found = work.rescaled(first, work.solved(work.beside(self.axes)))
        work.alignment.joint[first, second] = found
        n, m = work.parent.axes[first].size, work.anchor.axes[first].size
        work.maps.give([first], found.block(slice(n), slice(m)))
        work.maps.give([second], found.block(slice(n, None), slice(m, None)))

    def solves(self, parent: Binding, anchor: Binding) -> Iterable[Size]:
        """One over all units."""
        yield Size("transport", *sizes_in(self.axes, parent, anchor))

    def told(self, axis: str, binding: Binding) -> str:
        """Where the units are seen, and with which."""
        others = [other for other in self.axes if other != axis]
        return f"{seen_at(axis, binding, self.keys)}, joint with {' and '.join(others)}"


@dataclass(frozen=True)
class Heads(Problem):
    """Heads matched first, then the units inside each pair: one map a circuit.

    Attributes:
        circuits: the axes, those that must move alike together.
        rotation: each pair's map is a rotation.
        order: the axis of heads, where others have the same.
    """

    circuits: tuple[tuple[str, ...], ...] = ()
    rotation: bool = False
    order: str | None = None

    def check(self, parent: Binding, anchor: Binding, config: AlignConfig) -> None:
        """Solvers that pair units one by one need as many units in a head on both sides."""
        if not self.rotation:
            sizes = (one.axes[self.axes[0]] for one in (parent, anchor))
            check_one_width(config.solver, *(axis.size // axis.heads for axis in sizes))

    def solve(self, work: Aligner) -> None:
        """Assigns heads by the cost of their best alignment."""
        heads, plan = self.heads(work), work.map_of(self.order).plan if self.order else None
        if self.rotation:
            found = match_heads(self.grams(work), heads, compare=dissimilarity, solve_units=rotate_units, plan=plan)
        else:
            found = match_heads(
                self.grams(work), heads, compare=lambda pairs: unit_costs(pairs, work.config),
                solve_units=lambda pairs: [work.solved(pair) for pair in pairs], plan=plan,
            )  # fmt: skip
        for circuit in self.circuits:
            one = found[circuit[0]]
            work.maps.give(circuit, work.rescaled(circuit[0], one) if len(circuit) > 1 else one)

    def heads(self, work: Aligner) -> tuple[int, int]:
        """The numbers of heads of the parent and of the anchor."""
        return work.parent.axes[self.axes[0]].heads, work.anchor.axes[self.axes[0]].heads

    def grams(self, work: Aligner) -> dict[str, Gram]:
        """What describes the units of each circuit."""
        if self.rotation:
            return {circuit[0]: work.activations.unscaled(circuit) for circuit in self.circuits}
        return {circuit[0]: work.alike(circuit) for circuit in self.circuits}

    def solves(self, parent: Binding, anchor: Binding) -> Iterable[Size]:
        """One a circuit and pair of heads."""
        heads = [one.axes[self.axes[0]].heads for one in (parent, anchor)]
        n, m = (size // count for size, count in zip(sizes_in(self.axes[:1], parent, anchor), heads, strict=True))
        return [Size("svd" if self.rotation else "transport", n, m)] * (max(heads) * len(self.circuits))

    def told(self, axis: str, binding: Binding) -> str:
        """Where the units are seen, and with which."""
        others = [other for circuit in self.circuits if axis in circuit for other in circuit if other != axis]
        verb = "rotated" if self.rotation else "matched"
        return f"{seen_at(axis, binding, self.keys)}, heads {verb} in pairs" + (
            f", with {' and '.join(others)}" if others else ""
        )


@dataclass(frozen=True, kw_only=True)
class Order(Problem):
    """One order of the heads of several attentions, which share a bias by position.

    Attributes:
        attentions: whose heads they are. With weights as evidence the bias alone is compared: what the heads read has
            no map yet.
    """

    attentions: tuple[Heads, ...]

    @property
    def whole(self) -> bool:
        """The attentions stand in all blocks of a stack."""
        return True

    def check(self, parent: Binding, anchor: Binding, config: AlignConfig) -> None:
        """`identity` needs one number of heads."""
        if config.solver == "identity":
            check_one_width(config.solver, *sizes_in(self.axes, parent, anchor))

    def solve(self, work: Aligner) -> None:
        """Adds up the costs of the bias and of the heads of each attention at their best alignment."""
        (axis,) = self.axes
        if work.config.solver == "identity":
            work.maps.give(self.axes, identity(work.anchor.axes[axis].size, device=work.device))
            return
        costs = [ground_metric(work.alike([axis]), work.config.metric, "none")]
        for one in self.attentions if self.keys else ():
            pairs = [pairs_of(gram, one.heads(work)) for gram in one.grams(work).values()]
            costs += [dissimilarity(each) if one.rotation else unit_costs(each, work.config) for each in pairs]
        work.maps.give(self.axes, head_map(costs))

    def solves(self, parent: Binding, anchor: Binding) -> Iterable[Size]:
        """One."""
        yield Size("transport", *sizes_in(self.axes, parent, anchor))

    def told(self, axis: str, binding: Binding) -> str:
        """What is compared."""
        heads = f", and the heads of {len(self.attentions)} blocks" if self.keys else ""
        return f"{seen_at(axis, binding, self.keys)}{heads}: one order for all"


@dataclass(frozen=True)
class Stream(Problem):
    """One map for a whole residual stream, from all its joins (activations) or all its members (weights).

    Attributes:
        joins: where the stream is seen.
        rotation: the map is a rotation.
    """

    joins: tuple[str, ...] = ()
    rotation: bool = False

    @property
    def whole(self) -> bool:
        """The stream goes through all sections."""
        return True

    def check(self, parent: Binding, anchor: Binding, config: AlignConfig) -> None:
        """Solvers that pair units one by one need as many units on both sides."""
        if not self.rotation:
            check_one_width(config.solver, parent.axes[self.axes[0]].size, anchor.axes[self.axes[0]].size)

    def solve(self, work: Aligner) -> None:
        """Compares the units of the stream wherever it is seen."""
        if self.rotation:
            centred = work.anchor.family.norm == "pre"
            work.maps.give(self.axes, rotate_stream(work.activations.unscaled(self.joins), centred=centred))
        elif isinstance(work.evidence, WeightEvidence):
            written = [
                axis for axis in self.axes if axis not in work.parent.joins and section_of(axis) not in work.idle
            ]
            known, joint = set(work.maps), dict(work.alignment.joint)
            described = [axis for axis in written if not self._rests_on(axis, work)]
            if not described:
                raise FusionError(
                    f"align.evidence weights: all that writes the stream of '{self.axes[0]}' reads it too, so that "
                    "nothing can be compared first; use align.evidence activations"
                )
            for _ in range(_TIE_ROUNDS):
                one = work.solved(work.alike(described))
                work.maps.forget_all_but(known)  # what was found with an earlier map of this stream
                work.alignment.joint = dict(joint)
                work.maps.give(self.axes, one)
                described = written
        else:
            work.maps.give(self.axes, work.solved(work.alike(self.joins)))

    def _rests_on(self, axis: str, work: Aligner) -> bool:
        """Whether the rows of an axis can be compared only once the stream has a map."""
        reached, ahead = set[str](), [axis]
        while ahead:
            for needed in work.evidence.needs(ahead.pop()):
                if needed in self.axes:
                    return True
                fresh = {*work.problems[needed].axes, needed} - reached
                reached |= fresh
                ahead += fresh
        return False

    def solves(self, parent: Binding, anchor: Binding) -> Iterable[Size]:
        """One for the whole stream."""
        yield Size("svd" if self.rotation else "transport", *sizes_in(self.axes[:1], parent, anchor))

    def told(self, axis: str, binding: Binding) -> str:
        """One map for all."""
        what = "rotation of the stream" if self.rotation else "tied to the stream"
        return what if self.keys else f"{what}, from all rows that write it"


@dataclass(frozen=True, kw_only=True)
class Joined(Problem):
    """The map of a residual addition, from the maps of what is added.

    Attributes:
        join: what is added.
        policy: how its maps make one.
    """

    join: Join
    policy: Residual = "average"

    def check(self, parent: Binding, anchor: Binding, config: AlignConfig) -> None:
        """`identity` needs one width."""
        (axis,) = self.axes
        n, m = parent.axes[axis].size, anchor.axes[axis].size
        if self.policy == "identity" and n != m:
            raise FusionError(f"align.residual identity needs parents of one width; '{axis}' has {n} and {m} units")

    def solve(self, work: Aligner) -> None:
        """Joins the maps of skip and branch."""
        work.maps.give(self.axes, self._found(work))

    def _found(self, work: Aligner) -> TransportMap:
        if self.policy == "identity":
            return identity(work.anchor.axes[self.axes[0]].size, device=work.device)
        if self.policy in ("skip", "branch"):
            return work.map_of(self.join.skip if self.policy == "skip" else self.join.branch)
        skip, branch = work.map_of(self.join.skip).plan, work.map_of(self.join.branch).plan
        share: float | Tensor = 0.5
        if self.policy in ("weighted_scalar", "weighted_matrix"):
            s, b = (work.magnitudes[axis] for axis in (self.join.skip, self.join.branch))
            if self.policy == "weighted_scalar":
                s, b = s.mean(), b.mean()
            share = (s / (s + b).clamp_min(1e-300)).to(skip)
        return TransportMap(share * skip + (1 - share) * branch, f"join:{self.policy}", work.config.scaling)

    def solves(self, parent: Binding, anchor: Binding) -> Iterable[Size]:
        """None."""
        return ()

    def told(self, axis: str, binding: Binding) -> str:
        """What is added."""
        return f"join ({self.policy}) of {self.join.skip} + {self.join.branch}"


def problems(binding: Binding, config: AlignConfig) -> list[Problem]:
    """All problems of an alignment with `config`, in the order of the axes; each free axis is in one of them.

    This is where what a family allows meets what the configuration asks for.

    Args:
        binding: the anchor's; parents of one family and depth have the same problems.
        config: solver, metric and policies.
    """
    seen = config.evidence == "activations"
    residual = residual_of(config, binding)

    def alone(*axes: str) -> tuple[Key, ...]:
        return tuple((axis,) for axis in axes) if seen else ()

    found: dict[str, Problem] = {}
    if residual == "tie":  # a rotation of the stream is tied too
        for members in binding.streams():
            seen_at = [axis for axis in members if binding.on_boundary(axis) or axis in binding.taps]
            joins = tuple(axis for axis in seen_at if axis in binding.joins)
            stream = Stream(tuple(members), alone(*joins), joins=joins, rotation=config.stream == "rotation")
            found |= dict.fromkeys(members, stream)
    circuit_of = {axis: circuit for circuit in binding.circuits for axis in circuit}
    group_of = {axis: group for group in binding.attention for axis in group}
    gated = {axis: (gate, partner) for partner, gate in binding.gates.items() for axis in (gate, partner)}
    ordered: dict[str, list[tuple[str, ...]]] = {}
    for group in binding.attention:
        ordered.setdefault(binding.axes[group[0]].order or "", []).append(group)

    def matched(group: tuple[str, ...]) -> Heads:
        circuits = tuple(dict.fromkeys(circuit_of.get(one, (one,)) for one in group))
        rotation, order = config.stream == "rotation", binding.axes[group[0]].order
        return Heads(group, alone(*group), circuits=circuits, rotation=rotation, order=order)

    for axis in binding.free:
        if axis in found:
            continue
        problem: Problem
        circuit = circuit_of.get(axis, (axis,))
        if axis in binding.joins:
            join = binding.joins[axis]
            weighted = residual in ("weighted_scalar", "weighted_matrix")
            magnitudes = (join.skip, join.branch) if weighted else ()
            problem = Joined(axes=(axis,), magnitudes=magnitudes, join=join, policy=residual)
        elif axis in gated:
            problem = Gated(gated[axis], alone(*gated[axis]))
        elif axis in group_of and needs_groups(binding, group_of[axis]):
            problem = grouped_heads(binding, group_of[axis], config)
        elif axis in group_of and (config.heads == "matched" or binding.axes[axis].order):
            problem = matched(group_of[axis])
        elif axis in ordered:
            attentions = tuple(matched(group) for group in ordered[axis])
            keys = tuple(key for one in attentions for key in one.keys)
            problem = Order((axis,), (*alone(axis), *keys), attentions=attentions)
        elif config.qk == "joint" and len(circuit) > 1 and len({binding.runs_over[one] for one in circuit}) == 1:
            problem = Joint(circuit, (circuit,) if seen else ())
        elif config.qk != "separate":  # queries and keys of different tokens can't be one set
            problem = Units(circuit, alone(*circuit))
        else:
            problem = Units((axis,), alone(axis))
        found |= dict.fromkeys(problem.axes, problem)
    return list({id(problem): problem for problem in found.values()}.values())


def _check_heads(axis: str, parent: Binding, anchor: Binding) -> None:
    ours, theirs = (binding.axes[axis].heads for binding in (parent, anchor))
    if ours != theirs:
        raise FusionError(
            f"parents of different head count: {ours} and {theirs} heads; train parents of one head count, or "
            "use align.heads matched, which transports whole heads"
        )
