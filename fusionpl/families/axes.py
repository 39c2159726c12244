"""Axes and what stands on them: a family bound to one model."""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fusionpl.families.family import TAIL, Family, Kind

Index = slice | Tensor  # Tensor: the places of units that are not side by side
Gain = Literal["norm", "scale"]


@dataclass(frozen=True)
class Axis:
    """A set of units.

    Attributes:
        name, size: of the axis.
        heads: above 1, the units come in that many equal groups, one a head, head by head.
        fixed: no map moves it.
        members: the heads come in equal groups of that many, whose members share one head of another axis (the queries
            of a key-value head).
        kind: which maps keep the function, of a head inside it.
        pairs: of a rotary head, the number of its frequency pairs: unit i with unit i + pairs, from the first unit on.
        repeats: the axis whose heads this one repeats, once for each member of a group: what attention puts out.
        order: the axis whose units are the groups of heads, where others share their order.
    """

    name: str
    size: int
    heads: int = 1
    fixed: bool = False
    members: int = 1
    kind: Kind = "permutation"
    pairs: int = 0
    repeats: str | None = None
    order: str | None = None

    @property
    def groups(self) -> int:
        """Number of groups of heads."""
        return self.heads // self.members

    @property
    def width(self) -> int:
        """Units of a head."""
        return self.size // self.heads


