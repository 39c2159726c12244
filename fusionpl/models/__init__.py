"""Build, load and save the transformers of two libraries, timm and transformers."""

from fusionpl.models.build import ModelConfig, build_model
from fusionpl.models.folders import ModelFolder, open_model
from fusionpl.models.heads import with_classifier
from fusionpl.models.hub import short_name
from fusionpl.models.load import load_model
from fusionpl.models.resized import resized, untied
from fusionpl.models.save import add_to_card, beside, class_names, library_of, save_model, write_card
from fusionpl.models.tensors import TensorFile
from fusionpl.models.tokenizers import check_tokenizers, load_tokenizer, train_bpe, train_wordpiece
from fusionpl.models.vocabulary import Renumbering, Vocabulary, load_parent, renumber
from fusionpl.models.writer import ModelWriter

__all__ = [
    "ModelConfig",
    "ModelFolder",
    "ModelWriter",
    "Renumbering",
    "TensorFile",
    "Vocabulary",
    "add_to_card",
    "beside",
    "build_model",
    "check_tokenizers",
    "class_names",
    "load_model",
    "library_of",
    "load_parent",
    "load_tokenizer",
    "open_model",
    "renumber",
    "resized",
    "save_model",
    "short_name",
    "train_bpe",
    "train_wordpiece",
    "untied",
    "with_classifier",
    "write_card",
]
