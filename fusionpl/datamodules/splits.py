"""Fixed splits of labelled data: no seed changes them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from fusionpl.errors import FusionError

Indices = NDArray[np.int64]
SPLIT_SEED = 0
TEST_SHARE = 0.2  # of the training samples, where nothing else is there to test on
SMALL_SHARE = 0.2  # of the training samples, for calibration and validation each, where there are few
LACKING = -1  # the label of a sample that is left out
tell = rank_zero_only(print)


class SplitConfig(Protocol):
    """The options that decide a split."""

    @property
    def path(self) -> str: ...  # noqa: D102
    @property
    def classes(self) -> Sequence[Any] | None: ...  # noqa: D102
    @property
    def validation(self) -> int: ...  # noqa: D102
    @property
    def calibration(self) -> int: ...  # noqa: D102
    @property
    def train_limit(self) -> int | None: ...  # noqa: D102
    @property
    def skip_corrupt(self) -> bool: ...  # noqa: D102


def class_numbers(
    labels: Mapping[str, Sequence[Any]], classes: int | None, column: str, config: SplitConfig
) -> dict[str, Indices]:
    """Labels as numbers, those that are none `LACKING` where `skip_corrupt` allows that.

    Args:
        labels: split -> labels, null where a sample has none.
        classes: their number; None for as many as there are.
        column: where they are from.
        config: what is asked for.

    Raises:
        FusionError: a sample without a label, or with one that is no class; names split and row.
    """
    return {
        split: np.asarray(
            _checked(values, lambda value: _is_no_class(value, classes), LACKING, split, column, config), np.int64
        )
        for split, values in labels.items()
    }


def check_classes(names: Sequence[str], column: str, config: SplitConfig) -> None:
    """Raises FusionError where the classes in a column are less than two."""
    if len(names) < 2:
        raise FusionError(
            f"the data set '{config.path}' has a single class in column '{column}'; a classifier needs two or more"
        )


def targets(
    labels: Mapping[str, Sequence[float | None]], column: str, config: SplitConfig
) -> dict[str, NDArray[np.float64]]:
    """The targets of a regression, read like `class_numbers`: NaN takes the place of what is no number."""
    return {
        split: np.asarray(_checked(values, _is_no_number, np.nan, split, column, config), np.float64)
        for split, values in labels.items()
    }


def _checked(
    values: Sequence[Any], is_wrong: Callable[[Any], bool], instead: Any, split: str, column: str, config: SplitConfig
) -> Sequence[Any]:
    wrong = [row for row, value in enumerate(values) if is_wrong(value)]
    if not wrong:
        return values
    first = values[wrong[0]]
    value = "no label" if first is None else f"the label {first}, which is none"
    flawed(config, split, wrong, f"column '{column}' holds {value}", len(values))
    return [instead if is_wrong(value) else value for value in values]


def flawed(config: SplitConfig, split: str, rows: Sequence[int], what: str, count: int) -> None:
    """Says that samples are left out.

    Raises:
        FusionError: unless `data.skip_corrupt` allows that; names the first.
    """
    if not config.skip_corrupt:
        raise FusionError(
            f"the data set '{config.path}', split {split}, row {rows[0]}: {what}; mend it, or leave such rows out with "
            "--data.skip_corrupt true"
        )
    tell(f"{config.path}: {len(rows):,} of {count:,} rows of {split} are left out, the first is {rows[0]}: {what}")


def _is_no_class(value: Any, classes: int | None) -> bool:
    return value is None or value < 0 or (classes is not None and value >= classes)


def _is_no_number(value: float | None) -> bool:
    return value is None or not np.isfinite(value)


def labelled_parts(
    labels: Mapping[str, NDArray[Any]], config: SplitConfig, kept: Mapping[str, NDArray[Any]] | None = None
) -> dict[str, tuple[str, Indices]]:
    """For train, validation, calibration and test, the split that each is from and its indices there.

    What the data set lacks is taken from its training split, with the classes in proportion; without a test split,
    validation is the test. A data set without a training split is divided as if its validation split, or else its
    only split, were that. Samples whose label is `LACKING`, or whose target is not finite, are in none.

    Args:
        labels: split -> labels [N], targets [N] or tags [N, tags].
        config: sizes of the parts that are taken; smaller ones of few samples, see `_sizes`.
        kept: split -> labels of which more are `LACKING`: those samples are left out once the parts are cut, so that
            no choice of classes moves a sample from one part to another. `train_limit` counts what is left.

    Raises:
        FusionError: no split to train on; nothing is left to train on.
    """
    whole = {split: (split, np.flatnonzero(_is_labelled(values))) for split, values in labels.items()}
    source = _divided(list(labels), config)
    parts: dict[str, tuple[str, Indices]] = {}
    parts.update((split, whole[split]) for split in ("validation", "test") if split in whole and split != source)
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
    rest = whole[source][1]
    if "test" not in parts:
        rest, taken = _carve(rest, round(TEST_SHARE * len(rest)), labels[source], "the test split")
        parts["test"] = (source, taken)
        tell(f"{config.path}: no test split; {len(taken):,} of {len(taken) + len(rest):,} training samples are it")
    asked = {part: getattr(config, part) for part in ("calibration", "validation") if part not in parts}
    for part, size in _sizes(asked, len(rest), config).items():
        rest, taken = _carve(rest, size, labels[source], f"data.{part}")
        parts[part] = (source, taken)
    parts = {"train": (source, rest), **parts}
    if kept is not None:
        parts = _of_kept(parts, kept, config)
        rest = parts["train"][1]
    if config.train_limit is not None and config.train_limit < len(rest):
        _, rest = _carve(rest, config.train_limit, labels[source], "data.train_limit")
    return {**parts, "train": (source, rest)}


def _of_kept(
    parts: Mapping[str, tuple[str, Indices]], kept: Mapping[str, NDArray[Any]], config: SplitConfig
) -> dict[str, tuple[str, Indices]]:
    left = {part: (split, rows[_is_labelled(kept[split][rows])]) for part, (split, rows) in parts.items()}
    counts = ", ".join(f"{len(left[part][1]):,} of {len(rows):,} for {part}" for part, (_, rows) in parts.items())
    if not len(left["train"][1]):
        raise FusionError(f"data.classes: of '{config.path}' these classes leave nothing to train on ({counts}); "
                          "choose others, or smaller parts with data.validation and data.calibration")  # fmt: skip
    tell(f"{config.path}: samples of the classes asked for: {counts}")
    return left


def _is_labelled(labels: NDArray[Any]) -> NDArray[np.bool_]:
    labelled = np.isfinite(labels) if labels.dtype.kind == "f" else np.asarray(labels != LACKING)
    return np.asarray(labelled.all(1)) if labelled.ndim == 2 else labelled


def _divided(splits: Sequence[str], config: SplitConfig) -> str:
    """The split that is trained on, and that other parts are taken from."""
    if "train" in splits:
        return "train"
    split = "validation" if "validation" in splits else splits[0]
    if split != "validation" and len(splits) > 1:
        raise FusionError(f"the data set '{config.path}' has no train split; it has {', '.join(splits)}")
    tell(f"{config.path}: no train split; {split} is used as one")
    return split


def _sizes(asked: Mapping[str, int], count: int, config: SplitConfig) -> Mapping[str, int]:
    """How many samples each part takes of `count`: as many as asked for, or, where the defaults are more than half or
    what was asked for is all, a fifth at most."""
    chosen = any(size != getattr(type(config), part) for part, size in asked.items())
    total = sum(asked.values())
    if total <= (count - 1 if chosen else count // 2):
        return asked
    sizes, left, most = {}, max(count - 1, 0), max(round(SMALL_SHARE * count), 1)
    for part, size in asked.items():
        sizes[part] = min(size, most, left)
        left -= sizes[part]
    summary = ", ".join(f"{sizes[part]:,} for {part}" for part, size in asked.items() if size)
    names = " and ".join(f"data.{part} {size:,}" for part, size in asked.items() if size)
    tell(f"{config.path}: {count:,} training samples, too few for {names}: {summary}; these options take other numbers")
    return sizes


def _carve(indices: Indices, size: int, labels: Indices, key: str) -> tuple[Indices, Indices]:
    """Splits `indices` into (rest, taken), with the classes in proportion where there are enough samples."""
    from sklearn.model_selection import train_test_split

    if size and size >= len(indices):
        raise FusionError(f"{key} is {size}, but only {len(indices)} training samples are left to take it from")
    if size == 0:
        return indices, indices[:0]
    names, counts = np.unique(labels[indices], return_counts=True)
    even = labels.ndim == 1 and counts.min() >= 2 and min(size, len(indices) - size) >= len(names)
    rest, taken = train_test_split(
        indices, test_size=size, random_state=SPLIT_SEED, stratify=labels[indices] if even else None
    )
    return rest, taken
