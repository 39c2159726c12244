"""Runs a model of either library on a batch of either kind."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fusionpl.errors import FusionError

Batch = Mapping[str, Any] | Tensor


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """The model inputs of a batch: an image tensor [B, C, H, W], or a mapping, whose labels are dropped."""
    if isinstance(batch, Tensor):
        return {"pixel_values": batch}
    return {key: value for key, value in batch.items() if key != "labels"}


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64, in which a fusion adds up its statistics; Apple's GPUs don't."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Puts `models` in eval mode and gives every submodule its own mode back at the end."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def arguments(model: nn.Module, batch: Batch, like: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """How `model` is called with a batch: a timm model takes an image tensor, a transformers model keywords; one that
    generates keeps no cache.

    Args:
        model: of either library.
        batch: an image tensor, or a mapping of model inputs; `labels` are ignored.
        like: one of the model's parameters; inputs move to its device, floating-point ones to its type.
    """
    inputs: dict[str, Any] = {
        key: value.to(like.device, like.dtype if value.is_floating_point() else None)
        for key, value in inputs_of(batch).items()
    }
    if not hasattr(model, "config_class"):
        return tuple(inputs.values()), {}
    if "use_cache" in inspect.signature(type(model).forward).parameters:  # nothing is generated here
        inputs["use_cache"] = False
    return (), inputs


def device_named(name: torch.device | str) -> torch.device:
    """A device by its name, and with its number.

    Raises:
        FusionError: there is none.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise FusionError(f"there is no device {name}; use cpu, cuda or mps") from error


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Runs `model` on `batch` on the model's own device and in its own type.

    Args:
        model: a timm model (takes an image tensor, returns logits) or a transformers model (takes keywords,
            returns an output with `logits`).
        batch: an image tensor [B, C, H, W], or a mapping of model inputs; `labels` are ignored.

    Returns:
        The logits, [B, classes] or, for language models, [B, T, vocabulary].
    """
    args, keywords = arguments(model, batch, next(model.parameters()))
    return scores(model(*args, **keywords))


def scores(output: Any) -> Tensor:
    """The logits in what a model of either library returns; of a model of images and texts their similarities, of one
    of its towers the embeddings, and of an encoder without a head the hidden states [B, T, d].

    Raises:
        FusionError: it has none of these.
    """
    if isinstance(output, Tensor):
        return output
    names = ("logits", "prediction_logits", "logits_per_image", "image_embeds", "text_embeds", "last_hidden_state")
    tensor: Tensor | None = next((value for name in names if (value := getattr(output, name, None)) is not None), None)
    if tensor is None:
        raise FusionError(f"a model that returns {type(output).__name__} has none of {', '.join(names)} to compare; "
                          "take one with a head")  # fmt: skip
    return tensor
