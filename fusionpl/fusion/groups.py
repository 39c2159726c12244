"""What the least-squares refit fits: groups of linear maps, in forward order; known before any weight is read."""

import itertools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusionpl.calibration.cursor import places_of
from fusionpl.calibration.observe import Target
from fusionpl.calibration.taps import Place
from fusionpl.families.axes import Binding, Index, Slot, boundary, section_of
from fusionpl.families.family import TAIL, VOCABULARY


@dataclass(frozen=True)
class LinearGroup:
    """Linear modules that read the same tensor, or one norm that writes the stream: fitted together.

    Attributes:
        modules: module -> the axes that it writes, in the order of its output.
        norm: whether the module is a norm.
        narrow: whether it reads fewer units than it writes, as a decoder does: what it puts out is then known by what
            it reads, which is less to keep and to multiply.
        last: whether the module is a norm whose output is that of an encoder without a head.
        predicts: whether what it puts out are the logits of classes or tokens.
        skips: axis that is added to the stream -> (axis of the sum, axis of the stream that it is added to).
    """

    modules: Mapping[str, tuple[str, ...]]
    norm: bool
    narrow: bool
    skips: Mapping[str, tuple[str, str]]
    last: bool = False
    predicts: bool = False

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes that are written, in the order of the modules."""
        return tuple(axis for axes in self.modules.values() for axis in axes)

    @property
    def first(self) -> str:
        """The first of its modules."""
        return next(iter(self.modules))

    def width(self, binding: Binding) -> int:
        """Number of units that are written."""
        return sum(binding.axes[axis].size for axis in self.axes)

    def inputs(self, binding: Binding) -> set[Place]:
        """Where the fused network shows what the modules read (of a norm, what comes out) and what is to be added."""
        return {Place(self.first, "output" if self.norm else "input")} | self._added(binding)

    @property
    def targets(self) -> tuple[Target, ...]:
        """What a parent shows that is fitted to."""
        if self.narrow:
            return (Target(Place(self.first, "input")),)
        if self.norm:
            total = None if self.last else self.axes[0]
            return tuple(Target(Place(module, "output"), total=total) for module in self.modules)
        added = (
            next((self.skips[axis] for axis in axes if axis in self.skips), None) for axes in self.modules.values()
        )
        return tuple(
            Target(Place(module, "output"), *(both[::-1] if both else ()))
            for module, both in zip(self.modules, added, strict=True)
        )

    def _added(self, binding: Binding) -> set[Place]:
        return places_of(binding, (skip for _, skip in self.skips.values()))


def groups_of(binding: Binding, section: str, keep: frozenset[str]) -> tuple[LinearGroup, ...]:
    """The groups of a section, in forward order.

    A stem has none but the norm behind it in post-LN networks: the rest reads the same input in every parent, so its
    average is its least-squares solution. Modules of a block that read one axis read one tensor; in the tail one may
    read all tokens and another the first. A decoder that is the embedding stays.

    Args:
        binding: the anchor's.
        section: its name.
        keep: parameters that stay as they are.
    """
    if section in binding.ends and section != TAIL:
        behind = binding.end_norm(section) if binding.family.norm == "post" else None
        return (LinearGroup({behind: (boundary(section),)}, norm=True, narrow=False, skips={}),) if behind else ()
    # What a post-LN head puts out goes through a norm too.
    norms = {
        tap.target: axis
        for axis, tap in binding.taps.items()
        if tap.kind == "output"
        and (axis in binding.joins or (section_of(axis) == TAIL and not binding.reads(tap.target)))
    }
    norms |= binding.last_norms if section == TAIL else {}
    linear: dict[str, list[Slot]] = defaultdict(list)
    for slot in binding.slots:
        if slot.section == section and any(slot.reads) and slot.parameter not in keep:
            linear[slot.parameter.rpartition(".")[0]].append(slot)
    places: list[tuple[Any, str, tuple[str, ...]]] = []
    for name in binding.uses[section]:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in linear:
            key = module if section == TAIL else _axes(linear[module][0], reads=True)
            if name in binding.closed:
                continue
            # A slot is one axis of what is written and one of what is read.
            first = [slot for slot in linear[module] if _start(slot) == _start(linear[module][0])]
            places.append((key, module, tuple(axis for slot in first for axis in _axes(slot, reads=False))))
        elif leaf == "weight" and module in norms:
            places.append((module, module, (norms[module],)))
    # A norm at the end of a branch stands between what a module puts out and the stream: fitted for itself.
    branches = {
        join.branch: (axis, join.skip)
        for axis, join in binding.joins.items()
        if not (join.branch in binding.taps and _is_norm(binding, join.branch))
    }
    groups = []
    for _, group in itertools.groupby(places, key=lambda place: place[0]):
        modules = {module: axes for _, module, axes in group}
        norm = next(iter(modules)) in norms
        written = [axis for axes in modules.values() for axis in axes]
        skips = {} if norm else {axis: branches[axis] for axis in written if axis in branches}
        decodes = VOCABULARY in written
        narrow = decodes or (section in binding.blocks and not norm and not skips and _narrow(binding, linear, modules))
        predicts = section == TAIL and (decodes or written == ["classes"])
        last = next(iter(modules)) in binding.last_norms
        groups.append(LinearGroup(modules, norm, narrow, skips, last=last, predicts=predicts))
    return tuple(groups)


def _narrow(binding: Binding, linear: Mapping[str, list[Slot]], modules: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether modules of a block read fewer units than they write."""
    read = {axis for module in modules for axis in _axes(linear[module][0], reads=True)}
    written = [axis for axes in modules.values() for axis in axes]
    return sum(binding.axes[axis].size for axis in read) < sum(binding.axes[axis].size for axis in written)


def _is_norm(binding: Binding, axis: str) -> bool:
    """Whether the units of an axis are seen behind a norm, which reads no axis."""
    tap = binding.taps[axis]
    return tap.kind == "output" and f"{tap.target}.weight" in binding.owners and not binding.reads(tap.target)


def _start(slot: Slot) -> list[Index]:
    """Where a slot lies along the dimensions that are read."""
    return [index for index, read in zip(slot.index, slot.reads, strict=True) if read]


def _axes(slot: Slot, *, reads: bool) -> tuple[str, ...]:
    return tuple(axis for axis, read in zip(slot.axes, slot.reads, strict=True) if axis and read == reads)
