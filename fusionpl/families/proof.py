"""The proof of a family: what its axes allow may be done to the units at will, the function stays."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fusionpl.families.apply import aligned_state, load_parameters, own_state
from fusionpl.families.axes import Axis, Binding
from fusionpl.families.binding import bind
from fusionpl.families.canonical import unrotatable
from fusionpl.families.family import Family
from fusionpl.transport.maps import TransportMap, permutation

PROOF_TOLERANCE = 1e-3  # as a share of the outputs


def random_permutations(binding: Binding, generator: torch.Generator) -> dict[str, TransportMap]:
    """A random map for every free axis that keeps the function of the network: a permutation wherever one does.

    Axes that a residual addition or a circuit ties move alike; heads move as wholes, queries with their key-value head,
    and inside each head its units are renumbered. Frequency pairs of rotary heads stay where they are: each is rotated
    and scaled, or, behind a norm with gains, may change its sign. What a gate multiplies is scaled and signed.
    """
    orders: dict[str, Tensor] = {}
    maps: dict[str, TransportMap] = {}
    in_heads = {axis for group in binding.attention for axis in group}
    for group in binding.attention:
        first = binding.axes[group[0]]
        order = orders.get(first.order or "", torch.randperm(first.groups, generator=generator))
        if first.order:
            orders[first.order] = order
        maps |= _of_heads(binding, group, order, generator)
    for name, root in binding.tied().items():
        if name not in in_heads:
            if root not in orders:
                orders[root] = torch.randperm(binding.axes[name].size, generator=generator)
            maps[name] = permutation(orders[root])
            if binding.axes[name].kind == "scale":
                maps[name] = _scaled(maps[name], generator)
    return {name: maps[name] for name in binding.free}


def _of_heads(
    binding: Binding, group: Sequence[str], order: Tensor, generator: torch.Generator
) -> dict[str, TransportMap]:
    axes = [binding.axes[name] for name in group]
    groups, members = axes[0].groups, max(axis.members for axis in axes)
    inside = torch.stack([torch.randperm(members, generator=generator) for _ in range(groups)])
    heads = {1: order, members: (order[:, None] * members + inside).flatten()}
    tied = binding.tied()
    blocks: dict[str, list[list[Tensor]]] = {}  # for each group, what becomes of the units of its heads
    maps = {}
    for axis in axes:
        root = tied[axis.repeats or axis.name]
        first = root not in blocks
        if first:
            blocks[root] = [_inside(axis, generator) for _ in range(groups)]
        plan = torch.zeros(axis.heads, axis.width, axis.heads, axis.width, dtype=torch.float64)
        for new, old in enumerate(heads[axis.members].tolist()):
            turn, scale = blocks[root][new // axis.members]
            if axis.kind == "signs":  # norms undo the scale of each head
                scale = torch.full_like(scale, _scale(generator))
            elif not first and not axis.repeats:
                scale = 1 / scale
            plan[old, :, new] = turn * scale
        maps[axis.name] = TransportMap(plan.view(axis.size, axis.size), "random", "orthogonal")
    return maps


def _inside(axis: Axis, generator: torch.Generator) -> list[Tensor]:
    """An orthogonal map between the units of a head, and a scale for each of them."""
    turn, scale = torch.zeros(axis.width, axis.width, dtype=torch.float64), torch.ones(axis.width, dtype=torch.float64)
    for first in range(axis.pairs):
        pair = torch.tensor([first, first + axis.pairs])
        angle = 2 * torch.pi * torch.rand((), generator=generator, dtype=torch.float64)
        if axis.kind == "signs":
            angle = torch.pi * torch.randint(2, (), generator=generator)
        c, s = angle.cos(), angle.sin()
        turn[pair[:, None], pair] = torch.stack([torch.stack([c, s]), torch.stack([-s, c])]).double()
        scale[pair] = _scale(generator)
    rest = torch.arange(2 * axis.pairs, axis.width)
    turn[rest[torch.randperm(len(rest), generator=generator)], rest] = 1
    return [turn, scale]


def _scaled(transport: TransportMap, generator: torch.Generator) -> TransportMap:
    n = len(transport.plan)
    sizes = torch.tensor([_scale(generator) for _ in range(n)], dtype=torch.float64)
    signs = 1 - 2 * torch.randint(2, (n,), generator=generator)
    return replace(transport, plan=transport.plan * signs, sizes=(sizes, torch.ones_like(sizes)))


def _scale(generator: torch.Generator) -> float:
    return 0.5 + 1.5 * float(torch.rand((), generator=generator))


def permuted(model: nn.Module, generator: torch.Generator, binding: Binding | None = None) -> nn.Module:
    """A copy of `model` with every free axis renumbered at random, or moved as far as its family allows: other weights,
    the same function."""
    binding = binding or bind(model)
    own = own_state(model)
    state = aligned_state(own, binding, own, binding, random_permutations(binding, generator))
    return load_parameters(copy.deepcopy(model), state)


def permutation_error(
    model: nn.Module, run: Callable[[nn.Module], Tensor], *, seed: int = 0, family: Family | None = None
) -> float:
    """Renumbers all free axes of `model` at random and returns the largest difference in `run(model)`.

    About 1e-6 in float32 when the family describes the architecture; anything of the size of the outputs when not.
    """
    with torch.inference_mode():
        before = run(model)
        after = run(permuted(model, torch.Generator().manual_seed(seed), bind(model, family)))
    return float((before - after).abs().max())


def changed_a_little(model: nn.Module) -> nn.Module:
    """A copy with other weights: biases of zero and gains of one, as before training, hide mistakes."""
    generator, model = torch.Generator().manual_seed(0), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * (0.1 * spread if spread > 0 else 0.1))
    return model


def allowed(binding: Binding) -> str:
    """A table of the maps that keep the function: axis -> kind of map, the same axis of all blocks in one line."""
    streams = {axis for members in binding.streams() for axis in members}
    stream = "permutation, one for all" + (
        "" if unrotatable(binding) else "; rotation, once norms are folded into their readers"
    )
    several = len(binding.streams()) > 1
    rows: dict[str, str] = {}
    for name in binding.free:
        section, _, local = name.rpartition(".")
        shown = name
        if section in binding.blocks:
            shown = f"{binding.family.stacks[binding.stack_of[section]].block.path.format(l='*')}.{local}"
        axis = binding.axes[name]
        if name in streams:
            rows["each stream" if several else "the stream"] = stream
        elif axis.kind == "scale":
            rows[shown] = f"as its gate, {binding.gates[name].rpartition('.')[2]}; scale and sign"
        elif axis.heads > 1 or any(name in group for group in binding.attention):
            rows[shown] = _summary(axis)
        else:
            rows[shown] = "permutation"
    width = max(map(len, rows))
    return "\n".join(f"{axis.ljust(width)}  {kind}" for axis, kind in rows.items())


def _summary(axis: Axis) -> str:
    heads = f"{axis.heads} heads" if axis.members == 1 else f"{axis.groups} groups of {axis.members} heads"
    if axis.repeats:
        return f"{heads}, as {axis.repeats.rpartition('.')[2]}"
    rest = axis.width - 2 * axis.pairs
    kinds = {
        "permutation": f"permutation or rotation of {axis.width} units",
        "pairs": f"rotation and scale of {axis.pairs} frequency pairs"
        + (f", permutation of {rest} units" * (rest > 0)),
        "signs": f"signs of {axis.pairs} frequency pairs, scale",
    }
    return f"permutation of {heads} x {kinds[axis.kind]}"
