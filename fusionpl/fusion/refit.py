"""Least-squares refit: the linear maps of a section of the fused model solved in closed form, without labels or
gradients.

For a group of linear maps with inputs X [rows, n], as the fused network itself gives them, and targets Y [rows, m], the
weighted mean over the parents of what theirs put out, in the fused network's units,

    W = W0 + argmin over D of |X D - (Y - X W0)|^2 + penalty |D|^2,

where W0 is the average of the aligned parents; every fifth sample chooses the penalty, in the blocks behind two that
chose the same for the same group that or none. The target of a map that writes
into the residual stream is the mean of the parents' streams behind the addition minus what the fused stream already
holds, so errors of earlier layers are corrected. Norms of post-LN networks get a gain and a shift a unit. What puts out
predictions is fitted to the mean of the parents' probabilities: see `fit_softmax`. All tokens but padding count,
whatever `calibration.tokens` says.

Close relatives: RegMean (Jin et al., ICLR 2023, arXiv 2212.09849); Luenam et al. (arXiv 2507.00037).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fusionpl.calibration.cursor import Passage, sum_over_ranks
from fusionpl.calibration.taps import Place
from fusionpl.families.apply import State
from fusionpl.fusion.fitting import Fit, LinearMap, Section, decoder_of, passage, rows_of, shown
from fusionpl.fusion.groups import LinearGroup
from fusionpl.fusion.parents import AlignedParent
from fusionpl.fusion.predictions import beyond_a_fit, fit_predictions
from fusionpl.models.classes import partial_heads
from fusionpl.transport.least_squares import NormalEquations, fit_ridge

Penalties = Mapping[tuple[str, ...], Sequence[float]]  # of the same group in the blocks so far


def refit_section(
    fit: Fit, section: Section, groups: Sequence[LinearGroup], penalties: Penalties
) -> tuple[State, Penalties]:
    """Fits the groups of a section, one after the other, each from what the fused network then puts into it.

    Returns:
        The section's parameters, and the penalties that were chosen.
    """
    for group in groups:
        state = section.state
        if group.norm:
            state = fit_norm(fit, section, group)
        elif not (group.predicts and beyond_a_fit(fit, section, group)):
            before = penalties.get(_kind_of(group), ())
            state, chosen = fit_group(fit, section, group, before)
            penalties = {**penalties, _kind_of(group): (*before, chosen)}
        section = replace(section, state=state, done=(*section.done, group))
    return section.state, penalties


def advance(fit: Fit, section: Section) -> None:
    """Takes the fused network's batches through a section that is fitted."""
    for batch in fit.data:
        passage(fit, section, None, batch)


def fit_group(fit: Fit, section: Section, group: LinearGroup, before: Sequence[float] = ()) -> tuple[State, float]:
    """Fits a group of linear maps; its new parameters, and the penalty.

    Args:
        fit, section: where.
        group: which.
        before: the penalties of the same group in the blocks so far.
    """
    maps = [LinearMap.of(fit.binding, section.state, module) for module in group.modules]
    prior = torch.cat([each.matrix for each in maps], dim=1)
    if group.predicts and any(partial_heads(parent.network.original.module) for parent in section.parents):
        keep_inputs(fit, section, group)  # what never is no number to fit squares to
        solution, penalty = prior, float("inf")
    else:
        parts = normal_equations(fit, section, group, prior)
        settled = len(before) > 1 and before[-1] == before[-2]
        guess = before[-1] if before else None
        solution, penalty = fit_ridge(*parts, prior, guess, search=not settled, both=not fit.trial)
    if group.predicts:
        solution = fit_predictions(fit, section, group, solution)
        fit.data.predicting.clear()
    state = dict(section.state)
    for each, matrix in zip(maps, solution.split([each.matrix.shape[1] for each in maps], dim=1), strict=True):
        state |= each.parameters(matrix, section.state)
    return state, penalty


def normal_equations(
    fit: Fit, section: Section, group: LinearGroup, prior: Tensor
) -> tuple[NormalEquations, NormalEquations]:
    """Products of a group's inputs with themselves and with its targets, over the samples that are fitted and over
    those that choose the penalty.

    Of narrow groups it is kept what the parents put in: as theirs are linear, the products of the inputs with the
    targets are made of those with what the parents put in.

    Args:
        fit, section, group: see `fit_group`.
        prior: the average of the aligned parents' maps, [n + 1, m].
    """
    parents = _taking_part(section, group)
    decoders = {index: decoder_of(section, group, index) for index in parents if group.narrow}
    widths = [len(each) - 1 for each in decoders.values()] or [prior.shape[1]]
    sums = [NormalEquations.zeros(len(prior) - 1, sum(widths), device=prior.device) for _ in range(2)]
    for batch in fit.data:
        passed = passage(fit, section, group, batch)
        x = passed.seen[Place(group.first, "input")]
        if group.narrow:
            targets = [shown(fit, section, group, index, batch) for index in parents]
        else:
            targets = [_lacking(fit, passed, group, x)]
            shares = _shares(fit, section, group, batch)
            for index, parent in parents.items():
                own = _moved(parent, group, shown(fit, section, group, index, batch))
                targets[0] = targets[0] + shares[index] * parent.weight * own
        if group.predicts:
            fit.data.predicting[batch] = fit.data.as_kept(x)
        for part, rows in zip(sums, rows_of(fit, group, x, batch), strict=True):
            part.update(*(tensor.flatten(0, -2)[rows] for tensor in (x, *targets)), weight=fit.data.weight(batch))
    sum_over_ranks([tensor for part in sums for tensor in part.tensors()])

    def wanted(part: NormalEquations) -> Tensor:
        if not group.narrow:
            return part.xy
        total = torch.zeros_like(prior)
        for (index, decoder), products in zip(decoders.items(), part.xy.split(widths, dim=1), strict=True):
            put_out = products @ decoder[:-1] + part.xx[:, -1:] * decoder[-1]
            total += parents[index].weight * _moved(parents[index], group, put_out.float()).double()
        return total

    first, second = (part.with_targets(wanted(part)) for part in sums)
    return first, second


