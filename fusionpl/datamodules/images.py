"""Images with labels: fixed splits, batched fetch, batched augmentation."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fusionpl.datamodules.base import Run
from fusionpl.datamodules.config import AUTO, DataConfig, mean_and_std
from fusionpl.datamodules.labelled import LabelledSplits
from fusionpl.datamodules.labels import Labels
from fusionpl.datamodules.sources import Source, digits, hub_or_folder
from fusionpl.errors import FusionError
from fusionpl.models.images import channels_of
from fusionpl.models.preprocessing import NORMALIZATIONS, ImageProcessing

DEFAULT_SIZE = 32  # where neither options nor a model say one


class ImageSet(Dataset[dict[str, Tensor]]):
    """Images held as one uint8 tensor; a batch is one indexing, not a loop.

    Args:
        pixels: uint8 [N, C, H, W].
        labels: int64 [N].
        scale, shift: float32 [C, 1, 1]; what a model is given is `pixels / scale - shift`.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, scale: Tensor, shift: Tensor) -> None:
        self.pixels, self.labels = pixels, labels
        self.scale, self.shift = scale, shift

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same images on another device."""
        return ImageSet(*(tensor.to(device) for tensor in (self.pixels, self.labels, self.scale, self.shift)))

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.pixels.device

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """The batch `{"pixel_values": float32 [B, C, H, W], normalised, "labels": int64 [B]}`."""
        return {
            "pixel_values": self.pixels[indices].float() / self.scale - self.shift,
            "labels": self.labels[indices],
        }


class ImageDataModule(LabelledSplits):
    """Train, validation, test and calibration images; no seed changes which image is in which split.

    Args:
        config: which images, and how they are served.
        seed: decides, with the epoch, the order of the training images. Augmentation draws from torch's global
            RNG.
    """

    def __init__(self, config: DataConfig, seed: int = 0) -> None:
        super().__init__(seed)
        self.config = config
        self._size = None if config.image_size is None else (config.image_size, config.image_size)
        self._channels, self._normalization = config.channels, normalization(config.normalize)
        self._processing: ImageProcessing | None = None
        self._sets: dict[str, ImageSet] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        return self._labels.names or ()

    def describe(self) -> str:
        """Number of training images."""
        return f"{len(self.dataset('train')):,} images"

    @property
    def channels(self) -> int:
        """Channels that images are given: what the options say, else the model that was followed, else the images."""
        return self._channels or self._own_channels

    @cached_property
    def _own_channels(self) -> int:
        return self._source.channels()

    def model_args(self) -> dict[str, Any]:
        """The channels of the images."""
        return {"channels": self.channels}

    @property
    def processing(self) -> ImageProcessing:
        """How images are prepared: what the options say, else the model that was followed, else `ImageProcessing()`.

        Raises:
            FusionError: mean and deviation are of another number of channels.
        """
        processing = (self._processing or ImageProcessing()).at(self._size or (DEFAULT_SIZE, DEFAULT_SIZE))
        given = self._normalization
        if given is not None:
            processing = replace(processing, mean=given.mean, std=given.std, decreed=True)
        return processing.of_channels(self.channels)

    def follow(self, model: nn.Module, processing: ImageProcessing | None = None) -> None:
        """Takes size, channels and preparation of images from `model` where the options leave them open, and the
        numbers of classes from one that knows them all by name."""
        self._number_like(model)
        if self._sets:
            return
        self._processing = self._processing or processing
        side, stated = size_of(model), None if processing is None else processing.size
        own = None if side is None else (side, side)
        # Older versions of timm kept the size of the architecture in the files of a model of another size.
        fixed = getattr(getattr(model, "patch_embed", None), "strict_img_size", False)
        self._size = self._size or (own or stated if fixed else stated or own)
        self._channels = self._channels or channels_of(model)

    def check_model(self, model: nn.Module, run: Run | None = None) -> None:
        """Raises FusionError where `model` reads images of other channels; else see `FixedSplits`."""
        self.follow(model)
        reads = channels_of(model)
        if reads not in (None, self.channels):
            raise FusionError(
                f"the {type(model).__name__} reads images of {reads} channels, but data.channels is {self.channels}; "
                "leave data.channels out, or name a model of such images"
            )
        super().check_model(model, run)

    def dataset(self, part: str) -> ImageSet:
        """The images of a part, decoded on first use.

        Args:
            part: train, validation, calibration or test.
        """
        if part not in self._sets:
            split, indices = self._parts[part]
            processing = self.processing
            pixels, read = self._source.decode(split, indices, processing, self.channels)
            labels = torch.from_numpy(self._labels.values[split][read])
            self._sets[part] = ImageSet(pixels, labels, *processing.scale_and_shift())
        return self._sets[part]

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches, gathered on the accelerator if `data.on_device` says so."""
        if self.config.on_device and self.trainer is not None:
            self._sets["train"] = self.dataset("train").to(self.trainer.strategy.root_device)
        return super().train_dataloader()

    def augmented(self, batch: Any) -> Any:
        """The batch with its images shifted and mirrored."""
        _, shift = self.processing.scale_and_shift()
        pixels = augment(batch["pixel_values"], self.config.shift, self.config.flip, -shift)
        return {**batch, "pixel_values": pixels}

    @cached_property
    def _source(self) -> Source:
        return digits() if self.config.path == "digits" else hub_or_folder(self.config)

    @cached_property
    def _every(self) -> Labels:
        return Labels(self._source.labels, self._source.class_names)


def normalization(given: str | Mapping[str, Any]) -> ImageProcessing | None:
    """The mean and deviation that `data.normalize` names or holds; None for auto."""
    if given == AUTO:
        return None
    if isinstance(given, str):
        return NORMALIZATIONS[given]
    mean, std = mean_and_std(given)
    return ImageProcessing(tuple(mean), tuple(std))


def size_of(model: nn.Module) -> int | None:
    """Height and width of the images that a model of timm or transformers reads; None where it doesn't say one."""
    config: Any = getattr(model, "config", None)
    size: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = size or getattr(config, "image_size", None) or getattr(model, "pretrained_cfg", {}).get("input_size")
    sides = set(size[-2:]) if isinstance(size, tuple | list) else {size}
    return int(sides.pop()) if len(sides) == 1 and None not in sides else None


def augment(pixels: Tensor, shift: int, flip: bool, black: Tensor) -> Tensor:
    """Shifts every image by its own random offset, filling with black, and mirrors half of them.

    Args:
        pixels: [B, C, H, W], normalised.
        shift: largest offset in pixels, both ways, both directions.
        flip: whether to mirror left to right with probability 1/2.
        black: [C, 1, 1], what normalisation makes of black.

    Returns:
        [B, C, H, W], drawn from torch's global RNG.
    """
    count, _, height, width = pixels.shape
    device = pixels.device
    if shift:
        padded = black.to(pixels).expand(*pixels.shape[:2], height + 2 * shift, width + 2 * shift).clone()
        padded[..., shift:-shift, shift:-shift] = pixels
        offsets = torch.randint(0, 2 * shift + 1, (2, count, 1), device=device)
        rows = offsets[0] + torch.arange(height, device=device)
        columns = offsets[1] + torch.arange(width, device=device)
        images = torch.arange(count, device=device)[:, None, None]
        pixels = padded[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if flip:
        mirrored = torch.rand(count, 1, 1, 1, device=device) < 0.5
        pixels = torch.where(mirrored, pixels.flip(-1), pixels)
    return pixels.contiguous()
