"""Tasks: which options, data and metric belong to a kind of training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fusionpl.datamodules import (
    CausalTextDataModule,
    DataConfig,
    FixedSplits,
    ImageDataModule,
    MaskedTextConfig,
    MaskedTextDataModule,
    SpanTextConfig,
    SpanTextDataModule,
    TextClassificationConfig,
    TextClassificationDataModule,
    TextConfig,
)

TaskName = Literal[
    "image-classification", "masked-lm", "causal-language-modeling", "span-corruption", "text-classification"
]


@dataclass(frozen=True)
class Task:
    """A kind of training.

    Attributes:
        data: the options under `data`.
        datamodule: makes the data module of options, a seed and the tokenizer of an existing model (None for none).
        pipeline: the hub's name of the task.
        monitor: the validation metric that the best checkpoint is chosen by.
        mode: whether more or less of it is better.
        new_head: whether finetuning puts a classifier on a model that has none for the data's classes.
    """

    data: type
    datamodule: Callable[[Any, int, Any], FixedSplits]
    pipeline: str
    monitor: str
    mode: Literal["min", "max"]
    new_head: bool = False


TASKS: Mapping[str, Task] = {
    "image-classification": Task(
        DataConfig,
        lambda config, seed, _: ImageDataModule(config, seed),
        "image-classification",
        "val/accuracy",
        "max",
    ),
    "masked-lm": Task(MaskedTextConfig, MaskedTextDataModule, "fill-mask", "val/loss", "min"),
    "causal-language-modeling": Task(TextConfig, CausalTextDataModule, "text-generation", "val/loss", "min"),
    "span-corruption": Task(SpanTextConfig, SpanTextDataModule, "text2text-generation", "val/loss", "min"),
    "text-classification": Task(
        TextClassificationConfig,
        TextClassificationDataModule,
        "text-classification",
        "val/loss",
        "min",
        new_head=True,
    ),
}
