"""Binds a family to one model: every parameter's dimensions become named axes with sizes."""

import re
from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

from torch import Tensor, nn

from fusionpl.errors import FusionError
from fusionpl.families.axes import Axis, Binding, Join, Slot, Tap
from fusionpl.families.family import STEM, TAIL, Family, Section, family_of
from fusionpl.families.grammar import Dim

_Resolved = tuple[tuple[str, ...], ...]  # axis names, one tuple of segments a dimension


def bind(model: nn.Module, family: Family | None = None) -> Binding:
    """Binds `family` (by default the one of the model's class) to `model`.

    Raises:
        FusionError: naming the tensor: a parameter that no pattern or more than one matches, a wrong rank, sizes
            that disagree, an axis with neither tap nor join, tied weights on conflicting axes.
    """
    family = family or family_of(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    binder = _Binder(family, parameters, _heads(model, family))
    return binder.bind()


def _heads(model: nn.Module, family: Family) -> Mapping[str, int]:
    def step(owner: Any, part: str) -> Any:
        return owner[int(part)] if part.isdigit() else getattr(owner, part)

    root: Any = model
    return {group: int(reduce(step, path.split("."), root)) for group, path in family.sizes.items()}


class _Binder:
    def __init__(self, family: Family, parameters: Mapping[str, Tensor], groups: Mapping[str, int]) -> None:
        self.family, self.parameters, self.groups = family, parameters, groups
        indices = [found[0] for name in parameters if (found := family.block_index(name))]
        self.depth = max(indices, default=-1) + 1
        if self.depth == 0:
            raise FusionError(f"{family.name}: the model has no block {family.block.path}")

    def bind(self) -> Binding:
        dims = {name: self._match(name, tensor) for name, tensor in self.parameters.items()}
        resolved = {name: self._resolve(section, line) for name, (section, line) in dims.items()}
        self._check_ties(resolved)
        sizes = self._sizes(resolved)
        grouped = self._grouped(dims)
        slots = tuple(self._slots(dims, resolved, sizes))
        taps = {tap.axis: tap for tap in self._taps(slots)}
        joins = dict(self._joins(sizes))
        for name, join in joins.items():
            widths = {member: sizes[member] for member in join.members}
            if len({*widths.values(), sizes[name]}) > 1:
                raise FusionError(f"join {name}: members of different size: {widths}")
        axes = {name: self._axis(name, size, grouped) for name, size in sizes.items()}
        for name, axis in axes.items():
            if not axis.fixed and name not in taps and name not in joins:
                raise FusionError(f"{self.family.name}: axis '{name}' has neither tap nor join")
        circuits = [
            tuple(self._name(section, member) for member in members)
            for section, part in self._sections()
            for members in part.circuits.values()
        ]
        attention = [
            tuple(name for name in axes if name in grouped and name.rpartition(".")[0] == section)
            for section, _ in self._sections()
        ]
        return Binding(
            self.family, axes, slots, taps, joins,
            circuits=tuple(c for c in circuits if all(member in axes for member in c)),
            attention=tuple(group for group in attention if group),
            depth=self.depth, uses=self._uses(dims),
        )  # fmt: skip

    def _sections(self) -> Iterator[tuple[str, Section]]:
        return ((name, section) for name, _, section in self.family.sections(self.depth))

    def _block(self, index: int) -> str:
        return self.family.block.path.format(l=index)

    def _match(self, name: str, tensor: Tensor) -> tuple[str, tuple[Dim, ...]]:
        found = self.family.block_index(name)
        if found:
            candidates = [(self._block(found[0]), found[1], self.family.block)]
        else:
            candidates = [(STEM, name, self.family.stem), (TAIL, name, self.family.tail)]
        matches = [
            (section, dims)
            for section, local, part in candidates
            for pattern, dims in part.parameters.items()
            if re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), local)
        ]
        if len(matches) != 1:
            how = "no pattern matches" if not matches else f"{len(matches)} patterns match"
            raise FusionError(f"{self.family.name}: {how} parameter '{name}' {list(tensor.shape)}")
        if len(matches[0][1]) != tensor.ndim:
            raise FusionError(
                f"{self.family.name}: '{name}' has {tensor.ndim} dimensions, the family says {len(matches[0][1])}"
            )
        return matches[0]

    def _uses(self, dims: Mapping[str, tuple[str, tuple[Dim, ...]]]) -> dict[str, tuple[str, ...]]:
        first: dict[int, str] = {}
        names: dict[str, dict[str, None]] = {section: {} for section, _ in self._sections()}
        for name, (section, _) in dims.items():
            names[section][first.setdefault(id(self.parameters[name]), name)] = None
        return {section: tuple(found) for section, found in names.items()}

    def _name(self, section: str, local: str) -> str:
        """The global name of an axis: `in` is what the section before leaves as `out`."""
        if local in self.family.fixed or "." in local:
            return local
        if local == "in" and section == TAIL:
            return f"{self._block(self.depth - 1)}.out"
        if local == "in" and section != STEM:
            found = self.family.block_index(f"{section}.in")
            assert found is not None
            return f"{self._block(found[0] - 1)}.out" if found[0] else f"{STEM}.out"
        return f"{section}.{local}"

    def _resolve(self, section: str, dims: tuple[Dim, ...]) -> _Resolved:
        return tuple(tuple(self._name(section, segment.axis) for segment in dim.segments) for dim in dims)

    def _grouped(self, dims: Mapping[str, tuple[str, tuple[Dim, ...]]]) -> Mapping[str, str]:
        return {
            self._name(section, segment.axis): segment.group
            for section, line in dims.values()
            for dim in line
            for segment in dim.segments
            if segment.group
        }

    def _axis(self, name: str, size: int, grouped: Mapping[str, str]) -> Axis:
        heads = self.groups[grouped[name]] if name in grouped else 1
        if size % heads:
            raise FusionError(f"axis '{name}': {size} units do not divide into {heads} heads")
        return Axis(name, size, heads, fixed=name in self.family.fixed)

    def _check_ties(self, resolved: Mapping[str, _Resolved]) -> None:
        first: dict[int, str] = {}
        for name, tensor in self.parameters.items():
            twin = first.setdefault(id(tensor), name)
            if resolved[twin] != resolved[name]:
                raise FusionError(
                    f"{self.family.name}: '{twin}' and '{name}' are one tied tensor on conflicting axes: "
                    f"{resolved[twin]} and {resolved[name]}"
                )

    def _sizes(self, resolved: Mapping[str, _Resolved]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        source: dict[str, str] = {}
        pending = [
            (name, position, axes, self.parameters[name].shape[position])
            for name, line in resolved.items()
            for position, axes in enumerate(line)
        ]

        def settle(axis: str, size: int, name: str) -> None:
            sizes[axis], source[axis] = size, name

        while pending:
            left = []
            for name, position, axes, size in pending:
                unknown = [axis for axis in axes if axis not in sizes]
                known = sum(sizes[axis] for axis in axes if axis in sizes)
                if len(unknown) == 1:
                    settle(unknown[0], size - known, name)
                elif unknown:
                    left.append((name, position, axes, size))
                elif known != size and axes:
                    raise FusionError(
                        f"'{name}': dimension {position} has {size} units, but "
                        + " + ".join(f"{axis} ({sizes[axis]}, from '{source[axis]}')" for axis in axes)
                        + f" make {known}"
                    )
                elif not axes and size != 1:
                    raise FusionError(f"'{name}': dimension {position} has {size} units, the family says 1")
            if len(left) == len(pending):
                name, position, axes, size = left[0]
                unknown = [axis for axis in axes if axis not in sizes]
                share, rest = divmod(size - sum(sizes.get(axis, 0) for axis in axes), len(unknown))
                if rest:
                    raise FusionError(f"'{name}': {size} units do not divide among {', '.join(axes)}")
                for axis in unknown:
                    settle(axis, share, name)
            pending = left
        return self._in_order(sizes, resolved)

    def _in_order(self, sizes: dict[str, int], resolved: Mapping[str, _Resolved]) -> dict[str, int]:
        """Axes section by section, and as the parameters name them inside a section; fixed axes first."""
        ranks = {section: rank for rank, (section, _) in enumerate(self._sections())}
        appearance = dict.fromkeys(axis for line in resolved.values() for axes in line for axis in axes)
        return {
            axis: sizes[axis] for axis in sorted(appearance, key=lambda name: ranks.get(name.rpartition(".")[0], -1))
        }

    def _slots(
        self,
        dims: Mapping[str, tuple[str, tuple[Dim, ...]]],
        resolved: Mapping[str, _Resolved],
        sizes: Mapping[str, int],
    ) -> Iterator[Slot]:
        seen: set[int] = set()
        for name, (section, line) in dims.items():
            if id(self.parameters[name]) in seen:
                continue
            seen.add(id(self.parameters[name]))
            reads = tuple(dim.reads for dim in line)
            cuts: list[tuple[tuple[slice, ...], tuple[str | None, ...]]] = [((), ())]
            for axes in resolved[name]:
                cuts = [
                    ((*index, units), (*names, axis)) for index, names in cuts for axis, units in _spans(axes, sizes)
                ]
            for index, names in cuts:
                yield Slot(name, index, names, reads, section)

    def _taps(self, slots: tuple[Slot, ...]) -> Iterator[Tap]:
        outputs = {(slot.parameter, axis): units for slot in slots
                   for axis, units, reads in zip(slot.axes, slot.index, slot.reads, strict=True)
                   if axis and not reads}  # fmt: skip
        for section, prefix, part in self.family.sections(self.depth):
            for local, place in part.taps.items():
                axis = self._name(section, local)
                inner = re.fullmatch(r"input\((.+)\)", place)
                target = prefix + (inner[1] if inner else place)
                if inner:
                    yield Tap(axis, target, "input", slice(None))
                elif target in self.parameters:
                    yield Tap(axis, target, "parameter", slice(None))
                elif (f"{target}.weight", axis) in outputs:
                    yield Tap(axis, target, "output", outputs[f"{target}.weight", axis])

    def _joins(self, sizes: Mapping[str, int]) -> Iterator[tuple[str, Join]]:
        for section, part in self._sections():
            for local, members in part.joins.items():
                skip, branch, *aside = (self._name(section, member) for member in members)
                for name in (skip, branch):
                    if name not in sizes:
                        raise FusionError(f"{self.family.name}: the model has no axis '{name}', which a join needs")
                yield self._name(section, local), Join(skip, branch, tuple(a for a in aside if a in sizes))


def _spans(axes: tuple[str, ...], sizes: Mapping[str, int]) -> Iterator[tuple[str | None, slice]]:
    if not axes:
        yield None, slice(None)
    start = 0
    for axis in axes:
        yield axis, slice(start, start + sizes[axis])
        start += sizes[axis]
