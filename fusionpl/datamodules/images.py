"""Images with labels: fixed splits, batched fetch, batched augmentation."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from fusionpl.datamodules.base import FixedSplits
from fusionpl.datamodules.sources import Source, digits, hub_or_folder
from fusionpl.datamodules.splits import Indices, labelled_parts
from fusionpl.errors import FusionError

BLACK = -1.0
LARGEST = 2**13  # pixels of a side: no model takes more, and a slip of the pen would ask for all memory


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are served.

    Args:
        path: `digits` (ships with scikit-learn), a hub id, or a local folder of parquet files.
        image_size: height and width in pixels; others are resized.
        channels: 1 (grey) or 3 (RGB).
        batch_size: training images a step and process.
        train_limit: train on at most this many images; null for all. The other splits stay as they are.
        validation: images taken from the training split for validation, if the data set has no such split.
        calibration: images taken from the training split for calibration.
        shift: training images are shifted by up to this many pixels both ways.
        flip: training images are mirrored with probability 1/2.
        num_workers: processes that fetch training batches; 0 fetches in the main one.
        on_device: training images live on the accelerator as one uint8 tensor, so that a batch costs no transfer.
        skip_corrupt: leave out rows whose image can't be read or whose label is none, and count them.
    """

    path: str = "digits"
    image_size: int = 32
    channels: int = 1
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
    """

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels = pixels
        self.labels = labels

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same images on another device."""
        return ImageSet(self.pixels.to(device), self.labels.to(device))

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.pixels.device

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """The batch `{"pixel_values": float32 [B, C, H, W] in -1..1, "labels": int64 [B]}`."""
        return {"pixel_values": self.pixels[indices].float() / 127.5 - 1.0, "labels": self.labels[indices]}


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
            if getattr(config, name) < least:
                raise FusionError(f"data.{name} must be at least {least}, not {getattr(config, name)}")
        if config.image_size > LARGEST:
            raise FusionError(f"data.image_size must be at most {LARGEST}, not {config.image_size:.3g}")
        if config.channels not in (1, 3):
            raise FusionError(f"data.channels must be 1 or 3, not {config.channels}")
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

    def dataset(self, part: str) -> ImageSet:
        """The images of a part, decoded on first use.

        Args:
            part: train, validation, calibration or test.
        """
        if part not in self._sets:
            split, indices = self._parts[part]
            pixels, read = self._source.decode(split, indices)
            self._sets[part] = ImageSet(pixels, torch.from_numpy(self._source.labels[split][read]))
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
        return {**batch, "pixel_values": augment(batch["pixel_values"], self.config.shift, self.config.flip)}

    @cached_property
    def _source(self) -> Source:
        config = self.config
        if config.path == "digits":
            return digits(config.image_size, config.channels)
        return hub_or_folder(config)

    @cached_property
    def _parts(self) -> dict[str, tuple[str, Indices]]:
        """For every part, the split it is from and its indices there."""
        return labelled_parts(self._source.labels, self.config)


def augment(pixels: Tensor, shift: int, flip: bool) -> Tensor:
    """Shifts every image by its own random offset, filling with black, and mirrors half of them.

    Args:
        pixels: [B, C, H, W] in -1..1.
        shift: largest offset in pixels, both ways, both directions.
        flip: whether to mirror left to right with probability 1/2.

    Returns:
        [B, C, H, W], drawn from torch's global RNG.
    """
    count, _, height, width = pixels.shape
    device = pixels.device
    if shift:
        padded = functional.pad(pixels, (shift,) * 4, value=BLACK)
        offsets = torch.randint(0, 2 * shift + 1, (2, count, 1), device=device)
        rows = offsets[0] + torch.arange(height, device=device)
        columns = offsets[1] + torch.arange(width, device=device)
        images = torch.arange(count, device=device)[:, None, None]
        pixels = padded[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if flip:
        mirrored = torch.rand(count, 1, 1, 1, device=device) < 0.5
        pixels = torch.where(mirrored, pixels.flip(-1), pixels)
    return pixels.contiguous()
