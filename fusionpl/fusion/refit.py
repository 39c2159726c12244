"""Least-squares refit: the linear maps of a section of the fused model solved in closed form, without labels or
gradients.

For a group of linear maps with inputs X [rows, n], as the fused network itself gives them, and targets Y [rows, m], the
weighted mean over the parents of what theirs put out, in the fused network's units,

    W = W0 + argmin over D of |X D - (Y - X W0)|^2 + penalty |D|^2,

where W0 is the average of the aligned parents; every fifth sample chooses the penalty. The target of a map that writes
into the residual stream is the mean of the parents' streams behind the addition minus what the fused stream already
holds, so errors of earlier layers are corrected. Norms of post-LN networks get a gain and a shift a unit. What puts out
predictions is fitted to the mean of the parents' probabilities: see `fit_softmax`. All tokens but padding count,
whatever `calibration.tokens` says.

Close relatives: RegMean (Jin et al., ICLR 2023, arXiv 2212.09849); Luenam et al. (arXiv 2507.00037).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusionpl.calibration.cursor import CalibrationSet, Cursor, Passage, sum_over_ranks
from fusionpl.calibration.taps import Place
from fusionpl.families.apply import State
from fusionpl.families.axes import Binding
from fusionpl.families.family import attribute
from fusionpl.fusion.groups import LinearGroup
from fusionpl.fusion.parents import AlignedParent
from fusionpl.models.labels import NUMBERS, TAGS, Kind, kind_of
from fusionpl.transport.least_squares import NormalEquations, fit_ridge
from fusionpl.transport.softmax import LARGEST, Link, fit_softmax, log_mean, spread

# Every fifth sample chooses the regularisation.
HOLD_OUT = 5
Penalties = Mapping[tuple[str, ...], float]  # of the same group in the block before


def held_out(first: int, count: int) -> Tensor:
    """Which samples of a batch are held out, bool [count]; `first` is the number of its first one.

    >>> held_out(3, 4).tolist()
    [False, True, False, False]
    """
    return (torch.arange(first, first + count) + 1) % HOLD_OUT == 0


def predicting(model: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """Which rows of what a head reads become predictions: all real tokens, or the last one where a classifier of
    sequences reads all of them.

    Args:
        model: that it is the head of.
        x: [B, n], or [B, T, n] of tokens.
        mask: of the real ones, [B, T]; None for all.

    Returns:
        bool, [B] or [B, T], on the CPU.
    """
    real = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None or x.ndim == 2 else mask.bool().cpu()
    if x.ndim == 2 or not type(model).__name__.endswith("ForSequenceClassification"):
        return real
    last = real.shape[1] - 1 - real.flip(1).int().argmax(1)
    return functional.one_hot(last, real.shape[1]).bool()


@dataclass(frozen=True)
class Fit:
    """What all fits of a fusion rest on.

    Attributes:
        cursor: the fused network, which stands before the section that is fitted.
        data: the calibration set, with the parents' targets of the section.
        apart: whether the parents know other classes.
        tags: each parent's weights for tags, [tags] each, where classifiers give several at once.
        trial: whether nothing is fitted to the samples that are held out, so that a fusion can be judged by them.
    """

    cursor: Cursor
    data: CalibrationSet
    apart: bool = False
    tags: Sequence[Tensor] | None = None
    trial: bool = False

    @property
    def binding(self) -> Binding:
        """The fused network's."""
        return self.cursor.network.binding

    @property
    def module(self) -> nn.Module:
        """The fused network's, which says how to compute."""
        return self.cursor.network.module

    @property
    def kind(self) -> Kind:
        """What the network puts out."""
        return kind_of(self.module)


@dataclass(frozen=True)
class Section:
    """A section that is fitted, group by group.

    Attributes:
        name: of the section.
        state: the fused network's parameters so far.
        parents: all of them, the anchor too.
        states: the parents' parameters of the section.
        done: the groups that are fitted.
    """

    name: str
    state: State
    parents: Sequence[AlignedParent]
    states: Sequence[State]
    done: tuple[LinearGroup, ...] = ()


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
        elif not (group.predicts and _beyond_a_fit(fit, section, group)):
            state, chosen = fit_group(fit, section, group, penalties.get(_kind_of(group)))
            penalties = {**penalties, _kind_of(group): chosen}
        section = replace(section, state=state, done=(*section.done, group))
    return section.state, penalties


def advance(fit: Fit, section: Section) -> None:
    """Takes the fused network's batches through a section that is fitted."""
    for batch in fit.data:
        passage(fit, section, None, batch)


def passage(fit: Fit, section: Section, group: LinearGroup | None, batch: int) -> Passage:
    """Takes a batch up to the input of a group, or without one to the end of the section.

    In a block nothing is computed twice: what modules of earlier groups put out is kept from the first pass that ran
    them as they are now.
    """
    outputs = fit.data.outputs
    done = section.done if section.name in fit.binding.blocks else ()
    given = {
        module: outputs[module.removeprefix(section.name), batch] for earlier in done[:-1] for module in earlier.modules
    }
    fresh = [module for latest in done[-1:] for module in latest.modules]
    places = {Place(module, "output") for module in fresh} | (group.inputs(fit.binding) if group else set())
    passed = fit.cursor.step(section.name, section.state, batch, places, stop=group is not None, given=given)
    if group is not None:
        for module in fresh:
            outputs[module.removeprefix(section.name), batch] = passed.seen[Place(module, "output")]
    return passed


