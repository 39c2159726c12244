"""What fits of linear groups rest on: what the fused network puts into them, what parents show, which rows count."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusionpl.calibration.cursor import CalibrationSet, Cursor, Passage
from fusionpl.calibration.taps import Place
from fusionpl.families.apply import State
from fusionpl.families.axes import Binding
from fusionpl.fusion.groups import LinearGroup
from fusionpl.fusion.parents import AlignedParent
from fusionpl.fusion.voting import Voting

# Every fifth sample chooses the regularisation.
HOLD_OUT = 5
# How much of a parent's stream one stream for all is to hold on data of another, where all of the owner's is 1. Three
# teams of digits whose parents know five classes each had 93.5, 95.5, 94.7 % of ten right with 1, 95.7, 96.2, 96.0 with
# 0.5, 95.2, 96.5, 95.7 with 0.2 (600 samples of each parent; with 98 there was no difference).
ELSEWHERE = 0.5


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
        votings: who says what the network is to predict.
        apart: whether the parents know other classes.
        joint: whether the network has one stream for all parents.
        trial: whether nothing is fitted to the samples that are held out, so that a fusion can be judged by them.
    """

    cursor: Cursor
    data: CalibrationSet
    votings: Sequence[Voting]
    apart: bool = False
    joint: bool = False
    trial: bool = False

    @property
    def binding(self) -> Binding:
        """The fused network's."""
        return self.cursor.network.binding

    @property
    def module(self) -> nn.Module:
        """The fused network's, which says how to compute."""
        return self.cursor.network.module

    def shares(self, batch: int, weights: Sequence[float]) -> list[float]:
        """How much of each parent's stream is wanted on a batch, so that the weighted mean is 1: of one stream the
        owner's more than the others', which nobody asks there.

        Args:
            batch: which.
            weights: of the parents.
        """
        owner = self.data.owners[batch]
        if owner is None or not self.joint:
            return [1.0] * len(weights)
        shares = [1.0 if parent == owner else ELSEWHERE for parent in range(len(weights))]
        mean = sum(weight * share for weight, share in zip(weights, shares, strict=True))
        return [share / mean for share in shares]


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


def shown(fit: Fit, section: Section, group: LinearGroup, parent: int, batch: int) -> Tensor:
    """What a parent shows of a group's targets, side by side, in its own units; of a decoder what it reads."""
    parts = [fit.data.targets[target.key(section.name, parent, batch)] for target in group.targets]
    if not group.narrow:
        orders = [section.parents[parent].binding.order(module) for module in group.modules]
        parts = [part if order is None else part[..., order] for part, order in zip(parts, orders, strict=True)]
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def rows_of(fit: Fit, group: LinearGroup, tensor: Tensor, batch: int) -> tuple[Tensor, Tensor]:
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


def decoder_of(section: Section, group: LinearGroup, parent: int) -> Tensor:
    """A parent's own maps of a group, [n + 1, m]."""
    binding, state = section.parents[parent].binding, section.states[parent]
    return torch.cat([LinearMap.of(binding, state, module).matrix for module in group.modules], dim=1)


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
