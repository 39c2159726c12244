"""Where labelled images come from: scikit-learn's digits, a hub id, a local folder of parquet files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fusionpl.datamodules.splits import Indices, SplitConfig, check_classes, class_numbers, flawed
from fusionpl.errors import FusionError, reason

BUILT_IN = ("digits", "pydoc")


@dataclass(frozen=True)
class Source:
    """A data set whose images are decoded when they are asked for.

    Args:
        class_names: names of the classes, in the order of the labels.
        labels: for every split, the labels [N].
        decode: takes the name of a split and indices [n], gives pixels, uint8 [m, C, H, W], and the indices [m] of
            those that can be read.
    """

    class_names: tuple[str, ...]
    labels: dict[str, Indices]
    decode: Callable[[str, Indices], tuple[Tensor, Indices]]


def digits(size: int, channels: int) -> Source:
    """1,797 scanned digits that ship with scikit-learn: 8x8 grey, enlarged bilinearly; 400 of them are the test split.

    Args:
        size: height and width of the images.
        channels: 1, or 3 equal ones.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    small = torch.from_numpy(data.images).float()[:, None] * (255 / 16)
    large = functional.interpolate(small, (size, size), mode="bilinear", align_corners=False)
    pixels = large.round().to(torch.uint8).expand(-1, channels, -1, -1)
    train, test = train_test_split(np.arange(len(pixels)), test_size=400, random_state=0, stratify=data.target)
    rows = {"train": train, "test": test}
    return Source(
        class_names=tuple(str(name) for name in data.target_names),
        labels={split: data.target[rows[split]].astype(np.int64) for split in rows},
        decode=lambda split, indices: (pixels[rows[split][indices]].contiguous(), indices),
    )


class ImageConfig(SplitConfig, Protocol):
    """The options that decide how images are read."""

    @property
    def image_size(self) -> int: ...  # noqa: D102
    @property
    def channels(self) -> int: ...  # noqa: D102


def hub_or_folder(config: ImageConfig) -> Source:
    """A data set of the hub, or a local folder of parquet files: `datasets.load_dataset` reads both.

    The image and the label column are found from the data set's features (Image, ClassLabel). A label column of
    plain integers has classes named "0", "1", ...

    Args:
        config: hub id or folder, the size that images are brought to (bilinear), grey or colour, whether rows that
            can't be read are left out.

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

    def decode(split: str, indices: Indices) -> tuple[Tensor, Indices]:
        size, channels = config.image_size, config.channels
        pixels = torch.empty(len(indices), channels, size, size, dtype=torch.uint8)
        wrong: dict[int, str] = {}
        for row, index in enumerate(indices.tolist()):
            try:
                picture = images[split][index][image]
                if picture is None:
                    wrong[row] = "holds no image"
                    continue
                picture = picture.convert("L" if channels == 1 else "RGB")
            except Exception as error:  # a broken file raises whatever its decoder does
                wrong[row] = f"holds an image that can't be read ({reason(error, 80)})"
                continue
            if picture.size != (size, size):
                picture = picture.resize((size, size), resample=2)  # 2: bilinear
            pixels[row] = torch.from_numpy(np.array(picture)).reshape(size, size, channels).permute(2, 0, 1)
        if wrong:
            rows = [int(indices[row]) for row in wrong]
            flawed(config, split, rows, f"column '{image}' {next(iter(wrong.values()))}", len(indices))
            kept = [row for row in range(len(indices)) if row not in wrong]
            return pixels[kept], indices[kept]
        return pixels, indices

    return Source(tuple(names), labels, decode)


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
    raise FusionError(f"the data set '{path}' has no label column; its columns are {', '.join(features)}")


def load(path: str, name: str | None = None, *, streaming: bool = False) -> dict[str, Any]:
    """The splits of a hub id or of a local folder of data files, read by `datasets.load_dataset`.

    Args:
        path: hub id or folder.
        name: a configuration of the hub's data set, such as `wikitext-2-raw-v1`; a folder has none.
        streaming: read as it goes instead of downloading and converting first.

    Raises:
        FusionError: nothing there, or it can't be read.
    """
    import datasets

    folder = Path(path).expanduser()
    if not folder.is_dir() and (path[0] in "./~" or (len(folder.parts) > 1 and folder.parent.is_dir())):
        raise FusionError(
            f"no data set at {folder}; --data.path takes a built-in name ({', '.join(BUILT_IN)}), a folder of data "
            "files or a hub id"
        )
    datasets.disable_progress_bars()
    try:
        where = (str(folder), None) if folder.is_dir() else (path, name)
        return dict(datasets.load_dataset(*where, streaming=streaming))
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
        raise FusionError(f"cannot read the data set '{path}': {reason(error)}") from error
