"""What labels are: a class, a number, or tags: lists of names or numbers, rows of 0 and 1, or a column for each."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from fusionpl.datamodules.config import Class
from fusionpl.datamodules.splits import LACKING, SplitConfig, flawed
from fusionpl.errors import FusionError, nearest
from fusionpl.models.labels import CLASSES, IN_WORDS, TAGS, Kind

LISTED = 10  # names of classes that a line has room for
LISTS = ("List", "LargeList", "Sequence")  # as versions of `datasets` call them


@dataclass(frozen=True)
class Labels:
    """Labels as numbers, split by split; `names` are those of the classes or tags, None for a regression."""

    values: Mapping[str, NDArray[Any]]
    names: tuple[str, ...] | None
    kind: Kind = CLASSES

    def of_classes(self, asked: Sequence[Class], path: str) -> "Labels":
        """The labels of some classes alone, numbered in the order in which these are asked for; others are `LACKING`.

        Args:
            asked: names or numbers, see `DataConfig.classes`.
            path: of the data, for messages.

        Raises:
            FusionError: these labels are no classes; a class is none, is asked for twice, or has no sample.
        """
        if self.names is None or self.kind != CLASSES:
            raise FusionError(f"data.classes: the labels of '{path}' are {IN_WORDS[self.kind]}; leave data.classes out")
        chosen: list[int] = []
        for one in asked:
            number = _class_number(one, self.names, path)
            if number in chosen:
                raise FusionError(f"data.classes has the class '{self.names[number]}' of '{path}' twice; "
                                  "give each class once")  # fmt: skip
            if not any((values == number).any() for values in self.values.values()):
                raise FusionError(f"data.classes: '{path}' has no sample of class '{self.names[number]}'; leave it out")
            chosen.append(number)
        numbers = np.full(len(self.names) + 1, LACKING)  # the last place is that of LACKING itself
        numbers[chosen] = np.arange(len(chosen))
        values = {split: numbers[values] for split, values in self.values.items()}
        return replace(self, values=values, names=tuple(self.names[number] for number in chosen))

    def named(self, names: tuple[str, ...]) -> "Labels":
        """The same labels by the numbers that they have in `names`, which may be more."""
        places = np.array([names.index(name) for name in self.names or ()])
        numbers = {}
        for split, values in self.values.items():
            if self.kind == TAGS:
                numbers[split] = np.zeros((len(values), len(names)), dtype=values.dtype)
                numbers[split][:, places] = values
            else:
                numbers[split] = np.where(values < 0, values, places[values])
        return replace(self, values=numbers, names=names)

    def like(self, names: tuple[str, ...] | None, outputs: int) -> tuple[str, ...] | None:
        """The names by which a model numbers these labels, if it does so otherwise; None if not, or if it has others.

        Args:
            names: the model's; None where it has none.
            outputs: how many it has.
        """
        if self.names is None or names == self.names:
            return None
        if names and set(self.names) <= set(names):
            return names
        numbered = self.kind == TAGS and self.names == tuple(map(str, range(len(self.names))))
        return tuple(map(str, range(outputs))) if numbered and outputs > len(self.names) else None


def _class_number(asked: Class, names: Sequence[str], path: str) -> int:
    """The number of a class that is asked for by name, or by number where no name is one.

    Raises:
        FusionError: there is none; names the nearest.
    """
    if str(asked) in names:
        return names.index(str(asked))
    read = list(map(_as_read, names))
    same = [number for number, value in enumerate(read) if type(value) is type(asked) and value == asked]
    if len(same) == 1:
        return same[0]
    where = f"data.classes: '{path}' has no class {asked!r}"
    if re.fullmatch(r"-?\d+", str(asked)) and not any(isinstance(value, int | float) for value in read):
        if 0 <= int(asked) < len(names):
            return int(asked)
        raise FusionError(f"{where}; its {len(names)} classes have the numbers 0 to {len(names) - 1}")
    meant = nearest(asked, names) if isinstance(asked, str) else ""
    known = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED:,} more" if len(names) > LISTED else "")
    raise FusionError(f"{where}{meant or f'; its classes are {known}; null is all of them'}")


def _as_read(name: str) -> Any:
    """What YAML, and so the command line, makes of a name that stands there without quotes."""
    try:
        return yaml.safe_load(name)
    except yaml.YAMLError:
        return name


def is_list(feature: Any) -> bool:
    """Whether a column holds a list a row."""
    return type(feature).__name__ in LISTS


def joined(rows: Any, columns: Sequence[str]) -> list[list[float | None]]:
    """A list a row, of columns of 0 and 1."""
    return [list(row) for row in zip(*(list(rows[column]) for column in columns), strict=True)]


def tags_of(
    rows: Mapping[str, Sequence[Any]],
    names: Sequence[str] | None,
    column: str,
    config: SplitConfig,
    *,
    of_columns: bool = False,
) -> Labels:
    """Tags as 0 and 1, float32 [N, tags], NaN in rows that are left out.

    Args:
        rows: split -> a list a row.
        names: of the tags, by their numbers, where `datasets` knows them.
        column: where they are from.
        config: what is asked for.
        of_columns: whether the rows are those of several columns, one for each tag.

    Raises:
        FusionError: a row without a list, or with a member that is no tag; names split and row.
    """
    every = [row for values in rows.values() for row in values if row is not None]
    hot = of_columns or _is_hot(every)
    known = list(names or ())
    if not known:
        length = max(Counter(map(len, every)).most_common(1), default=(0, 0))[0]
        known = list(map(str, range(length))) if hot else _named({member for row in every for member in row})
    if not known:
        raise FusionError(f"the data set '{config.path}' has no label in any row of column '{column}'; name another "
                          "column with --data.label_column")  # fmt: skip
    numbers = {name: number for number, name in enumerate(known)}
    matrices = {}
    for split, values in rows.items():
        matrix = np.stack([_row(row, numbers, hot=hot) for row in values]) if len(values) else np.empty((0, len(known)))
        wrong = [int(row) for row in np.flatnonzero(~np.isfinite(matrix).all(1))]
        if wrong:
            flawed(config, split, wrong, f"column '{column}' holds {values[wrong[0]]}, which are no tags", len(values))
            matrix[wrong] = np.nan
        matrices[split] = matrix.astype(np.float32)
    return Labels(matrices, tuple(known), TAGS)


def _is_hot(rows: Sequence[Sequence[Any]]) -> bool:
    """Whether lists are rows of 0 and 1, most of one length of two or more; else they say which tags hold."""
    length, count = Counter(map(len, rows)).most_common(1)[0] if rows else (0, 0)
    return length > 1 and 2 * count > len(rows) and {member for row in rows for member in row} <= {0, 1}


def _named(members: set[Any]) -> list[str]:
    """Names in order; numbers count from 0."""
    if all(isinstance(member, int) and member >= 0 for member in members):
        return [str(number) for number in range(max(members, default=-1) + 1)]
    return sorted(str(member) for member in members if member is not None)


def _row(members: Sequence[Any] | None, numbers: Mapping[str, int], *, hot: bool) -> NDArray[np.float64]:
    """One row, NaN where it is none."""
    lacking: NDArray[np.float64] = np.full(len(numbers), np.nan)
    if members is None or (hot and (len(members) != len(numbers) or not set(members) <= {0, 1})):
        return lacking
    if hot:
        return np.asarray(members, dtype=np.float64)
    row: NDArray[np.float64] = np.zeros(len(numbers))
    for member in members:
        at = numbers.get(member, member) if isinstance(member, str) else member
        if not isinstance(at, int) or not 0 <= at < len(numbers):
            return lacking
        row[at] = 1.0
    return row
