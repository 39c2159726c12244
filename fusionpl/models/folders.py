"""Model folders: where they are, and what their config.json says."""

import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fusionpl.errors import FusionError, reason
from fusionpl.models.adapters import adapter_beside, base_of, class_with_head, is_adapter
from fusionpl.models.hub import download, hub_id

HEAD = "model-"  # what the folder of a model is called that has one of several heads, before its name


def model_folder(source: str, *, allow_pickle: bool = False, weights: bool = True) -> Path:
    """The folder with a model's files; what a hub id names is downloaded.

    Args:
        source, allow_pickle: see `load_model`.
        weights: whether weights are wanted, or configuration and tokenizer alone.

    Raises:
        FusionError: see `load_model`.
    """
    path = Path(source).expanduser()
    if (path / "model").is_dir():
        return path / "model"
    if path.is_dir():
        if heads := [] if (path / "config.json").is_file() else list(heads_in(path).values()):
            raise FusionError(
                f"{path} holds a model for each parent, {', '.join(head.name for head in heads)}; give one of them, as "
                f"{heads[0]}, or load all with fusionpl.load_models"
            )
        return path
    if path.exists():
        raise FusionError(f"{path} is a file; give the folder that holds config.json and model.safetensors")
    hub = hub_id(source)
    if hub is None:
        raise FusionError(f"no model at {path}; {_siblings(path)}")
    return download(hub, allow_pickle=allow_pickle, weights=weights)


def heads_in(run: Path) -> dict[str, Path]:
    """The models of a fusion with `labels: separate` in a run folder: name -> folder."""
    files = sorted(run.glob(f"{HEAD}*/config.json"))
    return {file.parent.name.removeprefix(HEAD): file.parent for file in files}


def head_name(name: str, taken: Iterable[str]) -> str:
    """A name that a folder can have, and that none has which is taken, in capitals or not.

    >>> head_name("SST 2/a", []), head_name("A", ["a"])
    ('SST-2-a', 'A-2')
    """
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "head"
    others = {one.casefold() for one in taken}
    numbered = (f"{plain}-{number}" for number in range(2, len(others) + 3))
    return plain if plain.casefold() not in others else next(one for one in numbered if one.casefold() not in others)


def check_there(sources: Iterable[str]) -> None:
    """Raises FusionError where nothing is at a path; what may be on the hub is asked for when it is read."""
    for source in sources:
        if hub_id(source) is None:
            model_folder(source)


def base_folder(folder: Path, *, allow_pickle: bool = False, weights: bool = True) -> Path:
    """The folder of the model that an adapter was trained on.

    Args:
        folder: the folder of the adapter.
        allow_pickle, weights: see `model_folder`.

    Raises:
        FusionError: there is no such model, or it is an adapter itself.
    """
    try:
        base = model_folder(base_of(folder), allow_pickle=allow_pickle, weights=weights)
    except FusionError as error:
        raise FusionError(f"the base of the adapter in {folder}: {error}") from error
    if is_adapter(base):
        raise FusionError(f"the base of the adapter in {folder} is an adapter itself, {base}; merge that first")
    return base


def model_config(folder: Path) -> dict[str, Any]:
    """What config.json says; for an adapter its base's, with the class for the head that the adapter brings.

    Raises:
        FusionError: it is missing, damaged, or names no architecture.
    """
    if is_adapter(folder):
        config = model_config(base_folder(folder, weights=False))
        name = class_with_head(folder, config)
        return config | {"architectures": [name]} if name else config
    file = folder / "config.json"
    if not file.is_file():
        unfinished = (folder / "checkpoints").is_dir()
        hint = "the run did not finish, continue it with --resume" if unfinished else "is this a model folder?"
        raise FusionError(f"{folder} has no config.json; {hint}")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise FusionError(f"{file} is damaged: {reason(error)}") from error
    if not isinstance(config, dict) or not ("architecture" in config or config.get("architectures")):
        raise FusionError(f"{file} names no architecture, so it is neither a timm nor a transformers config")
    return config


def tell_of_adapter(folder: Path) -> None:
    """Warns of an adapter beside a whole model, once."""
    if (line := adapter_beside(folder)) is not None:
        warnings.warn(line, stacklevel=1)


def _siblings(path: Path) -> str:
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    folders = sorted(
        {file.parent for pattern in ("*", "*/*", "*/*/*") for file in parent.glob(f"{pattern}/config.json")}
    )
    runs = [folder.parent if folder.name == "model" else folder for folder in folders]
    names = ", ".join(str(run.relative_to(parent)) for run in runs[:10])
    return f"under {parent} there are: {names}" if names else f"there are none under {parent}"
