"""What classifiers say, and what several say together: of classes one holds, of tags each may."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fusionpl.models.labels import TAGS, Kind
from fusionpl.transport.softmax import log_mean


def log_probabilities(output: Tensor, kind: Kind) -> Tensor:
    """The logs of what a classifier gives each class, float32 [..., classes]; of tags [..., tags, 2], that it holds and
    that it does not."""
    output = output.float()
    if kind != TAGS:
        return output.log_softmax(-1)
    return torch.stack([functional.logsigmoid(output), functional.logsigmoid(-output)], -1)


def log_odds(each: Sequence[Tensor], weights: Sequence[float | Tensor]) -> Tensor:
    """The log-odds of the weighted mean of what several models give tags.

    Args:
        each: their logits [..., tags].
        weights: one number a model, or one for each of its tags [tags], summing to 1.
    """
    return log_mean(each, weights, "sigmoid") - log_mean([-one for one in each], weights, "sigmoid")
