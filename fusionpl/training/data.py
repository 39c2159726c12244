"""The data module of a task."""

from collections.abc import Callable, Mapping
from typing import Any

from fusionpl.datamodules.base import FixedSplits
from fusionpl.datamodules.embeddings import ImageEmbeddingDataModule, TextEmbeddingDataModule
from fusionpl.datamodules.images import ImageDataModule
from fusionpl.datamodules.text import CausalTextDataModule, MaskedTextDataModule, SpanTextDataModule
from fusionpl.datamodules.text_classification import TextClassificationDataModule
from fusionpl.training.tasks import TaskName

# Each of options, a seed, and the tokenizer of an existing model (None for none).
DATA_MODULES: Mapping[TaskName, Callable[[Any, int, Any], FixedSplits]] = {
    "image-classification": lambda config, seed, _: ImageDataModule(config, seed),
    "masked-lm": MaskedTextDataModule,
    "causal-language-modeling": CausalTextDataModule,
    "span-corruption": SpanTextDataModule,
    "text-classification": TextClassificationDataModule,
    "feature-extraction": TextEmbeddingDataModule,
    "image-feature-extraction": lambda config, seed, _: ImageEmbeddingDataModule(config, seed),
}
