"""Options of calibration."""

from dataclasses import dataclass
from typing import Literal

Scale = Literal["standardize", "center", "normalize", "none"]


@dataclass(frozen=True)
class CalibrationConfig:
    """How activations are collected.

    Attributes:
        samples: how many samples of the calibration set are used, at most.
        batch_size: samples in one forward pass; changes speed, not the result.
        tokens: which tokens of a sequence count: `all`, `class` (the first), `mean` (their average), or `window:N`
            (the centre N x N patches and the class token).
        scale: what is done to each unit's activations: `standardize` ((a - mean) / (std + 1e-9)), `center`,
            `normalize` (unit length over all rows), `none`. With weights as evidence: `none` = raw rows, any other =
            rows of unit length.
    """

    samples: int = 512
    batch_size: int = 64
    tokens: str = "all"
    scale: Scale = "standardize"
