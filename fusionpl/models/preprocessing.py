"""How a model takes its images, done as timm and transformers do it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from fusionpl.errors import FusionError

Size = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class ImageProcessing:
    """What is done to an image before a model sees it; by default no more than to bring it to the model's size.

    Args:
        mean, std: per channel, of pixels in 0..1: the model sees (pixel - mean) / std. One number is for all channels.
        resize: the size that images are brought to, or the length of their shorter side; None for the model's size.
        crop: the size that is cut from the middle; None for nothing cut off.
        interpolation: by which they are resized, as torchvision calls it.
        bgr: whether the channels come as blue, green, red; `mean` and `std` are in that order.
        library: whose arithmetic is followed: timm resizes with Pillow, transformers with torchvision, and they round
            the place of a crop differently.
        decreed: this is a user's word, which stands over what the folders of models say.
    """

    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    resize: Size | int | None = None
    crop: Size | None = None
    interpolation: str = "bilinear"
    bgr: bool = False
    library: Literal["timm", "transformers"] = field(default="timm", compare=False)
    decreed: bool = field(default=False, compare=False)

    @property
    def size(self) -> Size | None:
        """Height and width of what the model sees; None where that is the model's own size."""
        return self.crop or cast(Size | None, self.resize)  # a shorter side alone comes with a crop

    def at(self, size: Size) -> Self:
        """The same for another size: what is cut off keeps its share."""
        if self.crop is None:
            return replace(self, resize=size)
        ratio = [new / old for new, old in zip(size, self.crop, strict=True)]
        resize = self.resize
        if isinstance(resize, int):
            resize = round(resize * max(ratio))
        elif resize is not None:
            resize = round(resize[0] * ratio[0]), round(resize[1] * ratio[1])
        return replace(self, resize=resize, crop=size)

    def of_channels(self, count: int) -> Self:
        """The same with a mean and a deviation for each of `count` channels.

        Raises:
            FusionError: it has them for another number of channels.
        """
        statistics = []
        for values in (self.mean, self.std):
            if len(set(values)) > 1 and len(values) != count:
                raise FusionError(
                    f"images of {count} channels are to be normalised by {len(values)} different numbers, "
                    f"{_numbers(values)}; give --data.normalize"
                )
            statistics.append(values if len(values) == count else values[:1] * count)
        return replace(self, mean=statistics[0], std=statistics[1])

    def pixels(self, picture: Image.Image) -> Tensor:
        """An image as uint8 [C, H, W], resized and cropped but not normalised."""
        library = self.library if self.interpolation != "lanczos" else "timm"  # older torchvision has none for tensors
        image: Any = picture if library == "timm" else transforms.pil_to_tensor(picture)
        if self.resize is not None:
            size = [self.resize] if isinstance(self.resize, int) else list(self.resize)
            exact = library == "transformers" and self.interpolation == "nearest"
            image = transforms.resize(image, size, InterpolationMode(self.interpolation + "-exact" * exact))
        if self.crop is not None:
            _, *size = transforms.get_dimensions(image)
            image = transforms.crop(image, *map(self._start, size, self.crop), *self.crop)
        tensor: Tensor = transforms.pil_to_tensor(image) if isinstance(image, Image.Image) else image
        return tensor.flip(0) if self.bgr else tensor

    def _start(self, length: int, window: int) -> int:
        """Where a crop begins: torchvision, which timm calls, rounds a half to even, and transformers down."""
        middle = (length - window) / 2
        return int(middle) if self.library == "transformers" or middle < 0 else round(middle)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Float32 [C, 1, 1] each: the model sees `pixels / scale - shift`."""
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (self.mean, self.std))
        return (255 * std).float(), (mean / std).float()

    def sees_as(self, other: "ImageProcessing") -> bool:
        """Whether a model sees the same numbers for a pixel as under the other one."""
        count = max(len(processing.mean) for processing in (self, other))
        ours, theirs = (processing.of_channels(count) for processing in (self, other))
        same = np.allclose(ours.mean, theirs.mean, atol=1e-6) and np.allclose(ours.std, theirs.std, rtol=1e-6)
        return bool(same) and self.bgr == other.bgr

    def summary(self) -> str:
        """Mean and deviation in words."""
        words = f"mean {_numbers(self.mean)} and deviation {_numbers(self.std)}"
        return words + " in the order blue, green, red" * self.bgr

    def told_geometry(self) -> str:
        """Resizing and crop in words, whatever the size."""
        if self.resize is None:
            return "cropped as they are" if self.crop else "resized bilinearly to the model's size"
        side = self.resize if isinstance(self.resize, int) else self.resize[0]
        share = f", {100 * min(self.crop) / side:.0f} % of a side kept" if self.crop else ""
        return f"{self.interpolation}, {'shape kept' if isinstance(self.resize, int) else 'squeezed'}{share}"


NORMALIZATIONS: Mapping[str, ImageProcessing] = {
    "imagenet": ImageProcessing(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "half": ImageProcessing(),
    "clip": ImageProcessing(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "none": ImageProcessing((0.0,), (1.0,)),
}


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.3g}" for value in (values[:1] if len(set(values)) == 1 else values))