@dataclass(frozen=True, eq=False)
class Slot:
    """The part of a parameter in which every dimension is one axis (None for a dimension of size one).

    Attributes:
        parameter: its name.
        index: where the part lies, dimension by dimension.
        axes, reads: of each dimension, its axis and whether the parameter reads it.
        section: that the parameter belongs to.
        gain: `norm` for the gain of a norm, `scale` for a LayerScale: it multiplies unit by unit; before a stream is
            rotated, it is folded; where several become one stream, that of a norm inside it is fitted.
        rooted: what it writes is multiplied by the square root of its width.
    """

    parameter: str
    index: tuple[Index, ...]
    axes: tuple[str | None, ...]
    reads: tuple[bool, ...]
    section: str
    gain: Gain | None = None
    rooted: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The slot's part of its parameter: a view, or a copy where its units are not side by side."""
        return tensor[self.index]

    def put(self, tensor: Tensor, part: Tensor) -> None:
        """Writes the slot's part of its parameter."""
        tensor[self.index] = part

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
    units: Index


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
        gates: axis -> the gate that multiplies it, unit by unit, and with which it moves.
        attention: for each attention of each block, the axes whose units come in heads.
        depths: the number of blocks of each stack.
        uses: section -> the parameters that its modules hold, in the order of the family's lines; a tied one under the
            first of its names.
        closed: parameters that stand at both ends of a stream: embeddings tied to the decoder.
        hindrance: why the stream has to keep its units although its parameters don't say so: see `looked_at`.
    """

    family: Family
    axes: Mapping[str, Axis]
    slots: tuple[Slot, ...]
    taps: Mapping[str, Tap]
    joins: Mapping[str, Join]
    circuits: tuple[tuple[str, ...], ...]
    gates: Mapping[str, str]
    attention: tuple[tuple[str, ...], ...]
    depths: tuple[int, ...]
    uses: Mapping[str, tuple[str, ...]]
    closed: frozenset[str] = frozenset()
    hindrance: str | None = None

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return sum(self.depths)

    @functools.cached_property
    def stacks(self) -> tuple[tuple[str, ...], ...]:
        """For each stack the module paths of its blocks, which are the names of their sections."""
        return tuple(stack.blocks(depth) for stack, depth in zip(self.family.stacks, self.depths, strict=True))

    @functools.cached_property
    def blocks(self) -> tuple[str, ...]:
        """The module paths of all blocks."""
        return tuple(block for stack in self.stacks for block in stack)

    @functools.cached_property
    def sections(self) -> tuple[str, ...]:
        """The names of all sections, in forward order."""
        return tuple(name for name, *_ in self.family.sections(self.depths))

    @functools.cached_property
    def ends(self) -> tuple[str, ...]:
        """The sections that no block is: every stack's stem, and the tail."""
        return (*(stack.stem_name for stack in self.family.stacks), TAIL)

    @functools.cached_property
    def stack_of(self) -> Mapping[str, int]:
        """Section -> its stack; the tail belongs to the last."""
        stacks: dict[str, int] = {}
        for index, (stack, blocks) in enumerate(zip(self.family.stacks, self.stacks, strict=True)):
            stacks |= dict.fromkeys((stack.stem_name, *blocks, TAIL), index)
        return stacks

    @functools.cached_property
    def runs_over(self) -> Mapping[str, int]:
        """Axis -> the stack whose tokens it is computed for: what attention reads of another stack is that one's."""
        stacks = {axis: self.stack_of[section_of(axis) or TAIL] for axis in self.axes}
        for slot in self.slots:
            read = [
                axis for axis, reads in zip(slot.axes, slot.reads, strict=True) if axis and reads and axis in stacks
            ]
            if slot.section not in self.blocks:
                continue
            own = self.family.stacks[self.stack_of[slot.section]]
            if read and read[0] not in (own.enters, boundary(own.stem_name)):
                stack = self.stack_of[section_of(read[0])]
                stacks |= {axis: stack for axis in slot.axes if axis and slot.writes(axis)}
        return stacks

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

        groups = [(axis, *join.members) for axis, join in self.joins.items()]
        groups += [*self.circuits, *self.gates.items()]
        for first, *rest in groups:
            for other in rest:
                root[find(other)] = find(first)
        return {name: find(name) for name in self.free}

    def streams(self) -> list[list[str]]:
        """The residual streams: for each, the joined axes and all that is added into them."""
        tied = self.tied()
        roots = dict.fromkeys(tied[axis] for axis in self.joins)
        return [[axis for axis in self.free if tied[axis] == root] for root in roots]

    def reads(self, module: str) -> tuple[str, ...]:
        """The axes that a module's weight reads; none where it is not linear."""
        slots = (slot for slot in self.slots if slot.parameter == f"{module}.weight")
        read = (axis for slot in slots for axis, reads in zip(slot.axes, slot.reads, strict=True) if axis and reads)
        return tuple(dict.fromkeys(read))

    def readers(self, section: str) -> list[list[str]]:
        """The linear modules of a section, in forward order, those together that read one tensor: they follow each
        other and read one axis."""
        modules = [name.removesuffix(".weight") for name in self.uses[section] if name.endswith(".weight")]
        groups = itertools.groupby(modules, key=self.reads)
        return [list(group) for read, group in groups if read]

    def order(self, module: str) -> Tensor | None:
        """The places of a module's outputs, axis by axis; None where they come in that order."""
        parts = [
            index
            for slot in self.slots if slot.parameter == f"{module}.weight"
            for index, reads in zip(slot.index, slot.reads, strict=True) if not reads
        ]  # fmt: skip
        whole = [part for part in parts if isinstance(part, Tensor)]
        return torch.cat(whole) if whole else None

    def end_norm(self, section: str) -> str | None:
        """The norm whose output a section of a post-LN network leaves; None where it leaves that of a linear map, or a
        sum."""
        tap = self.taps.get(boundary(section))
        return None if tap is None or self.reads(tap.target) else tap.target

    @property
    def last_norms(self) -> dict[str, str]:
        """The norms that give what a pre-norm encoder without a head puts out -> the axis of their units."""
        uses = self.uses[TAIL]
        return {
            slot.parameter.rpartition(".")[0]: str(slot.axes[0])
            for slot in self.slots
            if slot.section == TAIL and slot.gain == "norm" and not self.closed  # a decoder may be the embedding
            for norm, readers in self.family.tail.norms.items()
            if slot.parameter == f"{norm}.weight"
            and readers
            and not any(f"{reader}.weight" in uses for reader in readers)
        }

    def on_boundary(self, axis: str) -> bool:
        """Whether `axis` is the stream that one section hands to the next."""
        return axis == boundary(section_of(axis))

    def writers(self, axis: str) -> tuple[Slot, ...]:
        """The slots whose rows describe the units of `axis` by their incoming weights (no biases, no norms), or
        its values where it is a parameter that is added to the stream as it is (a class token)."""
        sections = dict.fromkeys(slot.section for slot in self.slots if slot.writes(axis))
        section = next((name for name in sections if name == section_of(axis)), next(iter(sections), None))
        tap = self.taps.get(axis)
        value = tap.target if tap is not None and tap.kind == "parameter" else None
        return tuple(
            slot for slot in self.slots
            if slot.section == section and slot.writes(axis) and (len(slot.axes) > 1 or slot.parameter == value)
        )  # fmt: skip


def section_of(axis: str) -> str:
    """The section that an axis belongs to."""
    return axis.rpartition(".")[0]


def boundary(section: str) -> str:
    """The axis of the stream that leaves a section."""
    return f"{section}.out"
