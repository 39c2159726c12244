"""Build, load and save the transformers of two libraries, timm and transformers."""

from fusionpl.models.adapters import adapter_beside
from fusionpl.models.build import ModelConfig, build_model
from fusionpl.models.folders import ModelFolder, model_config, model_folder, open_model
from fusionpl.models.heads import with_classifier
from fusionpl.models.hub import hub_id, short_name
from fusionpl.models.images import at_image_size, grid_of, told, with_image_size
from fusionpl.models.labels import CLASSES, IN_WORDS, NUMBERS, TAGS, Kind, kind_of
from fusionpl.models.lineage import Ancestor, ancestor, base_models, inherited, lineage, parents_section
from fusionpl.models.load import load_model
from fusionpl.models.pipelines import check_tokenizers
from fusionpl.models.pixels import for_pixels, told_differences, told_pixels, with_pixels
from fusionpl.models.preprocessing import NORMALIZATIONS, ImageProcessing
from fusionpl.models.processors import image_processing, save_image_processing, timm_processing
from fusionpl.models.push import check_push, push
from fusionpl.models.resized import resized, untied
from fusionpl.models.save import add_to_card, class_names, forget_places, library_of, save_model, write_card
from fusionpl.models.sentence import check_pooling, copy_modules, sentence_pooling, width_of
from fusionpl.models.settings import compare_settings
from fusionpl.models.tags import united, with_tags
from fusionpl.models.tensors import TensorFile
from fusionpl.models.token_settings import check_token_settings, end_of, pad_with, padding_of, pads_text
from fusionpl.models.tokenizers import load_tokenizer, train_bpe, train_wordpiece
from fusionpl.models.vocabulary import Renumbering, Vocabulary, load_parent, renumber
from fusionpl.models.writer import ModelWriter

__all__ = [
    "CLASSES",
    "IN_WORDS",
    "NUMBERS",
    "TAGS",
    "Ancestor",
    "Kind",
    "NORMALIZATIONS",
    "ImageProcessing",
    "ModelConfig",
    "ModelFolder",
    "ModelWriter",
    "Renumbering",
    "TensorFile",
    "Vocabulary",
    "adapter_beside",
    "add_to_card",
    "ancestor",
    "at_image_size",
    "base_models",
    "build_model",
    "check_pooling",
    "check_push",
    "check_token_settings",
    "check_tokenizers",
    "class_names",
    "compare_settings",
    "copy_modules",
    "end_of",
    "for_pixels",
    "forget_places",
    "grid_of",
    "hub_id",
    "image_processing",
    "inherited",
    "kind_of",
    "library_of",
    "lineage",
    "load_model",
    "load_parent",
    "load_tokenizer",
    "model_config",
    "model_folder",
    "open_model",
    "pad_with",
    "padding_of",
    "pads_text",
    "parents_section",
    "push",
    "renumber",
    "resized",
    "save_image_processing",
    "save_model",
    "sentence_pooling",
    "short_name",
    "timm_processing",
    "told",
    "told_differences",
    "told_pixels",
    "train_bpe",
    "train_wordpiece",
    "united",
    "untied",
    "width_of",
    "with_classifier",
    "with_image_size",
    "with_tags",
    "with_pixels",
    "write_card",
]
