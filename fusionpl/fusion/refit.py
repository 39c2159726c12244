"""Least-squares refit: the linear maps of a section of the fused model solved in closed form, without labels or
gradients.

Close relatives: RegMean (Jin et al., ICLR 2023, arXiv 2212.09849); Luenam et al. (arXiv 2507.00037).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fusionpl.calibration import CalibrationSet, Flow, Passage, Place, sum_over_ranks
from fusionpl.families import Binding, State
from fusionpl.fusion.parents import AlignedParent
from fusionpl.fusion.stages import Stage
from fusionpl.transport import NormalEquations, fit_ridge

# Every fifth sample chooses the regularisation.
HOLD_OUT = 5


class Refit:
    """Fits the stages of one section after the other.

    The target of a map that writes into the residual stream is the mean of the parents' aligned streams behind the
    addition minus what the fused stream already holds, so errors of earlier layers are corrected. Post-LN norms are
    fitted too, a gain and a shift a unit. All tokens but padding count, whatever `calibration.tokens` says.

    Args:
        flow: of the fused network, which stands before the section that is fitted.
        parents: all of them, the anchor too.
        data: the calibration set, with the parents' targets of the section.
    """

    def __init__(self, flow: Flow, parents: Sequence[AlignedParent], data: CalibrationSet) -> None:
        self.flow, self.data = flow, data
        self.binding = flow.network.binding
        self.parents = dict(enumerate(parents))

    def fit(self, section: str, stage: Stage, state: State) -> None:
        """Fits the modules of a stage, from what the fused network itself puts into them.

        Args:
            section: where the stage is.
            stage: what is fitted.
            state: the fused network's parameters of the section; the new ones take their places.
        """
        (self._fit_norm if stage.norm else self._fit_linear)(section, stage, state)

    def _fit_linear(self, section: str, stage: Stage, state: State) -> None:
        maps = [_LinearMap(self.binding, state, module) for module in stage.modules]
        here, prior = Place(maps[0].module, "input"), torch.cat([one.matrix for one in maps], dim=1)
        # Products with the parents' activations are moved, not the activations: maps are linear, and these are fewer.
        moving = {index: parent for index, parent in self.parents.items() if parent.alignment is not None}
        widths = [_width(parent.binding, stage) for parent in moving.values()]
        columns = prior.shape[1] + sum(widths)
        parts = [NormalEquations.zeros(len(prior) - 1, columns, device=prior.device) for _ in range(2)]
        for batch in self.data:
            passage = self.flow.step(section, state, batch, stage.inputs(self.binding), stop=True)
            x = passage.seen[here]
            still = self._lacking(passage, stage, x)
            for index, parent in self.parents.items():
                if index not in moving:
                    still = still + parent.weight * self._target(index, stage, batch)
            targets = [still, *(self._target(index, stage, batch) for index in moving)]
            for part, rows in zip(parts, self._rows(x, batch), strict=True):
                part.update(*(tensor.flatten(0, -2)[rows] for tensor in (x, *targets)))
        sum_over_ranks([tensor for part in parts for tensor in part.tensors()])

        def moved(xy: Tensor) -> Tensor:
            total: Tensor
            total, *others = xy.split([prior.shape[1], *widths], dim=1)
            for parent, other in zip(moving.values(), others, strict=True):
                total = total + parent.weight * _moved(parent, stage, other.float()).double()
            return total

        fit, choose = (part.to_targets(moved) for part in parts)
        solution, _ = fit_ridge(fit, choose, prior)
        for one, found in zip(maps, solution.split([one.matrix.shape[1] for one in maps], dim=1), strict=True):
            one.replace(found)

    def _fit_norm(self, section: str, stage: Stage, state: State) -> None:
        """One gain and one shift a unit, applied to what the norm puts out now."""
        (module,) = stage.modules
        gain, shift = state[f"{module}.weight"], state[f"{module}.bias"]
        count = torch.zeros((), dtype=torch.float64, device=gain.device)
        x, xx, y, xy = sums = [torch.zeros_like(gain, dtype=torch.float64) for _ in range(4)]
        for batch in self.data:
            out = self.flow.step(section, state, batch, stage.inputs(self.binding), stop=True).seen[
                Place(module, "output")
            ]
            target = torch.zeros_like(out)
            for index, parent in self.parents.items():
                target = target + parent.weight * _moved(parent, stage, self._target(index, stage, batch))
            rows = torch.cat(self._rows(out, batch))
            out, target = (tensor.flatten(0, -2)[rows].double() for tensor in (out, target))
            count += len(rows)
            for total, values in zip(sums, (out, out.square(), target, out * target), strict=True):
                total += values.sum(0)
        sum_over_ranks([count, *sums])
        variance = xx - x.square() / count
        factor = torch.where(variance > 0, (xy - x * y / count) / variance, 1.0)
        state[f"{module}.weight"] = (gain * factor).to(gain)
        state[f"{module}.bias"] = (shift * factor + (y - factor * x) / count).to(shift)

    def _target(self, parent: int, stage: Stage, batch: int) -> Tensor:
        """What the modules of a stage put out in a parent, side by side, in its own units."""
        found = [self.data.kept["target", parent, module, batch] for module in stage.modules]
        return torch.cat(found, dim=-1) if len(found) > 1 else found[0]

    def _lacking(self, passage: Passage, stage: Stage, like: Tensor) -> Tensor:
        """Minus what the fused stream already holds where the modules of a stage write into it, else zeros."""
        return torch.cat([
            -passage.units(stage.skips[axis][1]) if axis in stage.skips
            else like.new_zeros(*like.shape[:-1], self.binding.axes[axis].size)
            for axis in stage.axes
        ], dim=-1)  # fmt: skip

    def _rows(self, tensor: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """The rows of a batch [B, ..., n] that are fitted, and those that choose the penalty; padding is neither."""
        mask, first = self.data.masks[batch], self.data.firsts[batch]
        held = (torch.arange(first, first + len(tensor)) + 1) % HOLD_OUT == 0
        held = held.view(-1, *[1] * (tensor.ndim - 2)).expand(tensor.shape[:-1])
        real = torch.ones_like(held) if mask is None or tensor.ndim == 2 else mask.cpu()
        fit, choose = ((real & rows).flatten().nonzero()[:, 0].to(tensor.device) for rows in (~held, held))
        return fit, choose


def _width(binding: Binding, stage: Stage) -> int:
    return sum(binding.axes[axis].size for axis in stage.axes)


def _moved(parent: AlignedParent, stage: Stage, outputs: Tensor) -> Tensor:
    """What a stage puts out in a parent, [..., units of all its axes], or anything linear in it, in anchor's units."""
    parts = outputs.split([parent.binding.axes[axis].size for axis in stage.axes], dim=-1)
    streams = [stage.skips.get(axis, (axis,))[0] for axis in stage.axes]
    seen = dict(zip(streams, parts, strict=True))
    return torch.cat([parent.moved(seen, axis) for axis in streams], dim=-1)


class _LinearMap:
    """Weight and bias of a linear module as one matrix [inputs + 1, outputs], float64."""

    def __init__(self, binding: Binding, state: State, module: str) -> None:
        self.module, self._state = module, state
        self._names = f"{module}.weight", f"{module}.bias"
        slot = next(slot for slot in binding.slots if slot.parameter == self._names[0])
        self._writes_first = not slot.reads[0]

    @property
    def matrix(self) -> Tensor:
        weight, bias = (self._state.get(name) for name in self._names)
        assert weight is not None
        matrix = (weight.flatten(1).T if self._writes_first else weight).double()
        return torch.cat([matrix, torch.zeros_like(matrix[:1]) if bias is None else bias.double()[None]])

    def replace(self, matrix: Tensor) -> None:
        """Puts a new matrix into the state; without a bias its last row is dropped."""
        weight, bias = (self._state.get(name) for name in self._names)
        assert weight is not None
        found = matrix[:-1].T if self._writes_first else matrix[:-1]
        found = found.reshape(weight.shape).to(weight)
        self._state[self._names[0]] = found.clone(memory_format=torch.contiguous_format)
        if bias is not None:
            self._state[self._names[1]] = matrix[-1].to(bias)
