"""What a problem of an alignment is, and the order in which several are solved."""

from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import TopologicalSorter

import torch
from torch import Tensor

from fusionpl.alignment.config import AlignConfig
from fusionpl.alignment.evidence import ActivationEvidence, Evidence
from fusionpl.alignment.maps import Found, Maps
from fusionpl.calibration.moments import Key
from fusionpl.families.apply import State
from fusionpl.families.axes import Binding, section_of
from fusionpl.transport.costs import Gram, ground_metric
from fusionpl.transport.maps import TransportMap
from fusionpl.transport.solvers import solve


@dataclass(frozen=True)
class Comparison:
    """A parent beside the fused network's units.

    Attributes:
        parent, target: bindings of one family and depth.
        evidence: what describes the units of both.
        config: solver, metric and policies.
        device: where maps are.
        magnitudes: target's axis -> mean absolute activation [n], for the weighted residual policies.
        missing: blocks that the parent has not.
        problems: axis -> the problem that gives it its map, of all sections.
    """

    parent: Binding
    target: Binding
    evidence: Evidence
    config: AlignConfig
    device: torch.device
    magnitudes: Mapping[str, Tensor]
    missing: frozenset[str]
    problems: Mapping[str, "Problem"]

    @property
    def activations(self) -> ActivationEvidence:
        """The evidence of a problem that only activations can solve."""
        assert isinstance(self.evidence, ActivationEvidence)  # AlignConfig has refused weights
        return self.evidence

    def solved(self, inner: Gram) -> TransportMap:
        """The transport map between units with these inner products."""
        config = self.config
        cost = ground_metric(inner, config.metric, config.normalize)
        return solve(cost, config.solver, reg=config.reg, scaling=config.scaling)

    def in_circuit(self, axis: str) -> bool:
        """Whether the units of `axis` meet others in a product."""
        return any(axis in circuit for circuit in self.parent.circuits)

    def rescaled(self, axis: str, found: TransportMap) -> TransportMap:
        """Scales a map so that attention scores survive another width of heads; the released code does not."""
        if self.config.scaling == "source":
            return found
        ours, theirs = (binding.axes[axis].size / binding.axes[axis].heads for binding in (self.parent, self.target))
        # A coupling splits or merges units, which changes inner products; a rotation between widths does not.
        ratio = ours / theirs if found.scaling != "orthogonal" else theirs / ours
        return replace(found, gain=ratio**0.25)


@dataclass(frozen=True)
class Observed:
    """What the problems of a section are solved from.

    Attributes:
        parents: their bindings.
        target: the fused network's binding.
        anchor: index of the anchor.
        weights: the parents' shares.
        config: how units are matched.
        device: where maps are.
        problems: axis -> the problem that gives it its map, of all sections.
        missing: for each parent, the blocks that it has not.
        states: each parent's parameters of the section; none for problems that look at whole networks.
        evidence: what describes each parent's units beside the anchor's, where units are compared.
        magnitudes: anchor's axis -> mean absolute activation, [n].
        streams: first axis of a stream -> the products of its units with those of all parents', side by side.
    """

    parents: Sequence[Binding]
    target: Binding
    anchor: int
    weights: Sequence[float]
    config: AlignConfig
    device: torch.device
    problems: Mapping[str, "Problem"]
    missing: Sequence[frozenset[str]]
    states: Sequence[State] = ()
    evidence: Sequence[Evidence] = ()
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    streams: Mapping[str, Tensor] = field(default_factory=dict)

    def compare(self, index: int) -> Comparison:
        """One parent beside the fused network."""
        return Comparison(
            self.parents[index], self.target, self.evidence[index], self.config, self.device, self.magnitudes,
            self.missing[index], self.problems,
        )  # fmt: skip


@dataclass(frozen=True)
class Problem(ABC):
    """Axes that take their maps together.

    Attributes:
        axes: the axes.
        keys: whose activations are compared; each puts the units of its axes side by side. None where weights are the
            evidence.
        magnitudes: the anchor's axes whose mean absolute activation is needed.
    """

    axes: tuple[str, ...]
    keys: tuple[Key, ...] = ()
    magnitudes: tuple[str, ...] = ()

    @property
    def section(self) -> str:
        """The section in which it is solved."""
        return section_of(self.axes[0])

    @property
    def whole(self) -> bool:
        """Whether it looks at the whole network, so that it must be solved before any section is fused."""
        return False

    @property
    def together(self) -> tuple[str, ...]:
        """The joins whose units are multiplied with those of all parents."""
        return ()

    @abstractmethod
    def check(self, observed: Observed) -> None:
        """Raises FusionError where the options do not fit the widths or head counts; nothing has been seen yet."""

    def needs(self, evidence: Evidence | None) -> tuple[str, ...]:
        """The axes whose maps it starts from; `evidence` is None where units are not compared."""
        return ()

    @abstractmethod
    def solve(self, observed: Observed, maps: Sequence[Maps]) -> list[Found]:
        """The maps of its axes, for each parent.

        Args:
            observed: what it is solved from.
            maps: each parent's maps so far, among them those that it needs.
        """

    @abstractmethod
    def summary(self, axis: str, binding: Binding) -> str:
        """How `axis` gets its map, for a person."""


