"""Cuts calibration data into batches, and shares them among ranks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

from torch import Tensor

from fusionpl.calibration.config import CalibrationConfig
from fusionpl.calibration.forward import inputs_of
from fusionpl.errors import FusionError

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def no_progress(steps: Iterable[Any], label: str) -> Iterable[Any]:
    """The default progress bar: none."""
    return steps


def unlabelled(item: Any) -> dict[str, Tensor]:
    """The model inputs of an item of a data loader: a mapping, an image tensor, or an (inputs, labels) pair.

    Raises:
        FusionError: it is none of these.
    """
    inputs = item[0] if isinstance(item, (tuple, list)) and item else item
    if not isinstance(inputs, Tensor | Mapping):
        raise FusionError(
            f"a batch is an image tensor [B, C, H, W] or a mapping of model inputs, not a {type(inputs).__name__}; "
            "give an iterable of batches, or for data of each parent a list with one iterable for each, in their order"
        )
    return inputs_of(inputs)


class Samples(NamedTuple):
    """Some samples of a calibration set.

    Attributes:
        first: the number of the first of them.
        inputs: of a model.
        owner: the index of the parent whose data they are; None where nobody said.
        turn: the number by which ranks share them.
    """

    first: int
    inputs: dict[str, Tensor]
    owner: int | None
    turn: int


@dataclass(frozen=True)
class OfEachParent:
    """Data of each parent, in the parents' order.

    Attributes:
        sets: iterables of batches; or data loaders, where samples are drawn in any order.
    """

    sets: tuple[Iterable[Any], ...]


def by_owner(data: Iterable[Any], parents: int) -> Iterable[Any] | OfEachParent:
    """Data as they are, or those of each parent where a list (or tuple) holds an iterable of batches for each.

    A batch is a tensor, a mapping, a tuple, or a list such as [inputs, labels], whose parts are not alike; a list of
    batches is one set.

    >>> import torch
    >>> by_owner([[torch.zeros(2, 3)], [torch.ones(1, 3)]], parents=2)
    OfEachParent(sets=([tensor([[0., 0., 0.],
            [0., 0., 0.]])], [tensor([[1., 1., 1.]])]))
    >>> by_owner([torch.zeros(1), torch.ones(1)], parents=2)  # two batches
    [tensor([0.]), tensor([1.])]

    Raises:
        FusionError: there are several sets, and not one for each parent.
    """
    if not isinstance(data, list | tuple) or len(data) < 2 or any(map(_is_batch, data)):
        return data
    if len(data) != parents:
        raise FusionError(
            f"there are {len(data)} sets of data and {parents} parents; give one for each parent, in their order, or "
            "one for all"
        )
    return OfEachParent(tuple(data))


def _is_batch(item: Any) -> bool:
    if isinstance(item, Tensor | Mapping | tuple):
        return True
    return isinstance(item, list) and len({getattr(part, "ndim", type(part)) for part in item}) > 1


def batches(calibration: Iterable[Any] | OfEachParent, config: CalibrationConfig) -> Iterator[Samples]:
    """Cuts the first `samples` of an iterable of batches into model inputs of `batch_size`; of data of each parent
    those of each, which take turns.

    Items may be mappings, image tensors, or (inputs, labels) pairs.

    Raises:
        FusionError: a set is empty.
    """
    owned = isinstance(calibration, OfEachParent)
    sets = calibration.sets if isinstance(calibration, OfEachParent) else (calibration,)
    cut, first = {owner: _cut(own, config) for owner, own in enumerate(sets)}, 0
    for turn in count():
        for owner, own in list(cut.items()):
            inputs = next(own, None)
            if inputs is not None:
                yield Samples(first, inputs, owner if owned else None, turn + owner)
                first += len(next(iter(inputs.values())))
                continue
            if turn == 0:
                whose = f" of parent {owner}" if owned else ""
                raise FusionError(
                    f"the calibration set{whose} is empty; give calibration data or use align.evidence weights"
                )
            del cut[owner]
        if not cut:
            return


def _cut(items: Iterable[Any], config: CalibrationConfig) -> Iterator[dict[str, Tensor]]:
    seen = 0
    for item in items:
        inputs = unlabelled(item)
        size = min(config.samples - seen, len(next(iter(inputs.values()))))
        for start in range(0, size, config.batch_size):
            end = min(start + config.batch_size, size)
            yield {key: value[start:end] for key, value in inputs.items()}
        seen += size
        if seen >= config.samples:
            return
