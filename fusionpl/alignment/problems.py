"""The kinds of problems that an alignment by transport or rotation is made of: how each gives its axes their maps."""

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusionpl.alignment.config import AlignConfig, Residual
from fusionpl.alignment.evidence import Evidence, WeightEvidence
from fusionpl.alignment.heads import head_map, match_heads, pairs_of, unit_costs
from fusionpl.alignment.maps import Found, Pair
from fusionpl.alignment.problem import Comparison, Pairwise, seen_at, sizes_in, solve_needed
from fusionpl.alignment.rotation import dissimilarity, rotate_stream, rotate_units
from fusionpl.errors import FusionError
from fusionpl.families.axes import Binding, Join, section_of
from fusionpl.transport.costs import Gram, ground_metric
from fusionpl.transport.maps import TransportMap, identity
from fusionpl.transport.solvers import check_one_width

# With weights as evidence a tied stream needs the maps that depend on it: rounds of coordinate descent.
_TIE_ROUNDS = 3


class Units(Pairwise):
    """One map from the units of one axis, or of all axes of a circuit together."""

    def check_for(self, parent: Binding, target: Binding, config: AlignConfig) -> None:
        """Raises FusionError where the solver needs as many units on both sides, or where numbers of heads differ."""
        check_one_width(config.solver, parent.axes[self.axes[0]].size, target.axes[self.axes[0]].size)
        _check_heads(self.axes[0], parent, target)

    def solve_for(self, pair: Comparison, maps: Mapping[str, TransportMap]) -> Found:
        """Compares the units by what describes them."""
        transport = pair.solved(pair.evidence.stacked(self.axes, maps))
        return dict.fromkeys(
            self.axes, pair.rescaled(self.axes[0], transport) if pair.in_circuit(self.axes[0]) else transport
        )

    def summary(self, axis: str, binding: Binding) -> str:
        """Where the units are seen."""
        others = [other for other in self.axes if other != axis]
        return seen_at(axis, binding, self.keys) + (f", shared with {' and '.join(others)}" if others else "")


class Gated(Pairwise):
    """A gate and what it multiplies, which move alike; the scale and the sign of what is multiplied are free."""

    def check_for(self, parent: Binding, target: Binding, config: AlignConfig) -> None:
        """Raises FusionError where the solver needs as many units on both sides."""
        check_one_width(config.solver, parent.axes[self.axes[0]].size, target.axes[self.axes[0]].size)

    def solve_for(self, pair: Comparison, maps: Mapping[str, TransportMap]) -> Found:
        """Compares gates, and what they multiply whatever its sign."""
        gate, partner = self.axes
        first, second = pair.evidence.stacked([gate], maps), pair.evidence.stacked([partner], maps)
        transport = pair.solved(first + replace(second, cross=second.cross.abs()))
        signed = transport
        if pair.config.solver != "identity":
            plain = pair.evidence.raw(partner, maps)
            ours, theirs = (torch.where(squares > 0, squares, 1.0).sqrt() for squares in (plain.parent, plain.anchor))
            signs = torch.where(second.cross < 0, -1.0, 1.0)
            signed = replace(transport, plan=transport.plan * signs, sizes=(ours, theirs))
        return {gate: transport, partner: signed}

    def summary(self, axis: str, binding: Binding) -> str:
        """Where the units are seen."""
        gate, partner = self.axes
        if axis == gate:
            return f"{seen_at(axis, binding, self.keys)}, with {partner}"
        return f"{seen_at(axis, binding, self.keys)}, as {gate}, scaled and signed as the anchor's"


class Joint(Pairwise):
    """One map over the units of both axes of a circuit, which may exchange them."""

    def check_for(self, parent: Binding, target: Binding, config: AlignConfig) -> None:
        """Raises FusionError where the solver needs as many units on both sides, or where numbers of heads differ."""
        check_one_width(
            config.solver, *(sum(binding.axes[axis].size for axis in self.axes) for binding in (parent, target))
        )  # fmt: skip
        _check_heads(self.axes[0], parent, target)

    def solve_for(self, pair: Comparison, maps: Mapping[str, TransportMap]) -> Found:
        """Compares all units with all."""
        first, second = self.axes
        transport = pair.rescaled(first, pair.solved(pair.evidence.concatenated(self.axes, maps)))
        n, m = pair.parent.axes[first].size, pair.target.axes[first].size
        return {
            (first, second): transport,
            first: transport.block(slice(n), slice(m)),
            second: transport.block(slice(n, None), slice(m, None)),
        }

    def summary(self, axis: str, binding: Binding) -> str:
        """Where the units are seen, and with which."""
        others = [other for other in self.axes if other != axis]
        return f"{seen_at(axis, binding, self.keys)}, joint with {' and '.join(others)}"


