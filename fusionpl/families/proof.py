"""The proof of a family: units may be renumbered at will, the function stays."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fusionpl.families.apply import aligned_state, load_parameters, own_state
from fusionpl.families.axes import Binding
from fusionpl.families.binding import bind
from fusionpl.transport import TransportMap, permutation


def random_permutations(binding: Binding, generator: torch.Generator) -> dict[str, TransportMap]:
    """A random permutation for every free axis that keeps the function of the network.

    Axes that a residual addition or a circuit ties move alike; heads move as wholes, with the units inside each
    head renumbered on their own.
    """

    def shuffle(n: int) -> Tensor:
        return torch.randperm(n, generator=generator)

    heads = {axis: group for group in binding.attention for axis in group}
    head_order = {group: shuffle(binding.axes[group[0]].heads) for group in binding.attention}
    orders: dict[str, Tensor] = {}
    maps = {}
    for name, root in binding.tied().items():
        axis = binding.axes[name]
        if root not in orders:
            if name in heads:
                width = axis.size // axis.heads
                units = torch.stack([shuffle(width) for _ in range(axis.heads)])
                order = head_order[heads[name]]
                orders[root] = (order[:, None] * width + units).flatten()
            else:
                orders[root] = shuffle(axis.size)
        maps[name] = permutation(orders[root])
    return maps


def permuted(model: nn.Module, generator: torch.Generator, binding: Binding | None = None) -> nn.Module:
    """A copy of `model` with every free axis renumbered at random: other weights, the same function."""
    binding = binding or bind(model)
    own = own_state(model)
    state = aligned_state(own, binding, own, binding, random_permutations(binding, generator))
    return load_parameters(copy.deepcopy(model), state)


def permutation_error(model: nn.Module, run: Callable[[nn.Module], Tensor], *, seed: int = 0) -> float:
    """Renumbers all free axes of `model` at random and returns the largest difference in `run(model)`.

    About 1e-6 in float32 when the family describes the architecture; anything of the size of the outputs when not.
    """
    with torch.inference_mode():
        before = run(model)
        after = run(permuted(model, torch.Generator().manual_seed(seed)))
    return float((before - after).abs().max())
