"""Keeps tensors between the sections of a sweep: in memory up to a budget, beyond it in an unnamed temporary file."""

import os
import tempfile
from collections import defaultdict
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fusionpl.errors import FusionError

GIB = 2**30
_SHARE = 0.25  # of the free memory, by default
_KINDS = 2  # activations, maps

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can be allocated on a device; on the CPU within the limit of the process's control group."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        table = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(table["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # no Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
            free = min(free, int(limit) - used)
    except (OSError, KeyError):  # no control group of version 2
        pass
    return max(free, 0)


def budget(gibibytes: float | None, device: torch.device | str = "cpu") -> int:
    """Bytes that kept activations, and kept maps, may take in this process.

    Args:
        gibibytes: of both together; None for a quarter of what is free, shared by the processes here.
        device: where they are.
    """
    if gibibytes is not None:
        return int(gibibytes * GIB) // _KINDS
    return int(_SHARE * free_memory(device)) // _KINDS // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class Kept:
    """Tensors, alone or inside tuples, lists and dicts, by key; they come back on the device that they came from.

    What exceeds the budget is written to one temporary file that has no name: whatever ends the process, the system
    takes it back. It is read and written, not mapped: mapped pages would count as the process's memory. $TMPDIR says
    where it lies.

    Args:
        limit: bytes that may stay in memory.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = self.spilled = 0
        self._entries: dict[Hashable, tuple[list[Any], TreeSpec]] = {}
        self._free: dict[int, list[int]] = defaultdict(list)  # size -> where the file has room for it
        self._file: IO[bytes] | None = None

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._entries)

    def __setitem__(self, key: Hashable, value: Any) -> None:
        """Keeps `value`; one that replaces another of the same sizes takes its place.

        Raises:
            FusionError: there is no room for the temporary file.
        """
        leaves, spec = tree_flatten(value)
        if key in self:
            del self[key]
        seen: dict[int, Any] = {}  # one tensor may be in several places
        for leaf in leaves:
            if id(leaf) not in seen:
                seen[id(leaf)] = self._keep(leaf.detach()) if isinstance(leaf, Tensor) else leaf
        self._entries[key] = [seen[id(leaf)] for leaf in leaves], spec

    def __delitem__(self, key: Hashable) -> None:
        """Forgets an entry; what comes later and has its sizes takes its place in the file."""
        for entry in {id(leaf): leaf for leaf in self._entries.pop(key)[0]}.values():
            if isinstance(entry, Tensor):
                self.used -= _bytes(entry)
            elif isinstance(entry, _Spilled):
                self._free[entry.size].append(entry.start)

    def __getitem__(self, key: Hashable) -> Any:
        leaves, spec = self._entries[key]
        read = {id(leaf): self._read(leaf) for leaf in leaves if isinstance(leaf, _Spilled)}
        return tree_unflatten([read.get(id(leaf), leaf) for leaf in leaves], spec)

    def _keep(self, tensor: Tensor) -> "Tensor | _Spilled":
        size = _bytes(tensor)
        if self.used + size <= self.limit:
            self.used += size
            # A view would hold the whole tensor that it is a part of.
            return tensor.clone() if tensor.untyped_storage().nbytes() > size else tensor
        start = self._free[size].pop() if self._free[size] else self.spilled
        spilled = _Spilled(start, size, tensor.shape, tensor.dtype, tensor.device)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as this object
            self._file.seek(start)
            self._file.write(bytes_of(tensor.cpu().contiguous()))
            self._file.flush()
        except OSError as error:
            raise FusionError(
                f"no room in {tempfile.gettempdir()} for {(start + size) / GIB:.1f} GiB of kept activations "
                f"({error.strerror}); set TMPDIR to a folder with more, or lower calibration.samples"
            ) from error
        self.spilled = max(self.spilled, start + size)
        return spilled

    def _read(self, place: "_Spilled") -> Tensor:
        assert self._file is not None
        tensor = torch.empty(place.shape, dtype=place.dtype)
        self._file.seek(place.start)
        self._file.readinto(bytes_of(tensor))  # type: ignore[attr-defined]
        return tensor.to(place.device)


class Store(Generic[K, V]):
    """Values of one kind among what is kept.

    Args:
        kept: where they are.
        name: tells them from others there; a store of the same name holds the same.
    """

    def __init__(self, kept: Kept, name: Hashable) -> None:
        self._kept, self._name = kept, name

    def __setitem__(self, key: K, value: V) -> None:
        """Keeps a value; see `Kept`."""
        self._kept[self._name, key] = value

    def __getitem__(self, key: K) -> V:
        value: V = self._kept[self._name, key]
        return value

    def __delitem__(self, key: K) -> None:
        del self._kept[self._name, key]

    def __contains__(self, key: K) -> bool:
        return (self._name, key) in self._kept

    def clear(self) -> None:
        """Forgets all values of this kind."""
        for key in [key for key in self._kept if isinstance(key, tuple) and key[0] == self._name]:
            del self._kept[key]


class _Spilled:
    """Where a tensor lies in the file."""

    def __init__(self, start: int, size: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.start, self.size, self.shape, self.dtype, self.device = start, size, shape, dtype, device


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor of the CPU, to be written to a file or read into."""
    buffer: Any = tensor.flatten().view(torch.uint8).numpy()
    return memoryview(buffer)
