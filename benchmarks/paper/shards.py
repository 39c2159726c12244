"""Data sets that are parts of another: what parents get that never see all of the data."""

from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from fusionpl.datamodules.base import FixedSplits
from fusionpl.datamodules.corpora import corpus
from fusionpl.datamodules.images import ImageDataModule
from fusionpl.files import whole

Splits = Callable[[str], datasets.Dataset]

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


def write_shards(data: FixedSplits, folder: Path, count: int, share: float | None, seed: int) -> None:
    """Data sets as folders of parquet files; their training samples are disjoint parts of those of `data`.

    Validation and test are those of `data`; classes of text are topics. What is there is taken as it is.
    """
    splits, labels, classes = _images(data) if isinstance(data, ImageDataModule) else _documents(data, count)
    cuts = disjoint(labels, classes, count, share, seed)
    for place, indices in zip(places(folder, count), cuts, strict=True):
        if not (place / "train.parquet").is_file():
            place.mkdir(parents=True, exist_ok=True)
            for part in ("validation", "test"):
                _write(splits(part), place / f"{part}.parquet")
            _write(splits("train").select(indices.sort().values), place / "train.parquet")


def topics(texts: Sequence[str], count: int) -> list[int]:
    """The topic of each text, all of about as much: along the direction in which their words differ most.

    Source: latent semantic analysis, Deerwester et al., 1990.
    """
    words = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    along = TruncatedSVD(2, random_state=0).fit_transform(words)[:, 1]  # the first is how much is said at all
    found, before = [0] * len(texts), 0
    for index in along.argsort(kind="stable").tolist():
        found[index] = before * count // sum(map(len, texts))
        before += len(texts[index])
    return found


def _images(data: ImageDataModule) -> tuple[Splits, Tensor, int]:
    names = list(data.class_names)

    def split(part: str) -> datasets.Dataset:
        found = data.dataset(part)
        channels = found.pixels.shape[1]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        images = [image.permute(1, 2, 0).squeeze(-1 if channels == 1 else ()).numpy() for image in found.pixels]
        return datasets.Dataset.from_dict({"image": images, "label": found.labels.tolist()}, features=features)

    return split, data.dataset("train").labels, data.num_classes


def _documents(data: FixedSplits, count: int) -> tuple[Splits, Tensor, int]:
    """Documents, those for training in paragraphs, which have the topics of theirs."""
    config = data.config
    found = corpus(config.path, config.name, config.text_column, streaming=False)
    texts = found["train"]["text"]
    pieces = [(f"{part}\n\n", topic) for text, topic in zip(texts, topics(texts, count), strict=True)
              for part in text.split("\n\n")]  # fmt: skip
    train, labels = zip(*pieces, strict=True)
    found["train"] = datasets.Dataset.from_dict({"text": list(train)})
    return found.__getitem__, torch.tensor(labels), count


def _write(rows: datasets.Dataset, file: Path) -> None:
    with whole(file) as new:
        rows.to_parquet(new)
