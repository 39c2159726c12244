"""Options of a model that is built."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ModelConfig:
    """What `build_model` builds.

    Args:
        library: who implements the architecture.
        architecture: a timm model name (`vit_tiny_patch16_224`) or a transformers class
            (`ViTForImageClassification`).
        args: keywords of timm's `create_model`, or of the transformers config.
        initializer_range: standard deviation of the truncated normal all weights are drawn from;
            null leaves the library's own initialisation.
    """

    library: Literal["timm", "transformers"] = "timm"
    architecture: str = "vit_tiny_patch16_224"
    args: dict[str, Any] = field(default_factory=dict)
    initializer_range: float | None = None
