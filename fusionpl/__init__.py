"""fusionpl: align independently trained transformers with optimal transport, then average them into one.

model = fusionpl.load_model("runs/vit-digits/seed-1")
config = fusionpl.load_config("paper", {"align.solver": "emd"})
result = fusionpl.fuse([parent_a, parent_b], calibration, config)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusionpl.errors import FusionError
    from fusionpl.fusion.config import FuseConfig, load_config
    from fusionpl.fusion.fuse import fuse, prepare
    from fusionpl.fusion.result import FusionResult
    from fusionpl.models.load import load_model
    from fusionpl.models.separate import load_models, predict
    from fusionpl.training.fusion_callback import OTFusion

__all__ = [
    "FuseConfig",
    "FusionError",
    "FusionResult",
    "OTFusion",
    "fuse",
    "load_config",
    "load_model",
    "load_models",
    "predict",
    "prepare",
]

__version__ = "0.1.0"

_HOMES = {
    "FuseConfig": "fusionpl.fusion.config",
    "FusionError": "fusionpl.errors",
    "FusionResult": "fusionpl.fusion.result",
    "OTFusion": "fusionpl.training.fusion_callback",
    "fuse": "fusionpl.fusion.fuse",
    "load_config": "fusionpl.fusion.config",
    "load_model": "fusionpl.models.load",
    "load_models": "fusionpl.models.separate",
    "predict": "fusionpl.models.separate",
    "prepare": "fusionpl.fusion.fuse",
}


def __getattr__(name: str) -> Any:
    # The libraries below take seconds to import: only what is used is loaded.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fusionpl' has no attribute '{name}'")
