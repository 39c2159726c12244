"""A classification head on the encoder of a language model."""

from typing import Any, cast

import torch
import transformers
from torch import nn

from fusionpl.errors import FusionError
from fusionpl.models.labels import CLASSES, NUMBERS, TAGS, Kind, kind_of
from fusionpl.models.save import class_names as known_names


def with_classifier(
    model: nn.Module, num_classes: int, class_names: tuple[str, ...] | None, *, seed: int, kind: Kind | None = None
) -> nn.Module:
    """`model` as a classifier of sentences: its encoder, with a new head where it has none for these classes.

    Args:
        model: a language model, a classifier or a bare encoder of transformers.
        num_classes: number of classes; 1 for a regression.
        class_names: their names.
        seed: decides the new head's weights.
        kind: what the outputs shall mean; None as transformers takes it, a number where there is one, else classes.

    Returns:
        `model` itself if it gives as many outputs of that kind already, by the names of these classes, else a new model
        of the same architecture.

    Raises:
        FusionError: `model` is not of transformers, or transformers has no classifier for its architecture.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise FusionError(f"a {type(model).__name__} has no text encoder to classify with; use a BERT of transformers")
    kind = kind or (NUMBERS if num_classes == 1 else CLASSES)
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    if classifies and model.config.num_labels == num_classes and kind_of(model) == kind:
        if class_names is not None and _knows_others(model, class_names):
            _name(model.config, class_names)
        return model
    config = type(model.config).from_dict(model.config.to_dict())
    config.num_labels = num_classes
    config.problem_type = kind if kind == TAGS else None  # the others follow from the number
    if class_names is not None:
        _name(config, class_names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            classifier = transformers.AutoModelForSequenceClassification.from_config(config)
        except ValueError as error:
            raise FusionError(f"transformers has no sequence classifier for {model.config.model_type}") from error
    source, target = (dict(_encoder(network).named_parameters()) for network in (model, classifier))
    for name, tensor in target.items():
        if name in source:
            tensor.data.copy_(source[name].data)
        elif not name.startswith("pooler."):  # masked language models have none
            raise FusionError(f"the encoder of {type(model).__name__} lacks '{name}'")
    return cast(nn.Module, classifier.eval())


def _knows_others(model: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether a model calls its outputs otherwise; words may mean the same as the numbers of data without names."""
    own = known_names(model)
    words_for_numbers = all(map(str.isdigit, names)) and not all(map(str.isdigit, own or ()))
    return own is not None and set(own) != set(names) and not words_for_numbers


def _name(config: Any, names: tuple[str, ...]) -> None:
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}


def _encoder(model: Any) -> nn.Module:
    return cast(nn.Module, getattr(model, model.base_model_prefix, model))
