"""What memory and disk a fusion needs, from shapes alone."""

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusionpl.calibration.forward import Batch, eval_mode, inputs_of
from fusionpl.calibration.kept import GIB, budget, free_memory
from fusionpl.calibration.moments import Key
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.calibration.tokens import window
from fusionpl.errors import FusionError
from fusionpl.families.axes import Binding, boundary
from fusionpl.fusion.groups import LinearGroup
from fusionpl.fusion.plan import Plan, SectionPlan
from fusionpl.fusion.team import Team


@dataclass(frozen=True)
class Needs:
    """What a fusion needs, in bytes.

    Attributes:
        memory: at the peak, beyond what parents that are modules hold.
        disk: of temporary files.
        output: of the fused model.
    """

    memory: int
    disk: int
    output: int

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

    def summary(self, device: torch.device) -> str:
        """All of it in one line."""
        return (
            f"expected on {device}: {_size(self.memory)} of memory, {_size(self.disk)} of temporary files, a model of "
            f"{_size(self.output)}"
        )


def needs_of(team: Team, plan: Plan, batch: Batch, samples: int | Sequence[int], device: torch.device) -> Needs:
    """What a fusion needs.

    Args:
        team: the parents; no weight is read.
        plan: of the fusion.
        batch: one of the calibration set.
        samples: in the calibration set, or in that of each parent.
        device: where it will run.

    Raises:
        FusionError: `calibration.tokens` asks for a window that these images have not.
    """
    config, inputs = plan.config.calibration, inputs_of(batch)
    size = min(len(next(iter(inputs.values()))), config.batch_size)
    inputs = {key: value[:size] for key, value in inputs.items()}
    parents = [_Shapes.of(network, inputs) for network in team.networks]
    fused = parents[team.anchor] if plan.target is team.reference else _Shapes.of(plan.target, inputs)
    if config.tokens.startswith("window:") and "pixel_values" in inputs:
        window(parents[team.anchor].tokens, config.tokens)  # which refuses one that the grid has no room for
    sets = [samples] if isinstance(samples, int) else samples
    rows = sum(min(own, config.samples) for own in sets) * parents[team.anchor].tokens
    kept = _kept(team, plan, parents, fused, rows)
    limit = budget(config.memory, device)
    return Needs(
        memory=_working(team, plan, fused, size) + sum(min(each, limit) for each in kept),
        disk=sum(max(each - limit, 0) for each in kept),
        output=sum(each.numel() * each.element_size() for each in plan.target.module.parameters()),
    )


@dataclass(frozen=True)
class _Shapes:
    """What a batch looks like in a network: found without computing anything.

    Attributes:
        tokens: of a sample, in the stack that has most.
        widths: weight of a linear module -> the width of what the module reads.
    """

    tokens: int
    widths: Mapping[str, int]

    @classmethod
    def of(cls, network: SectionedModel, inputs: Mapping[str, Tensor]) -> "_Shapes":
        ran = network.original
        module, binding = ran.module, ran.binding
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad(), eval_mode(module):
            empty = {name: torch.empty(each.shape) for name, each in module.named_parameters()}
            fake = {key: mode.from_tensor(value) for key, value in inputs.items()}
            ends: list[Tensor] = []
            tokens = 0
            for blocks in binding.stacks:
                used = [name for section in binding.ends[: len(ends) + 1] for name in binding.uses[section]]
                hidden, calls, _ = ran.enter({name: empty[name] for name in used}, fake, ends)
                block = {name: empty[name] for name in binding.uses[blocks[0]]}
                end = ran.through(blocks[0], block, hidden=hidden, call=calls[0]).out
                assert end is not None
                ends.append(end)
                tokens = max(tokens, hidden[..., 0].numel() // len(hidden))
        reads = {slot.parameter: slot.reads[0] for slot in network.binding.slots}
        shapes = {name: each.shape for name, each in network.module.named_parameters() if each.ndim > 1}
        return cls(
            tokens, {name: shape[0] if reads.get(name) else math.prod(shape[1:]) for name, shape in shapes.items()}
        )

    def reads(self, module: str) -> int:
        """The width of what a linear module reads."""
        return self.widths[f"{module}.weight"]

    def shows(self, group: LinearGroup, binding: Binding) -> int:
        """The width of what is kept of a group, in a network that it is fitted to."""
        return self.reads(group.first) if group.narrow else group.width(binding)


def _units(binding: Binding, key: Key) -> int:
    return sum(binding.axes[axis].size for axis in key)


def _kept(team: Team, plan: Plan, parents: Sequence[_Shapes], fused: _Shapes, rows: int) -> tuple[int, int]:
    """Bytes of the activations that are kept between sections, and of the maps."""
    target, bindings = plan.target.binding, [*team.bindings, plan.target.binding]
    # Behind the last stack, those of the stacks before it are still there.
    *streams, ours = [sum(binding.axes[boundary(blocks[-1])].size for blocks in binding.stacks) for binding in bindings]
    widths = [0] * len(bindings)
    for section in plan.sections:
        shown = [
            sum(shapes.shows(group, binding) for group in section.groups)
            for shapes, binding in zip((*parents, fused), bindings, strict=True)
        ]
        widths = [max(pair) for pair in zip(widths, shown, strict=True)]
    item = getattr(torch, plan.config.calibration.dtype).itemsize
    activations = sum(streams) + sum(widths[:-1]) + (ours + widths[-1] if plan.fits else 0)
    maps = sum(
        8 * axis.size * target.axes[name].size
        for index, binding in enumerate(team.bindings)
        for name, axis in binding.axes.items()
        if index != team.anchor and not axis.fixed
    )
    return item * rows * activations if plan.observes else 0, maps


def _working(team: Team, plan: Plan, fused: _Shapes, samples: int) -> int:
    """Bytes that one section needs at once, of the largest."""
    return max((_in_section(section, team, plan, fused, samples) for section in plan.sections), default=0)


def _in_section(section: SectionPlan, team: Team, plan: Plan, fused: _Shapes, samples: int) -> int:
    ours = plan.target.binding
    *weights, new = [
        4 * sum(network.module.get_parameter(name).numel() for name in network.binding.uses[section.name])
        for network in (*team.networks, plan.target)
    ]
    elsewhere = [next(network.module.parameters()).is_meta for network in team.networks]  # read from files
    held = sum(each for each, away in zip(weights, elsewhere, strict=True) if away) + sum(weights) + 2 * new
    moments = [
        8 * _units(binding, key) * _units(ours, key)
        for index, binding in enumerate(team.bindings)
        if index != team.anchor
        for key in section.keys
    ]
    fits = []
    for group in section.groups:
        if not group.norm:
            n, m = fused.reads(group.first), group.width(ours)
            columns = n * len(team) if group.narrow else m
            fits.append(8 * (5 * n * n + 2 * n * columns + 5 * n * m))
    passing = 4 * fused.tokens * samples * 2 * sum(group.width(ours) for group in section.groups)
    return held + max(sum(moments) + 6 * max(moments, default=0), max(fits, default=0)) + passing


def _size(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB or not size else f"{max(size / GIB * 1024, 1):.0f} MiB"
