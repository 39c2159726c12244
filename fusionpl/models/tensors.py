"""Tensors in safetensors files: read one at a time, written one at a time."""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fusionpl.calibration import bytes_of
from fusionpl.errors import FusionError

CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Entry(NamedTuple):
    """What a header says of a tensor."""

    file: Path
    shape: torch.Size
    dtype: torch.dtype


WHOLE = "model.safetensors"
INDEX = f"{WHOLE}.index.json"


class Tensors(Mapping[str, Tensor]):
    """The tensors of a model folder, by name; each is read when it is asked for.

    Args:
        folder: with model.safetensors, or with its shards and their index.

    Raises:
        FusionError: there is no such file, or one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.entries: dict[str, Entry] = {}
        for file in _files(folder):
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  # it is no dict
                        tensor = opened.get_tensor(name)  # mapped: nothing is read before it is touched
                        self.entries[name] = Entry(file, tensor.shape, tensor.dtype)
            except (SafetensorError, OSError) as error:
                raise FusionError(f"{file} is truncated or damaged ({error}); copy or train it again") from error

    def __getitem__(self, name: str) -> Tensor:
        """A copy of a tensor, so that no file stays mapped."""
        with safe_open(self.entries[name].file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name).clone()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def _files(folder: Path) -> list[Path]:
    """Those that transformers reads: variants and older shards may lie beside them."""
    if (folder / WHOLE).exists():
        return [folder / WHOLE]
    index = folder / INDEX
    if not index.exists():
        others = (file for suffix in ("bin", "pth", "pt", "ckpt") for file in folder.glob(f"*.{suffix}"))
        pickles = sorted(file.name for file in others)
        note = f"; {pickles[0]} is a pickle, which is never read" if pickles else ""
        raise FusionError(f"{folder} has no {WHOLE}{note}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FusionError(f"{index} is damaged: {error}") from error
    for name in names:
        if not (folder / name).exists():
            raise FusionError(f"{folder / name} is missing, but {INDEX} names it; copy or train the model again")
    return [folder / name for name in names]


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
