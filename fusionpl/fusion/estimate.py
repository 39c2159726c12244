"""What a fusion will take: memory and disk from shapes alone, time from how fast this machine multiplies."""

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fusionpl.calibration.forward import Batch, eval_mode, inputs_of
from fusionpl.calibration.inputs import sources
from fusionpl.calibration.kept import GIB, budget, free_memory
from fusionpl.calibration.moments import Key
from fusionpl.calibration.network import Network
from fusionpl.calibration.tokens import window
from fusionpl.errors import FusionError
from fusionpl.families import Binding, State, boundary
from fusionpl.fusion.config import RACE, FuseConfig
from fusionpl.fusion.plan import Plan, SectionPlan
from fusionpl.fusion.stages import Stage
from fusionpl.transport.least_squares import COMBINATIONS
from fusionpl.transport.products import cross_product, self_product
from fusionpl.transport.softmax import LARGEST, spread

# What is not known before a fusion, as it was in those measured: how often a map's solver iterates (times the
# regularisation), how many penalties a fit tries, how many times a batch's rows are read and written beside products.
_EVALUATIONS = 120  # of a softmax regression's loss and gradient
_ITERATIONS, _PENALTIES, _PASSES = 2.0, 3, 10
_SYMMETRIC = 10 / 16  # of a product with itself is computed
_TRAINING = 3  # forward passes that one with its gradients takes
# Sizes of the probes, and how long one takes.
_PROBE, _SECONDS = 1024, 0.1


@dataclass(frozen=True)
class Estimate:
    """What a fusion will take.

    Attributes:
        memory: bytes at the peak beyond what parents that are modules hold.
        disk: bytes of temporary files.
        output: bytes of the fused model.
        work: what is computed, by kind: see `seconds`.
        given: seconds that were asked for: `refine.minutes`.
    """

    memory: int
    disk: int
    output: int
    work: Mapping[str, float]
    given: float = 0.0

    def check(self, device: torch.device, output: Path | None) -> None:
        """Raises FusionError where memory or disk will not do, with what is missing."""
        free = free_memory(device)
        if self.memory > free:
            raise FusionError(
                f"the fusion needs about {_size(self.memory)} of memory and {_size(free)} are free: "
                f"{_size(self.memory - free)} are missing; lower calibration.batch_size or calibration.memory"
            )
        places = [(Path(tempfile.gettempdir()), self.disk, "temporary files; set TMPDIR to a folder with more")]
        if output is not None:
            home = next(folder for folder in output.absolute().parents if folder.is_dir())
            places.append((home, self.output, "the fused model; choose another folder with --output"))
        for folder, needed, purpose in places:
            free = shutil.disk_usage(folder).free
            if needed > free:
                raise FusionError(
                    f"{folder} has {_size(free)} free, {_size(needed - free)} too little for the {_size(needed)} of "
                    f"{purpose}"
                )

    def seconds(self, device: torch.device) -> float:
        """The expected time of the fusion, after a second of measuring how fast the device is."""
        return self.given + sum(amount / _rate(kind, device) for kind, amount in self.work.items() if amount)

    def told(self, device: torch.device, trial: "Estimate | None" = None) -> str:
        """Time and memory in one line.

        Args:
            device: where it will run.
            trial: what one of two trials would take, if there may be any.
        """
        more = f" ({_duration(2 * trial.seconds(device))} more if units: auto has to try both ways)" if trial else ""
        return (
            f"expected: {_duration(self.seconds(device))}{more} on {device}, {_size(self.memory)} of memory, "
            f"{_size(self.disk)} of temporary files, a model of {_size(self.output)}"
        )


