"""Parents that number the same tokens differently: their rows are put into the anchor's order as they are read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fusionpl.families.binding import bind
from fusionpl.families.family import VOCABULARY, Family
from fusionpl.models.channels import with_channels_of
from fusionpl.models.classes import with_classes_of
from fusionpl.models.images import with_image_size
from fusionpl.models.load import load_model
from fusionpl.models.pixels import with_pixels
from fusionpl.models.preprocessing import ImageProcessing
from fusionpl.models.processors import image_processing
from fusionpl.models.token_settings import renumber_settings
from fusionpl.models.tokenizers import load_tokenizer


@dataclass(frozen=True)
class Renumbering:
    """The rows of a parent's vocabulary in the anchor's order.

    Attributes:
        rows: [n_anchor], the parent's row of each of the anchor's tokens; that of its unknown token where it has none.
        missing_tokens: the tokens that the parent has not.
        dropped: how many tokens only the parent has.
    """

    rows: Tensor
    missing_tokens: Tensor
    dropped: int

    def summary(self, name: str, anchor: str) -> str:
        """What a reader should know of a parent whose rows are matched."""
        shared = len(self.rows) - len(self.missing_tokens)
        alone = (
            [f"{len(self.missing_tokens)} that only {anchor} has stay as they are there"]
            if len(self.missing_tokens)
            else []
        )
        left = [f"{self.dropped} that only {name} has are left out"] if self.dropped else []
        return f"{name}: {'; '.join([f'{shared} rows of the vocabulary are matched by token', *alone, *left])}"


@dataclass(frozen=True)
class Vocabulary:
    """The anchor's vocabulary: its tokenizer, and the number of rows in its model, which may be larger."""

    tokenizer: PreTrainedTokenizerBase
    size: int

    @classmethod
    def of(cls, source: str | Path, model: nn.Module, family: Family | None = None) -> "Vocabulary | None":
        """The vocabulary of a model that was read from `source`; None where it reads no tokens or has no tokenizer."""
        axis = bind(model, family).axes.get(VOCABULARY)
        tokenizer = load_tokenizer(source) if axis else None
        return cls(tokenizer, axis.size) if axis and tokenizer is not None else None

    def renumbering(self, tokenizer: PreTrainedTokenizerBase | None, size: int) -> Renumbering | None:
        """How a model with another tokenizer, and `size` rows, is renumbered; None where nothing is to be done."""
        if tokenizer is None:
            return None
        ours, theirs = self.tokenizer.get_vocab(), tokenizer.get_vocab()
        # Rows of no token fill a model up to a round number: they are matched by number, and where the other model has
        # fewer, its last one stands for the rest.
        padding = set(range(size)) - set(theirs.values())
        last = max(padding, default=size)
        old_rows = [row if row in padding else last for row in range(self.size)]
        for token, row in ours.items():
            if row < self.size:
                old_rows[row] = theirs.get(token, size)
        rows = torch.tensor(old_rows)
        missing_tokens = (rows >= size).nonzero()[:, 0]
        if size == self.size and torch.equal(rows, torch.arange(size)):
            return None
        unknown = next((number for number in (tokenizer.unk_token_id, tokenizer.eos_token_id) if number is not None), 0)
        rows[missing_tokens] = unknown
        return Renumbering(rows, missing_tokens, len(theirs.keys() - ours.keys()))


def load_parent(
    source: str | Path,
    vocabulary: Vocabulary | None,
    like: nn.Module | None = None,
    *,
    processing: ImageProcessing | None = None,
    allow_pickle: bool = False,
    family: Family | None = None,
) -> nn.Module:
    """Loads a whole model (see `load_model`) that reads and writes the tokens of `vocabulary`, if one is given, takes
    images of the size and channels that `like` takes, prepared by `processing`, and has the classes of `like`, where
    both have names for theirs."""
    model = load_model(source, allow_pickle=allow_pickle)
    if like is not None:
        model = with_channels_of(model, like, partial(image_processing, source))
    model = with_pixels(model, source, processing, family)
    if vocabulary is not None:
        axis = bind(model, family).axes[VOCABULARY]
        order = vocabulary.renumbering(load_tokenizer(source), axis.size)
        if order is not None:
            renumber(model, order, family)
    return model if like is None else with_classes_of(with_image_size(model, like, family), like, family)


def renumber(
    model: Any, found: Renumbering, family: Family | None = None, *, name: str = "the model"
) -> Callable[[str, Tensor], Tensor]:
    """Puts the rows of a model's vocabulary into another order, in place; they may be on the meta device.

    Args:
        model: of transformers.
        found: the order.
        family: see `bind`.
        name: how messages call it.

    Returns:
        What does the same to a parameter that is read later, by its name.

    Raises:
        FusionError: see `renumber_settings`.
    """
    slots = bind(model, family).slots
    dims = {slot.parameter: slot.axes.index(VOCABULARY) for slot in slots if VOCABULARY in slot.axes}

    def moved(key: str, tensor: Tensor) -> Tensor:
        return tensor.index_select(dims[key], found.rows.to(tensor.device)) if key in dims else tensor

    new: dict[int, nn.Parameter] = {}
    for key in dims:
        parameter = model.get_parameter(key)
        new[id(parameter)] = nn.Parameter(moved(key, parameter.detach()), requires_grad=parameter.requires_grad)
    for key, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) in new:
            owner, _, leaf = key.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = new[id(parameter)]
    model.config.get_text_config().vocab_size = len(found.rows)
    missing_tokens = set(found.missing_tokens.tolist())  # which hold the row of another token
    places = {
        row: place for place, row in reversed(list(enumerate(found.rows.tolist()))) if place not in missing_tokens
    }
    renumber_settings(model, places, name)
    return moved