def fit_group(fit: Fit, section: Section, group: LinearGroup, penalty: float | None) -> tuple[State, float]:
    """Fits a group of linear maps; its new parameters, and the penalty.

    Args:
        fit, section: where.
        group: which.
        penalty: that the same group had in the block before.
    """
    maps = [LinearMap.of(fit.binding, section.state, module) for module in group.modules]
    prior = torch.cat([each.matrix for each in maps], dim=1)
    parts = normal_equations(fit, section, group, prior)
    solution, penalty = fit_ridge(*parts, prior, penalty, both=not fit.trial)
    if group.predicts:
        if fit.kind != NUMBERS:
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

    What decoders put out would be too much to keep. What the parents' put in is: as theirs are linear, the products of
    the inputs with the targets are made of those with what the parents put in.

    Args:
        fit, section, group: see `fit_group`.
        prior: the average of the aligned parents' maps, [n + 1, m].
    """
    parents = _taking_part(section, group)
    decoders = {index: _decoder(section, group, index) for index in parents if group.decodes}
    widths = [len(each) - 1 for each in decoders.values()] or [prior.shape[1]]
    sums = [NormalEquations.zeros(len(prior) - 1, sum(widths), device=prior.device) for _ in range(2)]
    for batch in fit.data:
        passed = passage(fit, section, group, batch)
        x = passed.seen[Place(group.first, "input")]
        if group.decodes:
            targets = [shown(fit, section, group, index, batch) for index in parents]
        else:
            targets = [_lacking(fit, passed, group, x)]
            for index, parent in parents.items():
                targets[0] = targets[0] + parent.weight * _moved(
                    parent, group, shown(fit, section, group, index, batch)
                )
        if group.predicts:
            fit.data.predicting[batch] = fit.data.as_kept(x)
        for part, rows in zip(sums, _rows(fit, group, x, batch), strict=True):
            part.update(*(tensor.flatten(0, -2)[rows] for tensor in (x, *targets)))
    sum_over_ranks([tensor for part in sums for tensor in part.tensors()])

    def wanted(part: NormalEquations) -> Tensor:
        if not group.decodes:
            return part.xy
        total = torch.zeros_like(prior)
        for (index, decoder), products in zip(decoders.items(), part.xy.split(widths, dim=1), strict=True):
            put_out = products @ decoder[:-1] + part.xx[:, -1:] * decoder[-1]
            total += parents[index].weight * _moved(parents[index], group, put_out.float()).double()
        return total

    first, second = (part.with_targets(wanted(part)) for part in sums)
    return first, second


def shown(fit: Fit, section: Section, group: LinearGroup, parent: int, batch: int) -> Tensor:
    """What a parent shows of a group's targets, side by side, in its own units; of a decoder what it reads."""
    parts = [fit.data.targets[target.key(section.name, parent, batch)] for target in group.targets]
    if not group.decodes:
        orders = [section.parents[parent].binding.order(module) for module in group.modules]
        parts = [part if order is None else part[..., order] for part, order in zip(parts, orders, strict=True)]
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


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
        for index, parent in enumerate(section.parents):
            target = target + parent.weight * _moved(parent, group, shown(fit, section, group, index, batch))
        fitted, choosing = _rows(fit, group, out, batch)
        rows = fitted if fit.trial else torch.cat([fitted, choosing])
        out, target = (tensor.flatten(0, -2)[rows].double() for tensor in (out, target))
        count += len(rows)
        for total, values in zip(sums, (out, out.square(), target, out * target), strict=True):
            total += values.sum(0)
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


