"""Which tokens of a sequence of activations count as evidence."""

import math

import torch
from torch import Tensor

from fusionpl.errors import FusionError


def select(activations: Tensor, tokens: str, mask: Tensor | None = None) -> Tensor:
    """The rows of evidence in a batch of activations.

    Args:
        activations: [B, T, n] from a sequence, [B, n] from a pooled vector, or [B, n, h, w] from the patch
            convolution, whose patches are never filtered (there is no class token among them), only averaged.
        tokens: `all`, `class`, `mean` or `window:N`.
        mask: [B, T], 1 for real tokens, 0 for padding, which never counts; None for no padding.

    Returns:
        [rows, n].

    Raises:
        FusionError: a window over tokens that are not a square grid behind one class token, or larger than it.
    """
    if activations.ndim == 2:
        return activations
    patches = activations.ndim == 4
    if patches:
        activations = activations.flatten(2).transpose(1, 2)
    if tokens == "mean":
        if mask is None:
            return activations.mean(1)
        weight = mask.to(activations).unsqueeze(-1)
        return (activations * weight).sum(1) / weight.sum(1)
    if tokens.startswith("window:") and mask is not None:
        raise FusionError(f"calibration.tokens {tokens} is for images, not for padded text; use all, class or mean")
    if tokens.startswith("window:") and not patches:
        activations = activations[:, window(activations.shape[1], tokens)]
    elif tokens == "class" and not patches:
        activations = activations[:, :1]
    elif mask is not None:
        return activations[mask.to(activations.device).bool()]
    return activations.flatten(0, 1)


def window(length: int, tokens: str) -> Tensor:
    """The places, among `length` tokens, that `tokens`, which is `window:N`, means: the class token and N x N patches.

    Raises:
        FusionError: there is no such grid.
    """
    n, side = int(tokens.partition(":")[2]), math.isqrt(length - 1)
    if side * side != length - 1 or n > side:
        raise FusionError(
            f"calibration.tokens window:{n} needs a class token and a square grid of at least {n} x {n} patches, "
            f"not {length} tokens; use calibration.tokens all"
        )
    start = (side - n) // 2
    grid = torch.arange(side * side).view(side, side)[start : start + n, start : start + n]
    return torch.cat([torch.zeros(1, dtype=torch.long), 1 + grid.flatten()])
