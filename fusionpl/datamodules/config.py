"""Options of data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from fusionpl.errors import FusionError, nearest

BUILT_IN = ("digits", "pydoc")
AUTO = "auto"
NORMALIZATIONS = ("imagenet", "clip", "half", "none")  # what `data.normalize` calls them
Class = bool | int | float | str  # YAML makes no string of names such as yes, 7 or 1.5
LARGEST = 2**13  # pixels of a side: no model takes more, and a slip of the pen would ask for all memory


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are served.

    Args:
        path: `digits` (ships with scikit-learn), a hub id, a data file (.parquet), a folder of them, or a folder of
            images by class: images/train/cat/1.png, or images/cat/1.png.
        classes: the classes whose samples are served, by name or by number, such as `[cat, dog]` or `[0, 2, 5]`; null
            for all. The labels are these alone, numbered 0, 1, ... in this order. Numbers count from 0, unless classes
            have numbers for names. All parts are cut of the whole data first (`validation` and `calibration` are sizes
            before other classes are left out): no choice of classes moves a sample from one part to another. A model
            that knows all of them by name keeps its own numbers.
        image_size: height and width in pixels; others are resized. Null for the model's.
        channels: 1 (grey) or 3 (RGB); null for the model's. A model that is built then has as many as the images:
            1 where all are grey.
        normalize: mean and deviation that pixels between 0 and 1 are normalised by: `imagenet`, `clip`, `half` (they
            are -1..1 then), `none` (they stay), or `{mean: [0.5], std: [0.25]}`, one for each channel or for all; auto
            is what the model's folder says, else half. What is said here is taken for all models.
        batch_size: training images a step and process.
        train_limit: train on at most this many images, of the classes asked for; null for all. The other splits stay
            as they are.
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
    classes: list[Class] | None = None
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

    def __post_init__(self) -> None:
        """Raises FusionError for values out of range."""
        for name, least in {"image_size": 1, "batch_size": 1, "shift": 0, "num_workers": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise FusionError(f"data.{name} must be at least {least}, not {value}")
        if self.image_size is not None and self.image_size > LARGEST:
            raise FusionError(f"data.image_size must be at most {LARGEST}, not {self.image_size:.3g}")
        if self.channels not in (None, 1, 3):
            raise FusionError(f"data.channels must be 1 or 3, not {self.channels}")
        if self.on_device and self.num_workers:  # which can't share an accelerator's memory
            raise FusionError(f"data.on_device needs data.num_workers 0, not {self.num_workers}")
        _check_normalize(self.normalize)
        _check_parts(self)
        _check_classes(self.classes)


@dataclass(frozen=True)
class ImageEmbeddingConfig(DataConfig):
    """Which images, and how they are served.

    Args:
        pooling: how the tokens of an image become one embedding: mean, cls (the class token), max or lasttoken; auto is
            cls.
    """

    pooling: Literal["auto", "mean", "cls", "max", "lasttoken"] = "auto"


@dataclass(frozen=True)
class TextConfig:
    """Which text, and how it is served.

    Args:
        path: `pydoc` (the Python Language Reference, which every Python carries), a hub id, a data file (.txt, .csv,
            .tsv, .json, .jsonl, .parquet), or a folder of such files.
        name: a configuration of the hub's data set, such as `wikitext-2-raw-v1`.
        text_column: the column of text; null for the one called text, or the only one of strings.
        streaming: read training text as it goes, for corpora larger than memory; needs `trainer.limit_train_batches`.
        tokenizer: a model folder or hub id to take it from; null trains one on the training text.
        vocab_size: entries of a tokenizer that is trained, at most.
        block_size: tokens a block, of masked text [CLS] and [SEP] among them.
        batch_size: blocks a step and process.
        train_limit: train on at most this many blocks; null for all.
        num_workers: processes that fetch training batches; 0 fetches in the main one.
    """

    path: str = "pydoc"
    name: str | None = None
    text_column: str | None = None
    streaming: bool = False
    tokenizer: str | None = None
    vocab_size: int = 2000
    block_size: int = 64
    batch_size: int = 32
    train_limit: int | None = None
    num_workers: int = 0

    def __post_init__(self) -> None:
        """Raises FusionError for a block in which nothing is left."""
        if self.block_size < 1:
            raise FusionError(f"data.block_size is {self.block_size}; a block has at least 1 token")


@dataclass(frozen=True)
class MaskedTextConfig(TextConfig):
    """Which text, and how much of it is masked.

    Args:
        mask_probability: share of the tokens to predict; 80 % of these are masked, 10 % replaced, 10 % kept.
    """

    mask_probability: float = 0.15

    def __post_init__(self) -> None:
        """Raises FusionError for a block in which nothing is left."""
        if (size := self.block_size) < 3:
            raise FusionError(f"data.block_size is {size}; a block is [CLS], text and [SEP], so at least 3 tokens")


@dataclass(frozen=True)
class SpanTextConfig(TextConfig):
    """Which text, and how much of it is cut out.

    Args:
        noise: share of the tokens that are cut out.
        span_length: tokens of a span that is cut out, on average.
    """

    noise: float = 0.15
    span_length: float = 3.0

    def __post_init__(self) -> None:
        """Raises FusionError for a block in which nothing is left."""
        if self.spans < 1:
            raise FusionError(
                f"data.block_size is {self.block_size}; of a block something is cut out and something stays"
            )

    @property
    def cut(self) -> int:
        """How many tokens of a block are cut out."""
        return min(max(round(self.block_size * self.noise), 1), self.block_size - 1)

    @property
    def spans(self) -> int:
        """In how many spans they are."""
        return min(max(round(self.cut / self.span_length), 1), self.cut, self.block_size - self.cut)


@dataclass(frozen=True)
class TextClassificationConfig:
    """Which sentences, and how they are served.

    Args:
        path: a hub id, a data file (.csv, .tsv, .json, .jsonl, .parquet) or a folder of them; `glue` with a task's
            name.
        name: a configuration of the hub's data set, such as `sst2` of `glue`.
        text_columns: one or two columns of text; null for the first one or two of strings.
        label_column: the column of labels: classes by name or number (`ClassLabel`, integers, strings, booleans), or
            floating-point numbers, which are regressed; or of tags, of which several may hold: lists of names or
            numbers, or of 0 and 1, or several columns of 0 and 1, such as `toxic,insult`. Null for `label`, else
            `coarse_label`, else the one ClassLabel, else `labels`.
        classes: the classes whose samples are served, by name or by number, such as `[cat, dog]` or `[0, 2, 5]`; null
            for all. The labels are these alone, numbered 0, 1, ... in this order. Numbers count from 0, unless classes
            have numbers for names; a regression and tags have no classes. All parts are cut of the whole data first
            (`validation` and `calibration` are sizes before other classes are left out): no choice of classes moves a
            sample from one part to another. A model that knows all of them by name keeps its own numbers.
        metrics: what is measured besides the loss: accuracy, f1, matthews, pearson, spearman; null for accuracy, for
            pearson and spearman of a regression, or for accuracy and f1 of tags, which have no others.
        max_length: longer sentences are cut, in tokens; a batch is padded to its longest.
        batch_size: training sentences a step and process.
        train_limit: train on at most this many, of the classes asked for; null for all.
        validation: taken from the training split for validation, if the data set has no such split; of few sentences
            a share.
        calibration: taken from the training split for calibration; of few sentences a share.
        num_workers: processes that fetch training batches; 0 fetches in the main one.
        skip_corrupt: leave out rows without text or whose label is none, and count them.
    """

    path: str = "glue"
    name: str | None = None
    text_columns: list[str] | None = None
    label_column: str | None = None
    classes: list[Class] | None = None
    metrics: list[str] | None = None
    max_length: int = 64
    batch_size: int = 32
    train_limit: int | None = None
    validation: int = 400
    calibration: int = 400
    num_workers: int = 0
    skip_corrupt: bool = False

    def __post_init__(self) -> None:
        """Raises FusionError for values out of range."""
        _check_parts(self)
        _check_classes(self.classes)


@dataclass(frozen=True)
class TextEmbeddingConfig(TextClassificationConfig):
    """Which sentences, and how they are served; labels are only read for a linear probe.

    Args:
        path: a file or folder of text (a sentence or a short passage a line), CSV, JSON lines or parquet, or a hub id.
        pooling: how the tokens of a sentence become one embedding: mean, cls, max or lasttoken; auto is what the
            model's folder says to sentence-transformers, else mean.
    """

    path: str = ""
    pooling: Literal["auto", "mean", "cls", "max", "lasttoken"] = "auto"


def _check_parts(config: DataConfig | TextClassificationConfig) -> None:
    for part in ("calibration", "validation"):
        if (size := getattr(config, part)) < 0:
            raise FusionError(f"data.{part} is {size}; it must be 0 or more")


def _check_classes(given: Sequence[Class] | None) -> None:
    """Raises FusionError for classes that no data could have: less than two, or one twice."""
    if given is None:
        return
    words = list(map(str, given))
    if len(words) < 2:
        raise FusionError(f"data.classes is [{', '.join(words)}]; a classifier needs two or more classes")
    twice = next((word for at, word in enumerate(words) if word in words[:at]), None)
    if twice is not None:
        raise FusionError(f"data.classes has '{twice}' twice; give each class once")


def mean_and_std(given: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """The two lists of `data.normalize`, of which each may be one number; empty where one is not there."""
    mean, std = (
        value if isinstance(value, list) else [value] for value in (given.get(key, []) for key in ("mean", "std"))
    )
    return mean, std


def _check_normalize(given: str | Mapping[str, Any]) -> None:
    """Raises FusionError where there is no such name, and where mean and deviation are not there, are no numbers, or
    don't fit together."""
    if isinstance(given, str):
        known = (AUTO, *NORMALIZATIONS)
        if given not in known:
            raise FusionError(
                f"data.normalize: there is no '{given}'{nearest(given, known)}; use {', '.join(known)}, or "
                "{mean: [0.5], std: [0.25]}"
            )
        return
    mean, std = mean_and_std(given)
    if given.keys() != {"mean", "std"} or len(mean) != len(std) or len(mean) not in (1, 3):
        raise FusionError(
            f"data.normalize is {dict(given)}; give mean and std, of one number or of one for each channel: "
            "{mean: [0.5], std: [0.25]}"
        )
    if not all(isfinite(number) for number in mean) or not all(isfinite(number) and number > 0 for number in std):
        raise FusionError(f"data.normalize: std must be above 0, and all of {dict(given)} finite")
