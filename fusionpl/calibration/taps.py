"""Records the activations of named axes while a model runs."""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from fusionpl.families import Binding, Tap

Activations = dict[str, Tensor]


@contextlib.contextmanager
def recorded(
    model: nn.Module, binding: Binding, axes: Iterable[str], *, gradients: bool = False
) -> Iterator[Activations]:
    """Hooks `model` so that each forward pass leaves the activations of `axes` in the yielded dict.

    Only the latest batch is held, without its graph unless `gradients` are wanted. Axes whose tap is a parameter are
    not recorded: see `parameter_units`.

    Yields:
        axis -> [B, T, n], [B, n] or, from a convolution, [B, n, h, w]; on the model's device.
    """
    places: dict[tuple[str, str], list[Tap]] = defaultdict(list)
    for axis in axes:
        tap = binding.taps[axis]
        if tap.kind != "parameter":
            places[tap.target, tap.kind].append(tap)
    seen: Activations = {}

    def keep(taps: list[Tap], tensor: Tensor) -> None:
        for tap in taps:
            index = (slice(None), tap.units) if tensor.ndim == 4 else (..., tap.units)
            seen[tap.axis] = (tensor if gradients else tensor.detach())[index]

    def on_input(taps: list[Tap]) -> Any:
        return lambda module, args: keep(taps, args[0])

    def on_output(taps: list[Tap]) -> Any:
        return lambda module, args, output: keep(taps, output)

    with contextlib.ExitStack() as stack:
        for (target, kind), taps in places.items():
            module = model.get_submodule(target)
            hook = (
                module.register_forward_pre_hook(on_input(taps))
                if kind == "input"
                else module.register_forward_hook(on_output(taps))
            )
            stack.callback(hook.remove)
        yield seen


def parameter_units(model: nn.Module, tap: Tap) -> Tensor:
    """The values of a tapped parameter as rows: [rows, n], one row a position or token."""
    return model.get_parameter(tap.target).detach().flatten(0, -2)
