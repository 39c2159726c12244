"""A device that this machine has not: what belongs on one device is shown to stay there without a GPU.

PyTorch knows the device type `lazy`, and its wheels bring no kernels for it. Tensors on it are wrappers here: an
operation checks that it is given no tensor of the CPU beside them, as a GPU would, and computes on the CPU.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy")


class Wrapper(Tensor):
    """A tensor of the CPU that says it is on `DEVICE`."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "Wrapper":
        wrapper: Wrapper = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.shape, dtype=here.dtype, device=DEVICE,
            strides=here.stride(), storage_offset=here.storage_offset(),
        )  # fmt: skip
        wrapper.here = here
        return wrapper

    def __repr__(self, **_: Any) -> str:
        return f"on {DEVICE}: {self.here}"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


class PretendDevice(TorchDispatchMode):
    """Inside, tensors can be made on `DEVICE` and moved there and back.

    Args:
        float64: whether it has that type.
        memory: bytes that it has; None for enough of them, which aren't counted.
    """

    def __init__(self, *, float64: bool = True, memory: int | None = None) -> None:
        super().__init__()
        self.float64, self.memory, self.most = float64, memory, 0
        self._made: weakref.WeakValueDictionary[int, Wrapper] = weakref.WeakValueDictionary()

    @property
    def used(self) -> int:
        """Bytes of what is alive."""
        storages = [one.here.untyped_storage() for one in self._made.values()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = _run(operation, args, kwargs or {})
        if not self.float64 and any(
            isinstance(one, Wrapper) and one.dtype == torch.float64 for one in tree_leaves(found)
        ):
            raise TypeError(f"{DEVICE} has no float64")
        if self.memory is not None:
            self._count(found, self.memory)
        return found

    def _count(self, found: Any, memory: int) -> None:
        made = [one for one in tree_leaves(found) if isinstance(one, Wrapper)]
        self._made.update({id(one): one for one in made})
        self.most = max(self.most, self.used)
        if self.most > memory:
            asked = max(one.here.nbytes for one in made)
            raise torch.OutOfMemoryError(f"{DEVICE} out of memory. Tried to allocate {asked}.00 B. It has not.")


def _run(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    wrappers = [one for one in tensors if isinstance(one, Wrapper)]
    name = operation.__name__
    moves = "copy" in name
    if wrappers and not moves and any(one.ndim for one in tensors if not isinstance(one, Wrapper)):
        raise RuntimeError(f"{name}: tensors on {DEVICE} and on the CPU")
    if wrappers and name.startswith("native_layer_norm") and len({one.dtype for one in tensors}) > 1:
        raise RuntimeError(f"{name}: tensors of several types")  # the CPU takes them
    asked = kwargs.get("device")
    if not wrappers and (asked is None or torch.device(asked).type != DEVICE.type):
        return operation(*args, **kwargs)
    if name.startswith("copy_"):
        there = isinstance(args[0], Wrapper)
    else:
        there = bool(wrappers) if asked is None else torch.device(asked).type == DEVICE.type
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda one: one.here if isinstance(one, Wrapper) else one, (args, kwargs))
    in_place = {id(one.here): one for one in wrappers}

    def wrapped(found: Any) -> Any:
        if not isinstance(found, Tensor) or not there:
            return found
        return in_place[id(found)] if id(found) in in_place else Wrapper(found)

    return tree_map(wrapped, operation(*args, **kwargs))
