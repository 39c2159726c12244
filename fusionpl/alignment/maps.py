"""The maps of a parent, kept as they are found."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusionpl.calibration.kept import Kept, bytes_of
from fusionpl.errors import FusionError
from fusionpl.transport.maps import TransportMap

Pair = tuple[str, str]
Found = Mapping[str | Pair, TransportMap]


class Plans:
    """Transport plans, in memory up to the budget of `kept` and beyond it in its file; equal ones are kept once.

    Args:
        kept: where they are.
    """

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    def keep(self, plan: Tensor) -> bytes:
        """Keeps a plan and returns the key by which it is read again."""
        key = hashlib.blake2b(bytes_of(plan.cpu().contiguous()), digest_size=16, key=repr(plan.shape).encode()).digest()
        if key not in self._kept:
            self._kept[key] = plan
        return key

    def __getitem__(self, key: bytes) -> Tensor:
        plan: Tensor = self._kept[key]
        return plan


@dataclass(frozen=True)
class _Entry:
    bare: TransportMap  # without its plan
    shape: torch.Size
    key: bytes


class Maps(Mapping[str, TransportMap]):
    """Axis -> map, of one parent. They never change: `joined` gives them with more.

    Args:
        plans: where the plans are.

    Attributes:
        joint: for `align.qk joint`, (q, k) -> one map over the units of both.
    """

    def __init__(self, plans: Plans) -> None:
        self._plans = plans
        self._entries: Mapping[str, _Entry] = {}
        self.joint: Mapping[Pair, TransportMap] = {}

    def __getitem__(self, axis: str) -> TransportMap:
        if axis not in self._entries:
            raise FusionError(
                f"no map was found for axis '{axis}', which would not move with the rest; this is a mistake of "
                "fusionpl or of the family file"
            )
        entry = self._entries[axis]
        return replace(entry.bare, plan=self._plans[entry.key])

    def __contains__(self, axis: object) -> bool:
        return axis in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def joined(self, found: Found) -> "Maps":
        """These maps and those that were found."""
        keys = {
            id(transport.plan): self._plans.keep(transport.plan)
            for axis, transport in found.items()
            if isinstance(axis, str)
        }
        more = Maps(self._plans)
        more._entries = dict(self._entries) | {
            axis: _Entry(replace(transport, plan=torch.empty(0)), transport.plan.shape, keys[id(transport.plan)])
            for axis, transport in found.items()
            if isinstance(axis, str)
        }
        more.joint = dict(self.joint) | {
            axis: transport for axis, transport in found.items() if isinstance(axis, tuple)
        }
        return more

    def shape(self, axis: str) -> torch.Size:
        """The size of an axis' plan, which is not read."""
        return self._entries[axis].shape

    def unconverged(self) -> dict[str, TransportMap]:
        """The maps whose solver did not reach its optimum, without their plans."""
        return {axis: entry.bare for axis, entry in self._entries.items() if not entry.bare.converged}
