"""The configuration of a fusion: `conf/fuse/*.yaml`."""

from dataclasses import dataclass, field

from fusionpl.alignment import AlignConfig
from fusionpl.calibration import CalibrationConfig


@dataclass(frozen=True)
class FuseConfig:
    """Everything that decides a fusion, apart from the parents and the calibration data.

    Attributes:
        anchor: index of the parent that the others are aligned to; negative counts from the end.
        weights: one number a parent, summing to 1; null = uniform.
        calibration: how activations are collected.
        align: how units are matched.
    """

    anchor: int = 0
    weights: list[float] | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
