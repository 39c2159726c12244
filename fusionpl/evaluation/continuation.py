"""How a language model goes on with a prompt: what a loss means, for people to read."""

from typing import Any

import torch
from torch import Tensor, nn

from fusionpl.calibration.forward import device_of, eval_mode
from fusionpl.errors import FusionError

NEW_TOKENS = 20


def continuation(model: nn.Module, tokenizer: Any, prompt: Tensor, tokens: int = NEW_TOKENS) -> str:
    """The text that a causal language model puts behind a prompt, taking the likeliest token each time.

    Args:
        model: of transformers, on any device; its mode is kept.
        tokenizer: that of the model.
        prompt: token numbers, int64 [T].
        tokens: at most so many new ones, fewer where the text ends or the model has no more positions.

    Raises:
        FusionError: the model can't generate.
    """
    whole: Any = model
    if not (hasattr(model, "can_generate") and whole.can_generate()):
        raise FusionError(f"a {type(model).__name__} can't go on with a text; it is no language model of transformers")
    ids = prompt.to(device_of(model))[None]
    positions = getattr(whole.config, "max_position_embeddings", None) or len(prompt) + tokens
    new = min(tokens, positions - len(prompt))
    if new < 1:
        return ""
    with torch.no_grad(), eval_mode(model):
        output = whole.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, num_beams=1,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
    return str(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