def estimate(
    plan: Plan,
    networks: Sequence[Network],
    anchor: int,
    config: FuseConfig,
    batch: Batch,
    samples: int,
    device: torch.device,
    goal: Network | None = None,
) -> Estimate:
    """What a fusion will take.

    Args:
        plan: of the fusion.
        networks: the parents; no weight is read.
        anchor: index of the anchor.
        config: what is asked for.
        batch: one of the calibration set.
        samples: in the calibration set.
        device: where it will run.
        goal: what the fused network looks like, where it is not like the anchor.
    """
    goal = goal or networks[anchor]
    inputs = inputs_of(batch)
    size = min(len(next(iter(inputs.values()))), config.calibration.batch_size)
    inputs = {key: value[:size] for key, value in inputs.items()}
    shapes = [_Shapes.of(network, inputs) for network in networks]
    fused = shapes[anchor] if goal is networks[anchor] else _Shapes.of(goal, inputs)
    samples = min(samples, config.calibration.samples)
    rows = samples * shapes[anchor].tokens
    evidence = samples * _evidence(config.calibration.tokens, shapes[anchor].tokens, inputs)
    bindings = [network.binding for network in networks]
    work = dict.fromkeys(("forward", "products", "elementwise", "cholesky", "solves", "transport", "svd"), 0.0)
    runs = plan.looks + any(section.keys or section.stages for section in plan.sections)
    alone = not runs and any(section.magnitudes for section in plan.sections)
    forward = runs * sum(one.forward for one in shapes) + (plan.fits + alone) * fused.forward
    work["forward"] = forward * samples / size
    refined = config.refine
    if refined.asked and refined.minutes is None:
        step = sum(one.forward for one in shapes) + _TRAINING * fused.forward
        work["forward"] += (1 + RACE) * step * refined.planned * refined.batch_size / size
    for index in range(len(networks)):
        if index != anchor:
            _add_alignment(work, plan, shapes, bindings, index, anchor, config, evidence)
    for axis in plan.together:
        work["products"] += 2 * evidence * _SYMMETRIC * sum(binding.axes[axis].size for binding in bindings) ** 2
    for stage in (stage for section in plan.sections for stage in section.stages if not stage.norm):
        n, m = fused.reads(stage.first), stage.width(goal.binding)
        columns = _columns(stage, shapes, bindings, anchor, goal.binding)
        work["products"] += 2 * rows * n * (n * _SYMMETRIC + columns)
        work["elementwise"] += 4 * _PASSES * rows * (n + columns)
        if stage.predicts and n * m <= LARGEST:
            work["products"] += 4 * _EVALUATIONS * rows // spread(rows, n * m) * n * m
        work["cholesky"] += (_PENALTIES + 1) * n**3 / 3
        work["solves"] += 4 * n * n * (m + _PENALTIES * min(m, COMBINATIONS))
    kept = _kept(plan, shapes, bindings, anchor, config, rows, fused, goal.binding)
    limit = budget(config.calibration.memory, device)
    working = _working(plan.sections, shapes, networks, anchor, shapes[anchor].tokens * size, fused, goal)
    return Estimate(
        memory=working + sum(min(one, limit) for one in kept),
        disk=sum(max(one - limit, 0) for one in kept),
        output=sum(one.numel() * one.element_size() for one in goal.module.parameters()),
        work=work,
        given=60 * (refined.minutes or 0.0) if refined.asked else 0.0,
    )


def _add_alignment(
    work: dict[str, float],
    plan: Plan,
    shapes: Sequence["_Shapes"],
    bindings: Sequence[Binding],
    index: int,
    anchor: int,
    config: FuseConfig,
    rows: int,
) -> None:
    """Adds what it takes to find the maps of a parent, and to move its parameters."""
    parent, reference = bindings[index], bindings[anchor]
    for name, keys in [("", plan.survey), *((section.name, section.keys) for section in plan.sections)]:
        derived = sources(reference, name, keys)
        direct = set(keys) - {key for one in derived for key in one.keys}
        pairs = [(_units(parent, key), _units(reference, key)) for key in direct]
        for module in (one.place.module for one in derived):
            n, m = shapes[index].reads(module), shapes[anchor].reads(module)
            pairs.append((n, m))
            work["products"] += 2 * rows * _SYMMETRIC * (n * n + m * m)
        work["products"] += 2 * rows * sum(n * m for n, m in pairs)
        work["elementwise"] += 4 * _PASSES * rows * sum(n + m for n, m in pairs)
    for problem in plan.problems:
        for kind, n, m in problem.solves(parent, reference):
            work[kind] += n * m * (min(n, m) if kind == "svd" else 16 * _ITERATIONS / config.align.reg)
    for slot in parent.slots:
        axes = [parent.axes[axis] for axis in slot.axes if axis]
        size = math.prod(axis.size for axis in axes)
        work["products"] += 2 * size * sum(axis.size for axis in axes if not axis.fixed)


