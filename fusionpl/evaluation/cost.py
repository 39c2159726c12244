"""What a model costs: parameters and floating-point operations."""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fusionpl.calibration.forward import Batch, eval_mode, inputs_of, logits


def parameters(model: nn.Module) -> int:
    """The number of parameters; a tensor that two modules share counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model: nn.Module, batch: Batch) -> int:
    """Floating-point operations of one forward pass on ONE sample (a multiply-add is two).

    Counted by `torch.utils.flop_counter`: matrix products and convolutions, no elementwise operations.

    Args:
        model: a timm or transformers model; its mode is kept.
        batch: a batch as `logits` takes it, of at least one sample; the first one is used.
    """
    sample = {key: value[:1] for key, value in inputs_of(batch).items()}
    # The plain attention kernel, so that every device counts the same operations.
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), eval_mode(model), sdpa_kernel(SDPBackend.MATH), counter:
        logits(model, sample)
    return counter.get_total_flops()
