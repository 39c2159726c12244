"""Tensors in safetensors files: read one at a time, written one at a time."""

import json
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fusionpl.calibration.kept import bytes_of
from fusionpl.errors import FusionError, reason
from fusionpl.models.layouts import MODELS, Layout, pickle_hint

CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Entry(NamedTuple):
    """What a header says of a tensor."""

    file: Path
    shape: torch.Size
    dtype: torch.dtype


class Tensors(Mapping[str, Tensor]):
    """The tensors of a model folder, by name, in the types of the files; each is read when it is asked for.

    As in transformers, a single file comes before an index of shards; what no index names is not read.

    Args:
        folder: with model.safetensors, or an index and shards.
        allow_pickle: whether pytorch_model.bin is read where there are no safetensors, as tensors and nothing else; one
            that was written before PyTorch 1.6 is in memory as a whole.
        layouts: how the files are named, safetensors and pickles: a model's, or an adapter's.

    Attributes:
        entries: name -> what its file says of it.
        source: the single file, or the index.
        pickled: the tensors, where they come from a pickle.

    Raises:
        FusionError: there is no such file, or one is damaged.
    """

    def __init__(self, folder: Path, *, allow_pickle: bool = False, layouts: tuple[Layout, Layout] = MODELS) -> None:
        allowed = layouts if allow_pickle else layouts[:1]
        files = next((layout_files for layout in allowed if (layout_files := _files(folder, layout))), None)
        if files is None:
            raise FusionError(f"{folder} has no {layouts[0].whole}{_instead(folder, *layouts)}")
        self.source, shards = files
        self.entries: dict[str, Entry] = {}
        self.pickled: dict[str, Tensor] = {}
        for file, wanted in shards.items():
            held = self._unpickle(file) if file.suffix == ".bin" else self._header(file)
            missing = sorted(wanted - held.keys()) if wanted is not None else []
            if missing:
                raise FusionError(f"{file} lacks {missing[0]}, which {self.source.name} says it has; copy it again")
            self.entries |= {name: entry for name, entry in held.items() if wanted is None or name in wanted}

    def _header(self, file: Path) -> dict[str, Entry]:
        entries = {}
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # it is no dict
                    tensor = opened.get_tensor(name)  # mapped: nothing is read before it is touched
                    entries[name] = Entry(file, tensor.shape, tensor.dtype)
        except (SafetensorError, OSError) as error:
            raise FusionError(f"{file} is truncated or damaged ({reason(error)}); copy or train it again") from error
        return entries

    def _unpickle(self, file: Path) -> dict[str, Entry]:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except pickle.UnpicklingError as error:
            raise FusionError(
                f"{file} is damaged, or holds more than tensors, which is never read; convert it to safetensors where "
                "you trust it"
            ) from error
        except Exception as error:  # a damaged file raises whatever its parser does
            raise FusionError(f"{file} is truncated or damaged ({reason(error)}); copy or train it again") from error
        tensors = content if isinstance(content, Mapping) else {}
        held = {str(name): tensor.detach() for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        if not held:
            raise FusionError(f"{file} is no table of tensors; save model.state_dict() to it, better as safetensors")
        self.pickled |= held
        return {name: Entry(file, tensor.shape, tensor.dtype) for name, tensor in held.items()}

    def __getitem__(self, name: str) -> Tensor:
        """A copy of a tensor, so that no file stays mapped."""
        file = self.entries[name].file
        if name in self.pickled:
            return self.pickled[name].clone()
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name).clone()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def _files(folder: Path, layout: Layout) -> tuple[Path, dict[Path, set[str] | None]] | None:
    """The file or the index, and file -> the tensors that it is to give (None: all of them)."""
    whole, index = folder / layout.whole, folder / layout.index
    if whole.is_file():
        return whole, {whole: None}
    if not index.is_file():
        return None
    try:
        shards: dict[Path, set[str] | None] = {}
        for name, shard in json.loads(index.read_text())["weight_map"].items():
            wanted = shards.setdefault(folder / Path(shard).name, set())
            assert wanted is not None
            wanted.add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FusionError(f"{index} is damaged: {error!r}; copy it again") from error
    for file in shards:
        if not file.is_file():
            raise FusionError(f"{file} is missing, but {index.name} names it; copy or download it too")
    return index, shards


def _instead(folder: Path, safetensors: Layout, pickles: Layout) -> str:
    """What a folder has instead of safetensors."""
    names = sorted(file.name for file in folder.glob("*"))
    if safetensors.held(names):
        return f", and its shards have no {safetensors.index}; copy or download it too"
    if pickles.held(names):
        return f"; {pickle_hint(pickles.held(names)[0])}"
    others = [name for name in names if name.endswith((".bin", ".pth", ".pt", ".ckpt"))]
    return f"; {others[0]} is a pickle, which is never read" if others else ""


class TensorFile:
    """A safetensors file that is written tensor by tensor, in any order.

    Args:
        path: the file, which is made at its full size.
        layout: name -> shape and type of every tensor.
    """

    def __init__(self, path: Path, layout: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
        self.path, self._layout, self._starts = path, dict(layout), {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (shape, dtype) in self._layout.items():
            start, end = end, end + shape.numel() * dtype.itemsize
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self._starts[name] = start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self.missing = set(self._layout)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(self._data + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor of the shape that the layout says, in the type that it says."""
        shape, dtype = self._layout[name]
        assert tensor.shape == shape, name
        with self.path.open("r+b") as file:
            file.seek(self._data + self._starts[name])
            file.write(bytes_of(tensor.detach().to("cpu", dtype).contiguous()))
        self.missing.discard(name)

    def read(self, name: str) -> Tensor:
        """A tensor that was written."""
        shape, dtype = self._layout[name]
        tensor = torch.empty(shape, dtype=dtype)
        with self.path.open("rb") as file:
            file.seek(self._data + self._starts[name])
            file.readinto(bytes_of(tensor))
        return tensor
