"""Models of tags brought to the tags of several models: what one has no output for, it never gives."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusionpl.families.binding import bind
from fusionpl.families.family import Family
from fusionpl.models.labels import TAGS, kind_of
from fusionpl.models.resized import refilled, reshaped
from fusionpl.models.save import class_names

NEVER = -10.0  # the logit of a tag that a model has no output for


def united(models: Mapping[str, nn.Module], first: str) -> tuple[str, ...] | None:
    """The tags of several models (name -> model), those of `first` first; None where they share theirs, give no tags or
    have no names for them."""
    names = {name: class_names(model) for name, model in models.items()}
    if any(kind_of(model) != TAGS for model in models.values()) or None in names.values():
        return None
    if len(set(names.values())) == 1:
        return None
    order = [names[first], *names.values()]
    return tuple(dict.fromkeys(tag for tags in order for tag in tags or ()))


def with_tags(
    model: Any, names: Sequence[str], family: Family | None = None
) -> tuple[nn.Module, Callable[[str, Tensor], Tensor]] | None:
    """A model with other tags.

    Args:
        model: of transformers; it may have some of them, and no others.
        names: of the tags.
        family: see `bind`.

    Returns:
        The new model, whose parameters are on the meta device, and what makes one of its parameters of the old one's;
        None where it has these tags already.
    """
    own = class_names(model)
    if own is None or own == tuple(names):
        return None
    dims = {slot.parameter: slot.axes.index("classes") for slot in bind(model, family).slots if "classes" in slot.axes}
    rows = torch.tensor([own.index(name) if name in own else len(own) for name in names])

    def moved(key: str, tensor: Tensor) -> Tensor:
        if key not in dims:
            return tensor
        shape = list(tensor.shape)
        shape[dims[key]] = 1
        never = tensor.new_full(shape, NEVER if tensor.ndim == 1 else 0.0)
        return torch.cat([tensor, never], dims[key]).index_select(dims[key], rows.to(tensor.device))

    config = copy.deepcopy(model.config)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: at for at, name in enumerate(names)}
    return reshaped(model, config), moved


def with_tags_of(model: nn.Module, like: nn.Module, family: Family | None = None) -> nn.Module:
    """A whole model with the tags of another, or itself where it has those already, or some that the other has not."""
    names = class_names(like)
    if kind_of(model) != TAGS or not names or not set(class_names(model) or ()) <= set(names):
        return model
    tagged = with_tags(model, names, family)
    if tagged is None:
        return model
    return refilled(model, *tagged)