def keep_inputs(fit: Fit, section: Section, group: LinearGroup) -> None:
    """Keeps what the fused network puts into what predicts."""
    for batch in fit.data:
        passed = passage(fit, section, group, batch)
        fit.data.predicting[batch] = fit.data.as_kept(passed.seen[Place(group.first, "input")])


def fit_norm(fit: Fit, section: Section, group: LinearGroup) -> State:
    """One gain and one shift a unit, applied to what the norm puts out now; the section's new parameters."""
    (module,) = group.modules
    offset, state = fit.binding.family.offset, section.state
    gain, shift = state[f"{module}.weight"] + offset, state.get(f"{module}.bias")
    count = torch.zeros((), dtype=torch.float64, device=gain.device)
    x, xx, y, xy = sums = [torch.zeros_like(gain, dtype=torch.float64) for _ in range(4)]
    for batch in fit.data:
        out = passage(fit, section, group, batch).seen[Place(module, "output")]
        target = torch.zeros_like(out)
        shares = _shares(fit, section, group, batch)
        for index, parent in enumerate(section.parents):
            own = _moved(parent, group, shown(fit, section, group, index, batch))
            target = target + shares[index] * parent.weight * own
        fitted, choosing = rows_of(fit, group, out, batch)
        rows = fitted if fit.trial else torch.cat([fitted, choosing])
        out, target = (tensor.flatten(0, -2)[rows].double() for tensor in (out, target))
        weight = fit.data.weight(batch)
        count += weight * len(rows)
        for total, values in zip(sums, (out, out.square(), target, out * target), strict=True):
            total += weight * values.sum(0)
    sum_over_ranks([count, *sums])
    if shift is None:  # RMSNorm's
        new = {f"{module}.weight": (gain * torch.where(xx > 0, xy / xx, 1.0) - offset).to(gain)}
    else:
        variance = xx - x.square() / count
        factor = torch.where(variance > 0, (xy - x * y / count) / variance, 1.0)
        new = {
            f"{module}.weight": (gain * factor - offset).to(gain),
            f"{module}.bias": (shift * factor + (y - factor * x) / count).to(shift),
        }
    return {**state, **new}


def _kind_of(group: LinearGroup) -> tuple[str, ...]:
    return tuple(axis.rpartition(".")[2] for axis in group.axes)


def _taking_part(section: Section, group: LinearGroup) -> dict[int, AlignedParent]:
    """The parents that show what a group puts out: the anchor stands in for those that have not the block, but where
    the stream is written, which they leave as it is."""
    parents = dict(enumerate(section.parents))
    away = {index for index, parent in parents.items() if section.name in parent.missing_blocks}
    if not away or group.skips:
        return parents
    share = sum(parents[index].weight for index in away)
    here = {index: parent for index, parent in parents.items() if index not in away}
    anchor = next(index for index, parent in here.items() if parent.maps is None)
    return {**here, anchor: replace(here[anchor], weight=here[anchor].weight + share)}


def _shares(fit: Fit, section: Section, group: LinearGroup, batch: int) -> list[float]:
    """How much of what each parent shows is wanted on a batch; of what does not write the stream, all."""
    weights = [parent.weight for parent in section.parents]
    return fit.shares(batch, weights) if group.skips or group.norm else [1.0] * len(weights)


def _lacking(fit: Fit, passed: Passage, group: LinearGroup, like: Tensor) -> Tensor:
    """Minus what the fused stream already holds where the modules of a group write into it, else zeros."""
    return torch.cat([
        -passed.units(group.skips[axis][1]) if axis in group.skips
        else like.new_zeros(*like.shape[:-1], fit.binding.axes[axis].size)
        for axis in group.axes
    ], dim=-1)  # fmt: skip


def _moved(parent: AlignedParent, group: LinearGroup, outputs: Tensor) -> Tensor:
    """What a group puts out in a parent, [..., units of all its axes], or anything linear in it, in the fused network's
    units."""
    parts = outputs.split([parent.binding.axes[axis].size for axis in group.axes], dim=-1)
    streams = [group.skips.get(axis, (axis,))[0] for axis in group.axes]
    seen = dict(zip(streams, parts, strict=True))
    # An axis may be written twice: a gate and what it multiplies, packed.
    return torch.cat(
        [parent.moved({**seen, axis: part}, axis) for axis, part in zip(streams, parts, strict=True)], dim=-1
    )
