"""The canonical form of a pre-LN network: the same function, written so that its residual stream may be rotated."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fusionpl.errors import FusionError
from fusionpl.families.binding import Binding, Slot


def canonical(model: nn.Module, binding: Binding, name: str = "the model") -> nn.Module:
    """A copy of `model` with the same function, whose stream commutes with rotations that fix the ones vector.

    Norms have gamma 1 and beta 0 (both folded into the linear maps that read them), LayerScale is 1 (folded into the
    map before it), everything written to the stream has mean zero over the units, so that LayerNorm equals RMSNorm,
    and in each attention head the circuits QK and VO are split evenly: what is left to choose inside a head is one
    orthogonal map a circuit.

    Source: the folding is that of Ashkboos et al., "SliceGPT", ICLR 2024 (arXiv 2401.15024), section 3.

    Raises:
        FusionError: a post-LN family; a norm inside the stream; a shift with no bias to take it. Names the tensor.
    """
    if binding.family.norm == "post":
        raise FusionError(
            f"{name}: {binding.family.name} is post-LN, its norms scale the stream unit by unit, so only permutations "
            "keep its function; use align.stream transport with align.residual tie and align.solver assignment"
        )
    model = copy.deepcopy(without_scales(model, binding))
    with torch.no_grad():
        for _, prefix, section in binding.family.sections(binding.depth):
            for norm, readers in section.norms.items():
                _fold_norm(model, prefix + norm, [prefix + reader for reader in readers], name)
        parameters = dict(model.named_parameters())
        elementwise = {
            prefix + module
            for _, prefix, section in binding.family.sections(binding.depth)
            for module in (*section.norms, *section.scales)
        }
        stream = {axis for members in binding.streams() for axis in members}
        for slot in binding.slots:
            if slot.parameter.rpartition(".")[0] not in elementwise:
                for dim, (axis, reads) in enumerate(zip(slot.axes, slot.reads, strict=True)):
                    if axis in stream and not reads:
                        tensor = slot.of(parameters[slot.parameter])
                        tensor -= tensor.double().mean(dim, keepdim=True).to(tensor)
        for group in binding.attention:
            _balance(binding, group, parameters)
    return model


def without_scales(model: nn.Module, binding: Binding) -> nn.Module:
    """The same function with every LayerScale at 1, folded into the map before it; a copy if there are any."""
    places = [
        (prefix + scale, prefix + writer)
        for _, prefix, section in binding.family.sections(binding.depth)
        for scale, writer in section.scales.items()
        if hasattr(_module(model, prefix + scale), "gamma")
    ]
    if not places:
        return model
    model = copy.deepcopy(model)
    with torch.no_grad():
        for scale, writer in places:
            gamma = model.get_parameter(f"{scale}.gamma")
            for tensor in model.get_submodule(writer).parameters(recurse=False):
                tensor.mul_(gamma.view(-1, *[1] * (tensor.ndim - 1)))
            gamma.fill_(1)
    return model


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _fold_norm(model: nn.Module, path: str, readers: list[str], name: str) -> None:
    norm = _module(model, path)
    gamma, beta = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if gamma is None:
        return
    if not readers:
        raise FusionError(f"{name}: '{path}' normalises inside the stream, which can't be rotated; use "
                          "align.stream transport")  # fmt: skip
    for reader in (model.get_submodule(path) for path in readers if _module(model, path) is not None):
        weight, bias = reader.get_parameter("weight"), getattr(reader, "bias", None)
        if beta is not None and bool(beta.any()):
            if bias is None:
                raise FusionError(f"{name}: '{path}.bias' has no bias of the map behind it to be folded into; use "
                                  "align.stream transport")  # fmt: skip
            bias += (weight.double() @ beta.double()).to(bias)
        weight.mul_(gamma)
    gamma.fill_(1)
    if beta is not None:
        beta.zero_()


def _balance(binding: Binding, group: tuple[str, ...], parameters: Mapping[str, Tensor]) -> None:
    """Splits each head's products Q^T K and V^T O as U sqrt(S) and sqrt(S) V: the norms of both factors agree."""
    circuit = next((circuit for circuit in binding.circuits if circuit[0] in group), None)
    pairs = [(_rows(binding, axis, reads=False), _rows(binding, axis, reads=True))
             for axis in group if circuit is None or axis not in circuit]  # fmt: skip
    if circuit is not None:
        pairs.append((_rows(binding, circuit[0], reads=False), _rows(binding, circuit[1], reads=False)))
    axis = binding.axes[group[0]]
    for first, second in pairs:
        a, b = (torch.cat([_matrix(slot, at, parameters) for slot, at in side], dim=1) for side in (first, second))
        split = [_split(p, q) for p, q in zip(a.chunk(axis.heads, dim=0), b.chunk(axis.heads, dim=0), strict=True)]
        for side, matrix in zip((first, second), map(torch.cat, zip(*split, strict=True)), strict=True):
            widths = [_matrix(slot, at, parameters).shape[1] for slot, at in side]
            for (slot, at), part in zip(side, matrix.split(widths, dim=1), strict=True):
                target = slot.of(parameters[slot.parameter]).movedim(at, 0)
                target.copy_(part.view_as(target))


def _rows(binding: Binding, axis: str, *, reads: bool) -> list[tuple[Slot, int]]:
    """The slots that write (or read) `axis`, and the dimension that it is."""
    return [
        (slot, at)
        for slot in binding.slots
        for at, (name, read) in enumerate(zip(slot.axes, slot.reads, strict=True))
        if name == axis and read == reads
    ]


def _matrix(slot: Slot, at: int, parameters: Mapping[str, Tensor]) -> Tensor:
    """[units, rest] of dimension `at` of a slot, float64."""
    tensor = slot.of(parameters[slot.parameter]).detach().double().movedim(at, 0)
    return tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]


def _split(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors [r, n] and [r, m] of a^T b with equal Gram matrices."""
    qa, ra = torch.linalg.qr(a.T)
    qb, rb = torch.linalg.qr(b.T)
    u, s, vt = torch.linalg.svd(ra @ rb.T, full_matrices=False)
    # What is below the rounding of float32 weights would grow with the square root.
    root = torch.where(s > 1e-6 * s[0], s, 0).sqrt()[:, None]
    missing = (0, 0, 0, len(a) - len(s))  # a head wider than the stream has units to spare
    first, second = root * (qa @ u).T, root * (qb @ vt.T).T
    return nn.functional.pad(first, missing), nn.functional.pad(second, missing)
