"""Axes and what stands on them: a family bound to one model."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fusionpl.families.family import STEM, TAIL, Family


@dataclass(frozen=True)
class Axis:
    """A set of units. `heads` > 1: the units come in that many equal groups, one a head, head by head."""

    name: str
    size: int
    heads: int = 1
    fixed: bool = False


@dataclass(frozen=True)
class Slot:
    """The part of a parameter in which every dimension is one axis (None for a dimension of size one)."""

    parameter: str
    index: tuple[slice, ...]
    axes: tuple[str | None, ...]
    reads: tuple[bool, ...]
    section: str

    def of(self, tensor: Tensor) -> Tensor:
        """The slot's view of its parameter."""
        return tensor[self.index]

    def writes(self, axis: str) -> bool:
        """Whether the slot produces `axis`: it has it as a dimension and does not read it."""
        return any(a == axis and not r for a, r in zip(self.axes, self.reads, strict=True))


@dataclass(frozen=True)
class Tap:
    """Where the units of an axis are seen: `units` of the last dimension of a module's output or input,
    or of a parameter."""

    axis: str
    target: str
    kind: str
    units: slice


@dataclass(frozen=True)
class Join:
    """A residual addition: the stream that arrives, the branch added to it, and those that move on their own."""

    skip: str
    branch: str
    aside: tuple[str, ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        """All axes added into the stream."""
        return (self.skip, self.branch, *self.aside)


@dataclass(frozen=True)
class Binding:
    """A family bound to one model.

    Attributes:
        axes: every axis by name, in the order of the forward pass.
        slots: the parameters, cut so that each dimension is one axis; tied parameters appear once.
        taps: axis -> where its activations are seen.
        joins: axis -> the axes added into it, in the order of the forward pass.
        circuits: axes that must move alike although they are seen apart (Q and K).
        attention: for each block, the axes whose units come in heads.
        depth: the number of blocks.
        uses: section -> the parameters that its modules hold; a tied one under the first of its names.
    """

    family: Family
    axes: Mapping[str, Axis]
    slots: tuple[Slot, ...]
    taps: Mapping[str, Tap]
    joins: Mapping[str, Join]
    circuits: tuple[tuple[str, ...], ...]
    attention: tuple[tuple[str, ...], ...]
    depth: int
    uses: Mapping[str, tuple[str, ...]]

    @functools.cached_property
    def blocks(self) -> tuple[str, ...]:
        """The module paths of the blocks, which are the names of their sections."""
        return tuple(self.family.block.path.format(l=index) for index in range(self.depth))

    @property
    def sections(self) -> tuple[str, ...]:
        """The names of all sections, in forward order."""
        return (STEM, *self.blocks, TAIL)

    @functools.cached_property
    def owners(self) -> Mapping[str, str]:
        """Parameter -> the section that it belongs to: the first that uses it."""
        return {slot.parameter: slot.section for slot in self.slots}

    @property
    def free(self) -> tuple[str, ...]:
        """Axes that a map may move."""
        return tuple(name for name, axis in self.axes.items() if not axis.fixed)

    def tied(self) -> dict[str, str]:
        """Free axis -> the representative of all axes that must move alike to keep the function."""
        root = {name: name for name in self.free}

        def find(name: str) -> str:
            while root[name] != name:
                name = root[name]
            return name

        groups = [(axis, *join.members) for axis, join in self.joins.items()] + list(self.circuits)
        for first, *rest in groups:
            for other in rest:
                root[find(other)] = find(first)
        return {name: find(name) for name in self.free}

    def streams(self) -> list[list[str]]:
        """The residual streams: for each, the joined axes and all that is added into them."""
        tied = self.tied()
        roots = dict.fromkeys(tied[axis] for axis in self.joins)
        return [[axis for axis in self.free if tied[axis] == root] for root in roots]

    def on_boundary(self, axis: str) -> bool:
        """Whether `axis` is the stream that one section hands to the next."""
        return axis == boundary(section_of(axis))

    def writers(self, axis: str) -> tuple[Slot, ...]:
        """The slots whose rows describe the units of `axis` by their incoming weights (no biases, no norms)."""
        section = next((s.section for s in self.slots if s.writes(axis)), None)
        return tuple(s for s in self.slots if s.section == section and s.writes(axis) and len(s.axes) > 1)


def section_of(axis: str) -> str:
    """The section that an axis belongs to."""
    return axis.rpartition(".")[0]


def boundary(section: str) -> str:
    """The axis of the stream that leaves a section."""
    return f"{section}.out"
