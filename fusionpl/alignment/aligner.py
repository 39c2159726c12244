"""Aligns one parent with the anchor: gives each axis its map when it is asked for."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from fusionpl.alignment.config import AlignConfig
from fusionpl.alignment.evidence import ActivationEvidence, Evidence
from fusionpl.alignment.maps import Alignment, Maps
from fusionpl.calibration.kept import Kept
from fusionpl.families import Binding, section_of
from fusionpl.transport.costs import Gram, ground_metric
from fusionpl.transport.maps import TransportMap
from fusionpl.transport.solvers import solve


class Solvable(Protocol):
    """Axes that take their maps together: see `problems`."""

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes."""

    def solve(self, work: "Aligner") -> None:
        """Gives them their maps."""


class Aligner:
    """The alignment of one parent under way: a join asks for its members, a row of weights for what it reads.

    Args:
        parent, anchor: bindings of one family and depth.
        config: solver, metric and policies.
        found: what `problems` found for them.
        kept: where maps are kept.
        owner: tells them from those of other parents.
        device: where maps are.
        weight: the parent's share.
        idle: blocks that the parent has not.

    Attributes:
        alignment: the maps found so far.
        evidence: what describes the units of the section that is solved; whoever calls `solve` sets it, and takes it
            away afterwards.
        magnitudes: anchor's axis -> mean absolute activation [n], for the weighted residual policies.
        streams: first axis of a stream -> the parent's map into the one stream of all parents, where there is one.
        chosen: first axis of units that are chosen -> which of the parent's are taken, and their places.
        given: what a map of chosen units is made of -> the first axis that has it.
    """

    evidence: Evidence

    def __init__(
        self,
        parent: Binding,
        anchor: Binding,
        config: AlignConfig,
        found: Iterable[Solvable],
        kept: Kept,
        owner: object,
        device: torch.device,
        weight: float,
        idle: frozenset[str] = frozenset(),
    ) -> None:
        self.idle = idle
        self.parent, self.anchor, self.config, self.device, self.weight = parent, anchor, config, device, weight
        self.problems = {axis: problem for problem in found for axis in problem.axes}
        self.alignment = Alignment(Maps(kept, owner))
        self.magnitudes: Mapping[str, Tensor] = {}
        self.streams: Mapping[str, TransportMap] = {}
        self.chosen: dict[str, tuple[Tensor, Tensor]] = {}
        self.given: dict[tuple[int, ...], str] = {}

    @property
    def maps(self) -> Maps:
        """Axis -> map."""
        return self.alignment.maps

    def solve(self, problem: Solvable) -> None:
        """Solves a problem, and before it those that it needs."""
        for axis in problem.axes:
            self.map_of(axis)

    def pass_on(self, problem: Solvable) -> None:
        """Gives the stream behind a block that the parent has not the map that it has before it."""
        for axis in problem.axes:
            before = axis
            while before in self.parent.joins and section_of(before) in self.idle:
                before = self.parent.joins[before].skip
            if before != axis:
                self.map_of(before)
                self.maps.share(axis, before)

    def map_of(self, axis: str) -> TransportMap:
        """The map of an axis, solved if it is not known."""
        if axis not in self.maps:
            self.problems[axis].solve(self)
        return self.maps[axis]

    def alike(self, axes: Sequence[str]) -> Gram:
        """Evidence for one set of units described by all `axes` together."""
        self._solve_needed(axes)
        return self.evidence.alike(axes, self.maps)

    def beside(self, axes: Sequence[str]) -> Gram:
        """Evidence for the units of all `axes` as one set."""
        self._solve_needed(axes)
        return self.evidence.beside(axes, self.maps)

    def plain(self, axis: str) -> Gram:
        """Evidence for the units of an axis as they are."""
        self._solve_needed([axis])
        return self.evidence.plain(axis, self.maps)

    @property
    def activations(self) -> ActivationEvidence:
        """The evidence, which is activations."""
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
        """Keeps the scores of attention between heads of different width; the released code does not."""
        if self.config.scaling == "source":
            return found
        ours, theirs = (binding.axes[axis].size / binding.axes[axis].heads for binding in (self.parent, self.anchor))
        # A coupling splits or merges units, which changes inner products; a rotation between widths does not.
        ratio = ours / theirs if found.scaling != "orthogonal" else theirs / ours
        return replace(found, gain=ratio**0.25)

    def _solve_needed(self, axes: Sequence[str]) -> None:
        for axis in axes:
            for needed in self.evidence.needs(axis):
                self.map_of(needed)
