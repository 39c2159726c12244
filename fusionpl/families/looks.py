"""What of a model no parameter shows: how its norms normalise, and what reads its stream without one."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from fusionpl.families.axes import Binding
from fusionpl.families.family import TAIL, Norm, attribute

_SO = "so only permutations keep its function"


def looked_at(model: nn.Module, binding: Binding) -> Binding:
    """The binding of a model, with what its modules show: a family of LayerNorms describes RMSNorms as well.

    Returns:
        The same binding, or one whose family has the model's kind of norm, or a hindrance.
    """
    if binding.family.norm == "post":
        return binding
    offset = binding.family.offset
    kinds = {norm: _kind(module, width, offset) for norm, module, width in _read(model, binding)}
    known = {kind for kind in kinds.values() if kind is not None}
    if known == {"rms"}:
        binding = replace(binding, family=replace(binding.family, norm="rms"))
    return replace(binding, hindrance=next(_hindrances(model, binding, kinds), None))


def _read(model: nn.Module, binding: Binding) -> Iterator[tuple[str, nn.Module, int]]:
    """The norms that linear modules of the model read, with parameters or without, and their widths."""
    for section, prefix, part in binding.family.sections(binding.depths):
        for norm, readers in part.norms.items():
            there = [f"{prefix}{reader}" for reader in readers if f"{prefix}{reader}.weight" in binding.uses[section]]
            module = attribute(model, f"{prefix}{norm}")
            if there and isinstance(module, nn.Module) and not isinstance(module, nn.Identity):
                yield f"{prefix}{norm}", module, binding.axes[binding.reads(there[0])[0]].size


def _kind(norm: nn.Module, width: int, offset: int) -> Norm | str | None:
    """`pre` for what a LayerNorm does, `rms` for an RMSNorm, another name for what is neither; None if it can't be
    asked."""
    row = 1 + torch.arange(1.0, width + 1, device="cpu")[None]
    probe = copy.copy(norm)  # which calls nobody's hooks
    probe.__dict__ |= {"_forward_hooks": {}, "_forward_pre_hooks": {}}
    probe.__dict__["_parameters"] = {
        name: parameter
        if parameter is None
        else torch.full(parameter.shape, 1.0 - offset if name == "weight" else 0.0, device="cpu")
        for name, parameter in norm._parameters.items()
    }
    try:
        with torch.no_grad():
            output = probe(row)
    except Exception:  # whatever a module raises that wants more than its input
        return None
    centred = row - row.mean()
    ways: dict[str, Tensor] = {"pre": centred / centred.square().mean().sqrt(), "rms": row / row.square().mean().sqrt()}
    near = (name for name, way in ways.items() if torch.allclose(output, way, rtol=1e-2, atol=1e-2))
    return next(near, type(norm).__name__)


def _hindrances(model: nn.Module, binding: Binding, kinds: dict[str, Norm | str | None]) -> Iterator[str]:
    """Why the stream of a model has to keep its units."""
    wanted = binding.family.norm
    for path, values in binding.family.unitwise.items():
        if attribute(model, path) in values:
            yield f"{path} {attribute(model, path)} takes what leaves its stream unit by unit, {_SO}"
    for norm, kind in kinds.items():
        if kind not in (None, wanted):
            other = {"pre": "a LayerNorm", "rms": "an RMSNorm"}
            yield (
                f"'{norm}' is {other.get(str(kind), f'a {kind}')}, and not {other[wanted]} as "
                f"{'the others' if wanted in kinds.values() else f'{binding.family.name} says'}, {_SO}"
            )
    for section, prefix, part in binding.family.sections(binding.depths):
        for reader in dict.fromkeys(reader for readers in part.norms.values() for reader in readers):
            before = any(f"{prefix}{norm}" in kinds for norm, readers in part.norms.items() if reader in readers)
            if f"{prefix}{reader}.weight" in binding.uses[section] and not before and wanted == "pre":
                yield f"no norm stands before '{prefix}{reader}', which reads the mean of its stream, {_SO}"
    if not binding.uses[TAIL]:
        yield f"no norm stands behind its last block, which gives what it puts out unit by unit, {_SO}"
