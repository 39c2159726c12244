"""The canonical form of a pre-norm network: the same function, written so that its residual stream may be rotated.

It is made section by section: nothing that it folds or splits reaches beyond one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from fusionpl.errors import FusionError
from fusionpl.families.apply import State, in_float32
from fusionpl.families.axes import Binding, Slot
from fusionpl.families.family import Section


def unrotatable(binding: Binding) -> str | None:
    """Why the residual stream of a model may not be rotated; None where it may.

    Its family is post-LN, it has no head behind its last norm, or see `inseparable`.
    """
    if binding.family.norm == "post":
        return (
            f"{binding.family.name} is post-LN, its norms scale the stream unit by unit, so only permutations keep its "
            "function"
        )
    if binding.last_norms:
        return (
            f"'{next(iter(binding.last_norms))}' gives what an encoder without a head puts out, unit by unit, so only "
            "permutations keep its function"
        )
    return inseparable(binding)


def inseparable(binding: Binding) -> str | None:
    """Why the residual stream of a model may not be put into one with those of others; None where it may.

    Its embedding is tied to its decoder, a norm, which is named, stands inside a pre-LN stream, none ends the
    embeddings of a post-LN model, or its modules show another hindrance.
    """
    if binding.hindrance:
        return binding.hindrance
    if binding.family.norm == "post" and binding.end_norm(binding.sections[0]) is None:
        return f"no norm stands behind the embeddings of {binding.family.name}, whose blocks have theirs in the stream"
    if binding.closed:
        return (
            f"'{next(iter(binding.closed))}' stands at both ends of the stream, so the gain of the last norm can't be "
            "folded into the decoder, and only permutations keep the function"
        )
    for section, prefix, part in binding.family.sections(binding.depths):
        for norm, readers in part.norms.items():
            if not readers and f"{prefix}{norm}.weight" in binding.uses[section]:
                return f"'{prefix}{norm}' normalises inside the stream, which can't be rotated"
    return None


def canonical(state: Mapping[str, Tensor], binding: Binding, section: str, name: str = "the model") -> State:
    """The parameters of a section with the same function, whose stream commutes with rotations: with all of them where
    norms are RMSNorms, with those that fix the ones vector where they are LayerNorms.

    Norms multiply by 1 and add 0 (both folded into the linear maps that read them; beta stays where one of these has no
    bias), LayerScale is 1 (folded into the
    map before it), what is written to the stream has mean zero over the units, so that LayerNorm equals RMSNorm, and in
    each attention head the circuits QK and VO are split evenly: what is left to choose inside a head is one orthogonal
    map a circuit. Rotary queries and keys are not split: what they allow, `alignment.grouped` settles.

    Source: the folding is that of Ashkboos et al., "SliceGPT", ICLR 2024 (arXiv 2401.15024), section 3.

    Args:
        state: the parameters that the section uses; they are left as they are.
        binding: the model's, whose stream may be rotated: see `unrotatable`.
        section: its name.
        name: how messages call the model.

    Raises:
        FusionError: a shift with no bias to take it; names the tensor.
    """
    state = {key: tensor.clone() for key, tensor in in_float32(without_scales(state, binding, section)).items()}
    prefix, part = _part(binding, section)
    for norm, readers in part.norms.items():
        _fold_norm(state, binding, prefix + norm, [prefix + reader for reader in readers], name)
    elementwise = {prefix + module for module in (*part.norms, *part.scales)}
    centred = binding.family.norm == "pre"
    stream = {axis for members in binding.streams() for axis in members if centred}
    for slot in binding.slots:
        if slot.section == section and slot.parameter.rpartition(".")[0] not in elementwise:
            for dim, (axis, reads) in enumerate(zip(slot.axes, slot.reads, strict=True)):
                if axis in stream and not reads:
                    tensor = slot.of(state[slot.parameter])
                    slot.put(state[slot.parameter], tensor - tensor.double().mean(dim, keepdim=True).to(tensor))
    for group in binding.attention:
        if group[0].startswith(f"{section}."):
            _balance(binding, group, state)
    return state


def without_scales(state: Mapping[str, Tensor], binding: Binding, section: str, name: str = "") -> State:
    """The parameters of a section with every LayerScale at 1, folded into the map before it.

    Args:
        state, binding, section, name: see `canonical`; of any model.

    Returns:
        `state` itself where there is none, else tensors in float32 at least: half precision would round twice.
    """
    prefix, part = _part(binding, section)
    scales = {
        name: writers
        for scale, writers in part.scales.items()
        for name in state if name.rpartition(".")[0] == f"{prefix}{scale}"
    }  # fmt: skip
    if not scales:
        return dict(state)
    state = in_float32(state)
    for scale, writers in scales.items():
        gamma = state[scale]
        for name in (f"{prefix}{writer}.{leaf}" for writer in writers for leaf in ("weight", "bias")):
            if name in state:
                state[name] = state[name] * gamma.view(-1, *[1] * (state[name].ndim - 1))
        state[scale] = torch.ones_like(gamma)
    return state


def _part(binding: Binding, section: str) -> tuple[str, Section]:
    return next((prefix, part) for name, prefix, part in binding.family.sections(binding.depths) if name == section)


def _fold_norm(state: State, binding: Binding, norm: str, readers: list[str], name: str) -> None:
    gamma, beta = state.get(f"{norm}.weight"), state.get(f"{norm}.bias")
    if gamma is None:
        return
    linear = [reader for reader in readers if f"{reader}.weight" in state]
    if not linear:  # it gives what an encoder without a head puts out
        return
    gamma += binding.family.offset  # what it multiplies by, until it is folded
    stays = any(f"{reader}.bias" not in state for reader in linear)
    if beta is not None and stays and bool(beta.any()):
        # It stays in the norm, in the units of its readers, and turns with the stream.
        if not bool(gamma.all()):
            raise FusionError(f"{name}: '{norm}.bias' has no bias of the map behind it to be folded into; use "
                              "strategy transport and align.stream transport")  # fmt: skip
        beta.div_(gamma)
    for reader in linear:
        weight, bias = state[f"{reader}.weight"], state.get(f"{reader}.bias")
        slot = next(slot for slot in binding.slots if slot.parameter == f"{reader}.weight")
        rows = weight.T if slot.reads[0] else weight
        times = rows.shape[1] // len(gamma)
        if beta is not None and bias is not None and not stays:
            bias += (rows.double() @ beta.double().repeat(times)).to(bias)
        rows.mul_(gamma.repeat(times))
    if beta is not None and not stays:
        beta.zero_()
    gamma.fill_(1 - binding.family.offset)


def _balance(binding: Binding, group: tuple[str, ...], state: State) -> None:
    """Splits each head's products Q^T K and V^T O as U sqrt(S) and sqrt(S) V: the norms of both factors agree."""
    axes = [binding.axes[axis] for axis in group]
    repeating = {axis.repeats: axis.name for axis in axes if axis.repeats}
    circuit = next((circuit for circuit in binding.circuits if circuit[0] in group), None)
    pairs = [
        (_rows(binding, axis.name, reads=False), _rows(binding, repeating.get(axis.name, axis.name), reads=True))
        for axis in axes if not axis.repeats and (circuit is None or axis.name not in circuit)
    ]  # fmt: skip
    if circuit is not None and all(
        binding.axes[axis].kind == "permutation" and binding.axes[axis].members == 1 for axis in circuit
    ):
        pairs.append((_rows(binding, circuit[0], reads=False), _rows(binding, circuit[1], reads=False)))
    heads = axes[0].groups
    for first, second in pairs:
        a, b = (torch.cat([_matrix(slot, at, state, heads, binding) for slot, at in side], dim=2)
                for side in (first, second))  # fmt: skip
        for side, whole in zip((first, second), _split(a, b), strict=True):
            widths = [_matrix(slot, at, state, heads, binding).shape[2] for slot, at in side]
            for (slot, at), part in zip(side, whole.split(widths, dim=2), strict=True):
                axis = binding.axes[str(slot.axes[at])]
                target = slot.of(state[slot.parameter]).movedim(at, 0)
                values = part.unflatten(2, (axis.members, -1)).transpose(1, 2).reshape(target.shape)
                slot.put(state[slot.parameter], values.movedim(0, at).to(target))


