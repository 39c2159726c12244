"""Parents of grey images beside parents of colour ones: their patch embedding is rewritten as it is read."""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from fusionpl.errors import FusionError
from fusionpl.models.images import Moved, channels_of, patches_of
from fusionpl.models.preprocessing import ImageProcessing
from fusionpl.models.resized import refilled, remade, reshaped

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, by which Pillow makes grey of colours


def at_channels(
    model: nn.Module,
    like: nn.Module,
    own: Callable[[], ImageProcessing | None],
    names: tuple[str, str] = ("it", "the anchor"),
) -> tuple[nn.Module, Moved] | None:
    """A model for images of as many channels as another takes.

    Of a model of grey images each channel of the new one has its share of the luma, so that it does to a colour image
    what it did to the grey one (8 bits of which are rounded). Of a model of colour images the three channels are added
    up: a grey image has the same number in all.

    Args:
        model: of timm or transformers; it may be on the meta device, and stays as it is.
        like: the model whose number of channels is taken.
        own: gives how the model takes its images, None where nothing says; asked where colours become grey.
        names: how messages call the two.

    Returns:
        As `at_image_size`.

    Raises:
        FusionError: not one is of grey and the other of colour images; colours are normalised by different numbers,
            which a grey image has not.
    """
    patches, have, wanted = patches_of(model), channels_of(model), channels_of(like)
    if patches is None or wanted is None or have == wanted:
        return None
    if {have, wanted} != {1, 3}:
        raise FusionError(
            f"{names[0]} reads images of {have} channels, {names[1]} of {wanted}; use parents of one kind"
        )
    processing = own() if wanted == 1 else None
    if processing is not None and any(len(set(values)) > 1 for values in (processing.mean, processing.std)):
        raise FusionError(
            f"{names[0]} reads colour images that are normalised by a number for each channel, {names[1]} grey ones; "
            f"make {names[0]} the anchor"
        )
    weight = f"{patches[0]}.weight"

    def moved(parameter: str, tensor: Tensor) -> Tensor:
        if parameter != weight:
            return tensor
        if wanted == 1:
            return tensor.sum(1, keepdim=True)
        return tensor * torch.tensor(LUMA).to(tensor)[:, None, None]

    return _empty(model, wanted), moved


def with_channels_of(model: nn.Module, like: nn.Module, own: Callable[[], ImageProcessing | None]) -> nn.Module:
    """A whole model for images of as many channels as another takes, or the model itself; see `at_channels`."""
    replacement = at_channels(model, like, own)
    return model if replacement is None else refilled(model, *replacement)


def _empty(model: Any, channels: int) -> nn.Module:
    if isinstance(model, transformers.PreTrainedModel):
        config: Any = copy.deepcopy(model.config)
        getattr(config, "vision_config", config).num_channels = channels
        return reshaped(model, config)
    new: Any = remade(model, in_chans=channels)
    new.pretrained_cfg["input_size"] = (channels, *new.pretrained_cfg.get("input_size", (3,))[1:])
    return cast(nn.Module, new)
