"""Sees what passes through the modules of a model while it runs."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from fusionpl.families.axes import Binding, Tap

_CHUNKS = "chunk_size_feed_forward"  # of the blocks of transformers' BERT and its relatives


class Place(NamedTuple):
    """The input or the output of a module, by its path."""

    module: str
    side: Literal["input", "output"]


class Reached(Exception):  # noqa: N818  # a signal, not an error
    """The part of a forward pass that is needed is over."""


@contextlib.contextmanager
def captured(
    model: nn.Module, places: Iterable[Place], *, stop: bool = False, gradients: bool = False
) -> Iterator[dict[Place, Tensor]]:
    """Hooks `model` so that each forward pass leaves what passes at `places` in the yielded dict.

    Args:
        model: whose modules the places name.
        places: where to look.
        stop: end the forward pass, and the `with` block, behind the last place.
        gradients: keep the graph.
    """
    wanted = set(places)
    seen: dict[Place, Tensor] = {}

    def keep(place: Place, tensor: Tensor) -> None:
        seen[place] = tensor if gradients else tensor.detach()
        if stop and len(seen) == len(wanted):
            raise Reached

    def hook(place: Place) -> Any:
        module = model.get_submodule(place.module)
        if place.side == "input":
            return module.register_forward_pre_hook(lambda _, args: keep(place, args[0]))
        return module.register_forward_hook(lambda _, args, output: keep(place, output))

    with contextlib.ExitStack() as stack:
        for place in wanted:
            stack.callback(hook(place).remove)
            _run_at_once(model, place, stack)
        try:
            yield seen
        except Reached as reached:
            if not stop:
                raise
            reached.with_traceback(None)  # its frames hold a block's parameters, and stand in a cycle since Python 3.12


def _run_at_once(model: nn.Module, place: Place, stack: contextlib.ExitStack) -> None:
    """Keeps the blocks around a place from taking their tokens in chunks, of which only the last would be seen."""
    path = place.module.split(".")
    for owner in (model.get_submodule(".".join(path[:length])) for length in range(len(path))):
        if size := getattr(owner, _CHUNKS, 0):
            setattr(owner, _CHUNKS, 0)
            stack.callback(setattr, owner, _CHUNKS, size)


@contextlib.contextmanager
def recorded(
    model: nn.Module, binding: Binding, axes: Iterable[str], *, gradients: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Fills the yielded dict, when the `with` block ends, with the activations of `axes` in the last forward pass.

    Axes whose tap is a parameter are not recorded: see `parameter_units`.

    Yields:
        axis -> [B, T, n], [B, n] or, from a convolution, [B, n, h, w]; on the model's device, without their graph
        unless `gradients` are wanted.
    """
    taps = [tap for axis in axes if (tap := binding.taps[axis]).kind != "parameter"]
    activations: dict[str, Tensor] = {}
    with captured(model, map(place_of, taps), gradients=gradients) as seen:
        yield activations
    activations.update({tap.axis: units_of(seen, tap) for tap in taps})


def place_of(tap: Tap) -> Place:
    """Where the activations of a tap that is no parameter pass."""
    return Place(tap.target, "input" if tap.kind == "input" else "output")


def units_of(seen: dict[Place, Tensor], tap: Tap) -> Tensor:
    """The units of a tap in what passed at its place."""
    tensor = seen[place_of(tap)]
    return tensor[:, tap.units] if tensor.ndim == 4 else tensor[..., tap.units]


def parameter_units(parameter: Tensor, tap: Tap) -> Tensor:
    """The values of a tapped parameter as rows: [rows, n], one row a position or token."""
    return parameter.detach().reshape(-1, parameter.shape[-1])[:, tap.units]
