"""Sentence encoders: what sentence-transformers keeps beside an encoder, its pooling and normalising modules."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from fusionpl.calibration.embeddings import Pooling
from fusionpl.errors import FusionError, reason

MODULES = "modules.json"
SETTINGS = (MODULES, "sentence_bert_config.json", "config_sentence_transformers.json")
_DIMENSIONS = ("embedding_dimension", "word_embedding_dimension")  # before version 6 the second one
_WITHOUT_WEIGHTS = ("Transformer", "Pooling", "Normalize")


def sentence_pooling(folder: Path) -> Pooling | None:
    """How a sentence encoder pools its tokens; None where the folder says nothing of it.

    Raises:
        FusionError: its files are damaged; it pools in another way than `Pooling` knows; it has a module with weights
            of its own.
    """
    pooling: Pooling | None = None
    for module in _modules(folder):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in _WITHOUT_WEIGHTS:
            raise FusionError(
                f"{folder}: behind the encoder stands a {kind} with weights of its own, which is not fused; take it "
                f"out of {MODULES}, or fuse encoders without one"
            )
        if kind == "Pooling":
            pooling = _mode(folder / str(module["path"]) / "config.json")
    return pooling


def check_pooling(poolings: Mapping[str, Pooling | None]) -> None:
    """Raises FusionError where parents (name -> how it pools) pool their tokens differently; names two of them."""
    (first, reference), *others = poolings.items()
    for name, pooling in others:
        if pooling != reference:
            raise FusionError(
                f"parents of different pooling: {first} takes {reference or 'none'}, {name} takes {pooling or 'none'}; "
                "say with --data.pooling which one the fused encoder is meant for"
            )


def copy_modules(source: Path, target: Path, width: int) -> None:
    """Puts the modules beside an encoder into another model folder.

    Args:
        source, target: model folders; nothing happens where the first one has no such modules.
        width: of the embeddings in the second one.
    """
    modules = _modules(source)
    for name in SETTINGS if modules else ():
        if (source / name).is_file():
            shutil.copy(source / name, target)
    for module in modules:
        part = str(module.get("path", ""))
        if part and (source / part).is_dir() and (source / part).resolve().parent == source.resolve():
            (target / part).mkdir(exist_ok=True)
            file = source / part / "config.json"
            if file.is_file():
                settings = _read(file)
                settings |= {name: width for name in _DIMENSIONS if name in settings}
                (target / part / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def width_of(model: Any) -> int:
    """The number of units of an encoder's hidden states; 0 where its configuration doesn't say, as of timm's."""
    return int(getattr(getattr(model, "config", None), "hidden_size", 0) or 0)


def _modules(folder: Path) -> list[dict[str, Any]]:
    file = folder / MODULES
    modules = _read(file) if file.is_file() else []
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise FusionError(f"{file} is damaged: it holds no list of modules; copy the model again")
    return modules


def _mode(file: Path) -> Pooling:
    settings = _read(file)
    flags = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    named = [key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for key in flags]
    mode = settings.get("pooling_mode", named[0] if len(named) == 1 else named)
    for known in get_args(Pooling):
        if mode == known:
            return known  # type: ignore[no-any-return]
    raise FusionError(f"{file}: pooling by {mode} is not known here; use {', '.join(get_args(Pooling))}")


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise FusionError(f"{file} can't be read ({reason(error)}); copy the model again") from error
