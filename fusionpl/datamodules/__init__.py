"""Data with fixed splits, among them a calibration set."""

from fusionpl.datamodules.base import IGNORED, PIXELS, FixedSplits
from fusionpl.datamodules.embeddings import (
    ImageEmbeddingConfig,
    ImageEmbeddingDataModule,
    TextEmbeddingConfig,
    TextEmbeddingDataModule,
)
from fusionpl.datamodules.images import AUTO, DataConfig, ImageDataModule
from fusionpl.datamodules.objectives import MaskedTextConfig, SpanTextConfig, TextConfig
from fusionpl.datamodules.sources import BUILT_IN
from fusionpl.datamodules.text import CausalTextDataModule, MaskedTextDataModule, SpanTextDataModule, TextDataModule
from fusionpl.datamodules.text_classification import TextClassificationConfig, TextClassificationDataModule

__all__ = [
    "AUTO",
    "BUILT_IN",
    "IGNORED",
    "PIXELS",
    "CausalTextDataModule",
    "DataConfig",
    "FixedSplits",
    "ImageDataModule",
    "ImageEmbeddingConfig",
    "ImageEmbeddingDataModule",
    "MaskedTextConfig",
    "MaskedTextDataModule",
    "SpanTextConfig",
    "SpanTextDataModule",
    "TextClassificationConfig",
    "TextClassificationDataModule",
    "TextConfig",
    "TextDataModule",
    "TextEmbeddingConfig",
    "TextEmbeddingDataModule",
]
