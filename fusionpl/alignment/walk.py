"""Aligns one parent with the anchor: walks the axes of the network and gives each its TransportMap."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from fusionpl.alignment.config import AlignConfig
from fusionpl.alignment.evidence import ActivationEvidence, Evidence, WeightEvidence
from fusionpl.alignment.heads import match_heads
from fusionpl.alignment.rotation import dissimilarity, rotate_stream, rotate_units
from fusionpl.calibration import Key
from fusionpl.errors import FusionError
from fusionpl.families import Binding, Join
from fusionpl.transport import Gram, Solver, TransportMap, ground_metric, identity, solve

Maps = dict[str, TransportMap]

# With weights as evidence a tied stream needs the maps that depend on it: rounds of coordinate descent.
_TIE_ROUNDS = 3


@dataclass
class Alignment:
    """The maps of one parent: by axis, and, for `align.qk: joint`, by (q, k) over the units of both."""

    maps: Maps = field(default_factory=dict)
    joint: dict[tuple[str, str], TransportMap] = field(default_factory=dict)


def align(parent: Binding, anchor: Binding, evidence: Evidence, config: AlignConfig) -> Alignment:
    """Gives every free axis of `parent` a map onto the anchor's.

    Args:
        parent, anchor: bindings of one family and depth.
        evidence: what describes the units.
        config: solver, metric and policies.

    Raises:
        FusionError: options that do not fit the widths or head counts; see AlignConfig.
    """
    walk = _Walk(parent, anchor, evidence, config)
    if config.stream == "rotation":
        walk.rotate_stream()
    elif config.residual == "tie":
        walk.tie_stream()
    for axis in parent.free:
        walk.map_of(axis)
    return walk.alignment


class _Walk:
    """Maps by need: a join asks for its members, a row of weights for what it reads, and each is solved once."""

    def __init__(self, parent: Binding, anchor: Binding, evidence: Evidence, config: AlignConfig) -> None:
        self.parent, self.anchor, self.evidence, self.config = parent, anchor, evidence, config
        self.alignment = Alignment()
        self.maps = self.alignment.maps
        self.circuit = {axis: circuit for circuit in parent.circuits for axis in circuit}
        self.attention = {axis: group for group in parent.attention for axis in group}
        if config.heads == "flat":
            self._check_heads()

    def _check_heads(self) -> None:
        for group in self.parent.attention:
            ours, theirs = (binding.axes[group[0]].heads for binding in (self.parent, self.anchor))
            if ours != theirs:
                raise FusionError(
                    f"parents of different head count: {ours} and {theirs} heads; train parents of one head count, or "
                    "use align.heads matched, which transports whole heads"
                )

    def map_of(self, axis: str) -> TransportMap:
        if axis not in self.maps:
            if axis in self.parent.joins:
                self.maps[axis] = self._joined(axis, self.parent.joins[axis])
            elif self.config.heads == "matched" and axis in self.attention:
                self._match(self.attention[axis])
            elif self.config.qk == "joint" and axis in self.circuit:
                self._solve_joint(self.circuit[axis])
            elif self.config.qk == "shared" and axis in self.circuit:
                shared = self._solved(self.evidence.alike(self.circuit[axis], self._inputs(*self.circuit[axis])))
                self.maps.update(dict.fromkeys(self.circuit[axis], self._rescaled(axis, shared)))
            else:
                found = self._solved(self.evidence.beside((axis,), self._inputs(axis)))
                self.maps[axis] = self._rescaled(axis, found) if axis in self.circuit else found
        return self.maps[axis]

    def _inputs(self, *axes: str) -> Mapping[str, TransportMap]:
        if isinstance(self.evidence, WeightEvidence):
            for axis in axes:
                for needed in self.evidence.needs(axis):
                    self.map_of(needed)
        return self.maps

    def _solved(self, inner: Gram) -> TransportMap:
        config = self.config
        cost = ground_metric(inner, config.metric, config.normalize)
        return solve(cost, config.solver, reg=config.reg, scaling=config.scaling)

    def _rescaled(self, axis: str, found: TransportMap) -> TransportMap:
        """Keeps the scores of attention between heads of different width; the released code does not."""
        if self.config.scaling == "source":
            return found
        ours, theirs = (binding.axes[axis].size / binding.axes[axis].heads for binding in (self.parent, self.anchor))
        # A coupling splits or merges units, which changes inner products; a rotation between widths does not.
        ratio = ours / theirs if found.scaling != "orthogonal" else theirs / ours
        return replace(found, gain=ratio**0.25)

    def _solve_joint(self, circuit: tuple[str, ...]) -> None:
        first, second = circuit
        plan = self._rescaled(first, self._solved(self.evidence.beside(circuit, self._inputs(*circuit))))
        self.alignment.joint[first, second] = plan
        n, m = self.parent.axes[first].size, self.anchor.axes[first].size
        self.maps[first] = plan.block(slice(n), slice(m))
        self.maps[second] = plan.block(slice(n, None), slice(m, None))

    def _match(self, group: tuple[str, ...]) -> None:
        circuits = list(dict.fromkeys(self.circuit.get(axis, (axis,)) for axis in group))
        ours, theirs = (binding.axes[group[0]] for binding in (self.parent, self.anchor))
        heads = ours.heads, theirs.heads
        if self.config.stream == "rotation":
            grams = {circuit[0]: self._activations.unscaled(circuit) for circuit in circuits}
            found = match_heads(grams, heads, compare=dissimilarity, solve_units=rotate_units)
        else:
            grams = {circuit[0]: self.evidence.alike(circuit, self._inputs(*circuit)) for circuit in circuits}
            found = match_heads(grams, heads, compare=self._cost, solve_units=self._solved)
        for circuit in circuits:
            one = found[circuit[0]]
            one = self._rescaled(circuit[0], one) if len(circuit) > 1 else one
            self.maps.update(dict.fromkeys(circuit, one))

    def _cost(self, inner: Gram) -> float:
        hard: Solver = "assignment" if inner.cross.shape[0] == inner.cross.shape[1] else "emd"
        return float(solve(ground_metric(inner, self.config.metric, "none"), hard).cost or 0.0)

    @property
    def _activations(self) -> ActivationEvidence:
        assert isinstance(self.evidence, ActivationEvidence)  # AlignConfig.check has refused weights
        return self.evidence

    def rotate_stream(self) -> None:
        """One rotation for each residual stream, from all its joins."""
        for members in self.parent.streams():
            seen = [axis for axis in members if axis in self.parent.taps and axis in self.parent.joins]
            one = rotate_stream(self._activations.unscaled(seen))
            self.maps.update(dict.fromkeys(members, one))

    def _joined(self, axis: str, join: Join) -> TransportMap:
        policy, scaling = self.config.residual, self.config.scaling
        if policy == "identity":
            n, m = self.parent.axes[axis].size, self.anchor.axes[axis].size
            if n != m:
                raise FusionError(f"align.residual identity needs parents of one width; '{axis}' has {n} and {m} units")
            return identity(n)
        if policy == "skip":
            return self.map_of(join.skip)
        if policy == "branch":
            return self.map_of(join.branch)
        skip, branch = self.map_of(join.skip).plan, self.map_of(join.branch).plan
        share: float | torch.Tensor = 0.5
        if policy in ("weighted_scalar", "weighted_matrix"):
            s, b = self.evidence.magnitude(join.skip), self.evidence.magnitude(join.branch)
            if policy == "weighted_scalar":
                s, b = s.mean(), b.mean()
            share = (s / (s + b).clamp_min(1e-300)).to(skip)
        return TransportMap(share * skip + (1 - share) * branch, f"join:{policy}", scaling)

    def tie_stream(self) -> None:
        """One map for each residual stream, from all its joins (activations) or all their members (weights)."""
        for members in self.parent.streams():
            if isinstance(self.evidence, WeightEvidence):
                self._tie_weights(members, self.evidence)
            else:
                joins = [axis for axis in members if axis in self.parent.joins]
                one = self._solved(self.evidence.alike(joins, self.maps))
                self.maps.update(dict.fromkeys(members, one))

    def _tie_weights(self, members: list[str], evidence: WeightEvidence) -> None:
        written = [axis for axis in members if axis not in self.parent.joins]
        described = [axis for axis in written if not evidence.needs(axis)]
        for _ in range(_TIE_ROUNDS):
            one = self._solved(evidence.alike(described, self._inputs(*described)))
            self.maps.clear()
            self.alignment.joint.clear()
            self.maps.update(dict.fromkeys(members, one))
            described = written


def evidence_keys(binding: Binding, config: AlignConfig) -> list[Key]:
    """The activations that an alignment with `config` looks at: tuples of axes, seen side by side."""
    keys: dict[Key, None] = {}
    if config.residual in ("weighted_scalar", "weighted_matrix"):
        for join in binding.joins.values():
            keys.update(dict.fromkeys([(join.skip,), (join.branch,)]))
    if config.evidence == "weights":
        return list(keys)
    solved = set(binding.free) - set(binding.joins)
    if config.residual == "tie":  # a rotation of the stream is tied too
        solved -= {axis for members in binding.streams() for axis in members}
        keys.update(dict.fromkeys((axis,) for axis in binding.joins))
    if config.qk == "joint" and config.heads == "flat":
        keys.update(dict.fromkeys(binding.circuits))
        solved -= {axis for circuit in binding.circuits for axis in circuit}
    keys.update(dict.fromkeys((axis,) for axis in binding.free if axis in solved))
    return list(keys)
