"""Cuts a calibration set into batches, and shares them among ranks."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fusionpl.calibration.config import CalibrationConfig
from fusionpl.calibration.forward import inputs_of
from fusionpl.errors import FusionError

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def no_progress(steps: Iterable[Any], label: str) -> Iterable[Any]:
    """The default progress bar: none."""
    return steps


def unlabelled(item: Any) -> dict[str, Tensor]:
    """The model inputs of an item of a data loader: a mapping, an image tensor, or an (inputs, labels) pair."""
    return inputs_of(item[0] if isinstance(item, (tuple, list)) else item)


def batches(
    calibration: Iterable[Any], config: CalibrationConfig, *, whole: bool = False
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Cuts the first `samples` of an iterable of batches into model inputs of `batch_size`.

    Items may be mappings, image tensors, or (inputs, labels) pairs. Under torch.distributed each rank takes its
    share of the batches, unless this one alone is at work and takes the `whole`.

    Yields:
        The number of the batch's first sample, and the batch.

    Raises:
        FusionError: the iterable is empty.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() and not whole else (0, 1)
    seen = index = 0
    for item in calibration:
        inputs = unlabelled(item)
        size = min(config.samples - seen, len(next(iter(inputs.values()))))
        for start in range(0, size, config.batch_size):
            if index % world == rank:
                end = min(start + config.batch_size, size)
                yield seen + start, {key: value[start:end] for key, value in inputs.items()}
            index += 1
        seen += size
        if seen >= config.samples:
            break
    if index == 0:
        raise FusionError("the calibration set is empty; give calibration data or use align.evidence weights")
