"""Data with fixed splits, among them a calibration set."""

from fusionpl.datamodules.base import IGNORED, FixedSplits
from fusionpl.datamodules.images import DataConfig, ImageDataModule
from fusionpl.datamodules.text import MaskedTextDataModule, TextConfig
from fusionpl.datamodules.text_classification import TextClassificationConfig, TextClassificationDataModule

__all__ = [
    "IGNORED",
    "DataConfig",
    "FixedSplits",
    "ImageDataModule",
    "MaskedTextDataModule",
    "TextClassificationConfig",
    "TextClassificationDataModule",
    "TextConfig",
]
