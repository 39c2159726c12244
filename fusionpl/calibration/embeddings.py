"""One embedding a sample, of encoders without a head."""

from typing import Literal

import torch
from torch import Tensor, nn

from fusionpl.calibration.forward import Batch, logits

Pooling = Literal["mean", "cls", "max", "lasttoken"]


def embed(model: nn.Module, batch: Batch, pooling: Pooling) -> Tensor:
    """The embeddings of a batch.

    Args:
        model: an encoder without a head, of either library.
        batch: an image tensor [B, C, H, W], or a mapping of model inputs, with an `attention_mask` [B, T] where some
            tokens are padding.
        pooling: how the hidden states of the tokens become one, as sentence-transformers names it: their mean, the
            first one, the largest value of each unit, or the last one. A timm model has pooled them already.

    Returns:
        Float32 [B, d].
    """
    states = logits(model, batch).float()
    if states.ndim == 2:
        return states
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    real = torch.ones(states.shape[:2]) if mask is None else mask
    real = real.to(states)[..., None]
    match pooling:
        case "mean":
            return (states * real).sum(1) / real.sum(1).clamp_min(1)
        case "cls":
            return states[:, 0]
        case "max":
            return states.masked_fill(real == 0, -torch.inf).amax(1)
    places = (real[..., 0] * torch.arange(states.shape[1], device=states.device)).argmax(1)
    return states[torch.arange(len(states), device=states.device), places]
