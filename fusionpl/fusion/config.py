"""The configuration of a fusion: `conf/fuse/*.yaml`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser

from fusionpl.alignment.config import AlignConfig
from fusionpl.calibration.config import CalibrationConfig
from fusionpl.errors import FusionError, check_choices, flattened
from fusionpl.options import check_sections, explain, read_yaml
from fusionpl.presets import preset

# How units are matched where nobody asked for anything: by conf/fuse/default.yaml, and by this class.
_UNTOUCHED = (AlignConfig(reg=0.02, residual="auto"), AlignConfig())


# The share of a refinement that its race takes, of the minutes, or besides the steps.
RACE = 0.25


def changed(align: AlignConfig) -> list[str]:
    """The options that somebody asked for: those that differ from the preset that is nearest."""
    return min(
        ([one.name for one in fields(align) if getattr(align, one.name) != getattr(untouched, one.name)]
         for untouched in _UNTOUCHED),
        key=len,
    )  # fmt: skip


@dataclass(frozen=True)
class RefitConfig:
    """What happens to the average without labels and gradients.

    Attributes:
        method: `none`, or `ridge`: each linear map is fitted, in forward order, from what the fused model itself puts
            into it to the weighted mean of the parents' aligned outputs, shrunk towards the average.
    """

    method: Literal["none", "ridge"] = "none"

    def __post_init__(self) -> None:
        """Raises FusionError for a method that is none."""
        check_choices(self, "refit")


@dataclass(frozen=True)
class RefineConfig:
    """Gradient steps on unlabeled data, between one-shot fusion and finetuning.

    Attributes:
        method: `none`, or `gradient`: predictions are drawn to the parents' mean, as far as held-out samples say that
            it helps; `auto`: `gradient` where steps or minutes are given.
        start: what is taught: the `fused` model, or the `parent` that is nearest to the parents' mean once its head is
            fitted; `auto`: each for half of the time, and whichever is nearer then, or the fused model where a
            width or depth is asked for, no head of a parent can be fitted, or the parents know other classes. What
            starts from a parent has its architecture.
        steps: optimiser steps of all starts together, and a quarter more for the race where there is one; null: 300, or
            as many as fit into `minutes`.
        minutes: train until this time is over, in place of a number of steps; the race takes a quarter of it. How many
            steps that are depends on the machine, so such a result does not repeat number for number.
        batch_size: samples a step and process.
        lr: largest learning rate of AdamW; null: a short race chooses it.
        samples: teach on at most so many samples, every fifth of which is held out: the calibration set's first, then
            those of the training data. null: all.
        augment: whether samples are augmented, by what `fusionpl.fuse` or the data module has for that; those that
            are held out never are.
    """

    method: Literal["auto", "none", "gradient"] = "auto"
    start: Literal["auto", "fused", "parent"] = "auto"
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 64
    lr: float | None = None
    samples: int | None = None
    augment: bool = False

    def __post_init__(self) -> None:
        """Raises FusionError for values out of range."""
        check_choices(self, "refine")
        for name in ("steps", "batch_size", "samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise FusionError(f"refine.{name} must be at least 1, not {value}")
        for name in ("minutes", "lr"):
            if (value := getattr(self, name)) is not None and not (math.isfinite(value) and value > 0):
                raise FusionError(f"refine.{name} must be above 0, not {value}")
        asked = next((name for name in ("steps", "minutes") if getattr(self, name) is not None), None)
        if asked and self.method == "none":
            raise FusionError(
                f"refine.{asked} has nothing to do while refine.method is none; use refine.method gradient"
            )
        if self.steps is not None and self.minutes is not None:
            raise FusionError("refine.steps and refine.minutes both say how long to refine; leave one out, or null")

    @property
    def asked(self) -> bool:
        """Whether anything is refined."""
        return self.method == "gradient" or (self.method == "auto" and (self.steps or self.minutes) is not None)

    @property
    def planned(self) -> int:
        """Steps where no time is given."""
        return 300 if self.steps is None else self.steps


Labels = Literal["union", "separate", "anchor"]


@dataclass(frozen=True)
class FuseConfig:
    """Everything that decides a fusion, apart from the parents and the calibration data.

    Attributes:
        anchor: index of the parent that the others are aligned to; negative counts from the end.
        weights: one number a parent, summing to 1; null = uniform.
        calibration: how activations are collected.
        align: how units are matched.
        refit: what happens to the average.
        refine: what happens after that; see `fusionpl.fusion.methods.refinement`.
        strategy: `transport`: units are matched and averaged; `joint`: one stream holds as much of all parents' streams
            as fits into it, the other units are the anchor's, and what reads and writes the stream is refitted
            (`align` has nothing to do; not for several stacks, nor norms inside a pre-LN stream); `head`: one parent as
            it is, whose head alone is fitted to what all predict: of the parents the one that then predicts held-out
            samples most as they do together; `auto`: `joint` where
            the family allows it and `align` is as in conf/fuse/default.yaml, else `transport`.
        width: with `joint`, the units of the fused model's stream, or up to 8 a factor of the anchor's; its heads and
            hidden units grow with it, and are more of the parents'. null: the anchor's.
        depth: with `joint`, the number of the fused model's blocks, between the shallowest parent's and the sum of all.
            null: the anchor's.
        units: with `joint`, which heads and hidden units: `anchor`, all of the anchor's and then the others' most
            useful; `even`, as many of each parent's, for parents that saw different data; `auto`: `even` where the
            predictions of classifiers on the calibration set say that they did, and no trial on a part of it speaks
            for `anchor`.
        labels: what parents whose classes have other names are fused to: `union`, one head for the classes of all, the
            anchor's first; `separate`, one trunk and a head for each parent, which may give classes, tags or numbers
            (`FusionResult.models`; `units auto` is `even`); `anchor`, the anchor's classes alone.
    """

    anchor: int = 0
    weights: list[float] | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    refit: RefitConfig = field(default_factory=RefitConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    strategy: Literal["transport", "joint", "head", "auto"] = "transport"
    width: int | float | None = None
    depth: int | None = None
    units: Literal["anchor", "even", "auto"] = "auto"
    labels: Labels = "union"

    def __post_init__(self) -> None:
        """Raises FusionError for options that contradict each other."""
        check_choices(self)
        if self.width is not None and not (math.isfinite(self.width) and self.width > 0):
            raise FusionError(f"width must be above 0, not {self.width}")
        if self.depth is not None and self.depth < 1:
            raise FusionError(f"depth must be at least 1, not {self.depth}")
        for name in ("width", "depth"):
            if self.refine.start == "parent" and getattr(self, name) is not None:
                raise FusionError(f"refine.start parent gives a parent's {name}; leave {name} out, or use start fused")
        if self.strategy == "transport" and self.width is not None:
            raise FusionError("strategy transport fuses into the anchor's width; width needs strategy joint")
        if self.strategy == "transport" and self.units != "auto":
            raise FusionError("strategy transport averages the units of all parents; units needs strategy joint")
        if self.strategy == "head" and (asked := [one for one in ("width", "depth") if getattr(self, one) is not None]):
            raise FusionError(f"strategy head keeps one parent's body; {asked[0]} needs strategy joint")
        if self.strategy == "head" and self.refine.asked:
            raise FusionError("strategy head keeps one parent's body; to teach it, use refine.start parent alone")
        if self.strategy != "joint":
            return
        if self.refit.method == "none":
            raise FusionError("strategy joint fits what reads and writes the stream; it needs refit.method ridge")
        if asked := changed(self.align):
            raise FusionError(
                f"strategy joint matches no units, so align.{asked[0]} has nothing to do; leave it out, or use "
                "strategy transport"
            )
        if self.weights and min(self.weights) <= 0:
            raise FusionError(f"strategy joint needs weights above 0, not {min(self.weights):g}; leave that parent out")

    @property
    def canonical(self) -> bool:
        """Whether parents are fused in canonical form."""
        return self.strategy == "joint" or self.align.stream == "rotation"


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> FuseConfig:
    """Reads a fuse configuration.

    Args:
        path: a YAML file, or the name of a preset of conf/fuse such as `paper`; None for the defaults of FuseConfig.
        overrides: dotted keys, for example `{"align.solver": "emd"}`.

    Raises:
        FusionError: no such file, a key that does not exist (names the nearest), a value of the wrong type or out of
            range.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FuseConfig)
    tree: dict[str, Any] = {}
    own = read_yaml(preset("fuse", path)) if path is not None else {}
    check_sections(own, parser, path)
    for key, value in (flattened(own) | dict(overrides or {})).items():
        *groups, leaf = key.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = value
    try:
        chosen = parser.instantiate(parser.parse_object(tree))
    except ArgumentError as error:
        raise FusionError(explain(str(error), parser)) from error
    return FuseConfig(**{field.name: chosen[field.name] for field in fields(FuseConfig)})


def resolve_anchor(config: FuseConfig, count: int) -> int:
    """The anchor's index, from 0. Raises FusionError when out of range."""
    if not -count <= config.anchor < count:
        raise FusionError(f"anchor {config.anchor} is not an index into {count} parents; use 0 to {count - 1}")
    return config.anchor % count


def mixing_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """One weight a parent; None is uniform. Raises FusionError unless there are `count` of them that sum to 1."""
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise FusionError(f"weights: {len(weights)} numbers for {count} parents; give one a parent")
    if not abs(sum(weights) - 1) <= 1e-6:
        raise FusionError(f"weights must sum to 1, {list(weights)} sum to {sum(weights):g}")
    return list(weights)
