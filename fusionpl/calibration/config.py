"""Options of calibration."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from fusionpl.errors import FusionError, check_choices

Scale = Literal["standardize", "center", "normalize", "none"]
StreamType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class CalibrationConfig:
    """How activations are collected.

    Attributes:
        samples: how many samples of the calibration set are used, at most.
        batch_size: samples in one forward pass; changes speed, not the result.
        tokens: which tokens of a sequence count: `all`, `class` (the first), `mean` (their average), or `window:N`
            (the centre N x N patches and the class token; `all` for text, which has no grid).
        scale: what is done to each unit's activations: `standardize` ((a - mean) / (std + 1e-9)), `center`,
            `normalize` (unit length over all rows), `none`. With weights as evidence: `none` = raw rows, any other =
            rows of unit length.
        memory: GiB that activations kept between blocks, and maps, may take; what exceeds it goes to a temporary
            file. null: a quarter of what is free.
        dtype: type of the kept activations.
    """

    samples: int = 512
    batch_size: int = 64
    tokens: str = "all"
    scale: Scale = "standardize"
    memory: float | None = None
    dtype: StreamType = "float32"

    def __post_init__(self) -> None:
        """Raises FusionError for values out of range."""
        check_choices(self, "calibration")
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise FusionError(f"calibration.{name} must be at least 1, not {getattr(self, name)}")
        if self.tokens not in ("all", "class", "mean") and not re.fullmatch(r"window:[1-9]\d*", self.tokens):
            raise FusionError(
                f"calibration.tokens '{self.tokens}': use all, class, mean or window:N (for example window:6)"
            )
        if self.memory is not None and not (math.isfinite(self.memory) and self.memory >= 0):
            raise FusionError(f"calibration.memory must be a number of GiB, not {self.memory}; null takes a quarter")
