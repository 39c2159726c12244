"""Parents for images of another size: their position embeddings are interpolated to the anchor's as they are read."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import transformers
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from fusionpl.errors import FusionError
from fusionpl.families.binding import bind
from fusionpl.families.family import Family
from fusionpl.models.resized import refilled, reshaped

# What families call the places of an image's patches.
_PLACES = ("patches", "positions")
Moved = Callable[[str, Tensor], Tensor]


class Grid(NamedTuple):
    """How a model cuts images into patches: sizes in pixels, height before width."""

    image: tuple[int, int]
    patch: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]


def grid_of(model: nn.Module) -> Grid | None:
    """How a model cuts images into patches; None where it reads none, or images of any size."""
    if isinstance(model, transformers.PreTrainedModel):
        source: Any = getattr(model.config, "vision_config", model.config)
        sizes = getattr(source, "image_size", None), getattr(source, "patch_size", None)
    else:
        source = getattr(model, "patch_embed", None)
        sizes = getattr(source, "img_size", None), getattr(source, "patch_size", None)
    return None if None in sizes else Grid(*map(_pair, sizes))


def at_image_size(
    model: nn.Module, like: nn.Module, family: Family | None = None, names: tuple[str, str] = ("it", "the anchor")
) -> tuple[nn.Module, Moved] | None:
    """A model for images of the size that another takes.

    Source: `timm.layers.resample_abs_pos_embed`; tokens that stand before the patches keep their embeddings.

    Args:
        model: of timm or transformers; it may be on the meta device, and stays as it is.
        like: the model whose image size is taken.
        family: see `bind`.
        names: how messages call the two.

    Returns:
        A model like the first, whose parameters are none to be used, and what makes its parameters of the first's, by
        their names; None where nothing is to be done.

    Raises:
        FusionError: the two cut images into patches of different size.
    """
    own, other = grid_of(model), grid_of(like)
    if own is None or other is None or own == other:
        return None
    if own.patch != other.patch:
        cut = [f"{name} of {_times(grid.patch)}" for name, grid in zip(names[::-1], (other, own), strict=True)]
        raise FusionError(f"parents cut images into patches of different size: {', '.join(cut)}; use one patch size")
    places = places_of(model, family)
    if places is None:
        return None
    name, prefix = places

    def moved(parameter: str, tensor: Tensor) -> Tensor:
        if parameter != name:
            return tensor
        table = tensor if tensor.ndim == 3 else tensor[None]
        resampled: Tensor = resample_abs_pos_embed(table, list(other.size), list(own.size), num_prefix_tokens=prefix)
        return resampled.reshape(*tensor.shape[:-2], *resampled.shape[1:])

    return _empty(model, other), moved


def with_image_size(model: nn.Module, like: nn.Module, family: Family | None = None) -> nn.Module:
    """A whole model for images of the size that another takes, or the model itself; see `at_image_size`."""
    replacement = at_image_size(model, like, family)
    if replacement is None:
        return model
    return refilled(model, *replacement)


def describe_resampling(name: str, model: nn.Module, anchor: str, like: nn.Module) -> str:
    """What a reader should know of a parent whose position embeddings are interpolated."""
    own, other = grid_of(model), grid_of(like)
    assert own is not None
    assert other is not None
    return (
        f"{name}: trained on images of {_times(own.image)}, its position embeddings are interpolated to {anchor}'s "
        f"{_times(other.image)}, and it is measured so"
    )


def patches_of(model: nn.Module) -> tuple[str, nn.Conv2d] | None:
    """The convolution that reads images, and its name; None where there is none."""
    return next(((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), None)


def channels_of(model: nn.Module) -> int | None:
    """Channels of the images that a model reads: those of its first convolution; None where it has none."""
    patches = patches_of(model)
    return None if patches is None else patches[1].in_channels


def places_of(model: nn.Module, family: Family | None = None) -> tuple[str, int] | None:
    """The parameter with the embeddings of places, and how many rows stand before those of the patches; None where
    there is none."""
    grid = grid_of(model)
    if grid is None:
        return None
    binding = bind(model, family)
    axis = next((binding.axes[name] for name in _PLACES if name in binding.axes), None)
    parameters = [slot.parameter for slot in binding.slots if axis is not None and axis.name in slot.axes]
    return (parameters[0], axis.size - grid.size[0] * grid.size[1]) if axis is not None and parameters else None


def _empty(model: Any, grid: Grid) -> nn.Module:
    """A copy for images of another size, whose parameters are none to be used."""
    if isinstance(model, transformers.PreTrainedModel):
        config: Any = copy.deepcopy(model.config)
        square = grid.image[0] == grid.image[1]
        getattr(config, "vision_config", config).image_size = grid.image[0] if square else list(grid.image)
        return reshaped(model, config)
    # Its parameters are the other's but for the one that timm replaces.
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    with torch.no_grad():
        twin.set_input_size(img_size=grid.image)
    if hasattr(twin, "pretrained_cfg"):
        twin.pretrained_cfg["input_size"] = (*twin.pretrained_cfg.get("input_size", (3,))[:1], *grid.image)
    return cast(nn.Module, twin)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else cast(tuple[int, int], tuple(size))


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
