"""Learned refinement: the fused model is drawn to its parents' mean on unlabeled data."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from transformers import get_cosine_schedule_with_warmup

from fusionpl.calibration import CalibrationSet, Progress, logits, no_progress, recorded
from fusionpl.families import Binding
from fusionpl.fusion.config import RefineConfig
from fusionpl.fusion.parents import AlignedParent

WARMUP = 0.1


def refine(
    model: nn.Module,
    binding: Binding,
    parents: Sequence[AlignedParent],
    data: CalibrationSet,
    config: RefineConfig,
    *,
    seed: int = 0,
    progress: Progress = no_progress,
) -> None:
    """Unlabeled distillation from aligned parents: their mean stream at every join, and their mean prediction.

    The loss is the mean over joins of |stream - target|^2 / |target|^2, plus the cross-entropy to the ensemble's
    probabilities. Under torch.distributed each rank draws from its own batches and the gradients are averaged.

    Args:
        model: refined in place, where it is; in eval mode afterwards.
        binding: the model's.
        parents: the teachers.
        data: this rank's calibration batches.
        config: steps, batch size and learning rate.
        seed: decides the order of the batches, and dropout.
        progress: wraps the steps.
    """
    teachers = [(parent, parent.network.whole()) for parent in parents]
    streams = [axis for axis in binding.joins if axis in binding.taps]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * config.steps), config.steps)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.train()
        batches = _drawn(data, config.batch_size, seed)
        for _ in progress(range(config.steps), "refine"):
            batch = next(batches)
            optimizer.zero_grad()
            if batch is not None:
                _loss(model, binding, teachers, streams, batch).backward()
            _average_gradients(model, took_part=batch is not None)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def _drawn(data: CalibrationSet, size: int, seed: int) -> Iterator[dict[str, Tensor] | None]:
    """Batches of `size` in a new order each time through, without end; None where this rank has none."""
    places = [
        (index, slice(start, start + size))
        for index in data
        for start in range(0, len(next(iter(data[index].values()))), size)
    ]
    if not places:
        yield from itertools.repeat(None)
    generator = torch.Generator().manual_seed(seed)
    while True:
        for at in torch.randperm(len(places), generator=generator).tolist():
            index, rows = places[at]
            yield {key: value[rows] for key, value in data[index].items()}


def _loss(
    model: nn.Module,
    binding: Binding,
    teachers: Sequence[tuple[AlignedParent, nn.Module]],
    streams: Sequence[str],
    batch: Mapping[str, Tensor],
) -> Tensor:
    wanted: dict[str, Tensor] = {}
    probabilities: Tensor | float = 0.0
    with torch.no_grad():
        for parent, teacher in teachers:
            with recorded(teacher, parent.binding, streams) as seen:
                probabilities = probabilities + parent.weight * logits(teacher, batch).softmax(-1)
            for axis in streams:
                wanted[axis] = wanted.get(axis, 0) + parent.weight * parent.moved(seen, axis)
    with recorded(model, binding, streams, gradients=True) as seen:
        scores = logits(model, batch)
    assert isinstance(probabilities, Tensor)
    mask = batch.get("attention_mask")
    losses = [_relative_error(seen[axis], wanted[axis], mask) for axis in streams]
    scores, probabilities = (_kept(tensor, mask) for tensor in (scores, probabilities))
    return torch.stack(losses).mean() + functional.cross_entropy(scores, probabilities)


def _average_gradients(model: nn.Module, *, took_part: bool) -> None:
    if not dist.is_initialized():
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    flat = torch.cat([*(one.flatten() for one in gradients), gradients[0].new_tensor([float(took_part)])])
    dist.all_reduce(flat)
    means = (flat[:-1] / flat[-1]).split([one.numel() for one in parameters])
    for parameter, mean in zip(parameters, means, strict=True):
        parameter.grad = mean.view_as(parameter)


def _kept(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """[rows, n]: every row of [B, n], and of [B, T, n] those that are no padding."""
    if tensor.ndim == 2:
        return tensor
    return tensor.flatten(0, 1) if mask is None else tensor[mask.to(tensor.device).bool()]


def _relative_error(stream: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    stream, target = _kept(stream, mask), _kept(target, mask).to(stream)
    return (stream - target).square().sum() / target.square().sum().clamp_min(1e-12)
