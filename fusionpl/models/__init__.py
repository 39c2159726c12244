"""Build, load and save the transformers of two libraries, timm and transformers."""

from fusionpl.models.build import ModelConfig, build_model
from fusionpl.models.heads import with_classifier
from fusionpl.models.load import load_model
from fusionpl.models.save import class_names, save_model
from fusionpl.models.tokenizers import check_tokenizers, load_tokenizer, train_wordpiece

__all__ = [
    "ModelConfig",
    "build_model",
    "check_tokenizers",
    "class_names",
    "load_model",
    "load_tokenizer",
    "save_model",
    "train_wordpiece",
    "with_classifier",
]
