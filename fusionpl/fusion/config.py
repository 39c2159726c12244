"""The configuration of a fusion: `conf/fuse/*.yaml`."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from fusionpl.alignment import AlignConfig
from fusionpl.calibration import CalibrationConfig
from fusionpl.errors import FusionError, flattened, nearest


@dataclass(frozen=True)
class RefitConfig:
    """What happens to the average without labels and gradients.

    Attributes:
        method: `none`, or `ridge`: each linear map is fitted, in forward order, from what the fused model itself puts
            into it to the weighted mean of the parents' aligned outputs, shrunk towards the average.
    """

    method: Literal["none", "ridge"] = "none"


@dataclass(frozen=True)
class RefineConfig:
    """A few gradient steps on unlabeled calibration data, between one-shot fusion and finetuning.

    Attributes:
        method: `none`, or `gradient`: the fused model's streams and predictions are drawn to the parents' mean.
        steps: optimiser steps.
        batch_size: samples a step and process.
        lr: largest learning rate of AdamW.
    """

    method: Literal["none", "gradient"] = "none"
    steps: int = 300
    batch_size: int = 32
    lr: float = 1e-4


@dataclass(frozen=True)
class FuseConfig:
    """Everything that decides a fusion, apart from the parents and the calibration data.

    Attributes:
        anchor: index of the parent that the others are aligned to; negative counts from the end.
        weights: one number a parent, summing to 1; null = uniform.
        calibration: how activations are collected.
        align: how units are matched.
        refit: what happens to the average.
        refine: what happens after that; see `fusionpl.training.refine`.
    """

    anchor: int = 0
    weights: list[float] | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    refit: RefitConfig = field(default_factory=RefitConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> FuseConfig:
    """Reads a fuse configuration.

    Args:
        path: a YAML file such as conf/fuse/paper.yaml; None for the defaults of FuseConfig.
        overrides: dotted keys, for example `{"align.solver": "emd"}`.

    Raises:
        FusionError: no such file, a key that does not exist (names the nearest), a value of the wrong type.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_text()) or {}
        except FileNotFoundError as error:
            raise FusionError(f"there is no configuration file {path}") from error
        except yaml.YAMLError as error:
            raise FusionError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    flat = flattened(tree) | dict(overrides or {})
    known = _types(FuseConfig)
    for key, value in flat.items():
        if key not in known:
            raise FusionError(f"unknown key {key}{nearest(key, known)}")
        if not _fits(value, known[key]):
            raise FusionError(f"{key}: {value!r} is not {_readable(known[key])}")
    config: FuseConfig = _built(FuseConfig, flat)
    return config


def _types(cls: type, prefix: str = "") -> dict[str, Any]:
    known: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        known |= (
            _types(typing.cast(type, kind), f"{prefix}{name}.")
            if dataclasses.is_dataclass(kind)
            else {f"{prefix}{name}": kind}
        )
    return known


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _readable(kind: Any) -> str:
    return (
        " or ".join(map(str, get_args(kind))) if get_origin(kind) is Literal else getattr(kind, "__name__", str(kind))
    )


def _built(cls: type, flat: Mapping[str, Any], prefix: str = "") -> Any:
    values: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            values[name] = _built(typing.cast(type, kind), flat, f"{prefix}{name}.")
        elif f"{prefix}{name}" in flat:
            values[name] = flat[f"{prefix}{name}"]
    return cls(**values)
