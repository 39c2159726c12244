"""Images and sentences for encoders without a head: labels are welcome and not needed."""

from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from fusionpl.calibration.embeddings import Pooling, embed
from fusionpl.calibration.forward import eval_mode
from fusionpl.datamodules.base import FixedSplits, Run
from fusionpl.datamodules.config import ImageEmbeddingConfig, TextEmbeddingConfig
from fusionpl.datamodules.images import ImageDataModule
from fusionpl.datamodules.labels import Labels
from fusionpl.datamodules.text import check_length
from fusionpl.datamodules.text_classification import TextClassificationDataModule
from fusionpl.errors import FusionError, reason
from fusionpl.families.family import is_bare

NO_LABELS = ""


class _Embedded(FixedSplits):
    """What both kinds share."""

    def check_model(self, model: nn.Module, run: Run | None = None) -> None:
        """Raises FusionError unless `model` reads the data and is an encoder without a head."""
        self.check_reads(model)
        if not is_bare(model) and not type(model).__name__.endswith("WithProjection"):
            raise FusionError(f"a {type(model).__name__} has a head, whose outputs are no embeddings; leave --task out")
        batch = self.sample()
        assert self.pooling is not None
        try:
            with eval_mode(model):
                embed(model, batch, self.pooling) if run is None else run(batch)
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:  # each library has its own
            raise FusionError(
                f"the {type(model).__name__} can't read the data of '{self.config.path}': {reason(error)}"
            ) from error


class ImageEmbeddingDataModule(_Embedded, ImageDataModule):
    """Images for encoders without a head: ViTModel, timm's models with `num_classes=0`."""

    config: ImageEmbeddingConfig

    @property
    def pooling(self) -> Pooling:
        """How tokens become one embedding."""
        return "cls" if self.config.pooling == "auto" else self.config.pooling


class TextEmbeddingDataModule(_Embedded, TextClassificationDataModule):
    """Sentences for encoders without a head: BertModel and what sentence-transformers are made of."""

    config: TextEmbeddingConfig

    @property
    def pooling(self) -> Pooling:
        """How tokens become one embedding."""
        return "mean" if self.config.pooling == "auto" else self.config.pooling

    def check_model(self, model: Any, run: Run | None = None) -> None:
        """Raises FusionError where sentences may be longer than the model's positions; else see `_Embedded`."""
        check_length(model, self.config.max_length, "data.max_length")
        self.follow(model)
        _Embedded.check_model(self, model, run)

    @cached_property
    def _splits(self) -> dict[str, Any]:
        """The rows that hold text."""
        splits = super()._splits
        column = self.config.text_columns[0] if self.config.text_columns else None
        features = next(iter(splits.values())).features
        strings = [name for name, kind in features.items() if str(getattr(kind, "dtype", "")).endswith("string")]
        column = column or next(iter(strings), None)
        if column is None:
            return splits
        return {name: rows.filter(lambda text: bool(text and text.strip()), input_columns=column)
                for name, rows in splits.items()}  # fmt: skip

    @cached_property
    def _label_column(self) -> str:
        """The column of labels; none where nothing is called so."""
        named = {"label", "coarse_label"} & self._features.keys()
        classes = any(type(feature).__name__ == "ClassLabel" for feature in self._features.values())
        return super()._label_column if self.config.label_column or named or classes else NO_LABELS

    @cached_property
    def _every(self) -> Labels:
        """The labels, or one class for all where there are none."""
        if self._label_column != NO_LABELS:
            return super()._every
        if self.config.classes is not None:
            raise FusionError(
                f"data.classes: the data set '{self.config.path}' has no labels; name their column with "
                "--data.label_column, or leave data.classes out"
            )
        return Labels({name: np.zeros(len(rows), dtype=np.int64) for name, rows in self._splits.items()}, ("",))