class Pairwise(Problem):
    """A problem that each parent but the anchor has with the anchor alone."""

    def needs(self, evidence: Evidence | None) -> tuple[str, ...]:
        """What its units are described by: with weights as evidence, what these read."""
        return tuple(axis for own in self.axes for axis in evidence.needs(own)) if evidence is not None else ()

    def check(self, observed: Observed) -> None:
        """Checks each parent with the anchor."""
        for index, parent in enumerate(observed.parents):
            if index != observed.anchor:
                self.check_for(parent, observed.target, observed.config)

    @abstractmethod
    def check_for(self, parent: Binding, target: Binding, config: AlignConfig) -> None:
        """Raises FusionError where the options do not fit the widths or head counts of one parent."""

    @abstractmethod
    def solve_for(self, pair: Comparison, maps: Mapping[str, TransportMap]) -> Found:
        """The maps of its axes for one parent."""

    def solve(self, observed: Observed, maps: Sequence[Maps]) -> list[Found]:
        """Solves it for one parent after the other. A stream goes unchanged past a block that a parent has not."""
        solutions: list[Found] = []
        for index, known in enumerate(maps):
            if index == observed.anchor:
                solutions.append({})
            elif self.whole or self.section not in observed.missing[index]:
                solutions.append(self.solve_for(observed.compare(index), known))
            else:
                before = {axis: _before(axis, observed.parents[index], observed.missing[index]) for axis in self.axes}
                solutions.append({axis: known[other] for axis, other in before.items() if other != axis})
        return solutions


def _before(axis: str, binding: Binding, missing: frozenset[str]) -> str:
    """Of the stream behind blocks that are missing, the axis before them."""
    while axis in binding.joins and section_of(axis) in missing:
        axis = binding.joins[axis].skip
    return axis


def ordered(problems: Iterable[Problem], evidence: Evidence | None) -> list[Problem]:
    """Problems in an order in which each comes behind those that it needs."""
    of_axis = {axis: problem for problem in problems for axis in problem.axes}
    needed = {
        problem: [of_axis[axis] for axis in problem.needs(evidence) if of_axis.get(axis, problem) is not problem]
        for problem in of_axis.values()
    }
    return list(TopologicalSorter(needed).static_order())


def solve_all(problems: Sequence[Problem], observed: Observed, maps: Sequence[Maps]) -> list[Maps]:
    """Solves some problems, and returns each parent's maps with the new ones among them.

    Args:
        problems: of one section, or of whole networks.
        observed: what they are solved from.
        maps: each parent's maps so far.
    """
    for problem in ordered(problems, next(iter(observed.evidence), None)):
        maps = [known.joined(solutions) for known, solutions in zip(maps, problem.solve(observed, maps), strict=True)]
    return list(maps)


def solve_needed(axes: Iterable[str], pair: Comparison, maps: Mapping[str, TransportMap]) -> Mapping[str, TransportMap]:
    """A parent's maps, with all that must be known before some axes are compared."""
    reached: dict[Problem, None] = {}
    ahead = [needed for axis in axes for needed in pair.evidence.needs(axis)]
    while ahead:
        axis = ahead.pop()
        if axis not in maps and (problem := pair.problems[axis]) not in reached:
            reached[problem] = None
            ahead += problem.needs(pair.evidence)
    known = ChainMap[str, TransportMap]({}, maps)  # type: ignore[arg-type]  # of these it only reads
    for problem in ordered(reached, pair.evidence):
        assert isinstance(problem, Pairwise)  # one stream compares no weights
        known.update(
            {axis: solution for axis, solution in problem.solve_for(pair, known).items() if isinstance(axis, str)}
        )
    return known


def sizes_in(axes: Iterable[str], parent: Binding, target: Binding) -> tuple[int, int]:
    """The number of units of all `axes` together, in a parent and in the fused network."""
    n, m = (sum(binding.axes[axis].size for axis in axes) for binding in (parent, target))
    return n, m


def seen_at(axis: str, binding: Binding, keys: tuple[Key, ...]) -> str:
    """Where the units of an axis are seen, for a person."""
    if not keys:
        return "rows of " + ", ".join(slot.parameter for slot in binding.writers(axis))
    tap = binding.taps[axis]
    return f"values of {tap.target}" if tap.kind == "parameter" else f"{tap.kind} of {tap.target}"
