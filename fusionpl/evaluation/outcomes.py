"""What a model did on each sample of a test set, so that two models can be compared on the same samples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from scipy.stats import binom
from scipy.stats import t as student
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from fusionpl.datamodules.base import IGNORED
from fusionpl.errors import FusionError, reason

SHARES = ("accuracy", "agreement")  # of what is right; more is better
Metric = Literal["accuracy", "agreement", "loss"]


def scored(output: Tensor, labels: Tensor) -> Tensor:
    """What a batch of outputs is worth, sample by sample.

    Args:
        output: logits or log-probabilities, [B, classes] or [B, T, tokens]; of a regression, [B, 1]; logits of tags,
            [B, tags].
        labels: classes [B] or tokens [B, T] (-100 is not scored); of a regression, floating-point numbers [B]; of tags
            1 where they hold and 0 where not, floating point [B, tags].

    Returns:
        Float32 [B, 3]: the loss, summed over the scored labels (cross-entropy in nats), how many labels were scored,
        and how many of them are the likeliest. Of a regression [B, 2]: the squared error, and 1. Each tag is a label
        of its own.
    """
    output = output.float()
    if are_tags(labels):
        losses = binary_cross_entropy_with_logits(output, labels.float(), reduction="none").sum(1)
        right = ((output > 0) == (labels > 0.5)).sum(1)
        return torch.stack([losses, torch.full_like(losses, labels.shape[1]), right], 1)
    if labels.is_floating_point():
        loss = (output.squeeze(-1) - labels).square()
        return torch.stack([loss, torch.ones_like(loss)], 1)
    if labels.ndim == 1:
        output, labels = output[:, None], labels[:, None]
    losses = cross_entropy(output.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    right = output.argmax(-1) == labels
    return torch.stack([losses.view(labels.shape).sum(1), (labels != IGNORED).sum(1), right.sum(1)], 1)


def are_tags(labels: Tensor) -> bool:
    """Whether labels are tags, of which several may hold: floating point [B, tags]."""
    return labels.is_floating_point() and labels.ndim == 2


@dataclass(frozen=True)
class Outcomes:
    """What a model did on each of N samples: images, sentences, or blocks of text.

    Attributes:
        values: what `scored` gave, on the CPU, [N, 3], or [N, 2] of a regression.
    """

    values: Tensor

    @property
    def figures(self) -> dict[str, float]:
        """The mean `loss` over all scored labels and, but of a regression, `accuracy` in [0, 1]."""
        loss, count, *right = self.values.double().sum(0)
        totals = {"accuracy": right[0], "loss": loss} if right else {"loss": loss}
        return {name: float(total / count) for name, total in totals.items()}

    def better(self, other: "Outcomes", metric: Metric) -> "Difference":
        """By how much this model is better than another one, on the same samples.

        The difference of two means over labels is a ratio of sums over samples, D = sum d_i / sum n_i, where d_i is
        what sample i adds and n_i its number of scored labels. Samples are taken as independent, so its standard error
        is sqrt(N / (N - 1) sum (d_i - D n_i)^2) / sum n_i (linearised, as in a cluster sample; Cochran, "Sampling
        Techniques", 6.4). Where each sample has one label that is the paired standard error; of accuracies, McNemar's.

        The probability of a difference at least as large, were there none: of classes McNemar's mid-p test on the
        samples that one model alone has right (Fagerland et al., 2013); else Student's t with N - 1 degrees of freedom.

        Args:
            other: of the same samples, in the same order.
            metric: what is compared; a larger share of SHARES and less loss are better.

        Raises:
            FusionError: they are not of the same samples.
        """
        ours, theirs = self.values.double(), other.values.double()
        if ours.shape != theirs.shape or not torch.equal(ours[:, 1], theirs[:, 1]):
            raise FusionError("two models can only be compared on the same test samples; measure both on one test set")
        gains = ours[:, 2] - theirs[:, 2] if metric in SHARES else theirs[:, 0] - ours[:, 0]
        return difference_of(gains, ours[:, 1], classes=metric in SHARES)


def side_by_side(sets: Sequence[Outcomes]) -> Outcomes:
    """What was done on several sets: the samples of each together count alike, and the mean sample as one."""
    samples = sum(len(own.values) for own in sets)
    return Outcomes(torch.cat([own.values * (samples / (len(sets) * len(own.values))) for own in sets]))


@dataclass(frozen=True)
class Difference:
    """By how much one model is better than another on the same test samples.

    Attributes:
        value: of accuracies a share, of losses nats (or squared error); negative where it is worse.
        error: its standard error; NaN of one sample.
        chance: how probable a difference at least as large is between equal models, the p-value of a two-sided test.
        samples: how many.
    """

    value: float
    error: float
    chance: float
    samples: int


def difference_of(gains: Tensor, count: Tensor, *, classes: bool) -> Difference:
    """A difference of what samples add: see `Outcomes.better`.

    Args:
        gains: by how much one model is better on each sample, float64 [N].
        count: the number of labels of each, float64 [N].
        classes: whether a gain is that of labels that are right or wrong.
    """
    samples, value = len(gains), float(gains.sum() / count.sum())
    if samples < 2:
        return Difference(value, math.nan, math.nan, samples)
    spread = (gains - value * count).square().sum() * samples / (samples - 1)
    error = float(spread.sqrt() / count.sum())
    if classes and bool((count == 1).all()):
        chance = _mid_p(int((gains > 0).sum()), int((gains < 0).sum()))
    elif error:
        chance = float(2 * student.sf(abs(value / error), samples - 1))
    else:
        chance = float(value == 0)
    return Difference(value, error, chance, samples)


def _mid_p(only_ours: int, only_theirs: int) -> float:
    """McNemar's two-sided mid-p value from the discordant samples."""
    less, both = min(only_ours, only_theirs), only_ours + only_theirs
    return min(1.0, float(2 * binom.cdf(less, both, 0.5) - binom.pmf(less, both, 0.5)))


def save_outcomes(file: Path, outcomes: Mapping[str, Outcomes]) -> None:
    """Writes the outcomes of models by their names, as safetensors."""
    # safetensors refuses tensors that share memory, as those of one model under two names do
    save_file({name: outcome.values.clone() for name, outcome in outcomes.items()}, file)


def load_outcomes(file: Path) -> dict[str, Outcomes]:
    """Reads what `save_outcomes` wrote; nothing where there is no such file.

    Raises:
        FusionError: the file is damaged.
    """
    return {name: Outcomes(values) for name, values in load_tensors(file).items()}


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Reads a report's tensors; nothing where there is no such file.

    Raises:
        FusionError: the file is damaged.
    """
    if not file.is_file():
        return {}
    try:
        return load_file(file)
    except Exception as error:  # safetensors has its own for a damaged file
        raise FusionError(f"'{file}' is damaged ({reason(error)}); run fuse.py again") from error
