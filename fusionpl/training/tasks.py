"""Tasks: which options and metric belong to a kind of training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from fusionpl.datamodules.config import (
    DataConfig,
    ImageEmbeddingConfig,
    MaskedTextConfig,
    SpanTextConfig,
    TextClassificationConfig,
    TextConfig,
    TextEmbeddingConfig,
)
from fusionpl.errors import FusionError, nearest

TaskName = Literal[
    "image-classification",
    "masked-lm",
    "causal-language-modeling",
    "span-corruption",
    "text-classification",
    "feature-extraction",
    "image-feature-extraction",
]


@dataclass(frozen=True)
class Task:
    """A kind of training.

    Attributes:
        data: the options under `data`.
        pipeline: transformers' and the hub's name of the task.
        heads: what the classes of its models are called in transformers.
        monitor: the validation metric that the best checkpoint is chosen by.
        mode: whether more or less of it is better.
        new_head: whether finetuning puts a classifier on a model that has none for the data's classes.
        trains: whether there is anything to learn; encoders without a head are only compared.
    """

    data: type
    pipeline: str
    heads: tuple[str, ...]
    monitor: str
    mode: Literal["min", "max"]
    new_head: bool = False
    trains: bool = True


TASKS: Mapping[TaskName, Task] = {
    "image-classification": Task(
        DataConfig,
        "image-classification",
        ("ForImageClassification",),
        "val/accuracy",
        "max",
    ),
    "masked-lm": Task(MaskedTextConfig, "fill-mask", ("ForMaskedLM", "ForPreTraining"), "val/loss", "min"),
    "causal-language-modeling": Task(TextConfig, "text-generation", ("ForCausalLM", "LMHeadModel"), "val/loss", "min"),
    "span-corruption": Task(SpanTextConfig, "text2text-generation", ("ForConditionalGeneration",), "val/loss", "min"),
    "text-classification": Task(
        TextClassificationConfig,
        "text-classification",
        ("ForSequenceClassification",),
        "val/loss",
        "min",
        new_head=True,
    ),
    "feature-extraction": Task(TextEmbeddingConfig, "feature-extraction", (), "val/loss", "min", trains=False),
    "image-feature-extraction": Task(
        ImageEmbeddingConfig,
        "image-feature-extraction",
        (),
        "val/loss",
        "min",
        trains=False,
    ),
}
# What others call them, besides the names of transformers' pipelines.
ALIASES: Mapping[str, TaskName] = {
    **{task.pipeline: name for name, task in TASKS.items()},
    "masked-language-modeling": "masked-lm",
    "mlm": "masked-lm",
    "causal-lm": "causal-language-modeling",
    "clm": "causal-language-modeling",
    "sequence-classification": "text-classification",
}


def task_named(name: str) -> TaskName:
    """A task by its name here or by one of `ALIASES`.

    Raises:
        FusionError: there is no such task.
    """
    if name in TASKS:
        return cast(TaskName, name)
    if name in ALIASES:
        return ALIASES[name]
    raise FusionError(f"task: there is no '{name}'{nearest(name, (*TASKS, *ALIASES))}; use {', '.join(TASKS)}")


def task_of_model(config: Mapping[str, Any]) -> TaskName | None:
    """The task of a model, by the class that its config.json names; None where that has no task here.

    Args:
        config: see `fusionpl.models.folders.model_config`; timm's models classify images.

    >>> task_of_model({"architectures": ["GPTNeoXForCausalLM"]})
    'causal-language-modeling'
    """
    if "architecture" in config:
        return "image-feature-extraction" if config.get("num_classes") == 0 else "image-classification"
    cls = config["architectures"][0]
    task_name = next((name for name, task in TASKS.items() if any(head in cls for head in task.heads)), None)
    if task_name is None and cls.endswith("Model"):
        return "feature-extraction" if "vocab_size" in config else "image-feature-extraction"
    return task_name
