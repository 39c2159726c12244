"""Accuracy and loss of one model, or of several whose probabilities are averaged."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef

from fusionpl.calibration import device_of, eval_mode, logits
from fusionpl.datamodules import IGNORED
from fusionpl.errors import FusionError


def evaluate(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Measures a classifier or a masked language model.

    Args:
        model: a timm or transformers model, on any device, in either mode (which it keeps).
        batches: mappings of model inputs and `labels`, [B] classes or [B, T] tokens (-100 is not scored).

    Returns:
        Of a regression (labels [B] of floating point) `pearson`, `spearman` and `loss`, the mean squared error. Else
        `accuracy` in [0, 1] and `loss` (mean cross-entropy, nats) over all scored labels; for tokens also
        `perplexity` = exp(loss). NaN outputs give a NaN loss. Ranks are not combined: under DDP every
        process measures the batches it was given.

    Raises:
        FusionError: there is no batch, or a batch has no labels.
    """
    return evaluate_ensemble([model], batches)


@torch.inference_mode()
def evaluate_ensemble(models: Sequence[nn.Module], batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Measures the mean of the models' predicted probabilities; see `evaluate` for the rest."""
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise FusionError("cannot evaluate: there are no batches (an empty data set, or a used-up iterator)")
    batches = itertools.chain([first], batches)
    if "labels" in first and first["labels"].is_floating_point():
        return _evaluate_regression(models, batches)
    device = device_of(models[0])
    loss = torch.zeros((), device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    accuracy: MulticlassAccuracy | None = None
    of_tokens = False
    with eval_mode(*models):
        for batch in batches:
            if "labels" not in batch:
                raise FusionError(f"cannot evaluate: a batch has no 'labels', only {sorted(batch)}")
            labels = batch["labels"].to(device)
            of_tokens = labels.ndim > 1
            scores = _log_probabilities(models, batch).flatten(0, -2)
            labels = labels.flatten()
            if accuracy is None:
                # Filtering ignored labels and validating both wait for the device: only where needed.
                accuracy = MulticlassAccuracy(
                    scores.shape[-1],
                    average="micro",
                    ignore_index=IGNORED if of_tokens else None,
                    validate_args=False,
                    sync_on_compute=False,
                ).to(device)
            accuracy.update(scores, labels)
            loss += cross_entropy(scores, labels, ignore_index=IGNORED, reduction="sum")
            count += (labels != IGNORED).sum()
    assert accuracy is not None
    result = {"accuracy": accuracy.compute().item(), "loss": (loss / count).item()}
    if of_tokens:
        result["perplexity"] = math.exp(result["loss"]) if result["loss"] < 700 else math.inf
    return result


def _evaluate_regression(models: Sequence[nn.Module], batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    predictions, labels = [], []
    with eval_mode(*models):
        for batch in batches:
            found = torch.stack([logits(model, batch).float().squeeze(-1).cpu() for model in models])
            predictions.append(found.mean(0))
            labels.append(batch["labels"].float().cpu())
    values, wanted = torch.cat(predictions), torch.cat(labels)
    return {
        "pearson": float(pearson_corrcoef(values, wanted)),
        "spearman": float(spearman_corrcoef(values, wanted)),
        "loss": float(mse_loss(values, wanted)),
    }


def _log_probabilities(models: Sequence[nn.Module], batch: Mapping[str, Any]) -> Tensor:
    """The log of the mean probability over models, [B, classes] or [B, T, vocabulary], float32."""
    first, *others = (logits(model, batch).float().log_softmax(-1) for model in models)
    for other in others:
        first = torch.logaddexp(first, other.to(first.device))
    return first - math.log(len(models))
