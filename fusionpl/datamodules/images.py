"""Images with labels: fixed splits, batched fetch, batched augmentation."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fusionpl.datamodules.base import FixedSplits, Run
from fusionpl.datamodules.sources import Source, digits, hub_or_folder
from fusionpl.datamodules.splits import Indices, labelled_parts
from fusionpl.errors import FusionError, nearest
from fusionpl.models.preprocessing import NORMALIZATIONS, ImageProcessing

AUTO = "auto"
DEFAULT_SIZE = 32  # where neither options nor a model say one
LARGEST = 2**13  # pixels of a side: no model takes more, and a slip of the pen would ask for all memory


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are served.

    Args:
        path: `digits` (ships with scikit-learn), a hub id, a data file (.parquet), a folder of them, or a folder of
            images by class: images/train/cat/1.png, or images/cat/1.png.
        image_size: height and width in pixels; others are resized. Null for the model's.
        channels: 1 (grey) or 3 (RGB); null for the model's. A model that is built then has as many as the images:
            1 where all are grey.
        normalize: mean and deviation that pixels between 0 and 1 are normalised by: `imagenet`, `clip`, `half` (they
            are -1..1 then), `none` (they stay), or `{mean: [0.5], std: [0.25]}`, one for each channel or for all; auto
            is what the model's folder says, else half. What is said here is taken for all models.
        batch_size: training images a step and process.
        train_limit: train on at most this many images; null for all. The other splits stay as they are.
        validation: images taken from the training split for validation, if the data set has no such split; of few
            images a share.
        calibration: images taken from the training split for calibration; of few images a share.
        shift: training images are shifted by up to this many pixels both ways.
        flip: training images are mirrored with probability 1/2.
        num_workers: processes that fetch training batches; 0 fetches in the main one.
        on_device: training images live on the accelerator as one uint8 tensor, so that a batch costs no transfer.
        skip_corrupt: leave out rows whose image can't be read or whose label is none, and count them.
    """

    path: str = "digits"
    image_size: int | None = None
    channels: int | None = None
    normalize: str | dict[str, float | list[float]] = AUTO
    batch_size: int = 16
    train_limit: int | None = None
    validation: int = 200
    calibration: int = 197
    shift: int = 0
    flip: bool = False
    num_workers: int = 0
    on_device: bool = False
    skip_corrupt: bool = False


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
        return ImageSet(*(one.to(device) for one in (self.pixels, self.labels, self.scale, self.shift)))

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


class ImageDataModule(FixedSplits):
    """Train, validation, test and calibration images; no seed changes which image is in which split.

    Args:
        config: which images, and how they are served.
        seed: decides, with the epoch, the order of the training images. Augmentation draws from torch's global
            RNG.

    Raises:
        FusionError: options out of range.
    """

    def __init__(self, config: DataConfig, seed: int = 0) -> None:
        super().__init__(seed)
        self.config = config
        for name, least in {"image_size": 1, "batch_size": 1, "shift": 0, "num_workers": 0}.items():
            value = getattr(config, name)
            if value is not None and value < least:
                raise FusionError(f"data.{name} must be at least {least}, not {value}")
        if config.image_size is not None and config.image_size > LARGEST:
            raise FusionError(f"data.image_size must be at most {LARGEST}, not {config.image_size:.3g}")
        if config.channels not in (None, 1, 3):
            raise FusionError(f"data.channels must be 1 or 3, not {config.channels}")
        self._size = None if config.image_size is None else (config.image_size, config.image_size)
        self._channels, self._normalization = config.channels, normalization(config.normalize)
        self._processing: ImageProcessing | None = None
        self._sets: dict[str, ImageSet] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        return self._source.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

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
        found = (self._processing or ImageProcessing()).at(self._size or (DEFAULT_SIZE, DEFAULT_SIZE))
        given = self._normalization
        if given is not None:
            found = replace(found, mean=given.mean, std=given.std, decreed=True)
        return found.of_channels(self.channels)

    def follow(self, model: nn.Module, processing: ImageProcessing | None = None) -> None:
        """Takes size, channels and preparation of images from `model` where the options leave them open."""
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
            labels = torch.from_numpy(self._source.labels[split][read])
            self._sets[part] = ImageSet(pixels, labels, *processing.scale_and_shift())
        return self._sets[part]

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches, gathered on the accelerator if `data.on_device` says so.

        Raises:
            FusionError: on_device with worker processes, which can't share an accelerator's memory.
        """
        if self.config.on_device:
            if self.config.num_workers:
                raise FusionError(f"data.on_device needs data.num_workers 0, not {self.config.num_workers}")
            if self.trainer is not None:
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
    def _parts(self) -> dict[str, tuple[str, Indices]]:
        """For every part, the split it is from and its indices there."""
        return labelled_parts(self._source.labels, self.config)


def normalization(given: str | Mapping[str, Any]) -> ImageProcessing | None:
    """The mean and deviation that `data.normalize` names or holds; None for auto.

    Raises:
        FusionError: there is no such name; mean and deviation are not there, are no numbers, or don't fit together.
    """
    if given == AUTO:
        return None
    if isinstance(given, str):
        if given not in NORMALIZATIONS:
            known = (AUTO, *NORMALIZATIONS)
            raise FusionError(
                f"data.normalize: there is no '{given}'{nearest(given, known)}; use {', '.join(known)}, or "
                "{mean: [0.5], std: [0.25]}"
            )
        return NORMALIZATIONS[given]
    mean, std = (one if isinstance(one, list) else [one] for one in (given.get(key, []) for key in ("mean", "std")))
    if given.keys() != {"mean", "std"} or len(mean) != len(std) or len(mean) not in (1, 3):
        raise FusionError(
            f"data.normalize is {dict(given)}; give mean and std, of one number or of one for each channel: "
            "{mean: [0.5], std: [0.25]}"
        )
    if not all(isfinite(one) for one in mean) or not all(isfinite(one) and one > 0 for one in std):
        raise FusionError(f"data.normalize: std must be above 0, and all of {dict(given)} finite")
    return ImageProcessing(tuple(mean), tuple(std))


def channels_of(model: nn.Module) -> int | None:
    """Channels of the images that a model reads: those of its first convolution; None where it has none."""
    return next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)


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
