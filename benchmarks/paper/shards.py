"""Data sets that are parts of another: what parents get that never see all of the data."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from torch import Tensor

from fusionpl.datamodules import ImageDataModule

SHARE = 0.8


def halves(labels: Tensor, classes: int, *, skewed: bool, seed: int) -> list[Tensor]:
    """Indices of two disjoint halves.

    Args:
        labels: [N] classes.
        classes: number of classes.
        skewed: the first half has 80 % of the first half of the classes and 20 % of the others; else 50 % of all.
        seed: decides which samples of a class go where.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[], []]
    for label in range(classes):
        found = torch.nonzero(labels == label).flatten()
        found = found[torch.randperm(len(found), generator=generator)]
        share = 0.5 if not skewed else SHARE if label < classes // 2 else 1 - SHARE
        cut = round(share * len(found))
        parts[0].append(found[:cut])
        parts[1].append(found[cut:])
    return [torch.cat(part) for part in parts]


def parts(folder: Path) -> list[Path]:
    """Where the two shards in a folder are."""
    return [folder / f"part-{index}" for index in (0, 1)]


def write_shards(data: ImageDataModule, folder: Path, *, skewed: bool, seed: int) -> None:
    """Two data sets as folders of parquet files; their training images are halves of those of `data`.

    Validation and test are those of `data`. What is there is taken as it is.
    """
    train = data.dataset("train")
    cuts = halves(train.labels, data.num_classes, skewed=skewed, seed=seed)
    for place, indices in zip(parts(folder), cuts, strict=True):
        if not (place / "train.parquet").is_file():
            place.mkdir(parents=True, exist_ok=True)
            for part in ("validation", "test"):
                whole = data.dataset(part)
                _write(whole.pixels, whole.labels, data.class_names, place / f"{part}.parquet")
            _write(train.pixels[indices], train.labels[indices], data.class_names, place / "train.parquet")


def _write(pixels: Tensor, labels: Tensor, names: Sequence[str], file: Path) -> None:
    channels = pixels.shape[1]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    images = [image.permute(1, 2, 0).squeeze(-1 if channels == 1 else ()).numpy() for image in pixels]
    made = datasets.Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)
    temporary = file.with_suffix(".tmp")
    made.to_parquet(temporary)
    temporary.replace(file)
