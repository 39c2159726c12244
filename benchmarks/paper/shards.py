"""Data sets that are parts of another: what parents get that never see all of the data."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from torch import Tensor

from fusionpl.datamodules import ImageDataModule

# Kind of data -> the share of a class that goes to the part that it belongs to; None for an equal share.
SHARES: dict[str, float | None] = {"IID": None, "80:20": 0.8, "own classes": 1.0}


def disjoint(labels: Tensor, classes: int, count: int, share: float | None, seed: int) -> list[Tensor]:
    """Indices of disjoint parts.

    Args:
        labels: [N] classes.
        classes: number of classes; they belong to the parts in order, as evenly as they can.
        count: number of parts.
        share: of a class, what the part that it belongs to has; the others have the rest in equal shares.
        seed: decides which samples of a class go where.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in range(count)]
    for label in range(classes):
        found = torch.nonzero(labels == label).flatten()
        found = found[torch.randperm(len(found), generator=generator)]
        own = label * count // classes
        start, until = 0, 0.0
        for index, part in enumerate(parts):
            until += 1 / count if share is None else share if index == own else (1 - share) / (count - 1)
            part.append(found[start : round(until * len(found))])
            start = round(until * len(found))
    return [torch.cat(part) for part in parts]


def places(folder: Path, count: int) -> list[Path]:
    """Where the shards in a folder are."""
    return [folder / f"part-{index}" for index in range(count)]


def write_shards(data: ImageDataModule, folder: Path, count: int, share: float | None, seed: int) -> None:
    """Data sets as folders of parquet files; their training images are disjoint parts of those of `data`.

    Validation and test are those of `data`. What is there is taken as it is.
    """
    train = data.dataset("train")
    cuts = disjoint(train.labels, data.num_classes, count, share, seed)
    for place, indices in zip(places(folder, count), cuts, strict=True):
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
