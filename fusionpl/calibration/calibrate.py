"""Runs all parents over the same calibration batches and streams the moments that alignment needs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusionpl.calibration.config import CalibrationConfig
from fusionpl.calibration.forward import Batch, device_of, eval_mode, inputs_of, logits
from fusionpl.calibration.moments import Moments
from fusionpl.calibration.taps import parameter_units, recorded
from fusionpl.calibration.tokens import check_tokens, select
from fusionpl.errors import FusionError
from fusionpl.families import Binding

Key = tuple[str, ...]
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def no_progress(steps: Iterable[Any], label: str) -> Iterable[Any]:
    """The default progress bar: none."""
    return steps


def batches(calibration: Iterable[Any], config: CalibrationConfig) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Cuts the first `samples` of an iterable of batches into model inputs of `batch_size`.

    Items may be mappings, image tensors, or (inputs, labels) pairs. Under torch.distributed each rank takes its
    share of the batches.

    Yields:
        The number of the batch's first sample, and the batch.

    Raises:
        FusionError: the iterable is empty.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    seen = index = 0
    for item in calibration:
        inputs = inputs_of(item[0] if isinstance(item, (tuple, list)) else item)
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


def calibrate(
    parents: Sequence[nn.Module],
    bindings: Sequence[Binding],
    anchor: int,
    calibration: Iterable[Any],
    keys: Sequence[Key],
    config: CalibrationConfig,
    progress: Progress = no_progress,
) -> list[dict[Key, Moments]]:
    """Streams the joint moments of every parent with the anchor over the calibration set.

    Args:
        parents: models; the bindings are theirs, in the same order.
        anchor: index of the anchor.
        calibration: any iterable of batches.
        keys: which axes; a key of several axes puts their units side by side.
        config: samples, batch size and token selection; scaling happens later.
        progress: wraps the iteration over batches.

    Returns:
        For each parent (the anchor with itself too) key -> Moments.
    """
    check_tokens(config.tokens)
    device = device_of(parents[anchor])
    moments = [_empty(binding, bindings[anchor], keys, device) for binding in bindings]
    streamed = [key for key in keys if bindings[anchor].taps[key[0]].kind != "parameter"]
    axes = [axis for key in streamed for axis in key]
    with torch.inference_mode(), eval_mode(*parents):
        for _, batch in progress(batches(calibration, config), "calibrate") if streamed else ():
            rows = [
                _rows(parent, binding, batch, axes, config.tokens)
                for parent, binding in zip(parents, bindings, strict=True)
            ]
            for ours, a in zip(moments, rows, strict=True):
                for key in streamed:
                    ours[key].update(_beside(a, key).to(device), _beside(rows[anchor], key).to(device))
    if dist.is_initialized():
        _all_reduce(moments)
    for key in set(keys) - set(streamed):
        for ours, parent, binding in zip(moments, parents, bindings, strict=True):
            values = (parameter_units(model, bound.taps[key[0]])
                      for model, bound in ((parent, binding), (parents[anchor], bindings[anchor])))  # fmt: skip
            ours[key].update(*values)
    return moments


def _empty(binding: Binding, anchor: Binding, keys: Sequence[Key], device: torch.device) -> dict[Key, Moments]:
    def size(bound: Binding, key: Key) -> int:
        return sum(bound.axes[axis].size for axis in key)

    return {key: Moments.zeros(size(binding, key), size(anchor, key), device=device) for key in keys}


def _rows(model: nn.Module, binding: Binding, batch: Batch, axes: Sequence[str], tokens: str) -> dict[str, Tensor]:
    with recorded(model, binding, axes) as seen:
        logits(model, batch)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return {axis: select(tensor, tokens, mask) for axis, tensor in seen.items()}


def _beside(rows: Mapping[str, Tensor], key: Key) -> Tensor:
    return rows[key[0]] if len(key) == 1 else torch.cat([rows[axis] for axis in key], dim=-1)


def _all_reduce(moments: Sequence[Mapping[Key, Moments]]) -> None:
    tensors = [tensor for ours in moments for one in ours.values() for tensor in one.tensors()]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))
