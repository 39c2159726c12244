"""Parents that see the same image as other numbers: their patch embedding is rewritten as they are read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusionpl.errors import FusionError
from fusionpl.families.family import Family
from fusionpl.models.hub import short_name
from fusionpl.models.images import Moved, grid_of, patches_of, places_of
from fusionpl.models.preprocessing import ImageProcessing
from fusionpl.models.processors import image_processing

Names = tuple[str, str]


def for_pixels(
    model: nn.Module,
    own: ImageProcessing | None,
    given: ImageProcessing | None,
    read: Callable[[str], Tensor],
    family: Family | None = None,
    names: Names = ("it", "the anchor"),
) -> Moved | None:
    """What makes a model's parameters such that it does to images prepared otherwise what it did to its own.

    A pixel x of one normalisation is `a x + b` of the other, by channel, so a convolution without padding takes the
    difference exactly: `a` goes into its weight, and what `b` makes of all patches into its bias, or else into the
    embeddings of their places.

    Args:
        model: that reads images; it may be on the meta device.
        own: how it was trained to take them; None for the default.
        given: how they are prepared; None where nobody says.
        read: gives a parameter by its name.
        family: see `bind`.
        names: how messages call it, and whose images are given.

    Returns:
        Takes the name of a parameter and its tensor; None where nothing is to be done.

    Raises:
        FusionError: the model has no such convolution, or no place for the constant.
    """
    own = own or ImageProcessing()
    if given is None or given.decreed or grid_of(model) is None or own.sees_as(given):
        return None
    patches, places = patches_of(model), places_of(model, family)
    if patches is None or any(patches[1].padding) or (patches[1].bias is None and places is None):
        raise FusionError(
            f"{names[0]} sees images with {own.summary()}, {names[1]} with {given.summary()}, and its first layer "
            "can't be rewritten for that; say by which they are prepared with --data.normalize"
        )
    name, convolution = patches
    weight, (scale, shift) = f"{name}.weight", _between(own, given, convolution.in_channels)
    turned = own.bgr != given.bgr
    kernel = read(weight).double().cpu()
    constant = torch.einsum("ochw,c->o", kernel.flip(1) if turned else kernel, shift)
    target, prefix = (f"{name}.bias", 0) if convolution.bias is not None else (places or ("", 0))

    def moved(parameter: str, tensor: Tensor) -> Tensor:
        if parameter == weight:
            values = (tensor.flip(1) if turned else tensor).double() * scale.to(tensor.device)[:, None, None]
            return values.to(tensor.dtype)
        if parameter != target:
            return tensor
        values = tensor.double()
        if convolution.bias is None:
            values[..., prefix:, :] += constant.to(tensor.device)
        else:
            values += constant.to(tensor.device)
        return values.to(tensor.dtype)

    return moved


@torch.no_grad()
def with_pixels(
    model: nn.Module, source: str | Path, given: ImageProcessing | None, family: Family | None = None
) -> nn.Module:
    """A whole model that was read from `source`, changed in place and returned, that takes images as they are prepared;
    see `for_pixels`."""
    if given is None or given.decreed or grid_of(model) is None:
        return model

    def read(name: str) -> Tensor:
        return model.get_parameter(name).detach()

    moved = for_pixels(model, image_processing(source), given, read, family, (short_name(str(source)), "the data"))
    if moved is not None:
        for name, parameter in model.named_parameters():
            parameter.copy_(moved(name, parameter.detach()))
    return model


def describe_pixels(name: str, own: ImageProcessing | None, anchor: str, given: ImageProcessing) -> str:
    """What a reader should know of a parent whose patch embedding is rewritten."""
    said = "" if own else " (its folder says nothing)"
    return (
        f"{name}: trained on images of {(own or ImageProcessing()).summary()}{said}, its patch embedding is rewritten "
        f"for {anchor}'s, {given.summary()}, which changes no output"
    )


def describe_differences(found: Mapping[str, ImageProcessing | None], anchor: str) -> list[str]:
    """A line for each model whose folder resizes or crops images otherwise than the anchor's.

    Args:
        found: name -> what its folder says.
        anchor: its name, in `found`; images are prepared as it says.
    """
    reference = found[anchor]
    if reference is None:
        return []
    return [
        f"{name}: its images were prepared otherwise ({own.told_geometry()}), and are here as {anchor}'s "
        f"({reference.told_geometry()})"
        for name, own in found.items()
        if own is not None and own.told_geometry() != reference.told_geometry()
    ]


def _between(own: ImageProcessing, given: ImageProcessing, channels: int) -> tuple[Tensor, Tensor]:
    """Float64 [C] each: what the model takes is `scale * given + shift`, in the given order of channels."""

    def numbers(processing: ImageProcessing) -> Any:
        per_channel = processing.of_channels(channels)
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (per_channel.mean, per_channel.std))
        return (mean.flip(0), std.flip(0)) if processing is own and own.bgr != given.bgr else (mean, std)

    (mean, std), (other_mean, other_std) = numbers(own), numbers(given)
    return other_std / std, (other_mean - mean) / std
