"""What libraries do unasked, switched off: progress bars for work of milliseconds, caches for one forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.utils import logging


def without_cache(model: nn.Module) -> None:
    """Lets a language model's forward pass keep no keys and values; `generate` has its own setting, and still does."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switches transformers' progress bars off, and back on if they were."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
