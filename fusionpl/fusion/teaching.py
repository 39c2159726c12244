"""Distillation of several models into one, and how far one is from their mean on samples that are held out."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from fusionpl.calibration.cursor import sum_over_ranks
from fusionpl.calibration.forward import device_of, eval_mode, logits
from fusionpl.fusion.unlabelled import Inputs, Unlabelled
from fusionpl.fusion.voting import Voting
from fusionpl.models.labels import CLASSES, NUMBERS, TAGS, Kind
from fusionpl.schedule import warmup_cosine

WARMUP = 0.1
HELD_OUT_SEED = 0  # of what a data set draws for each batch, as masks
Augment = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
Means = Sequence[tuple[Voting, Tensor]]
Units = Mapping[int | None, float]  # the parent whose head it is -> what its losses are measured in


class Teaching:
    """Teachers over unlabelled samples.

    Under torch.distributed each rank draws from its own samples, the gradients are averaged, and what is measured is
    summed, so that all ranks hold the same model and find the same figures.

    Args:
        teachers: models with the same outputs.
        votings: who says what a model is to predict.
        mask: the model input that says which of [B, T] count, where there is one.
        samples: to teach on, and those that are held out.
        size: samples a step and process.
        augment: changes a batch of model inputs, which is where the model is, at random; the teachers see what the
            model sees.
        seed: decides the order of the samples and, with the rank, what is drawn from torch's global RNG: augmentation
            and dropout.

    Attributes:
        seconds: that the last look at the held-out samples took.
        steps: of all runs.
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        votings: Sequence[Voting],
        mask: str,
        samples: Unlabelled,
        size: int,
        augment: Augment | None,
        seed: int,
    ) -> None:
        self._teachers, self._votings, self._mask = teachers, votings, mask
        self._samples, self._size, self._augment, self._seed = samples, size, augment, seed
        self._means: dict[int, Means] = {}  # of held-out batches, where they are few numbers
        self.seconds, self.steps = 0.0, 0
        self.device = device_of(teachers[0])

    def run(
        self, model: nn.Module, lr: float, shares: Iterable[float], look: Callable[[float], None] = lambda share: None
    ) -> bool:
        """Draws a model to the mean of the teachers: see `refinement`.

        Args:
            model: changed in place, where it is; in eval mode afterwards.
            lr: largest learning rate of AdamW.
            shares: before each step, the share of the teaching that is over; the same on all ranks.
            look: called before each step.

        Returns:
            Whether all gradients were finite; at the first that are not it stops.
        """
        optimizer, finite = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0), True
        units = self._units
        with torch.random.fork_rng():
            torch.manual_seed(self._seed + (dist.get_rank() if dist.is_initialized() else 0))
            batches = self._samples.taught(self._size, self._seed)
            for share in shares:
                look(share)
                model.train()
                optimizer.zero_grad()
                drawn = next(batches)
                if drawn is not None:
                    self._loss(model, units, *drawn).backward()
                _average_gradients(model, took_part=drawn is not None)
                finite = bool(nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite())
                if not finite:
                    break
                for group in optimizer.param_groups:
                    group["lr"] = lr * warmup_cosine(share, WARMUP)
                optimizer.step()
                self.steps += 1
        model.eval()
        return finite

    def divergence(self, model: nn.Module) -> float:
        """The mean divergence of a model from the teachers' mean over the held-out samples, in nats; of models that put
        out one number, the mean squared error, as a share of its variance where there are other heads."""
        started, units = time.monotonic(), self._units
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        with torch.no_grad(), eval_mode(model), torch.random.fork_rng():
            torch.manual_seed(HELD_OUT_SEED)
            for index, (owner, batch) in enumerate(self._samples.held(self._size)):
                batch = self._here(batch)
                outputs = logits(model, batch)
                for voting, mean in self._held_means(index, owner, batch):
                    output, mean = _counted(outputs[..., voting.columns], mean, batch.get(self._mask))
                    distance = (loss_to(mean, output, voting.kind) - _least(mean, voting.kind)) / units[voting.head]
                    total += torch.stack([distance.double() * len(output), total.new_full((), len(output))])
        sum_over_ranks([total])
        self.seconds = time.monotonic() - started
        return float(total[0] / total[1])

    def _loss(self, model: nn.Module, units: Units, owner: int | None, batch: Inputs) -> Tensor:
        batch = self._here(batch)
        batch = dict(self._augment(batch)) if self._augment is not None else batch
        outputs, losses = logits(model, batch), []
        for voting, mean in self._means_of(owner, batch):
            output, mean = _counted(outputs[..., voting.columns], mean, batch.get(self._mask))
            losses.append(loss_to(mean, output, voting.kind) / units[voting.head])
        return torch.stack(losses).sum()

    def _here(self, batch: Inputs) -> Inputs:
        return {key: value.to(self.device) for key, value in batch.items()}

    @torch.no_grad()
    def _means_of(self, owner: int | None, batch: Inputs) -> Means:
        """What the teachers say together of the outputs that they are asked about; who is not counted does not run."""
        given: dict[int, Tensor] = {}
        means = []
        for voting in self._votings:
            voters = voting.voters(owner)
            for index in voters:
                if index not in given:
                    given[index] = logits(self._teachers[index], batch)
            if voters:
                outputs = [given[index][..., voting.columns] for index in voters]
                means.append((voting, mean_of(outputs, list(voters.values()), voting.kind)))
        return means

    @cached_property
    def _units(self) -> Units:
        """What the losses of each head are measured in, on all ranks at once: nats, and of numbers beside other outputs
        the variance of what the teachers say of the held-out samples."""
        heads = {voting.head: voting for voting in self._votings}
        units = dict.fromkeys(heads, 1.0)
        numbers = [head for head, voting in heads.items() if head is not None and voting.kind == NUMBERS]
        if len(heads) == 1 or not numbers:
            return units
        widths = {head: heads[head].columns.stop - heads[head].columns.start for head in numbers}
        sums = {head: torch.zeros(3, width, dtype=torch.float64, device=self.device) for head, width in widths.items()}
        with torch.no_grad(), eval_mode(*self._teachers):
            for index, (owner, batch) in enumerate(self._samples.held(self._size)):
                for voting, mean in self._held_means(index, owner, self._here(batch)):
                    if voting.head in numbers:
                        rows = mean.double()
                        sums[voting.head] += torch.stack([torch.ones_like(rows), rows, rows.square()]).sum(1)
        sum_over_ranks(list(sums.values()))
        parts = {head: own / own[0].clamp_min(1) for head, own in sums.items()}
        return {**units, **{head: float((one[2] - one[1].square()).mean()) or 1.0 for head, one in parts.items()}}

    def _held_means(self, index: int, owner: int | None, batch: Inputs) -> Means:
        if index in self._means:
            return self._means[index]
        means = self._means_of(owner, batch)
        if all(mean.ndim == 2 for _, mean in means):  # a distribution for every token would be too much to keep
            self._means[index] = means
        return means


