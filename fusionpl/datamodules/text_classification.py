"""Sentences, or pairs of them, with a class or a number: SST-2, TREC, GLUE's tasks, any data set of that kind."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from fusionpl.datamodules.base import Collate, Run
from fusionpl.datamodules.config import TextClassificationConfig
from fusionpl.datamodules.labelled import LabelledSplits
from fusionpl.datamodules.labels import Labels, is_list, joined, tags_of
from fusionpl.datamodules.sources import load
from fusionpl.datamodules.splits import LACKING, check_classes, class_numbers, flawed, targets, tell
from fusionpl.datamodules.text import check_length
from fusionpl.errors import FusionError
from fusionpl.models.labels import CLASSES, NUMBERS, TAGS, Kind
from fusionpl.models.preprocessing import ImageProcessing
from fusionpl.models.token_settings import pad_with, padding_of, pads_text

METRICS_OF: Mapping[Kind, list[str]] = {
    CLASSES: ["accuracy"],
    TAGS: ["accuracy", "f1"],
    NUMBERS: ["pearson", "spearman"],
}
HIDDEN = -1  # GLUE's label of a test sentence whose answer is kept back


class Sentences(Dataset[dict[str, Any]]):
    """Token numbers of sentences, of unequal length, and their labels.

    Args:
        encoded: what the tokenizer makes of the sentences: lists of numbers by name.
        labels: int64 [N], or float32 [N] or [N, tags].
    """

    def __init__(self, encoded: dict[str, list[list[int]]], labels: Tensor) -> None:
        self.encoded, self.labels = encoded, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**{key: values[index] for key, values in self.encoded.items()}, "labels": self.labels[index]}


class TextClassificationDataModule(LabelledSplits):
    """Train, validation, calibration and test sentences; no seed changes which is in which split.

    A test split whose labels are kept back, as GLUE's, is left out: validation is the test then.

    Args:
        config: which sentences, and how they are served.
        seed: decides, with the epoch, the order of the training sentences.
        tokenizer: the model's own.

    Raises:
        FusionError: there is no tokenizer.
    """

    evaluation_batch = 64
    reads = "input_ids"

    def __init__(
        self, config: TextClassificationConfig, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        super().__init__(seed)
        if tokenizer is None:
            raise FusionError(
                "text classification starts from a model with a tokenizer: train a language model first, for example "
                "with --config conf/train/bert-pydoc.yaml"
            )
        self.config, self.tokenizer = config, tokenizer
        self._sets: dict[str, Sentences] = {}

    @property
    def metrics(self) -> list[str]:  # type: ignore[override]
        """What is measured besides the loss."""
        metrics = self.config.metrics or METRICS_OF[self.kind]
        wrong = [name for name in metrics if self.kind == TAGS and name not in METRICS_OF[TAGS]]
        if wrong:
            raise FusionError(f"data.metrics: tags, of which several may hold, have no {wrong[0]}; they have "
                              f"{' and '.join(METRICS_OF[TAGS])}")  # fmt: skip
        return metrics

    def texts(self) -> Iterator[str]:
        """The sentences to calibrate on."""
        split, indices = self._parts["calibration"]
        rows = self._splits[split].select(indices)
        return (row[column] for row in rows for column in self._text_columns)

    def describe(self) -> str:
        """Number of training sentences."""
        return f"{len(self.dataset('train')):,} sentences"

    def check_model(self, model: Any, run: Run | None = None) -> None:
        """Raises FusionError where sentences may be longer than the model's positions; else see `FixedSplits`."""
        check_length(model, self.config.max_length, "data.max_length")
        self.follow(model)
        super().check_model(model, run)

    def follow(self, model: Any, processing: ImageProcessing | None = None) -> None:
        """Pads as `model` does, with its end of text where nothing else is there; and lets a classifier that has no
        token for padding read it.

        Raises:
            FusionError: there is nothing to pad with.
        """
        self._number_like(model)
        tokenizer: Any = self.tokenizer
        reads = pads_text(model)
        if tokenizer.pad_token is None:
            number = padding_of(model) if reads else None
            token = tokenizer.eos_token if number is None else tokenizer.convert_ids_to_tokens(number)
            if token is None:
                raise FusionError(
                    f"the tokenizer of the {type(model).__name__} has no token for padding and no end of text; set its "
                    "pad_token in tokenizer_config.json"
                )
            tokenizer.pad_token = token
            tell(f"the tokenizer has no token for padding: texts are padded with '{token}'")
        if reads and padding_of(model) is None:
            pad_with(model, tokenizer.pad_token_id)
        elif reads and padding_of(model) != tokenizer.pad_token_id:
            tell(
                f"warning: texts are padded with token {tokenizer.pad_token_id}, but the pad_token_id of the "
                f"{type(model).__name__} is {padding_of(model)}: it reads its answer at the padding of shorter texts"
            )

    def dataset(self, part: str) -> Sentences:
        """The sentences of a part, tokenised on first use."""
        if part not in self._sets:
            split, indices = self._parts[part]
            rows = self._splits[split].select(indices)
            texts = [list(rows[column]) for column in self._text_columns]
            cut = {"truncation": True, "max_length": self.config.max_length}
            encoded = self.tokenizer(*texts, **cut) if len(indices) else {}
            labels = torch.from_numpy(self._labels.values[split][indices])
            self._sets[part] = Sentences(dict(encoded), labels if self.kind == CLASSES else labels.float())
        return self._sets[part]

    def collate(self, part: str) -> Collate:
        """Pads a batch to its longest sentence."""
        return self._padded

    def _padded(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        labels = torch.stack([row["labels"] for row in rows])
        features = [{key: value for key, value in row.items() if key != "labels"} for row in rows]
        return {**self.tokenizer.pad(features, return_tensors="pt"), "labels": labels}

    @cached_property
    def _splits(self) -> dict[str, Any]:
        splits = load(self.config.path, self.config.name)
        return {split.replace("validation_matched", "validation"): rows for split, rows in splits.items()}

    @property
    def _features(self) -> dict[str, Any]:
        return dict(next(iter(self._splits.values())).features)

    @cached_property
    def _text_columns(self) -> list[str]:
        strings = [name for name, feature in self._features.items()
                   if str(getattr(feature, "dtype", "")).endswith("string")
                   and name not in (self._label_column, *self._label_column.split(","))]  # fmt: skip
        wanted = self.config.text_columns or strings[:2]
        for name in wanted:
            if name not in strings:
                raise FusionError(
                    f"the data set '{self.config.path}' has no text column '{name}'; its columns of text are "
                    f"{', '.join(strings) or 'none'}"
                )
        if not 1 <= len(wanted) <= 2:
            raise FusionError(
                f"data.text_columns: {len(wanted)} columns of text in '{self.config.path}', give one or two of "
                f"{', '.join(self._features)}"
            )
        return wanted

    @cached_property
    def _label_column(self) -> str:
        features, wanted = self._features, self.config.label_column
        if wanted is None:
            classes = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
            wanted = next((name for name in ("label", "coarse_label", *classes, "labels") if name in features), None)
        if wanted is not None and "," in wanted and set(wanted.split(",")) <= features.keys():
            return str(wanted)
        if wanted not in features:
            asked = f" '{wanted}'" if wanted else ""
            raise FusionError(
                f"the data set '{self.config.path}' has no label column{asked}; its columns "
                f"are {', '.join(features)}: name one with --data.label_column"
            )
        return str(wanted)

    @cached_property
    def _every(self) -> Labels:
        column, feature = self._label_column, self._features.get(self._label_column)
        if feature is None:
            columns = column.split(",")
            rows = {split: joined(rows, columns) for split, rows in self._splits.items()}
            return tags_of(rows, columns, column, self.config, of_columns=True)
        labels = {split: list(rows[column]) for split, rows in self._splits.items()}
        if is_list(feature):
            return tags_of(labels, getattr(feature.feature, "names", None), column, self.config)
        return self._of_one(labels, feature)

    def _of_one(self, labels: dict[str, list[Any]], feature: Any) -> Labels:
        """Labels of which a sample has one, in a column that `datasets` describes by `feature`."""
        column, kind = self._label_column, str(getattr(feature, "dtype", type(feature).__name__))
        if kind.startswith("float") and _are_classes(labels):
            kind = "int64"
            labels = {
                split: [None if value is None else int(value) for value in values] for split, values in labels.items()
            }
        known = {split: values for split, values in labels.items()
                 if not (kind.startswith("int") and values and all(value == HIDDEN for value in values))}  # fmt: skip
        if kind.startswith("float"):
            return Labels(targets(known, column, self.config), None, NUMBERS)
        if not kind.startswith(("int", "uint", "bool")) and not kind.endswith("string"):
            raise FusionError(
                f"the label column '{column}' of '{self.config.path}' holds {kind}; labels are classes (integers, "
                "strings, booleans), floating-point numbers, or lists of tags: name another with --data.label_column"
            )
        names = getattr(feature, "names", None)
        if names is None:
            values = sorted({value for column_values in known.values() for value in column_values} - {None})
            names = [str(value) for value in values]
            numbers = {value: number for number, value in enumerate(values)}
            known = {split: [numbers.get(value) for value in column_values] for split, column_values in known.items()}
        check_classes(names, column, self.config)
        return Labels(class_numbers(known, len(names), column, self.config), tuple(names))

    def _usable(self, split: str) -> NDArray[Any]:
        """Labels of a split, that of a row without text as of one that is left out."""
        labels = super()._usable(split)
        for column in self._text_columns:
            empty = [row for row, text in enumerate(self._splits[split][column]) if text is None]
            if empty:
                flawed(self.config, split, empty, f"column '{column}' holds no text", len(labels))
                labels = labels.copy()
                labels[empty] = LACKING if labels.dtype.kind == "i" else np.nan
        return labels


def _are_classes(labels: Mapping[str, list[float | None]]) -> bool:
    """Whether numbers are classes of which some lack: tables hold integers as floating-point numbers then."""
    values = [value for column in labels.values() for value in column]
    return None in values and all(value is None or value == int(value) for value in values if value == value)
