"""Binds a family to one model: every parameter's dimensions become named axes with sizes."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusionpl.errors import FusionError
from fusionpl.families.axes import Axis, Binding, Gain, Index, Join, Slot, Tap, section_of
from fusionpl.families.family import ROTATED, STEM, TAIL, Family, Kind, Section, Stack, attribute, family_of
from fusionpl.families.grammar import Dim, Segment
from fusionpl.families.looks import looked_at
from fusionpl.families.sizes import Layout, sizes_of


def bind(model: nn.Module, family: Family | None = None) -> Binding:
    """Binds `family` (by default the one of the model's class) to `model`.

    Raises:
        FusionError: naming the tensor: a parameter that no pattern or more than one matches, a wrong rank, sizes
            that disagree, an axis with neither tap nor join, tied weights on conflicting axes.
    """
    family = family or family_of(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    counts = {group: _count(model, family, path) for group, path in family.sizes.items() if group != ROTATED}
    return looked_at(model, _Binder(family, parameters, counts, _rotated(model, family)).bind())


def _count(model: nn.Module, family: Family, path: str) -> int:
    count = attribute(model, path)
    if count is None:
        raise FusionError(f"{family.name}: the model has no {path}, which says how its units are grouped")
    if not isinstance(count, int) or count < 1:
        raise FusionError(f"{family.name}: the model's {path} is {type(count).__name__} {count}, not a number of heads")
    return count


def _rotated(model: nn.Module, family: Family) -> float:
    """How many units of a rotary head are rotated, or, up to 1, which share of them."""
    path = family.sizes.get(ROTATED)
    share = 1.0 if path is None else attribute(model, path)
    if not isinstance(share, int | float) or share <= 0:
        raise FusionError(f"{family.name}: the model's {path} is {share}, not a number or a share of rotated units")
    return share


_Names = tuple[str, ...]


@dataclass(frozen=True)
class _Line:
    """What a family says of one parameter."""

    section: str
    dims: tuple[Dim, ...]
    place: int  # among the lines of its section, which stand in forward order


class _Binder:
    def __init__(
        self, family: Family, parameters: Mapping[str, Tensor], counts: Mapping[str, int], rotated: float
    ) -> None:
        self.family, self.parameters, self.counts, self.rotated = family, parameters, counts, rotated
        names: dict[int, str] = {}
        self.first = {name: names.setdefault(id(tensor), name) for name, tensor in parameters.items()}  # if tied
        self.depths = tuple(self._depth(stack) for stack in family.stacks)
        self.sections = tuple((name, part) for name, _, part in family.sections(self.depths))
        self.stack_of = {
            name: stack
            for stack, depth in zip(family.stacks, self.depths, strict=True)
            for name in (stack.stem_name, *stack.blocks(depth), TAIL)
        }

    def bind(self) -> Binding:
        lines = {name: self._match(name, tensor) for name, tensor in self.parameters.items()}
        self._one = {(lines[name].section, axis): twin for name, axis, twin in self._tied(lines)}
        grouped, repeats = self._grouped(lines)
        layouts = {name: self._layout(line, grouped) for name, line in lines.items()}
        ranks = {section: rank for rank, (section, _) in enumerate(self.sections)}
        heads = {axis: math.prod(self.counts[group] for group in groups) for axis, groups in grouped.items()}
        sizes = sizes_of({name: tensor.shape for name, tensor in self.parameters.items()}, layouts, ranks, heads)
        slots = tuple(self._slots(lines, layouts, sizes, grouped))
        taps = {tap.axis: tap for tap in self._taps(slots)}
        joins = dict(self._joins(sizes))
        for name, join in joins.items():
            sizes.setdefault(name, sizes[join.skip])
            widths = {member: sizes[member] for member in join.members}
            if len({*widths.values(), sizes[name]}) > 1:
                raise FusionError(f"join {name}: members of different size: {widths}")
        gates = {
            self._name(section, axis): self._name(section, gate)
            for section, part in self.sections
            for axis, gate in part.gates.items()
            if {self._name(section, axis), self._name(section, gate)} <= sizes.keys()
        }
        kinds: dict[str, Kind] = dict.fromkeys(gates, "scale")
        for section, part in self.sections:
            kinds |= {self._name(section, axis): kind for axis, kind in part.maps.items()}
        axes = {
            name: self._axis(name, sizes, grouped.get(name, ()), repeats.get(name), kinds.get(name, "permutation"))
            for name in sizes
        }
        for name, axis in axes.items():
            if not (axis.fixed or axis.repeats) and name not in taps and name not in joins:
                raise FusionError(f"{self.family.name}: axis '{name}' has neither tap nor join")
            if axis.repeats and axis.size != axes[axis.repeats].size * axis.members:
                raise FusionError(
                    f"axis '{name}': {axis.size} units are not the {axes[axis.repeats].size} of {axis.repeats}, "
                    f"{axis.members} times"
                )
        circuits = [
            tuple(self._name(section, member) for member in members)
            for section, part in self.sections
            for members in part.circuits.values()
        ]
        attention: dict[tuple[str, str], list[str]] = {}
        for name in axes:
            if name in grouped:
                attention.setdefault((section_of(name), grouped[name][0]), []).append(name)
        binding = Binding(
            self.family, axes, slots, taps, joins,
            circuits=tuple(c for c in circuits if all(member in axes for member in c)),
            gates=gates, attention=tuple(map(tuple, attention.values())), depths=self.depths,
            uses=self._uses(lines), closed=frozenset(self._closed(lines, layouts)),
        )  # fmt: skip
        self._check_ties(layouts, binding.tied())
        return binding

    def _depth(self, stack: Stack) -> int:
        indices = [position[0] for name in self.parameters if (position := stack.block_index(name))]
        if not indices:
            raise FusionError(f"{self.family.name}: the model has no block {stack.block.path}")
        return max(indices) + 1

    def _match(self, name: str, tensor: Tensor) -> _Line:
        candidates = [
            (stack.block.path.format(l=position[0]), position[1], stack.block)
            for stack in self.family.stacks if (position := stack.block_index(name))
        ] or [
            *((stack.stem_name, name, stack.stem) for stack in self.family.stacks), (TAIL, name, self.family.tail)
        ]  # fmt: skip
        matches = [
            _Line(section, dims, place)
            for section, local, part in candidates
            for place, (pattern, dims) in enumerate(part.parameters.items())
            if re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), local)
        ]
        if len(matches) != 1:
            how = "no pattern matches" if not matches else f"{len(matches)} patterns match"
            raise FusionError(f"{self.family.name}: {how} parameter '{name}' {list(tensor.shape)}")
        if len(matches[0].dims) != tensor.ndim:
            raise FusionError(
                f"{self.family.name}: '{name}' has {tensor.ndim} dimensions, the family says {len(matches[0].dims)}"
            )
        return matches[0]

    def _tied(self, lines: Mapping[str, _Line]) -> Iterator[tuple[str, str, str]]:
        """Parameters that are one tensor with another section's, with an axis of theirs, and the axis that it is."""
        sections: dict[str, set[str]] = {}
        for name, line in lines.items():
            sections.setdefault(self.first[name], set()).add(line.section)
        parts = dict(self.sections)
        for name, line in lines.items():
            if len(sections[self.first[name]]) > 1:
                axes = {segment.axis for dim in line.dims for segment in dim.segments}
                yield from ((name, axis, twin) for axis, twin in parts[line.section].tied.items() if axis in axes)

    def _uses(self, lines: Mapping[str, _Line]) -> dict[str, tuple[str, ...]]:
        names: dict[str, dict[str, None]] = {section: {} for section, _ in self.sections}
        # A class may define its modules in another order than it runs them (Phi-3).
        for name, line in sorted(lines.items(), key=lambda item: item[1].place):
            names[line.section][self.first[name]] = None
        return {section: tuple(parameters) for section, parameters in names.items()}

    def _name(self, section: str, local: str) -> str:
        """The global name of an axis: `in` is what the section before leaves as `out`, `decoder.stem.in` that of
        another section."""
        local = self._one.get((section, local), local)
        elsewhere, dot, axis = local.rpartition(".")
        if dot and axis == "in" and elsewhere in self.stack_of:
            return self._name(elsewhere, axis)
        if local in self.family.fixed or dot:
            return local
        stack = self.stack_of[section]
        if local == "in" and section != STEM:
            names = [name for name, _ in self.sections]
            before = names[names.index(section) - 1]
            return self._name(before, stack.enters if before == stack.stem_name else "out")
        if local in stack.shared and section not in (stack.stem_name, TAIL):
            section = stack.block.path.format(l=0)
        return f"{section}.{local}"

    def _grouped(self, lines: Mapping[str, _Line]) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        """Axis -> the axes that group its units; and repeating axis -> the one that it repeats."""
        groupings: dict[str, set[tuple[str, ...]]] = {}
        for line in lines.values():
            for segment in (segment for dim in line.dims for segment in dim.segments):
                if segment.groups:
                    groupings.setdefault(self._name(line.section, segment.axis), set()).add(segment.groups)
        grouped: dict[str, tuple[str, ...]] = {}
        repeats: dict[str, str] = {}
        for axis, ways in groupings.items():
            grouped[axis], *longer = sorted(ways, key=len)
            for groups in longer:
                repeats[_repeating(axis, groups)] = axis
                grouped[_repeating(axis, groups)] = groups
        return grouped, repeats

    def _layout(self, line: _Line, grouped: Mapping[str, tuple[str, ...]]) -> Layout:
        def resolved(segment: Segment) -> str:
            name = self._name(line.section, segment.axis)
            return name if segment.groups in ((), grouped.get(name)) else _repeating(name, segment.groups)

        return tuple((tuple(map(resolved, dim.segments)), dim.repeated) for dim in line.dims)

    def _axis(
        self, name: str, sizes: Mapping[str, int], groups: tuple[str, ...], repeats: str | None, kind: Kind
    ) -> Axis:
        size = sizes[name]
        outer = self.counts[groups[0]] if groups else 1
        members = self.counts[groups[1]] if len(groups) > 1 else 1
        heads = outer * members
        if size % heads:
            raise FusionError(f"axis '{name}': {size} units do not divide into {heads} heads")
        rotated = int(self.rotated if self.rotated > 1 else self.rotated * (size // heads))
        rotated = rotated if kind in ("pairs", "signs") else 0
        order = self._name(section_of(name), groups[0]) if groups else None
        order = order if order in sizes else None
        return Axis(name, size, heads, name in self.family.fixed, members, kind, rotated // 2, repeats, order)

    def _twins(self, layouts: Mapping[str, Layout]) -> Iterator[tuple[str, str, list[_Names], list[_Names]]]:
        """The names of tied tensors, and their axes, where these differ."""
        for name, twin in self.first.items():
            ours, theirs = ([axes for axes, _ in layouts[parameter]] for parameter in (twin, name))
            if ours != theirs:
                yield twin, name, ours, theirs

    def _closed(self, lines: Mapping[str, _Line], layouts: Mapping[str, Layout]) -> Iterator[str]:
        yield from (twin for twin, *_ in self._twins(layouts))
        yield from (self.first[name] for name, *_ in self._tied(lines))

    def _check_ties(self, layouts: Mapping[str, Layout], tied: Mapping[str, str]) -> None:
        for twin, name, ours, theirs in self._twins(layouts):
            moved = [[tuple(tied.get(axis, axis) for axis in axes) for axes in side] for side in (ours, theirs)]
            if moved[0] != moved[1]:
                raise FusionError(
                    f"{self.family.name}: '{twin}' and '{name}' are one tied tensor on conflicting axes: "
                    f"{tuple(ours)} and {tuple(theirs)}"
                )

    def _slots(
        self,
        lines: Mapping[str, _Line],
        layouts: Mapping[str, Layout],
        sizes: Mapping[str, int],
        grouped: Mapping[str, tuple[str, ...]],
    ) -> Iterator[Slot]:
        parts = list(self.family.sections(self.depths))
        norms = {f"{prefix}{norm}.weight" for _, prefix, part in parts for norm in (*part.norms, *self._inside(part))}
        scales = {f"{prefix}{scale}" for _, prefix, part in parts for scale in part.scales}
        rooted = {f"{prefix}{module}.weight" for _, prefix, part in parts for module in part.rooted}
        ranks = {section: rank for rank, (section, _) in enumerate(self.sections)}
        # A class may define its head before what stands below it (XLM-RoBERTa): a tied tensor is the first section's.
        leaders: dict[str, str] = {}
        for name in sorted(lines, key=lambda candidate: ranks[lines[candidate].section]):
            leaders.setdefault(self.first[name], name)
        for parameter in (name for name in lines if self.first[name] == name):
            name = leaders[parameter]
            line = lines[name]
            reads = tuple(dim.reads for dim in line.dims)
            cuts: list[tuple[tuple[Index, ...], tuple[str | None, ...]]] = [((), ())]
            for at, ((axes, repeated), dim) in enumerate(zip(layouts[name], line.dims, strict=True)):
                if repeated:
                    axes = axes * (self.parameters[name].shape[at] // sizes[axes[0]])
                turns = self.counts[grouped[axes[0]][0]] if dim.interleaved else 1
                cuts = [
                    ((*index, units), (*names, axis))
                    for index, names in cuts
                    for axis, units in _spans(axes, sizes, turns)
                ]
            gain: Gain | None = "norm" if name in norms else "scale" if name.rpartition(".")[0] in scales else None
            for index, names in cuts:
                yield Slot(parameter, index, names, reads, line.section, gain, name in rooted)

    def _inside(self, part: Section) -> Iterator[str]:
        """The norms that the stream goes through, of a post-LN family."""
        if self.family.norm == "post":
            for axis, places in part.taps.items():
                if axis == "out" or axis in part.joins:
                    yield from places

    def _taps(self, slots: tuple[Slot, ...]) -> Iterator[Tap]:
        outputs: dict[tuple[str, str], Index] = {}
        for slot in slots:
            for axis, units, reads in zip(slot.axes, slot.index, slot.reads, strict=True):
                if axis and not reads:
                    outputs.setdefault((slot.parameter, axis), units)
        for section, prefix, part in self.family.sections(self.depths):
            for local, places in part.taps.items():
                axis = self._name(section, local)
                if (section, local) not in self._one and self.stack_of[section_of(axis)] is self.stack_of[section]:
                    yield from itertools.islice(self._seen(axis, prefix, places, outputs), 1)

    def _seen(
        self, axis: str, prefix: str, places: tuple[str, ...], outputs: Mapping[tuple[str, str], Index]
    ) -> Iterator[Tap]:
        for place in places:
            inner = re.fullmatch(r"input\((.+)\)", place)
            target = prefix + (inner[1] if inner else place)
            if inner:
                yield Tap(axis, target, "input", slice(None))
            elif target in self.parameters:
                yield Tap(axis, target, "parameter", slice(None))
            elif (weight := (self.first.get(f"{target}.weight", ""), axis)) in outputs:
                yield Tap(axis, target, "output", outputs[weight])

    def _joins(self, sizes: Mapping[str, int]) -> Iterator[tuple[str, Join]]:
        known = set(sizes)
        for section, part in self.sections:
            for local, members in part.joins.items():
                skip, branch, *aside = (self._name(section, member) for member in members)
                known.add(self._name(section, local))
                for name in (skip, branch):
                    if name not in known:
                        raise FusionError(f"{self.family.name}: the model has no axis '{name}', which a join needs")
                yield self._name(section, local), Join(skip, branch, tuple(a for a in aside if a in sizes))


def _repeating(axis: str, groups: tuple[str, ...]) -> str:
    return f"{axis}@{groups[-1]}"


def _spans(axes: tuple[str, ...], sizes: Mapping[str, int], turns: int) -> Iterator[tuple[str | None, Index]]:
    """Where the units of each axis lie along a dimension, in which the axes come that many times in turn."""
    if not axes:
        yield None, slice(None)
    round_ = sum(sizes[axis] for axis in axes) // turns
    start = 0
    for axis in axes:
        width = sizes[axis] // turns
        if turns == 1:
            yield axis, slice(start, start + width)
        else:
            yield axis, (torch.arange(turns)[:, None] * round_ + torch.arange(start, start + width)).flatten()
        start += width
