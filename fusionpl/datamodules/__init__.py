"""Data with fixed splits, among them a calibration set."""

from fusionpl.datamodules.images import DataConfig, ImageDataModule

__all__ = ["DataConfig", "ImageDataModule"]
