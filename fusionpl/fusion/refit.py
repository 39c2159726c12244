"""Least-squares refit: every linear map of a fused model solved in closed form, without labels or gradients.

Close relatives: RegMean (Jin et al., ICLR 2023, arXiv 2212.09849); Luenam et al. (arXiv 2507.00037).
"""

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusionpl.alignment import Alignment
from fusionpl.calibration import CalibrationConfig, Progress, batches, eval_mode, logits, no_progress, recorded
from fusionpl.families import Binding, Slot
from fusionpl.transport import NormalEquations, fit_ridge

# Every fifth sample chooses the regularisation.
HOLD_OUT = 5


@dataclass(frozen=True)
class AlignedParent:
    """A parent with what brings its activations into the anchor's units.

    Attributes:
        model, binding: the parent.
        alignment: its maps; None for the anchor.
        weight: its share of the targets.
    """

    model: nn.Module
    binding: Binding
    alignment: Alignment | None
    weight: float

    def moved(self, seen: Mapping[str, Tensor], axis: str) -> Tensor:
        """The activations of `axis` in the anchor's units, [..., n_anchor], float64.

        Args:
            seen: axis -> activations; with `align.qk joint` those of the whole circuit.
        """
        if self.alignment is None or axis not in self.alignment.maps:
            return seen[axis].double()
        for circuit, plan in self.alignment.joint.items():
            if axis in circuit:
                both = torch.cat([seen[member].double() for member in circuit], dim=-1)
                return (both @ plan.to_output.to(both)).chunk(2, dim=-1)[circuit.index(axis)]
        tensor = seen[axis].double()
        return tensor @ self.alignment.maps[axis].to_output.to(tensor)


def refit(
    model: nn.Module,
    binding: Binding,
    parents: Sequence[AlignedParent],
    calibration: Iterable[Any],
    config: CalibrationConfig,
    *,
    keep: frozenset[str] = frozenset(),
    progress: Progress = no_progress,
) -> None:
    """Fits the linear maps of `model` in place.

    The target of a map that writes into the residual stream is the mean of the parents' aligned streams behind the
    addition minus what the fused stream already holds, so errors of earlier layers are corrected. Post-LN norms are
    fitted too, a gain and a shift a unit. The stem reads the same input in every parent and needs no fit.

    Args:
        model, binding: the average of the aligned parents, and its binding (the anchor's).
        parents: all of them, the anchor too.
        calibration: batches, not a generator: iterated once a stage. Memory does not grow with them.
        config: samples and batch size. All tokens but padding count, whatever `tokens` says.
        keep: parameters that stay as they are.
        progress: wraps the stages.
    """
    fit = _Fit(model.eval(), binding, parents)
    with torch.inference_mode(), eval_mode(*(parent.model for parent in parents)):
        for stage in progress(_stages(model, binding, keep), "refit"):
            fit.solve(stage, batches(calibration, config))


@dataclass(frozen=True)
class _Stage:
    """Linear modules that read the same units, or one norm that writes the stream: fitted together.

    `writes` has, for each module, the axes that it writes, in the order of its output.
    """

    writes: Mapping[str, tuple[str, ...]]
    norm: bool

    @property
    def axes(self) -> frozenset[str]:
        return frozenset(axis for axes in self.writes.values() for axis in axes)


def _stages(model: nn.Module, binding: Binding, keep: frozenset[str]) -> list[_Stage]:
    """In forward order."""
    norms = {tap.target: axis for axis, tap in binding.taps.items() if axis in binding.joins and tap.kind == "output"}
    linear: dict[str, list[Slot]] = defaultdict(list)
    for slot in binding.slots:
        if slot.section != "stem" and any(slot.reads) and slot.parameter not in keep:
            linear[slot.parameter.rpartition(".")[0]].append(slot)
    places: list[tuple[Any, str, tuple[str, ...]]] = []
    for name, _ in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in linear:
            first = linear[module][0]
            key = first.section, _axes(first, reads=True)
            writes = dict.fromkeys(axis for slot in linear[module] for axis in _axes(slot, reads=False))
            places.append((key, module, tuple(writes)))
        elif leaf == "weight" and module in norms:
            places.append((module, module, (norms[module],)))
    return [
        _Stage({module: axes for _, module, axes in group}, norm=isinstance(key, str))
        for key, group in itertools.groupby(places, key=lambda place: place[0])
    ]


def _axes(slot: Slot, *, reads: bool) -> tuple[str, ...]:
    return tuple(axis for axis, read in zip(slot.axes, slot.reads, strict=True) if axis and read == reads)


