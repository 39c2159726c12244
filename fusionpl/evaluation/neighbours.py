"""How encoders are judged: whose nearest neighbours agree with those of all parents together, and what a linear probe
reads from their embeddings."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional

from fusionpl.calibration.embeddings import Pooling, embed
from fusionpl.calibration.forward import eval_mode
from fusionpl.evaluation.outcomes import Outcomes

NEIGHBOURS = 10


@torch.inference_mode()
def embeddings(model: nn.Module, batches: Iterable[Mapping[str, Any]], pooling: Pooling) -> tuple[Tensor, Tensor]:
    """The embeddings of labelled batches, float32 [N, d], and their labels [N], on the CPU."""
    vectors, labels = [], []
    with eval_mode(model):
        for batch in batches:
            vectors.append(embed(model, batch, pooling).cpu())
            labels.append(batch["labels"].cpu())
    return torch.cat(vectors), torch.cat(labels)


def similarities(embedded: Tensor) -> Tensor:
    """The cosine similarities of all pairs of N embeddings [N, d], float32 [N, N].

    They stay the same when the units of the embeddings are renumbered or rotated, so encoders of different seeds and
    widths can be compared by them.

    >>> similarities(torch.tensor([[2.0, 0.0], [0.0, 3.0]])).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    unit = functional.normalize(embedded, dim=1)
    return unit @ unit.T


def agreement(found: Tensor, wanted: Tensor) -> Outcomes:
    """How far the nearest neighbours by one set of similarities are those by another.

    Args:
        found, wanted: similarities [N, N], N > 1.

    Returns:
        For each sample how many of its NEIGHBOURS (fewer where there are fewer others) nearest ones are the same:
        `figures["accuracy"]` is their share. Its loss is the squared difference of the similarities, a mean over all.
    """
    count = min(NEIGHBOURS, len(found) - 1)
    near = [_nearest(matrix, count) for matrix in (found, wanted)]
    same = torch.stack([torch.isin(ours, theirs).sum() for ours, theirs in zip(*near, strict=True)])
    apart = (found - wanted).square().mean(1) * count
    return Outcomes(torch.stack([apart, torch.full_like(apart, count), same.to(apart)], 1))


def probe(fitted: tuple[Tensor, Tensor], tested: tuple[Tensor, Tensor]) -> float:
    """The accuracy, in [0, 1], of a logistic regression on standardised embeddings.

    Args:
        fitted, tested: embeddings [N, d] and classes [N], to fit it to and to test it on.
    """
    mean, spread = fitted[0].mean(0), fitted[0].std(0).clamp_min(1e-6)
    (x, y), (z, truth) = ((((values - mean) / spread).numpy(), classes.numpy()) for values, classes in (fitted, tested))
    model = LogisticRegression(max_iter=1000, C=0.1).fit(x, y)
    return float(np.mean(model.predict(z) == truth))


def _nearest(matrix: Tensor, count: int) -> Tensor:
    """For each sample, the numbers of its most similar others, [N, count]."""
    others = matrix.clone().fill_diagonal_(-torch.inf)
    return others.topk(count, dim=1).indices
