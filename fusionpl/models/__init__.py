"""Build, load and save the transformers of two libraries, timm and transformers."""

from fusionpl.models.build import ModelConfig, build_model
from fusionpl.models.load import load_model
from fusionpl.models.save import class_names, save_model

__all__ = ["ModelConfig", "build_model", "class_names", "load_model", "save_model"]
