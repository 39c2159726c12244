"""The maps of a parent, kept as they are found."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from fusionpl.calibration.kept import Kept
from fusionpl.transport.maps import TransportMap

Pair = tuple[str, str]


class Maps(Mapping[str, TransportMap]):
    """Axis -> map. Plans beyond the budget of `kept` are read from its file each time; one that several axes share is
    kept once.

    Args:
        kept: where plans are kept.
        owner: tells them from those of other parents.
    """

    def __init__(self, kept: Kept, owner: object) -> None:
        self._kept, self._owner = kept, owner
        self._found: dict[str, tuple[TransportMap, torch.Size, int]] = {}
        self._count = 0

    def __getitem__(self, axis: str) -> TransportMap:
        bare, _, number = self._found[axis]
        return replace(bare, plan=self._kept[self._owner, number])

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def give(self, axes: Iterable[str], found: TransportMap) -> None:
        """Gives all `axes` one map."""
        self._kept[self._owner, self._count] = found.plan
        bare = replace(found, plan=torch.empty(0))
        self._found |= dict.fromkeys(axes, (bare, found.plan.shape, self._count))
        self._count += 1

    def share(self, axis: str, other: str) -> None:
        """Gives `axis` the map of another."""
        self._found[axis] = self._found[other]

    def shape(self, axis: str) -> torch.Size:
        """The size of an axis' plan, which is not read."""
        return self._found[axis][1]

    def unconverged(self) -> dict[str, TransportMap]:
        """The maps whose solver did not reach its optimum, without their plans."""
        return {axis: bare for axis, (bare, _, _) in self._found.items() if not bare.converged}

    def forget_all_but(self, axes: Collection[str]) -> None:
        """Forgets the maps of all other axes, and the plans that none needs any longer."""
        self._found = {axis: one for axis, one in self._found.items() if axis in axes}
        needed = {number for *_, number in self._found.values()}
        for number in range(self._count):
            if number not in needed and (self._owner, number) in self._kept:
                del self._kept[self._owner, number]


@dataclass
class Alignment:
    """The maps of one parent: by axis, and, for `align.qk: joint`, by (q, k) over the units of both."""

    maps: Maps
    joint: dict[Pair, TransportMap] = field(default_factory=dict)