def _rows(binding: Binding, axis: str, *, reads: bool) -> list[tuple[Slot, int]]:
    """The slots that write (or read) `axis`, and the dimension that it is."""
    return [
        (slot, at)
        for slot in binding.slots
        for at, (name, read) in enumerate(zip(slot.axes, slot.reads, strict=True))
        if name == axis and read == reads
    ]


def _matrix(slot: Slot, at: int, state: State, heads: int, binding: Binding) -> Tensor:
    """[heads, units, rest] of dimension `at` of a slot, float64; repeated heads of a group lie side by side."""
    tensor = slot.of(state[slot.parameter]).detach().double().movedim(at, 0)
    members = binding.axes[str(slot.axes[at])].members
    return tensor.reshape(heads, members, len(tensor) // (heads * members), -1).transpose(1, 2).flatten(2)


def _split(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors [heads, r, n] and [heads, r, m] of each head's a^T b with equal Gram matrices."""
    qa, ra = torch.linalg.qr(a.mT)
    qb, rb = torch.linalg.qr(b.mT)
    u, s, vt = torch.linalg.svd(ra @ rb.mT, full_matrices=False)
    # What is below the rounding of float32 weights would grow with the square root.
    root = torch.where(s > 1e-6 * s[:, :1], s, 0).sqrt()[..., None]
    missing = (0, 0, 0, a.shape[1] - s.shape[1])  # a head wider than the stream has units to spare
    first, second = root * (qa @ u).mT, root * (qb @ vt.mT).mT
    return functional.pad(first, missing), functional.pad(second, missing)