def fit_predictions(fit: Fit, section: Section, group: LinearGroup, start: Tensor) -> Tensor:
    """Fits what puts out predictions to the mean of the parents' probabilities: see `fit_softmax`.

    Of parents that know other classes, who are sure of a wrong one where they know none, the mean is half and half:
    which of them is surer then decides, and that is in the log of the mean, which least squares fit.

    Args:
        fit, section, group: see `fit_group`.
        start: where the fit starts, [n + 1, m].
    """
    decoders = {index: _decoder(section, group, index) for index in range(len(section.parents)) if group.decodes}
    weights: Sequence[float | Tensor] = fit.tags or [parent.weight for parent in section.parents]
    link: Link = "sigmoid" if fit.kind == TAGS else "softmax"
    count = sum(fit.data.predicting[batch][..., 0].numel() for batch in fit.data)
    step = spread(count, start.numel())

    def logs(part: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in fit.data:
            x = fit.data.predicting[batch]
            at = _rows(fit, group, x, batch)[part][::step]
            given = []
            for index in range(len(section.parents)):
                own = shown(fit, section, group, index, batch).flatten(0, -2)[at].float()
                given.append(_outputs(own, decoders[index]) if group.decodes else own)
            yield x.flatten(0, -2)[at], log_mean(given, weights, link)

    def rows(part: int) -> Iterator[tuple[Tensor, Tensor]]:
        return ((x, log.exp()) for x, log in logs(part))

    if fit.apart:
        return _fit_logs(fit, logs, start)
    return fit_softmax(
        lambda: rows(0), lambda: rows(1), start, link=link, both=not fit.trial,
        reduce=lambda sums: sum_over_ranks([*sums]),
    ).matrix  # fmt: skip


def _fit_logs(fit: Fit, logs: Callable[[int], Iterator[tuple[Tensor, Tensor]]], start: Tensor) -> Tensor:
    """Least squares of log-probabilities, less their means over the classes, which change no prediction."""
    parts = [NormalEquations.zeros(len(start) - 1, start.shape[1], device=start.device) for _ in range(2)]
    for part, equations in enumerate(parts):
        for x, log in logs(part):
            equations.update(x, log - log.mean(-1, keepdim=True))
    sum_over_ranks([tensor for part in parts for tensor in part.tensors()])
    fitted, choosing = parts
    return fit_ridge(fitted, choosing, start - start.mean(1, keepdim=True), both=not fit.trial)[0]


def _kind_of(group: LinearGroup) -> tuple[str, ...]:
    return tuple(axis.rpartition(".")[2] for axis in group.axes)


def _beyond_a_fit(fit: Fit, section: Section, group: LinearGroup) -> bool:
    """Whether predictions are not what the last linear map puts out, or parents lack tokens, whose rows are the
    anchor's, or there are too many weights."""
    capped = attribute(fit.module, "config.final_logit_softcapping")
    lacking = any(parent.network.missing_tokens is not None for parent in section.parents)
    modules = (fit.module.get_submodule(name) for name in group.modules)
    entries = sum(module.get_parameter("weight").numel() for module in modules)
    return bool(capped) or lacking or entries > LARGEST


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


def _decoder(section: Section, group: LinearGroup, parent: int) -> Tensor:
    """A parent's own maps of a group, [n + 1, m]."""
    binding, state = section.parents[parent].binding, section.states[parent]
    return torch.cat([LinearMap.of(binding, state, module).matrix for module in group.modules], dim=1)


def _lacking(fit: Fit, passed: Passage, group: LinearGroup, like: Tensor) -> Tensor:
    """Minus what the fused stream already holds where the modules of a group write into it, else zeros."""
    return torch.cat([
        -passed.units(group.skips[axis][1]) if axis in group.skips
        else like.new_zeros(*like.shape[:-1], fit.binding.axes[axis].size)
        for axis in group.axes
    ], dim=-1)  # fmt: skip


def _rows(fit: Fit, group: LinearGroup, tensor: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """The rows of a batch [B, ..., n] that are fitted, and those that choose the penalty; padding is neither."""
    mask = fit.data.mask(batch, fit.binding, group.axes[0])
    held = held_out(fit.data.firsts[batch], len(tensor))
    held = held.view(-1, *[1] * (tensor.ndim - 2)).expand(tensor.shape[:-1])
    if group.predicts:
        real = predicting(fit.module, tensor, mask)
    else:
        real = torch.ones_like(held) if mask is None or tensor.ndim == 2 else mask.cpu()
    fitted, choosing = ((real & rows).flatten().nonzero()[:, 0].to(tensor.device) for rows in (~held, held))
    return fitted, choosing


def _outputs(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.addmm(matrix[-1].to(x), x, matrix[:-1].to(x))


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


@dataclass(frozen=True)
class LinearMap:
    """Weight and bias of a linear module as one matrix [inputs + 1, outputs axis by axis], float64.

    Attributes:
        module: its name.
        matrix: weight and, in the last row, bias.
        transposed: whether the weight's first dimension is what is written.
        order: of the outputs, axis by axis; None where it is the module's.
    """

    module: str
    matrix: Tensor
    transposed: bool
    order: Tensor | None

    @classmethod
    def of(cls, binding: Binding, state: State, module: str) -> "LinearMap":
        """That of a module with these parameters."""
        weight, bias = state[f"{module}.weight"], state.get(f"{module}.bias")
        slot = next(slot for slot in binding.slots if slot.parameter == f"{module}.weight")
        matrix = (weight.flatten(1).T if not slot.reads[0] else weight).double()
        whole = torch.cat([matrix, torch.zeros_like(matrix[:1]) if bias is None else bias.double()[None]])
        order = binding.order(module)
        return cls(module, whole if order is None else whole[:, order], not slot.reads[0], order)

    def parameters(self, matrix: Tensor, like: State) -> State:
        """The parameters of another matrix; without a bias its last row is dropped."""
        weight, bias = like[f"{self.module}.weight"], like.get(f"{self.module}.bias")
        if self.order is not None:
            matrix = matrix[:, self.order.argsort()]
        new = (matrix[:-1].T if self.transposed else matrix[:-1]).reshape(weight.shape).to(weight)
        state = {f"{self.module}.weight": new.clone(memory_format=torch.contiguous_format)}
        return state if bias is None else {**state, f"{self.module}.bias": matrix[-1].to(bias)}
