"""fuse(): calibrate, align, apply, average, refit."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml
from torch import nn

from fusionpl.alignment import ActivationEvidence, AlignConfig, Alignment, WeightEvidence, align, evidence_keys
from fusionpl.calibration import Key, Moments, Progress, calibrate, device_of, has_float64, no_progress
from fusionpl.errors import FusionError
from fusionpl.families import (
    Binding,
    State,
    aligned_state,
    bind,
    canonical,
    check_compatible,
    check_finite,
    load_parameters,
    without_scales,
)
from fusionpl.fusion.average import average, mixing_weights, own_state
from fusionpl.fusion.config import FuseConfig
from fusionpl.fusion.refit import AlignedParent, refit
from fusionpl.models import class_names, save_model
from fusionpl.transport import TransportMap


@dataclass
class FusionResult:
    """What a fusion made.

    Attributes:
        model: the fused model, with the anchor's architecture; in eval mode.
        parents: in order, each with its alignment; for a rotation they are in canonical form.
        aligned: each parent's parameters in the anchor's units.
        config: what was asked for.
        averaged: the mean of the aligned parents, where the model is more than that; else None.
        refitted: the least-squares refit, where the model is more than that; else None.
        warnings: what a reader should know, for example solvers that did not converge, by axis.
    """

    model: nn.Module
    parents: list[AlignedParent]
    aligned: list[State]
    config: FuseConfig
    averaged: nn.Module | None = None
    refitted: nn.Module | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def alignments(self) -> list[Alignment | None]:
        """One a parent, in order; None for the anchor, whose units stay."""
        return [parent.alignment for parent in self.parents]

    @property
    def binding(self) -> Binding:
        """The model's: it has the anchor's architecture."""
        return self.parents[resolve_anchor(self.config, len(self.parents))].binding

    @property
    def maps(self) -> dict[str, TransportMap]:
        """Axis -> map of the first parent that is not the anchor."""
        return next((alignment.maps for alignment in self.alignments if alignment), {})

    def aligned_parent(self, index: int) -> nn.Module:
        """Parent `index` in the anchor's units, as a model of its own."""
        return load_parameters(copy.deepcopy(self.model), self.aligned[index])

    def save(self, folder: str | Path, *, tokenizer: Any = None, card: str = "") -> None:
        """Writes model/ (the fused model in its own library's format), maps.safetensors and config.yaml.

        Args:
            folder: a run folder; what is there of the same name is replaced.
            tokenizer: of a language model, kept beside it.
            card: Markdown body of the model card.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, folder / "model", tokenizer=tokenizer, card=card)
        plans = {
            f"parent{index}/{axis}": found.plan.float().contiguous()
            for index, alignment in enumerate(self.alignments)
            if alignment
            for axis, found in alignment.maps.items()
        }
        safetensors.torch.save_file({name: plan.clone() for name, plan in plans.items()}, folder / "maps.safetensors")
        (folder / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(self.config), sort_keys=False))


def fuse(
    parents: Sequence[nn.Module],
    calibration: Iterable[Any],
    config: FuseConfig | None = None,
    *,
    names: Sequence[str] | None = None,
    progress: Progress = no_progress,
) -> FusionResult:
    """Aligns the parents to the anchor and averages them into one model.

    Source: Imfeld et al., "Transformer Fusion with Optimal Transport", ICLR 2024.

    Args:
        parents: two or more models of one family, depth and set of classes; widths may differ.
        calibration: any iterable of batches (mapping of model inputs, or image tensor [B, C, H, W]); labels are never
            read. With `align.evidence: weights` it may be empty.
        config: see FuseConfig.
        names: how messages call the parents.
        progress: wraps loops for a progress bar.

    Returns:
        FusionResult; its model is new, the parents are untouched.

    Raises:
        FusionError: parents that do not fit together, NaN weights, an empty calibration set, an option out of range.
    """
    config = config or FuseConfig()
    return Calibrated(parents, calibration, [config], names=names, progress=progress).fuse(config)


class Calibrated:
    """Parents that one calibration pass has prepared for fusion under one or several configurations.

    Args:
        parents, names, progress: see `fuse`.
        calibration: see `fuse`; it is iterated once here and, if a configuration refits, once for each of its stages.
        configs: they share the anchor, what is collected (`calibration.samples` and `tokens`), and `align.stream`.

    Raises:
        FusionError: see `fuse`.
    """

    def __init__(
        self,
        parents: Sequence[nn.Module],
        calibration: Iterable[Any],
        configs: Sequence[FuseConfig],
        *,
        names: Sequence[str] | None = None,
        progress: Progress = no_progress,
    ) -> None:
        first = configs[0]
        self.names = list(names or (f"parent {index}" for index in range(len(parents))))
        self.bindings = check_parents(parents, self.names)
        self.anchor = resolve_anchor(first, len(parents))
        for config in configs:
            mixing_weights(config.weights, len(parents))  # a mistake here should not cost a calibration
        self.parents = [
            _prepared(parent, binding, name, configs)
            for parent, binding, name in zip(parents, self.bindings, self.names, strict=True)
        ]
        # A generator would be used up after the first pass over it.
        once = iter(calibration) is calibration and any(config.refit.method != "none" for config in configs)
        self.calibration = list(calibration) if once else calibration
        self.progress = progress
        anchor = self.bindings[self.anchor]
        keys = list(dict.fromkeys(key for config in configs for key in evidence_keys(anchor, config.align)))
        self.moments = calibrate(
            self.parents, self.bindings, self.anchor, self.calibration, keys, first.calibration, progress
        )

    def fuse(self, config: FuseConfig) -> FusionResult:
        """Aligns, applies, averages and refits under one of the configurations."""
        anchor, parents, bindings = self.anchor, self.parents, self.bindings
        weights = mixing_weights(config.weights, len(parents))
        alignments = align_all(parents, bindings, anchor, self.moments, config)
        aligned = [
            aligned_state(parent, binding, parents[anchor], bindings[anchor], found.maps, found.joint)
            if found
            else own_state(parent)
            for parent, binding, found in zip(parents, bindings, alignments, strict=True)
        ]
        kept = anchor_only(bindings[anchor], config.align)
        model = load_parameters(copy.deepcopy(parents[anchor]), average(aligned, weights, kept, anchor)).eval()
        moved = [AlignedParent(*each) for each in zip(parents, bindings, alignments, weights, strict=True)]
        result = FusionResult(model, moved, aligned, config, warnings=_unconverged(alignments, self.names))
        if config.refit.method == "ridge":
            result.averaged = copy.deepcopy(model)
            refit(
                model, bindings[anchor], moved, self.calibration, config.calibration,
                keep=kept, progress=self.progress,
            )  # fmt: skip
        return result


def _prepared(parent: nn.Module, binding: Binding, name: str, configs: Sequence[FuseConfig]) -> nn.Module:
    if configs[0].align.stream == "rotation":
        return canonical(parent, binding, name)
    if any(config.refit.method != "none" for config in configs):
        return without_scales(parent, binding)
    return parent


def align_all(
    parents: Sequence[nn.Module],
    bindings: Sequence[Binding],
    anchor: int,
    moments: Sequence[Mapping[Key, Moments]],
    config: FuseConfig,
) -> list[Alignment | None]:
    """One alignment a parent from calibrated moments; None for the anchor."""
    alignments: list[Alignment | None] = []
    for index, (parent, binding) in enumerate(zip(parents, bindings, strict=True)):
        if index == anchor:
            alignments.append(None)
            continue
        centred = config.align.metric == "correlation"
        scale = config.calibration.scale
        evidence: ActivationEvidence | WeightEvidence
        if config.align.evidence == "weights":
            evidence = WeightEvidence(
                parent, binding, parents[anchor], bindings[anchor], scale,
                centred=centred, magnitudes=moments[index],
            )  # fmt: skip
        else:
            evidence = ActivationEvidence(moments[index], bindings[anchor], scale, centred=centred)
        alignments.append(align(binding, bindings[anchor], evidence, config.align))
    return alignments


def check_parents(parents: Sequence[nn.Module], names: Sequence[str]) -> list[Binding]:
    """Binds every parent and checks that they can be fused.

    Raises:
        FusionError: naming the parents and what differs.
    """
    if len(parents) < 2:
        raise FusionError(f"fusion needs at least two parents, not {len(parents)}; give --parents A B")
    homes = [device_of(parent) for parent in parents]
    for home, name in zip(homes, names, strict=True):
        if home != homes[0]:
            raise FusionError(f"{names[0]} is on {homes[0]}, {name} on {home}; move them to one with parent.to(device)")
    if not has_float64(homes[0]):
        raise FusionError(
            f"the parents are on {homes[0]}, which has no float64; fuse them on the CPU: parent.to('cpu')"
        )
    for parent, name in zip(parents, names, strict=True):
        check_finite(parent, name)
    bindings = [bind(parent) for parent in parents]
    check_compatible(dict(zip(names, bindings, strict=True)))
    classes = {name: labels for name, parent in zip(names, parents, strict=True) if (labels := class_names(parent))}
    first, reference = next(iter(classes.items()), ("", ()))
    for name, labels in classes.items():
        if labels != reference:
            ours, theirs = next((a, b) for a, b in zip_longest(reference, labels) if a != b)
            raise FusionError(
                f"parents of different class names: where {first} has '{ours}', {name} has '{theirs}'; "
                "train both on the same classes"
            )
    return bindings


def resolve_anchor(config: FuseConfig, count: int) -> int:
    """The anchor's index, from 0. Raises FusionError when out of range."""
    if not -count <= config.anchor < count:
        raise FusionError(f"anchor {config.anchor} is not an index into {count} parents; use 0 to {count - 1}")
    return config.anchor % count


def anchor_only(binding: Binding, config: AlignConfig) -> frozenset[str]:
    """The parameters that `align.embeddings` and `align.classifier` leave to the anchor."""
    stem = {slot.parameter for slot in binding.slots if slot.section == "stem"}
    classifier = {
        slot.parameter
        for slot in binding.slots
        if slot.section == "tail"
        and all(axis in binding.family.fixed for axis, reads in zip(slot.axes, slot.reads, strict=True) if not reads)
    }
    return frozenset((set() if config.embeddings else stem) | (set() if config.classifier else classifier))


def _unconverged(alignments: Sequence[Alignment | None], names: Sequence[str]) -> list[str]:
    lines = []
    for alignment, name in zip(alignments, names, strict=True):
        if alignment is None:
            continue
        bad = {axis: one for axis, one in alignment.maps.items() if not one.converged}
        if bad:
            axis, worst = max(bad.items(), key=lambda item: item[1].marginal_error)
            lines.append(
                f"{name}: {worst.solver} did not converge on {len(bad)} of {len(alignment.maps)} axes, worst '{axis}' "
                f"(marginal error {worst.marginal_error:.1e} after {worst.iterations} iterations); "
                "raise align.reg or use align.solver emd"
            )
    return lines
