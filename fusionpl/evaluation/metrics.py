"""Accuracy and loss of one model, or of several whose probabilities are averaged."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.functional.classification import binary_f1_score
from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef

from fusionpl.calibration.forward import device_of, eval_mode, logits
from fusionpl.errors import FusionError
from fusionpl.evaluation.outcomes import Outcomes, are_tags, scored
from fusionpl.fusion.answers import log_odds


def evaluate(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Measures a classifier or a masked language model.

    Args:
        model: a timm or transformers model, on any device, in either mode (which it keeps).
        batches: mappings of model inputs and `labels`, [B] classes or [B, T] tokens (-100 is not scored).

    Returns:
        Of a regression (labels [B] of floating point) `pearson`, `spearman` and `loss`, the mean squared error. Of tags
        (labels [B, tags] of floating point, 1 where they hold) `accuracy` and `loss` over all of them, the binary
        cross-entropy, and `f1`, the micro average, of those more probable than one half. Else
        `accuracy` in [0, 1] and `loss` (mean cross-entropy, nats) over all scored labels; for tokens also
        `perplexity` = exp(loss). NaN outputs give a NaN loss. Ranks are not combined: under DDP every
        process measures the batches it was given.

    Raises:
        FusionError: there is no batch, or a batch has no labels.
    """
    return evaluate_ensemble([model], batches)


def evaluate_ensemble(models: Sequence[nn.Module], batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Measures the mean of the models' predicted probabilities; see `evaluate` for the rest."""
    return evaluate_samples(models, batches)[0]


@torch.inference_mode()
def evaluate_samples(
    models: Sequence[nn.Module], batches: Iterable[Mapping[str, Any]]
) -> tuple[dict[str, float], Outcomes]:
    """What `evaluate_ensemble` measures, and what the models did on each sample."""
    values, predictions, targets = [], [], []
    of_tokens = False
    with eval_mode(*models):
        for batch in batches:
            if "labels" not in batch:
                raise FusionError(f"cannot evaluate: a batch has no 'labels', only {sorted(batch)}")
            labels = batch["labels"].to(device_of(models[0]))
            of_tokens = labels.ndim > 1 and not labels.is_floating_point()
            output = together(models, batch, labels)
            values.append(scored(output, labels))
            if labels.is_floating_point():
                predictions.append(output if are_tags(labels) else output.squeeze(-1))
                targets.append(labels)
    if not values:
        raise FusionError("cannot evaluate: there are no batches (an empty data set, or a used-up iterator)")
    outcomes = Outcomes(torch.cat(values).cpu())
    figures = outcomes.figures
    if predictions:
        figures = {**_of_floats(torch.cat(predictions).cpu(), torch.cat(targets).cpu().float()), **figures}
    return with_perplexity(figures) if of_tokens else figures, outcomes


def with_perplexity(figures: dict[str, float]) -> dict[str, float]:
    """The figures of predicted tokens with exp(loss)."""
    return figures | {"perplexity": math.exp(figures["loss"]) if figures["loss"] < 700 else math.inf}


def _of_floats(predicted: Tensor, wanted: Tensor) -> dict[str, float]:
    """The figures of all samples together: of tags [N, tags] or of numbers [N]."""
    if are_tags(wanted):
        return {"f1": float(binary_f1_score(predicted.flatten(), wanted.flatten().int(), threshold=0.5))}
    correlations = {"pearson": pearson_corrcoef, "spearman": spearman_corrcoef}
    return {name: float(of(predicted, wanted)) for name, of in correlations.items()}


def together(models: Sequence[nn.Module], batch: Mapping[str, Any], labels: Tensor) -> Tensor:
    """What models say together: the mean number [B, 1], the log-odds of the mean probability of tags [B, tags], or else
    the log of the mean probability, [B, classes] or [B, T, vocabulary]; float32."""
    if not labels.is_floating_point():
        return _log_probabilities(models, batch)
    first, *others = (logits(model, batch).float() for model in models)
    each = [first, *(other.to(first.device) for other in others)]
    return log_odds(each, [1 / len(each)] * len(each)) if are_tags(labels) else torch.stack(each).mean(0)


def _log_probabilities(models: Sequence[nn.Module], batch: Mapping[str, Any]) -> Tensor:
    """The log of the mean probability over models, [B, classes] or [B, T, vocabulary], float32."""
    each = [logits(model, batch).float().log_softmax(-1) for model in models]
    widest = max(scores.shape[-1] for scores in each)
    # Vocabularies that are padded to different sizes are one but for their padding, which nothing is likely to be.
    first, *others = (functional.pad(scores, (0, widest - scores.shape[-1]), value=-math.inf) for scores in each)
    for other in others:
        first = torch.logaddexp(first, other.to(first.device))
    return first - math.log(len(models))
