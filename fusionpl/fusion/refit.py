"""Least-squares refit: the linear maps of a section of the fused model solved in closed form, without labels or
gradients.

Close relatives: RegMean (Jin et al., ICLR 2023, arXiv 2212.09849); Luenam et al. (arXiv 2507.00037).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusionpl.calibration.flow import CalibrationSet, Flow, Passage, sum_over_ranks
from fusionpl.calibration.taps import Place
from fusionpl.families import Binding, State, attribute
from fusionpl.fusion.parents import AlignedParent
from fusionpl.fusion.stages import Stage
from fusionpl.models.labels import NUMBERS, TAGS, kind_of
from fusionpl.transport.least_squares import NormalEquations, fit_ridge
from fusionpl.transport.softmax import LARGEST, Link, fit_softmax, log_mean, spread

# Every fifth sample chooses the regularisation.
HOLD_OUT = 5


def held_out(first: int, count: int) -> Tensor:
    """Which samples of a batch are held out, bool [count]; `first` is the number of its first one."""
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


class Refit:
    """Fits the stages of one section after the other, and those of a block after those of the block before.

    The target of a map that writes into the residual stream is the mean of the parents' aligned streams behind the
    addition minus what the fused stream already holds, so errors of earlier layers are corrected. Post-LN norms are
    fitted too, a gain and a shift a unit. All tokens but padding count, whatever `calibration.tokens` says.

    Args:
        flow: of the fused network, which stands before the section that is fitted next.
        parents: all of them, the anchor too.
        data: the calibration set, with the parents' targets of the section.
        apart: whether the parents know other classes.
        tags: each parent's weights for tags, [tags] each, where classifiers give several at once.
        trial: whether nothing is fitted to the samples that are held out, so that a fusion can be judged by them.
    """

    def __init__(
        self,
        flow: Flow,
        parents: Sequence[AlignedParent],
        data: CalibrationSet,
        *,
        apart: bool = False,
        tags: Sequence[Tensor] | None = None,
        trial: bool = False,
    ) -> None:
        self.flow, self.data, self.apart, self.tags, self.trial = flow, data, apart, tags, trial
        self.binding, self._kind = flow.network.binding, kind_of(flow.network.module)
        self.parents = dict(enumerate(parents))
        self._penalties: dict[tuple[str, ...], float] = {}  # of the same stage in the block before
        self._done: dict[str, list[Stage]] = {}

    def fit(self, section: str, stage: Stage, state: State, states: Sequence[State]) -> None:
        """Fits the modules of a stage, from what the fused network itself puts into them.

        Args:
            section: where the stage is.
            stage: what is fitted.
            state: the fused network's parameters of the section; the new ones take their places.
            states: the parents' parameters of the section.
        """
        if stage.norm:
            self._fit_norm(section, stage, state)
        elif not (stage.predicts and self._beyond_a_fit(stage)):
            self._fit_linear(section, stage, state, states)
        if section in self.binding.blocks:
            self._done.setdefault(section, []).append(stage)

    def onward(self, section: str, state: State) -> None:
        """Takes the fused network's batches through a section whose stages are fitted."""
        for batch in self.data:
            self._step(section, None, state, batch)

    def _step(self, section: str, stage: Stage | None, state: State, batch: int) -> Passage:
        """Takes a batch up to the input of a stage, or without one to the end of the section.

        In a block nothing is computed twice: what modules of earlier stages put out is kept from the first step that
        ran them as they are now.
        """
        kept, before = self.data.kept, self._done.get(section, [])
        given = {
            module: kept["given", module.removeprefix(section), batch] for one in before[:-1] for module in one.modules
        }
        fresh = [module for one in before[-1:] for module in one.modules]
        places = {Place(module, "output") for module in fresh} | (stage.inputs(self.binding) if stage else set())
        passage = self.flow.step(section, state, batch, places, stop=stage is not None, given=given)
        if stage is not None:
            for module in fresh:
                kept["given", module.removeprefix(section), batch] = passage.seen[Place(module, "output")]
        return passage

    def _fit_linear(self, section: str, stage: Stage, state: State, states: Sequence[State]) -> None:
        maps = [_LinearMap(self.binding, state, module) for module in stage.modules]
        here, prior = Place(maps[0].module, "input"), torch.cat([one.matrix for one in maps], dim=1)
        parents = self._taking_part(section, stage)
        later = {
            index: _Later(parent, stage, states[index])
            for index, parent in parents.items()
            if stage.narrow or _moves_later(self.binding, parent, stage, len(prior) - 1)
        }
        widths = [*([] if stage.narrow else [prior.shape[1]]), *(one.width for one in later.values())]
        end = sum(widths)
        parts = [NormalEquations.zeros(len(prior) - 1, end, device=prior.device) for _ in range(2)]
        for batch in self.data:
            passage = self._step(section, stage, state, batch)
            x, targets = passage.seen[here], [self._target(section, index, stage, batch) for index in later]
            if not stage.narrow:
                still = self._lacking(passage, stage, x)
                for index, parent in parents.items():
                    if index not in later:
                        target = self._target(section, index, stage, batch)
                        still = still + parent.weight * _moved(parent, stage, target)
                targets.insert(0, still)
            if stage.predicts:
                self.data.keep(("predicts", batch), x)
            for part, rows in zip(parts, self._rows(stage, x, batch), strict=True):
                part.update(*(tensor.flatten(0, -2)[rows] for tensor in (x, *targets)))
        sum_over_ranks([tensor for part in parts for tensor in part.tensors()])

        def wanted(part: NormalEquations) -> Tensor:
            shown = list(part.xy.split(widths, dim=1))
            total = torch.zeros_like(prior) if stage.narrow else shown.pop(0)
            for one, products in zip(later.values(), shown, strict=True):
                total = total + one.targets(products, part.xx[:, -1:])
            return total

        fit, choose = (part.with_targets(wanted(part)) for part in parts)
        kind = tuple(axis.rpartition(".")[2] for axis in stage.axes)
        solution, self._penalties[kind] = fit_ridge(fit, choose, prior, self._penalties.get(kind), both=not self.trial)
        if stage.predicts and self._kind != NUMBERS:
            solution = self._fit_predictions(section, stage, solution, states)
        for one, found in zip(maps, solution.split([one.matrix.shape[1] for one in maps], dim=1), strict=True):
            one.replace(found)

    def _fit_norm(self, section: str, stage: Stage, state: State) -> None:
        """One gain and one shift a unit, applied to what the norm puts out now."""
        (module,) = stage.modules
        offset = self.binding.family.offset
        gain, shift = state[f"{module}.weight"] + offset, state.get(f"{module}.bias")
        count = torch.zeros((), dtype=torch.float64, device=gain.device)
        x, xx, y, xy = sums = [torch.zeros_like(gain, dtype=torch.float64) for _ in range(4)]
        for batch in self.data:
            out = self._step(section, stage, state, batch).seen[Place(module, "output")]
            target = torch.zeros_like(out)
            for index, parent in self.parents.items():
                target = target + parent.weight * _moved(parent, stage, self._target(section, index, stage, batch))
            fit, choose = self._rows(stage, out, batch)
            rows = fit if self.trial else torch.cat([fit, choose])
            out, target = (tensor.flatten(0, -2)[rows].double() for tensor in (out, target))
            count += len(rows)
            for total, values in zip(sums, (out, out.square(), target, out * target), strict=True):
                total += values.sum(0)
        sum_over_ranks([count, *sums])
        if shift is None:  # RMSNorm's
            state[f"{module}.weight"] = (gain * torch.where(xx > 0, xy / xx, 1.0) - offset).to(gain)
            return
        variance = xx - x.square() / count
        factor = torch.where(variance > 0, (xy - x * y / count) / variance, 1.0)
        state[f"{module}.weight"] = (gain * factor - offset).to(gain)
        state[f"{module}.bias"] = (shift * factor + (y - factor * x) / count).to(shift)

    def _beyond_a_fit(self, stage: Stage) -> bool:
        """Whether predictions are not what the last linear map puts out, or parents lack tokens, whose rows are the
        anchor's, or there are too many weights."""
        capped = attribute(self.flow.network.module, "config.final_logit_softcapping")
        lacking = any(parent.network.absent is not None for parent in self.parents.values())
        modules = (self.flow.network.module.get_submodule(one) for one in stage.modules)
        entries = sum(one.get_parameter("weight").numel() for one in modules)
        return bool(capped) or lacking or entries > LARGEST

    def _taking_part(self, section: str, stage: Stage) -> dict[int, AlignedParent]:
        """The parents that show what a stage puts out: the anchor stands in for those that have not the block, but
        where the stream is written, which they leave as it is."""
        away = {index for index, parent in self.parents.items() if section in parent.idle}
        if not away or stage.skips:
            return self.parents
        found = {index: parent for index, parent in self.parents.items() if index not in away}
        share = sum(self.parents[index].weight for index in away)
        anchor = next(index for index, parent in found.items() if parent.alignment is None)
        return {**found, anchor: replace(found[anchor], weight=found[anchor].weight + share)}

    def _target(self, section: str, parent: int, stage: Stage, batch: int) -> Tensor:
        """What a parent shows of a stage's targets, side by side, in its own units."""
        found = [self.data.kept[target.key(section, parent, batch)] for target in stage.targets]
        if not stage.narrow:
            orders = [self.parents[parent].binding.order(module) for module in stage.modules]
            found = [one if order is None else one[..., order] for one, order in zip(found, orders, strict=True)]
        return torch.cat(found, dim=-1) if len(found) > 1 else found[0]

    def _fit_predictions(self, section: str, stage: Stage, start: Tensor, states: Sequence[State]) -> Tensor:
        """Fits what puts out predictions to the mean of the parents' probabilities: see `fit_softmax`.

        Of parents that know other classes, who are sure of a wrong one where they know none, the mean is half and half:
        which of them is surer then decides, and that is in the log of the mean, which least squares fit.
        """
        heads = {
            index: torch.cat([_LinearMap(parent.binding, states[index], one).matrix for one in stage.modules], dim=1)
            for index, parent in self.parents.items()
            if stage.narrow
        }
        weights: Sequence[float | Tensor] = self.tags or [parent.weight for parent in self.parents.values()]
        link: Link = "sigmoid" if self._kind == TAGS else "softmax"
        count = sum(self.data.kept["predicts", batch][..., 0].numel() for batch in self.data)
        step = spread(count, start.numel())

        def logs(part: int) -> Iterator[tuple[Tensor, Tensor]]:
            for batch in self.data:
                x = self.data.kept["predicts", batch]
                at = self._rows(stage, x, batch)[part][::step]
                given = []
                for index in self.parents:
                    shown = self._target(section, index, stage, batch).flatten(0, -2)[at].float()
                    given.append(_outputs(shown, heads[index]) if stage.narrow else shown)
                yield x.flatten(0, -2)[at], log_mean(given, weights, link)

        def rows(part: int) -> Iterator[tuple[Tensor, Tensor]]:
            return ((x, log.exp()) for x, log in logs(part))

        if self.apart:
            found = self._fit_logs(logs, start)
        else:
            found = fit_softmax(
                lambda: rows(0), lambda: rows(1), start, link=link, both=not self.trial,
                reduce=lambda sums: sum_over_ranks([*sums]),
            ).matrix  # fmt: skip
        for batch in self.data:
            del self.data.kept["predicts", batch]
        return found

    def _fit_logs(self, logs: Callable[[int], Iterator[tuple[Tensor, Tensor]]], start: Tensor) -> Tensor:
        """Least squares of log-probabilities, less their means over the classes, which change no prediction."""
        parts = [NormalEquations.zeros(len(start) - 1, start.shape[1], device=start.device) for _ in range(2)]
        for part, equations in enumerate(parts):
            for x, log in logs(part):
                equations.update(x, log - log.mean(-1, keepdim=True))
        sum_over_ranks([tensor for part in parts for tensor in part.tensors()])
        fit, choose = parts
        return fit_ridge(fit, choose, start - start.mean(1, keepdim=True), both=not self.trial)[0]

    def _lacking(self, passage: Passage, stage: Stage, like: Tensor) -> Tensor:
        """Minus what the fused stream already holds where the modules of a stage write into it, else zeros."""
        return torch.cat([
            -passage.units(stage.skips[axis][1]) if axis in stage.skips
            else like.new_zeros(*like.shape[:-1], self.binding.axes[axis].size)
            for axis in stage.axes
        ], dim=-1)  # fmt: skip

    def _rows(self, stage: Stage, tensor: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """The rows of a batch [B, ..., n] that are fitted, and those that choose the penalty; padding is neither."""
        mask = self.data.mask(batch, self.binding, stage.axes[0])
        held = held_out(self.data.firsts[batch], len(tensor))
        held = held.view(-1, *[1] * (tensor.ndim - 2)).expand(tensor.shape[:-1])
        if stage.predicts:
            real = predicting(self.flow.network.module, tensor, mask)
        else:
            real = torch.ones_like(held) if mask is None or tensor.ndim == 2 else mask.cpu()
        fit, choose = ((real & rows).flatten().nonzero()[:, 0].to(tensor.device) for rows in (~held, held))
        return fit, choose


class _Later:
    """A parent whose targets are made of products with what it shows: both what maps do and what linear modules do to
    their inputs is linear.

    Args:
        parent: the parent.
        stage: what is fitted.
        state: the parent's parameters of the section.
    """

    def __init__(self, parent: AlignedParent, stage: Stage, state: State) -> None:
        self.parent, self.stage = parent, stage
        self._matrix = None
        if stage.narrow:
            self._matrix = torch.cat([_LinearMap(parent.binding, state, one).matrix for one in stage.modules], dim=1)

    @property
    def width(self) -> int:
        """Number of units that the parent shows."""
        return self.stage.width(self.parent.binding) if self._matrix is None else len(self._matrix) - 1

    def targets(self, products: Tensor, sums: Tensor) -> Tensor:
        """The parent's share of the products with the targets, [n + 1, units of the anchor].

        Args:
            products: of inputs with what the parent shows, [n + 1, width].
            sums: of the inputs, [n + 1, 1].
        """
        if self._matrix is not None:
            products = products @ self._matrix[:-1] + sums * self._matrix[-1]
        return self.parent.weight * _moved(self.parent, self.stage, products.float()).double()


def _outputs(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.addmm(matrix[-1].to(x), x, matrix[:-1].to(x))


def _moves_later(anchor: Binding, parent: AlignedParent, stage: Stage, inputs: int) -> bool:
    """Whether it takes fewer products to move the products of a parent's outputs with the inputs than the outputs."""
    sizes = [(parent.binding.axes[axis].size, anchor.axes[axis].size) for axis in stage.axes]
    moving = sum(ours * theirs for ours, theirs in sizes)
    return parent.alignment is not None and moving >= inputs * sum(ours for ours, _ in sizes)


def _moved(parent: AlignedParent, stage: Stage, outputs: Tensor) -> Tensor:
    """What a stage puts out in a parent, [..., units of all its axes], or anything linear in it, in anchor's units."""
    parts = outputs.split([parent.binding.axes[axis].size for axis in stage.axes], dim=-1)
    streams = [stage.skips.get(axis, (axis,))[0] for axis in stage.axes]
    seen = dict(zip(streams, parts, strict=True))
    # An axis may be written twice: a gate and what it multiplies, packed.
    return torch.cat(
        [parent.moved({**seen, axis: part}, axis) for axis, part in zip(streams, parts, strict=True)], dim=-1
    )


class _LinearMap:
    """Weight and bias of a linear module as one matrix [inputs + 1, outputs axis by axis], float64."""

    def __init__(self, binding: Binding, state: State, module: str) -> None:
        self.module, self._state = module, state
        self._names = f"{module}.weight", f"{module}.bias"
        slot = next(slot for slot in binding.slots if slot.parameter == self._names[0])
        self._writes_first = not slot.reads[0]
        self._order = binding.order(module)

    @property
    def matrix(self) -> Tensor:
        weight, bias = (self._state.get(name) for name in self._names)
        assert weight is not None
        matrix = (weight.flatten(1).T if self._writes_first else weight).double()
        whole = torch.cat([matrix, torch.zeros_like(matrix[:1]) if bias is None else bias.double()[None]])
        return whole if self._order is None else whole[:, self._order]

    def replace(self, matrix: Tensor) -> None:
        """Puts a new matrix into the state; without a bias its last row is dropped."""
        weight, bias = (self._state.get(name) for name in self._names)
        assert weight is not None
        if self._order is not None:
            matrix = matrix[:, self._order.argsort()]
        found = matrix[:-1].T if self._writes_first else matrix[:-1]
        found = found.reshape(weight.shape).to(weight)
        self._state[self._names[0]] = found.clone(memory_format=torch.contiguous_format)
        if bias is not None:
            self._state[self._names[1]] = matrix[-1].to(bias)
