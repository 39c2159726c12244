"""Learned refinement: the fused model is drawn to its parents' mean on unlabeled data."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, repeat

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from fusionpl.calibration import CalibrationSet, Progress, device_of, logits, no_progress
from fusionpl.errors import FusionError
from fusionpl.families import Binding
from fusionpl.fusion.config import RefineConfig
from fusionpl.fusion.parents import AlignedParent
from fusionpl.models import CLASSES, NUMBERS, TAGS, Kind, kind_of
from fusionpl.schedule import Clock, warmup_cosine

WARMUP = 0.1
Augment = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
Sample = tuple[int, int]  # the batch of a calibration set that it is in, and where


def refine(
    model: nn.Module,
    binding: Binding,
    parents: Sequence[AlignedParent],
    data: CalibrationSet,
    config: RefineConfig,
    *,
    augment: Augment | None = None,
    seed: int = 0,
    tags: Sequence[Tensor] | None = None,
    progress: Progress = no_progress,
) -> None:
    """Unlabeled distillation of the parents into what they were fused to; see `loss_to_mean`.

    Under torch.distributed each rank draws from its own samples, the gradients are averaged, and the first rank's clock
    counts.

    Args:
        model: refined in place, where it is; in eval mode afterwards.
        binding: the model's.
        parents: the teachers, with their weights.
        data: this rank's calibration batches.
        config: steps or minutes, batch size and learning rate.
        augment: changes a batch of model inputs, which is where the model is, at random; the teachers see what the
            model sees.
        seed: decides the order of the samples and, with the rank, what is drawn from torch's global RNG: augmentation
            and dropout.
        tags: the teachers' weights for each tag, [tags] each, in place of their own; see `Team.tag_weights`.
        progress: wraps the steps.

    Raises:
        FusionError: gradients that are not finite.
    """
    device, mask = device_of(model), binding.family.stacks[-1].mask
    teachers, kind = [parent.network.original.whole() for parent in parents], kind_of(model)
    weights = [parent.weight for parent in parents] if tags is None else [one.float().to(device) for one in tags]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed + (dist.get_rank() if dist.is_initialized() else 0))
        model.train()
        batches = _drawn(data, config.batch_size, seed)
        for share in progress(_shares(config, device), "refine"):
            batch = next(batches)
            optimizer.zero_grad()
            if batch is not None:
                batch = {key: value.to(device) for key, value in batch.items()}
                batch = dict(augment(batch)) if augment is not None else batch
                with torch.no_grad():
                    given = [logits(teacher, batch) for teacher in teachers]
                loss_to_mean(logits(model, batch), given, weights, batch.get(mask), kind=kind).backward()
            _average_gradients(model, took_part=batch is not None)
            if not nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
                raise FusionError(f"learned refinement diverged; lower refine.lr (it is {config.lr:g})")
            for group in optimizer.param_groups:
                group["lr"] = config.lr * warmup_cosine(share, WARMUP)
            optimizer.step()
    model.eval()


def loss_to_mean(
    output: Tensor,
    given: Sequence[Tensor],
    weights: Sequence[float | Tensor],
    mask: Tensor | None = None,
    *,
    kind: Kind = CLASSES,
) -> Tensor:
    """The cross-entropy of a model to the weighted mean of other models' probabilities.

    Where models put out numbers, or one of them, the squared error to the mean of these; of tags the mean
    cross-entropy of each by itself.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, at temperature 1.

    Args:
        output: logits of the model, [B, classes] or [B, T, tokens].
        given: those of the other models, without their graph.
        weights: one a model, summing to 1; or one for each of its tags.
        mask: what counts of [B, T]; None for all.
        kind: what the outputs mean.
    """
    numbers = kind == NUMBERS or (kind == CLASSES and output.shape[-1] == 1)
    mean = torch.zeros_like(output)
    for weight, one in zip(weights, given, strict=True):
        mean += weight * (one if numbers else one.sigmoid() if kind == TAGS else one.softmax(-1))
    if mask is not None and output.ndim == 3:
        output, mean = (one[mask.to(one.device).bool()] for one in (output, mean))
    output, mean = output.flatten(0, -2), mean.flatten(0, -2)
    if kind == TAGS:
        return functional.binary_cross_entropy_with_logits(output, mean)
    return functional.mse_loss(output, mean) if numbers else functional.cross_entropy(output, mean)


def _shares(config: RefineConfig, device: torch.device) -> Iterable[float]:
    """Before each step, the share of the refinement that is over; the same on all ranks."""
    if config.minutes is not None:
        return _by_clock(Clock(60 * config.minutes), device)
    return [step / config.planned for step in range(config.planned)]


def _by_clock(clock: Clock, device: torch.device) -> Iterator[float]:
    while True:
        share = torch.tensor(clock.share, device=device)
        if dist.is_initialized():
            dist.broadcast(share, 0)
        if share >= 1:
            return
        yield float(share)


def _drawn(data: CalibrationSet, size: int, seed: int) -> Iterator[dict[str, Tensor] | None]:
    """Batches of `size` samples, in a new order each time through, without end; None where this rank has none.

    Samples that are padded to other lengths don't meet.
    """
    alike: dict[tuple[torch.Size, ...], list[Sample]] = defaultdict(list)
    for index in data:
        values = list(data[index].values())
        alike[tuple(value.shape[1:] for value in values)] += [(index, row) for row in range(len(values[0]))]
    if not alike:
        yield from repeat(None)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([float(len(samples)) for samples in alike.values()])
    streams = [_endless(samples, generator) for samples in alike.values()]
    while True:
        stream = streams[int(torch.multinomial(counts, 1, generator=generator))]
        yield _gathered(data, islice(stream, size))


def _endless(samples: Sequence[Sample], generator: torch.Generator) -> Iterator[Sample]:
    while True:
        for at in torch.randperm(len(samples), generator=generator).tolist():
            yield samples[at]


def _gathered(data: CalibrationSet, samples: Iterable[Sample]) -> dict[str, Tensor]:
    rows: dict[int, list[int]] = defaultdict(list)
    for index, row in samples:
        rows[index].append(row)
    parts = [{key: value[chosen] for key, value in data[index].items()} for index, chosen in rows.items()]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


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
