"""What the outputs of a model mean: one class of several, tags of which each may hold, or numbers."""

from typing import Any, Literal

import transformers

Kind = Literal["single_label_classification", "multi_label_classification", "regression"]
# As `problem_type` in the configurations of transformers.
CLASSES: Kind = "single_label_classification"
TAGS: Kind = "multi_label_classification"
NUMBERS: Kind = "regression"
IN_WORDS = {CLASSES: "one class each", TAGS: "tags, several at once", NUMBERS: "numbers"}
IN_SHORT = {CLASSES: "classes", TAGS: "tags", NUMBERS: "numbers"}
_HEADS = ("ForSequenceClassification", "ForImageClassification")


def kind_of(model: Any) -> Kind:
    """What a model's outputs mean: what `problem_type` says or, as in transformers, a number where there is one output.

    timm's classifiers and language models choose one class, or one token, of several.
    """
    classifies = isinstance(model, transformers.PreTrainedModel) and any(
        head in type(model).__name__ for head in _HEADS
    )
    if not classifies:
        return CLASSES
    kind: Kind | None = getattr(model.config, "problem_type", None)
    return kind or (NUMBERS if model.config.num_labels == 1 else CLASSES)
