"""The main figure of a task as the mean of what each test sample adds to it, so that two models can be compared."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusionpl.evaluation.outcomes import Difference, Outcomes, are_tags, difference_of

ACCURACY, F1, PEARSON, PERPLEXITY, AGREEMENT = "accuracy", "f1", "pearson", "perplexity", "agreement"


@dataclass(frozen=True)
class Scores:
    """A figure of N samples.

    Of a figure that is no mean (f1, a correlation) a sample adds the figure and its influence on that: the mean of
    these is the figure, and their spread over the samples that of the figure, linearised (Hampel, "The Influence Curve
    and Its Role in Robust Estimation", 1974).

    Attributes:
        metric: accuracy, f1, pearson, perplexity (of which less is better) or agreement.
        values: what each sample adds, float64 [N].
    """

    metric: str
    values: Tensor

    @property
    def figure(self) -> float:
        """The figure."""
        return float(self.values.mean())

    @classmethod
    def share(cls, outcomes: Outcomes, metric: str = ACCURACY) -> "Scores":
        """The share of what is right of all that outcomes count, of which each sample has as many."""
        counts, right = outcomes.values[:, 1].double(), outcomes.values[:, 2].double()
        return cls(metric, right / counts.mean())

    @classmethod
    def perplexity(cls, outcomes: Outcomes) -> "Scores":
        """P = exp(sum l_i / sum n_i) of the losses l_i over n_i tokens: a sample has the influence
        P (l_i - n_i ln P) / mean n."""
        losses, counts = outcomes.values[:, 0].double(), outcomes.values[:, 1].double()
        mean = losses.sum() / counts.sum()
        return cls(PERPLEXITY, mean.exp() * (1 + (losses - mean * counts) / counts.mean()))

    @classmethod
    def of(cls, output: Tensor, labels: Tensor) -> "Scores":
        """The figure that a task's labels ask for.

        Args:
            output: of all samples, [N, classes], [N, tags] or, of numbers, [N, 1].
            labels: classes, int64 [N]; 1 and 0 of tags, float [N, tags]; numbers, float [N].

        Returns:
            The accuracy; of tags the micro average of f1; of numbers Pearson's correlation, NaN where one is constant.
        """
        output, labels = output.double().cpu(), labels.cpu()
        if are_tags(labels):
            return cls(F1, _f1(output > 0, labels > 0.5))
        if labels.is_floating_point():
            return cls(PEARSON, _pearson(output.squeeze(-1), labels.double()))
        return cls(ACCURACY, (output.argmax(-1) == labels).double())

    def better(self, other: "Scores") -> Difference:
        """By how much this figure is better than another one's, on the same samples; see `Outcomes.better`."""
        gains = self.values - other.values if self.metric != PERPLEXITY else other.values - self.values
        return difference_of(gains, torch.ones_like(gains), classes=self.metric == ACCURACY)

    def ratio(self, other: "Scores") -> tuple[float, float]:
        """The ratio R of this figure to another one's on the same N samples, and its standard error: linearised and
        paired, sqrt(N / (N - 1) sum (r_i - R s_i)^2) / sum s_i (Cochran, "Sampling Techniques", 6.4). Of a perplexity
        it is the other one's to this, by which the mean probability of a token is higher."""
        mine, theirs, samples = self.values, other.values, len(self.values)
        if self.metric == PERPLEXITY:
            mine, theirs = theirs, mine
        ratio = float(mine.sum() / theirs.sum())
        if samples < 2:
            return ratio, math.nan
        spread = (mine - ratio * theirs).square().sum() * samples / (samples - 1)
        return ratio, float(torch.sqrt(spread) / theirs.sum())


def in_row(tasks: Mapping[str, Scores]) -> dict[str, Any]:
    """The figures of tasks, by their names, as a row holds them; nothing where there are none."""
    if not tasks:
        return {}
    figures = {task: scores.figure for task, scores in tasks.items()}
    return {"tasks": figures, "metrics": {task: scores.metric for task, scores in tasks.items()}}


def _f1(given: Tensor, wanted: Tensor) -> Tensor:
    """F = sum 2 hits / sum (given + wanted), so a sample has the influence (2 hits - F (given + wanted)) / mean."""
    hits, either = 2.0 * (given & wanted).sum(1), given.sum(1).double() + wanted.sum(1)
    if not either.any():
        return torch.zeros_like(either)
    figure = hits.sum() / either.sum()
    return figure + (hits - figure * either) / either.mean()


def _pearson(given: Tensor, wanted: Tensor) -> Tensor:
    """Of r a sample with the standard scores x and y has the influence x y - r (x^2 + y^2) / 2."""
    x, y = ((one - one.mean()) / one.std(correction=0) for one in (given, wanted))
    figure = (x * y).mean()
    return figure + x * y - figure * (x.square() + y.square()) / 2