@dataclass(frozen=True)
class _Shapes:
    """What a batch looks like in a network: found without computing anything.

    Attributes:
        tokens: of a sample, in the stack that has most.
        forward: floating-point operations of a batch.
        widths: weight of a linear module -> the width of what the module reads.
    """

    tokens: int
    forward: float
    widths: Mapping[str, int]

    @classmethod
    def of(cls, network: Network, inputs: Mapping[str, Tensor]) -> "_Shapes":
        ran = network.original
        module, binding = ran.module, ran.binding
        counts = []
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad(), eval_mode(module):
            empty = {name: torch.empty(one.shape) for name, one in module.named_parameters()}
            fake = {key: mode.from_tensor(value) for key, value in inputs.items()}

            def counted(times: int, run: Callable[[State], Any], *sections: str) -> Any:
                with FlopCounterMode(display=False) as counter:
                    found = run({name: empty[name] for section in sections for name in binding.uses[section]})
                counts.append(times * counter.get_total_flops())
                return found

            ends: list[Tensor] = []
            tokens = 0
            for blocks in binding.stacks:
                enter = partial(ran.enter, batch=fake, ends=ends)
                hidden, calls, _ = counted(1, enter, *binding.ends[: len(ends) + 1])
                through = partial(ran.through, blocks[0], hidden=hidden, call=calls[0])
                ends.append(counted(len(blocks), through, blocks[0]).out)
                tokens = max(tokens, hidden[..., 0].numel() // len(hidden))
            counted(1, partial(ran.leave, batch=fake, ends=ends), *binding.ends)
        widths = {name: one.shape for name, one in network.module.named_parameters() if one.ndim > 1}
        reads = {slot.parameter: slot.reads[0] for slot in network.binding.slots}
        return cls(
            tokens,
            sum(counts),
            {name: shape[0] if reads.get(name) else math.prod(shape[1:]) for name, shape in widths.items()},
        )

    def reads(self, module: str) -> int:
        """The width of what a linear module reads."""
        return self.widths[f"{module}.weight"]

    def shows(self, stage: Stage, binding: Binding) -> int:
        """The width of what is kept of a stage, in a network that it is fitted to."""
        return self.reads(stage.first) if stage.narrow else stage.width(binding)


def _evidence(tokens: str, length: int, inputs: Mapping[str, Tensor]) -> int:
    """How many of a sample's tokens count as evidence."""
    if tokens.startswith("window:") and "pixel_values" in inputs:
        return len(window(length, tokens))
    return 1 if tokens in ("class", "mean") else length


def _columns(stage: Stage, shapes: Sequence[_Shapes], bindings: Sequence[Binding], anchor: int, goal: Binding) -> int:
    """What the inputs of a stage are multiplied with."""
    others = [one.shows(stage, binding) for one, binding in zip(shapes, bindings, strict=True)]
    return sum(others) if stage.narrow else sum(others) - others[anchor] + stage.width(goal)


def _units(binding: Binding, key: Key) -> int:
    return sum(binding.axes[axis].size for axis in key)


def _kept(
    plan: Plan,
    shapes: Sequence[_Shapes],
    bindings: Sequence[Binding],
    anchor: int,
    config: FuseConfig,
    rows: int,
    fused: _Shapes,
    goal: Binding,
) -> tuple[int, int]:
    """Bytes of the activations that are kept between sections, and of the maps."""
    # Behind the last stack, those of the stacks before it are still there.
    *stream, ours = [
        sum(binding.axes[boundary(blocks[-1])].size for blocks in binding.stacks) for binding in (*bindings, goal)
    ]
    widths = [0] * (len(bindings) + 1)
    for section in plan.sections:
        each = [
            sum(one.shows(stage, binding) for stage in section.stages)
            for one, binding in zip((*shapes, fused), (*bindings, goal), strict=True)
        ]
        widths = [max(pair) for pair in zip(widths, each, strict=True)]
    item = getattr(torch, config.calibration.dtype).itemsize
    activations = sum(stream) + sum(widths[:-1]) + (ours + widths[-1] if plan.fits else 0)
    maps = sum(
        8 * axis.size * goal.axes[name].size
        for index, binding in enumerate(bindings)
        for name, axis in binding.axes.items()
        if index != anchor and not axis.fixed
    )
    return item * rows * activations if plan.observes else 0, maps


def _working(
    sections: Sequence[SectionPlan],
    shapes: Sequence[_Shapes],
    networks: Sequence[Network],
    anchor: int,
    rows: int,
    fused: _Shapes,
    goal: Network,
) -> int:
    """Bytes that one section needs at once, of the largest."""
    ours = goal.binding
    found = []
    for section in sections:
        *weights, new = [
            4 * sum(network.module.get_parameter(name).numel() for name in network.binding.uses[section.name])
            for network in (*networks, goal)
        ]
        read = sum(one for one, network in zip(weights, networks, strict=True) if _is_elsewhere(network.module))
        held = read + sum(weights) + 2 * new
        moments = [
            8 * _units(network.binding, key) * _units(ours, key)
            for index, network in enumerate(networks) if index != anchor for key in section.keys
        ]  # fmt: skip
        fits = []
        for stage in section.stages:
            if not stage.norm:
                n, m = fused.reads(stage.first), stage.width(ours)
                columns = _columns(stage, shapes, [network.binding for network in networks], anchor, ours)
                fits.append(8 * (5 * n * n + 2 * n * columns + 5 * n * m))
        passing = 4 * rows * 2 * sum(stage.width(ours) for stage in section.stages) if section.stages else 0
        found.append(held + max(sum(moments) + 6 * max(moments, default=0), max(fits, default=0)) + passing)
    return max(found, default=0)


def _is_elsewhere(module: nn.Module) -> bool:
    """Whether parameters have to be read from files."""
    return next(module.parameters()).is_meta


@cache
def _rate(kind: str, device: torch.device) -> float:
    """Operations (`transport`, `elementwise`: bytes) a second."""
    n = _PROBE
    x = torch.ones(2 * n, n, device=device)
    spd = torch.eye(n, dtype=torch.float64, device=device) + 1 / n
    column = torch.ones(n, dtype=torch.float64, device=device)
    probes: dict[str, tuple[float, Callable[[], Any]]] = {
        "forward": (4 * n**3, lambda: nn.functional.linear(x, x[:n])),
        "products": (4 * n**3 * (1 + _SYMMETRIC), lambda: (cross_product(x, x), self_product(x))),
        "elementwise": (3 * x.nbytes, lambda: x.square().sum(0)),
        "cholesky": (n**3 / 3, lambda: torch.linalg.cholesky(spd)),
        "solves": (2 * n**3, lambda: torch.cholesky_solve(spd, spd)),
        "transport": (2 * spd.nbytes, lambda: (spd @ column, spd.T @ column)),
        "svd": (n**3 / 64, lambda: torch.linalg.svd(spd[: n // 4, : n // 4])),
    }
    amount, run = probes[kind]
    run()
    started, runs = time.perf_counter(), 0
    while (taken := time.perf_counter() - started) < _SECONDS:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        runs += 1
    return amount * runs / taken


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _size(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB or not size else f"{max(size / GIB * 1024, 1):.0f} MiB"
