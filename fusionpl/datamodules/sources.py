"""Where labelled images come from: scikit-learn's digits, a hub id, a data file, a folder of them or of images."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fusionpl.datamodules.config import BUILT_IN
from fusionpl.datamodules.files import check_any, file_arguments, folder_arguments, kind_of, unread
from fusionpl.datamodules.splits import Indices, SplitConfig, check_classes, class_numbers, flawed, tell
from fusionpl.errors import FusionError, reason
from fusionpl.models.preprocessing import ImageProcessing

EMPTY = ("SchemaInferenceError", "EmptyDataError")  # what datasets and pandas raise for files without a row
DEEP_GREY = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # 16 bits a pixel, as PIL calls them
GREY = ("1", "L", "LA", "La", "F", *DEEP_GREY)


@dataclass(frozen=True)
class Source:
    """A data set whose images are decoded when they are asked for.

    Args:
        class_names: names of the classes, in the order of the labels.
        labels: for every split, the labels [N].
        decode: takes the name of a split, indices [n], how images are prepared, with a size, and the number of
            channels; gives pixels, uint8 [m, C, H, W], and the indices [m] of those that can be read.
        channels: finds how many channels the images have: 1 where all are grey, else 3.
    """

    class_names: tuple[str, ...]
    labels: dict[str, Indices]
    decode: Callable[[str, Indices, ImageProcessing, int], tuple[Tensor, Indices]]
    channels: Callable[[], int]


def digits() -> Source:
    """1,797 scanned digits that ship with scikit-learn: 8x8 grey, 400 of them are the test split.

    They are enlarged bilinearly and whole, whatever is done to images. As colour images they have three equal channels.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    small = torch.from_numpy(data.images).float()[:, None] * (255 / 16)
    train, test = train_test_split(np.arange(len(small)), test_size=400, random_state=0, stratify=data.target)
    rows = {"train": train, "test": test}

    def decode(split: str, indices: Indices, processing: ImageProcessing, channels: int) -> tuple[Tensor, Indices]:
        images = small[rows[split][indices]]
        large = functional.interpolate(images, processing.size, mode="bilinear", align_corners=False)
        return large.round().to(torch.uint8).expand(-1, channels, -1, -1).contiguous(), indices

    return Source(
        class_names=tuple(str(name) for name in data.target_names),
        labels={split: data.target[rows[split]].astype(np.int64) for split in rows},
        decode=decode,
        channels=lambda: 1,
    )


def hub_or_folder(config: SplitConfig) -> Source:
    """A data set of the hub, a data file, a folder of them, or of images by class: `datasets.load_dataset` reads all.

    The image and the label column are found from the data set's features (Image, ClassLabel). A label column of
    plain integers has classes named "0", "1", ...

    Args:
        config: hub id, file or folder, and whether rows that can't be read are left out.

    Raises:
        FusionError: nothing there, no image column, no label column (lists what there is), a row without a label or
            with one that is no class, a single class. `decode` raises it for an image that can't be read.
    """
    import datasets

    splits = load(config.path)
    features = next(iter(splits.values())).features
    image, label = _image_column(config.path, features), _label_column(config.path, features)
    names = getattr(features[label], "names", None)
    classes = None if names is None else len(names)
    labels = class_numbers({split: list(rows[label]) for split, rows in splits.items()}, classes, label, config)
    if names is None:
        names = [str(index) for index in range(max(int(values.max(initial=0)) for values in labels.values()) + 1)]
    check_classes(names, label, config)
    images = {
        split: rows.select_columns([image]).cast_column(image, datasets.Image()) for split, rows in splits.items()
    }

    def decode(split: str, indices: Indices, processing: ImageProcessing, channels: int) -> tuple[Tensor, Indices]:
        assert processing.size is not None
        pixels = torch.empty(len(indices), channels, *processing.size, dtype=torch.uint8)
        wrong: dict[int, str] = {}
        for row, index in enumerate(indices.tolist()):
            try:
                picture = images[split][index][image]
                if picture is None:
                    wrong[row] = "holds no image"
                    continue
                picture = _converted(picture, channels)
            except Exception as error:  # a broken file raises whatever its decoder does
                wrong[row] = f"holds an image that can't be read ({reason(error, 80)})"
                continue
            pixels[row] = processing.pixels(picture)
        if wrong:
            rows = [int(indices[row]) for row in wrong]
            flawed(config, split, rows, f"column '{image}' {next(iter(wrong.values()))}", len(indices))
            good_rows = [row for row in range(len(indices)) if row not in wrong]
            return pixels[good_rows], indices[good_rows]
        return pixels, indices

    def channels() -> int:
        for rows in images.values():
            for row in rows.cast_column(image, datasets.Image(decode=False)):
                if not _is_grey(row[image]):
                    return 3
        return 1

    return Source(tuple(names), labels, decode, channels)