@dataclass(frozen=True)
class Heads(Pairwise):
    """Heads matched first, then the units inside each pair: one map a circuit.

    Attributes:
        circuits: the axes, those that must move alike together.
        rotation: each pair's map is a rotation.
        order: the axis of heads, where others have the same.
    """

    circuits: tuple[tuple[str, ...], ...] = ()
    rotation: bool = False
    order: str | None = None

    def check_for(self, parent: Binding, target: Binding, config: AlignConfig) -> None:
        """Raises FusionError where the solver needs as many units in a head on both sides."""
        if not self.rotation:
            sizes = (binding.axes[self.axes[0]] for binding in (parent, target))
            check_one_width(config.solver, *(axis.size // axis.heads for axis in sizes))

    def solve_for(self, pair: Comparison, maps: Mapping[str, TransportMap]) -> Found:
        """Assigns heads by the cost of their best alignment."""
        heads, plan = self.heads(pair), maps[self.order].plan if self.order else None
        if self.rotation:
            units = match_heads(
                self.grams(pair, maps), heads, compare=dissimilarity, solve_units=rotate_units, plan=plan
            )  # fmt: skip
        else:
            units = match_heads(
                self.grams(pair, maps), heads, compare=lambda grams: unit_costs(grams, pair.config),
                solve_units=lambda grams: [pair.solved(gram) for gram in grams], plan=plan,
            )  # fmt: skip
        solutions: dict[str | Pair, TransportMap] = {}
        for circuit in self.circuits:
            of_circuit = units[circuit[0]]
            solutions |= dict.fromkeys(
                circuit, pair.rescaled(circuit[0], of_circuit) if len(circuit) > 1 else of_circuit
            )
        return solutions

    def needs(self, evidence: Evidence | None) -> tuple[str, ...]:
        """What its units are described by, and the order of the heads if other attentions share it."""
        return (*super().needs(evidence), *([self.order] if self.order else []))

    def heads(self, pair: Comparison) -> tuple[int, int]:
        """The numbers of heads of the parent and of the anchor."""
        return pair.parent.axes[self.axes[0]].heads, pair.target.axes[self.axes[0]].heads

    def grams(self, pair: Comparison, maps: Mapping[str, TransportMap]) -> dict[str, Gram]:
        """What describes the units of each circuit."""
        if self.rotation:
            return {circuit[0]: pair.activations.unscaled(circuit) for circuit in self.circuits}
        return {circuit[0]: pair.evidence.stacked(circuit, maps) for circuit in self.circuits}

    def summary(self, axis: str, binding: Binding) -> str:
        """Where the units are seen, and with which."""
        others = [other for circuit in self.circuits if axis in circuit for other in circuit if other != axis]
        verb = "rotated" if self.rotation else "matched"
        return f"{seen_at(axis, binding, self.keys)}, heads {verb} in pairs" + (
            f", with {' and '.join(others)}" if others else ""
        )


@dataclass(frozen=True, kw_only=True)
class Order(Pairwise):
    """One order of the heads of several attentions, which share a bias by position.

    Attributes:
        attentions: whose heads they are. With weights as evidence the bias alone is compared: what the heads read has
            no map yet.
    """

    attentions: tuple[Heads, ...]

    @property
    def whole(self) -> bool:
        """True: the attentions stand in all blocks of a stack."""
        return True

    def check_for(self, parent: Binding, target: Binding, config: AlignConfig) -> None:
        """Raises FusionError where the solver is `identity` and numbers of heads differ."""
        if config.solver == "identity":
            check_one_width(config.solver, *sizes_in(self.axes, parent, target))

    def solve_for(self, pair: Comparison, maps: Mapping[str, TransportMap]) -> Found:
        """Adds up the costs of the bias and of the heads of each attention at their best alignment."""
        (axis,) = self.axes
        if pair.config.solver == "identity":
            return {axis: identity(pair.target.axes[axis].size, device=pair.device)}
        costs = [ground_metric(pair.evidence.stacked([axis], maps), pair.config.metric, "none")]
        for attention in self.attentions if self.keys else ():
            for gram in attention.grams(pair, maps).values():
                heads = pairs_of(gram, attention.heads(pair))
                costs.append(dissimilarity(heads) if attention.rotation else unit_costs(heads, pair.config))
        return {axis: head_map(costs)}

    def summary(self, axis: str, binding: Binding) -> str:
        """What is compared, for a person."""
        heads = f", and the heads of {len(self.attentions)} blocks" if self.keys else ""
        return f"{seen_at(axis, binding, self.keys)}{heads}: one order for all"


@dataclass(frozen=True)
class Stream(Pairwise):
    """One map for a whole residual stream, from all its joins (activations) or all its members (weights).

    Attributes:
        joins: where the stream is seen.
        rotation: the map is a rotation.
    """

    joins: tuple[str, ...] = ()
    rotation: bool = False

    @property
    def whole(self) -> bool:
        """True: the stream goes through all sections."""
        return True

    def check_for(self, parent: Binding, target: Binding, config: AlignConfig) -> None:
        """Raises FusionError where the solver needs as many units on both sides."""
        if not self.rotation:
            check_one_width(config.solver, parent.axes[self.axes[0]].size, target.axes[self.axes[0]].size)

    def solve_for(self, pair: Comparison, maps: Mapping[str, TransportMap]) -> Found:
        """Compares the units of the stream wherever it is seen."""
        if self.rotation:
            centred = pair.target.family.norm == "pre"
            transport = rotate_stream(pair.activations.unscaled(self.joins), centred=centred)
        elif isinstance(pair.evidence, WeightEvidence):
            transport = self._from_weights(pair, maps)
        else:
            transport = pair.solved(pair.evidence.stacked(self.joins, maps))
        return dict.fromkeys(self.axes, transport)

    def needs(self, evidence: Evidence | None) -> tuple[str, ...]:
        """No axes: what reads the stream comes behind it."""
        return ()

    def _from_weights(self, pair: Comparison, maps: Mapping[str, TransportMap]) -> TransportMap:
        """From the rows that write the stream, once what they read has maps, which rest on the stream's: in rounds."""
        written = [axis for axis in self.axes if axis not in pair.parent.joins and section_of(axis) not in pair.missing]
        described = [axis for axis in written if not self._rests_on(axis, pair)]
        if not described:
            raise FusionError(
                f"align.evidence weights: all that writes the stream of '{self.axes[0]}' reads it too, so that "
                "nothing can be compared first; use align.evidence activations"
            )
        for _ in range(_TIE_ROUNDS):
            transport = pair.solved(pair.evidence.stacked(described, solve_needed(described, pair, maps)))
            maps = ChainMap(dict.fromkeys(self.axes, transport), maps)  # type: ignore[arg-type]  # it only reads
            described = written
        return transport

    def _rests_on(self, axis: str, pair: Comparison) -> bool:
        """Whether the rows of an axis can be compared only once the stream has a map."""
        reached, ahead = set[str](), [axis]
        while ahead:
            for needed in pair.evidence.needs(ahead.pop()):
                if needed in self.axes:
                    return True
                fresh = {*pair.problems[needed].axes, needed} - reached
                reached |= fresh
                ahead += fresh
        return False

    def summary(self, axis: str, binding: Binding) -> str:
        """Says that one map is for all, and where it is from."""
        what = "rotation of the stream" if self.rotation else "tied to the stream"
        return what if self.keys else f"{what}, from all rows that write it"


@dataclass(frozen=True, kw_only=True)
class Joined(Pairwise):
    """The map of a residual addition, from the maps of what is added.

    Attributes:
        join: what is added.
        policy: how its maps make one.
    """

    join: Join
    policy: Residual = "average"

    def check_for(self, parent: Binding, target: Binding, config: AlignConfig) -> None:
        """Raises FusionError where the policy is `identity` and widths differ."""
        (axis,) = self.axes
        n, m = parent.axes[axis].size, target.axes[axis].size
        if self.policy == "identity" and n != m:
            raise FusionError(f"align.residual identity needs parents of one width; '{axis}' has {n} and {m} units")

    def solve_for(self, pair: Comparison, maps: Mapping[str, TransportMap]) -> Found:
        """Joins the maps of skip and branch."""
        (axis,) = self.axes
        if self.policy == "identity":
            return {axis: identity(pair.target.axes[axis].size, device=pair.device)}
        if self.policy in ("skip", "branch"):
            return {axis: maps[self.join.skip if self.policy == "skip" else self.join.branch]}
        skip, branch = maps[self.join.skip].plan, maps[self.join.branch].plan
        share: float | Tensor = 0.5
        if self.policy in ("weighted_scalar", "weighted_matrix"):
            s, b = (pair.magnitudes[added] for added in (self.join.skip, self.join.branch))
            if self.policy == "weighted_scalar":
                s, b = s.mean(), b.mean()
            share = (s / (s + b).clamp_min(1e-300)).to(skip)
        plan = share * skip + (1 - share) * branch
        return {axis: TransportMap(plan, f"join:{self.policy}", pair.config.scaling)}

    def needs(self, evidence: Evidence | None) -> tuple[str, ...]:
        """The axes that are added, as far as their maps decide."""
        if self.policy == "identity":
            return ()
        parts = {"skip": (self.join.skip,), "branch": (self.join.branch,)}
        return parts.get(self.policy, (self.join.skip, self.join.branch))

    def summary(self, axis: str, binding: Binding) -> str:
        """What is added and by which policy, for a person."""
        return f"join ({self.policy}) of {self.join.skip} + {self.join.branch}"


def _check_heads(axis: str, parent: Binding, anchor: Binding) -> None:
    ours, theirs = (binding.axes[axis].heads for binding in (parent, anchor))
    if ours != theirs:
        raise FusionError(
            f"parents of different head count: {ours} and {theirs} heads; train parents of one head count, or "
            "use align.heads matched, which transports whole heads"
        )
