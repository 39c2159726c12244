"""`fuse.py --compare`: what stands beside the fused model, other presets and what their owner could do instead."""

from collections.abc import Sequence
from pathlib import Path

from fusionpl.errors import FusionError, nearest
from fusionpl.fusion.config import FuseConfig, load_config
from fusionpl.presets import preset, presets

DISTILLED, TRAINED_ON = "distilled", "trained-on"
ALTERNATIVES = (DISTILLED, TRAINED_ON)


def compared(words: Sequence[str]) -> tuple[dict[str, FuseConfig], list[str]]:
    """What `--compare` names: row -> configuration of a preset, and alternatives.

    Raises:
        FusionError: it is neither an alternative nor a file, or the file is no preset.
    """
    configs = {}
    for word in words:
        if word in ALTERNATIVES:
            continue
        known = [*ALTERNATIVES, *presets("fuse")]
        if word not in known and not Path(word).is_file():
            raise FusionError(
                f"--compare: there is no '{word}'{nearest(word, known)}; use {', '.join(known)}, or a file of your own"
            )
        file = preset("fuse", word)
        configs[f"fused ({file.stem})"] = load_config(file)
    return configs, [name for name in ALTERNATIVES if name in words]