def _is_grey(encoded: dict[str, Any] | None) -> bool:
    """Whether an encoded image is grey, by its header; one that can't be read says nothing against it."""
    if encoded is None:
        return True
    try:
        with Image.open(encoded["path"] if encoded["bytes"] is None else BytesIO(encoded["bytes"])) as picture:
            return picture.mode in GREY
    except Exception:  # a broken file raises whatever its decoder does; decoding it names it
        return True


def _converted(picture: Image.Image, channels: int) -> Image.Image:
    if picture.mode in DEEP_GREY:  # PIL would cut off what is lighter than 255 of 65535
        deep = np.asarray(picture).astype(np.float32)
        picture = Image.fromarray((deep / 257).round().clip(0, 255).astype(np.uint8))
    return picture.convert("L" if channels == 1 else "RGB")


def _image_column(path: str, features: "datasets.Features") -> str:  # type: ignore[name-defined]  # noqa: F821
    for name, feature in features.items():
        encoded = isinstance(feature, dict) and "bytes" in feature  # an Image whose parquet metadata was lost
        if type(feature).__name__ == "Image" or encoded:
            return str(name)
    raise FusionError(f"the data set '{path}' has no image column; its columns are {', '.join(features)}")


def _label_column(path: str, features: "datasets.Features") -> str:  # type: ignore[name-defined]  # noqa: F821
    for name, feature in features.items():
        if type(feature).__name__ == "ClassLabel":
            return str(name)
    for name, feature in features.items():
        if str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
            return str(name)
    hint = "; put images into a folder for each class" if list(features) == ["image"] else ""
    raise FusionError(f"the data set '{path}' has no label column; its columns are {', '.join(features)}{hint}")


def load(path: str, name: str | None = None, *, streaming: bool = False) -> dict[str, Any]:
    """The splits of a hub id, a data file or a folder of data files, read by `datasets.load_dataset`.

    Args:
        path: hub id, file or folder; see `files`.
        name: a configuration of the hub's data set, such as `wikitext-2-raw-v1`; a file or folder has none.
        streaming: read as it goes instead of downloading and converting first.

    Returns:
        Split -> rows; one file is a train split.

    Raises:
        FusionError: nothing there, it is of no kind that is read, or it can't be read.
    """
    import datasets

    place = Path(path).expanduser()
    named = path.startswith((".", "/", "~")) or kind_of(place) is not None
    if not path or (not place.exists() and (named or (len(place.parts) > 1 and place.parent.is_dir()))):
        raise FusionError(
            f"no data set at {place if path else repr(path)}; --data.path takes a built-in name "
            f"({', '.join(BUILT_IN)}), a data file, a folder of data files or a hub id"
        )
    arguments: dict[str, Any] = {"path": path, "name": name}
    if place.exists():
        arguments = folder_arguments(place) if place.is_dir() else file_arguments(place)
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it says of a file stands in our line
    try:
        splits = dict(datasets.load_dataset(**arguments, streaming=streaming))
        used = datasets.load_dataset_builder(**arguments).config.data_files if place.is_dir() else None
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
        if place.is_dir():
            check_any(place)
        raise FusionError(f"cannot read the data set '{path}': {_cause(error)}") from error
    if used and (others := unread(place, used)):
        tell(
            f"{path}: {len(others):,} files are not read, {others[0].relative_to(place)} first: names of others have "
            "train, validation or test in them, and these have not"
        )
    return splits


def _cause(error: BaseException) -> str:
    """Why a data set can't be read: what was raised first, not what `datasets` made of it."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    if any(isinstance(cause, UnicodeError) or "UTF8" in str(cause) for cause in chain):
        return "its text isn't UTF-8; convert it, for example by iconv -f latin1 -t utf-8"
    if any(isinstance(cause, StopIteration) or type(cause).__name__ in EMPTY for cause in chain):
        return "it is empty"
    generated = type(error).__name__.startswith("DatasetGeneration") and error.__cause__
    return reason(error.__cause__ if generated and error.__cause__ else error)