class _Fit:
    def __init__(self, model: nn.Module, binding: Binding, parents: Sequence[AlignedParent]) -> None:
        self.model, self.binding, self.parents = model, binding, parents
        self.streams = {join.branch: (name, join.skip) for name, join in binding.joins.items()}

    def solve(self, stage: _Stage, calibration: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Accumulates the normal equations of a stage over the calibration set and solves them."""
        sums = {module: self._empty(stage, module) for module in stage.writes}
        for first, batch in calibration:
            inputs, targets = self._pairs(stage, batch)
            for module, x in inputs.items():
                y = torch.cat([targets[axis] for axis in stage.writes[module]], dim=-1)
                for part, rows in zip(sums[module], _parts(x, first, batch.get("attention_mask")), strict=True):
                    part.update(x[rows], y[rows])
        for module, (part, held_out) in sums.items():
            if dist.is_initialized():
                for tensor in (*part.tensors(), *held_out.tensors()):
                    dist.all_reduce(tensor)
            fit = _fit_norm if stage.norm else _fit_linear
            fit(self.model.get_submodule(module), part, held_out)

    def _empty(self, stage: _Stage, module: str) -> tuple[NormalEquations, NormalEquations]:
        """Sums of the rows to fit and of those held out, on every rank, even one without a batch."""
        weight = self.model.get_submodule(module).get_parameter("weight")
        written = sum(self.binding.axes[axis].size for axis in stage.writes[module])
        read = weight.numel() // written
        fit, held_out = (NormalEquations.zeros(read if not stage.norm else written, written, device=weight.device)
                         for _ in range(2))  # fmt: skip
        return fit, held_out

    def _pairs(self, stage: _Stage, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the fused model puts into each module (of a norm: what comes out), and what each axis should become:
        the weighted mean of the parents' aligned activations; of a branch, their streams less the fused one's."""
        skips = {axis: self.streams[axis] for axis in stage.axes & self.streams.keys() if not stage.norm}
        places = [skip for _, skip in skips.values()]
        targets: dict[str, Tensor] = {}
        for parent in self.parents:
            with recorded(parent.model, parent.binding, places) as held, _passing(parent.model, stage) as outputs:
                logits(parent.model, batch)
            seen: dict[str, Tensor] = {}
            for module, axes in stage.writes.items():
                sizes = [parent.binding.axes[axis].size for axis in axes]
                seen.update(zip(axes, outputs[module].split(sizes, dim=-1), strict=True))
            for axis in stage.axes:
                if axis in skips:
                    stream, skip = skips[axis]
                    moved = parent.moved({stream: held[skip].double() + seen[axis].double()}, stream)
                else:
                    moved = parent.moved(seen, axis)
                targets[axis] = targets.get(axis, 0) + parent.weight * moved
        with (
            recorded(self.model, self.binding, places) as held,
            _passing(self.model, stage, inputs=not stage.norm) as inputs,
        ):
            logits(self.model, batch)
        for axis, (_, skip) in skips.items():
            targets[axis] = targets[axis] - held[skip].double()
        return inputs, targets


@contextlib.contextmanager
def _passing(model: nn.Module, stage: _Stage, *, inputs: bool = False) -> Iterator[dict[str, Tensor]]:
    """Collects what comes out of the modules of a stage, or goes in, and ends the forward pass behind the last."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        seen[name] = tensor.detach()
        if len(seen) == len(stage.writes):
            raise _Reached

    with contextlib.ExitStack() as stack:
        for name in stage.writes:
            module = model.get_submodule(name)
            hook = (
                module.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
                if inputs
                else module.register_forward_hook(lambda _, args, output, name=name: keep(name, output))
            )
            stack.callback(hook.remove)
        with contextlib.suppress(_Reached):
            yield seen


class _Reached(Exception):  # noqa: N818  # a signal, not an error
    """The part of a forward pass that is needed is over."""


def _parts(x: Tensor, first: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which rows [B] or [B, T] of a batch are fitted and which choose the penalty; padding is neither."""
    shape = x.shape[:-1]
    held = (torch.arange(first, first + len(x), device=x.device) + 1) % HOLD_OUT == 0
    held = held.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    real = torch.ones(shape, dtype=torch.bool, device=x.device) if mask is None or len(shape) == 1 else mask.bool()
    real = real.to(x.device)
    return real & ~held, real & held


def _fit_linear(module: nn.Module, part: NormalEquations, held_out: NormalEquations) -> None:
    weight, bias = module.get_parameter("weight"), cast(Tensor | None, module.bias)
    prior = weight.double().flatten(1).T if isinstance(module, nn.Linear) else weight.double()
    constant = prior.new_zeros(1, prior.shape[1]) if bias is None else bias.double()[None]
    solution, _ = fit_ridge(part, held_out, torch.cat([prior, constant]))
    weight.copy_(solution[:-1].T if isinstance(module, nn.Linear) else solution[:-1])
    if bias is not None:
        bias.copy_(solution[-1])


def _fit_norm(module: nn.Module, part: NormalEquations, held_out: NormalEquations) -> None:
    """One gain and one shift a unit, applied to what the norm puts out now."""
    sums = part + held_out
    x, xx, y = sums.xx[:-1, -1], sums.xx.diagonal()[:-1], sums.xy[-1]
    xy = sums.xy.diagonal()
    variance = xx - x.square() / sums.count
    gain = torch.where(variance > 0, (xy - x * y / sums.count) / variance, 1.0)
    shift = (y - gain * x) / sums.count
    module.get_parameter("weight").mul_(gain)
    module.get_parameter("bias").mul_(gain).add_(shift)
