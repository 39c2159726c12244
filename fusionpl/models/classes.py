"""Models brought to the classes, or tags, of several models: what one has no output for, it never gives."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusionpl.errors import FusionError
from fusionpl.families.axes import Binding
from fusionpl.families.binding import bind
from fusionpl.families.family import Family
from fusionpl.models.labels import TAGS, kind_of
from fusionpl.models.resized import refilled, relabelled
from fusionpl.models.save import class_names

# What a model puts out for what it has no output for: a tag is then improbable, a class impossible.
NO_TAG, NO_CLASS = -10.0, -1e4


class PartialHead(nn.Linear):
    """The head of a model that knows some of its classes: their rows are those of its own head, the others' are 0.

    Args:
        like: a linear module of as many outputs as there are classes.
        missing: bool [classes], those that the model does not know.
        never: what it puts out for them.
    """

    def __init__(self, like: nn.Linear, missing: Tensor, never: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.weight, self.bias = like.weight, like.bias
        self.missing, self._never = missing, never

    def forward(self, input: Tensor) -> Tensor:  # as torch calls it
        """What the model says, and for what it does not know that it is not there."""
        return super().forward(input).masked_fill(self.missing.to(input.device), self._never)


def missing_classes(model: nn.Module) -> Tensor | None:
    """Which classes a model with a partial head does not know, bool [classes]; None where it knows all."""
    return next((head.missing for head in partial_heads(model).values()), None)


def partial_heads(model: nn.Module) -> dict[str, PartialHead]:
    """Name -> partial head."""
    return {name: head for name, head in model.named_modules() if isinstance(head, PartialHead)}


def whole_heads(model: nn.Module) -> nn.Module:
    """The same model, changed in place: its heads say something of all classes."""
    for name, head in partial_heads(model).items():
        plain = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        plain.weight, plain.bias = head.weight, head.bias
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, plain.train(head.training))
    return model


def united(names: Mapping[str, Sequence[str]], first: str) -> tuple[str, ...]:
    """The classes of several models (name -> its classes), those of `first` first, each once.

    >>> united({"a": ["cat", "dog"], "b": ["dog", "car"]}, first="b")
    ('dog', 'car', 'cat')

    Raises:
        FusionError: one has two classes of one name.
    """
    for model, own in names.items():
        if twice := next((name for name in own if list(own).count(name) > 1), None):
            raise FusionError(f"{model} has two classes called '{twice}'; give each its own name in id2label")
    return tuple(dict.fromkeys(name for classes in (names[first], *names.values()) for name in classes))


def with_classes(
    model: nn.Module, names: Sequence[str], family: Family | None = None
) -> tuple[nn.Module, Callable[[str, Tensor], Tensor]] | None:
    """A model with other classes.

    Args:
        model: of timm or transformers, whose classes have names.
        names: of the classes; those that it does not know, it never gives, and those of its own that are not among them
            are dropped.
        family: see `bind`.

    Returns:
        The new model, whose parameters are on the meta device, and what makes one of its parameters of the old one's;
        None where it has these classes already.
    """
    own = class_names(model)
    if own is None or own == tuple(names):
        return None
    rows = torch.tensor([own.index(name) if name in own else len(own) for name in names])
    return with_rows(model, names, rows, len(own), family)


def with_rows(
    model: nn.Module, names: Sequence[str], rows: Tensor, count: int, family: Family | None = None
) -> tuple[nn.Module, Callable[[str, Tensor], Tensor]]:
    """A model with other outputs, some of them its own.

    Args:
        model: of timm or transformers.
        names: of the new outputs.
        rows: for each of these, which of the model's own it is, or `count` where it is none; such it never gives.
        count: of the model's own outputs.
        family: see `bind`.

    Returns:
        See `with_classes`.
    """
    dims = head_parameters(bind(model, family))

    def moved(key: str, tensor: Tensor) -> Tensor:
        if key not in dims:
            return tensor
        shape = list(tensor.shape)
        shape[dims[key]] = 1
        more = torch.cat([tensor, tensor.new_zeros(shape)], dims[key])
        return more.index_select(dims[key], rows.to(tensor.device))

    new, missing = relabelled(model, names), rows == count
    for module in {key.rpartition(".")[0] for key in dims} if missing.any() else ():
        owner, _, leaf = module.rpartition(".")
        head: Any = new.get_submodule(module)
        never = NO_TAG if kind_of(model) == TAGS else NO_CLASS
        setattr(new.get_submodule(owner), leaf, PartialHead(head, missing, never).train(head.training))
    return new, moved


def head_parameters(binding: Binding) -> dict[str, int]:
    """The parameters that have a row for each class -> along which dimension."""
    return {slot.parameter: slot.axes.index("classes") for slot in binding.slots if "classes" in slot.axes}


def with_classes_of(model: nn.Module, like: nn.Module, family: Family | None = None) -> nn.Module:
    """A whole model with the classes of another, or itself where it has those already, or either has no names."""
    names = class_names(like)
    new = None if names is None else with_classes(model, names, family)
    return model if new is None else refilled(model, *new)
