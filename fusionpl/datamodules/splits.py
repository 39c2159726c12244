"""Fixed splits of labelled data: no seed changes them."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from fusionpl.datamodules.sources import Indices
from fusionpl.errors import FusionError

SPLIT_SEED = 0


class SplitConfig(Protocol):
    """The options that decide a split."""

    @property
    def path(self) -> str: ...  # noqa: D102
    @property
    def validation(self) -> int: ...  # noqa: D102
    @property
    def calibration(self) -> int: ...  # noqa: D102
    @property
    def train_limit(self) -> int | None: ...  # noqa: D102


def labelled_parts(labels: Mapping[str, Indices], config: SplitConfig) -> dict[str, tuple[str, Indices]]:
    """For train, validation, calibration and test, the split that each is from and its indices there.

    What the data set lacks is taken from its training split, with the classes in proportion; without a test split,
    validation is the test.

    Args:
        labels: split -> labels [N] or targets [N].
        config: sizes of the parts that are taken.

    Raises:
        FusionError: no train split, neither test nor validation split, or too few samples.
    """
    if "train" not in labels:
        raise FusionError(f"the data set '{config.path}' has no train split; it has {', '.join(labels)}")
    whole: dict[str, tuple[str, Indices]] = {split: (split, np.arange(len(found))) for split, found in labels.items()}
    parts: dict[str, tuple[str, Indices]] = {}
    parts.update((split, whole[split]) for split in ("validation", "test") if split in whole)
    if "test" not in parts:
        if "validation" not in parts:
            raise FusionError(f"the data set '{config.path}' has no test split; it has {', '.join(labels)}")
        parts["test"] = parts.pop("validation")
    rest = whole["train"][1]
    for part, size in (("calibration", config.calibration), ("validation", config.validation)):
        if part not in parts:
            rest, taken = _carve(rest, size, labels["train"], f"data.{part}")
            parts[part] = ("train", taken)
    if config.train_limit is not None and config.train_limit < len(rest):
        _, rest = _carve(rest, config.train_limit, labels["train"], "data.train_limit")
    return {**parts, "train": ("train", rest)}


def _carve(indices: Indices, size: int, labels: Indices, key: str) -> tuple[Indices, Indices]:
    """Splits `indices` into (rest, taken), with the classes in proportion where there are enough samples."""
    from sklearn.model_selection import train_test_split

    if size < 0 or size >= len(indices):
        raise FusionError(f"{key} is {size}, but only {len(indices)} training samples are left to take it from")
    if size == 0:
        return indices, indices[:0]
    names, counts = np.unique(labels[indices], return_counts=True)
    even = counts.min() >= 2 and min(size, len(indices) - size) >= len(names)
    rest, taken = train_test_split(
        indices, test_size=size, random_state=SPLIT_SEED, stratify=labels[indices] if even else None
    )
    return rest, taken