def mean_of(given: Sequence[Tensor], weights: Sequence[float | Tensor], kind: Kind = CLASSES) -> Tensor:
    """The weighted mean of the probabilities of logits [..., classes], or of numbers."""
    mean = torch.zeros_like(given[0])
    for weight, output in zip(weights, given, strict=True):
        weight = weight.to(output) if isinstance(weight, Tensor) else weight
        mean += weight * (
            output if _numbers(output, kind) else output.sigmoid() if kind == TAGS else output.softmax(-1)
        )
    return mean


def loss_to(mean: Tensor, output: Tensor, kind: Kind = CLASSES) -> Tensor:
    """The cross-entropy of a model to mean probabilities; of tags the mean of each one's own; of numbers the mean
    squared error.

    Args:
        mean: [N, classes], see `mean_of`.
        output: logits of the model, [N, classes].
        kind: what the outputs mean.
    """
    if kind == TAGS:
        return functional.binary_cross_entropy_with_logits(output, mean)
    return functional.mse_loss(output, mean) if _numbers(output, kind) else functional.cross_entropy(output, mean)


def _numbers(output: Tensor, kind: Kind) -> bool:
    return kind == NUMBERS or (kind == CLASSES and output.shape[-1] == 1)


def _counted(output: Tensor, mean: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The predictions that count, [N, classes]."""
    if mask is not None and output.ndim == 3:
        return output[mask.to(output.device).bool()], mean[mask.to(mean.device).bool()]
    return output.flatten(0, -2), mean.flatten(0, -2)


def _least(mean: Tensor, kind: Kind) -> Tensor:
    """The loss of a model that puts out the mean itself."""
    if _numbers(mean, kind):
        return mean.new_zeros(())
    each: Tensor = torch.special.entr(mean)
    return (each + torch.special.entr(1 - mean)).mean() if kind == TAGS else each.sum(-1).mean()


def _average_gradients(model: nn.Module, *, took_part: bool) -> None:
    if not dist.is_initialized():
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    flat = torch.cat([*(one.flatten() for one in gradients), gradients[0].new_full((1,), float(took_part))])
    dist.all_reduce(flat)
    means = (flat[:-1] / flat[-1]).split([one.numel() for one in parameters])
    for parameter, mean in zip(parameters, means, strict=True):
        parameter.grad = mean.view_as(parameter)
