"""Models from a run folder, a timm or transformers folder, or a hub id."""

import json
import re
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import safetensors.torch
import timm
from safetensors import SafetensorError
from torch import Tensor, nn

from fusionpl.errors import FusionError
from fusionpl.models.build import transformers_class
from fusionpl.models.quiet import quiet_transformers

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_FILES = ["*.json", "*.safetensors", "*.txt"]


def load_model(source: str | Path) -> nn.Module:
    """Loads a model in evaluation mode. Only safetensors are read: nothing is unpickled, no remote code runs.

    Args:
        source: a run folder (its `model/` is taken), a folder in timm's or transformers' layout, or the id of
            such a model on the hub.

    Returns:
        The model, on the CPU, in float32.

    Raises:
        FusionError: names the path and what is wrong with it: no such folder (lists the models beside it), no
            config.json or model.safetensors, a damaged file, tensors that do not fit the config.
    """
    folder = model_folder(str(source))
    config = _config(folder)
    model = _load_timm(folder, config) if "architecture" in config else _load_transformers(folder, config)
    return model.float().eval()


def model_folder(source: str) -> Path:
    """The folder with a model's files; a hub id is downloaded. Raises FusionError as `load_model` does."""
    path = Path(source).expanduser()
    if (path / "model").is_dir():
        return path / "model"
    if path.is_dir():
        return path
    if path.exists():
        raise FusionError(f"{path} is a file; give the folder that holds config.json and model.safetensors")
    if not HUB_ID.fullmatch(source) or (path.parent != Path(".") and path.parent.is_dir()):
        raise FusionError(f"no model at {path}; {_siblings(path)}")
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FusionError(f"'{source}' is neither a folder nor a model the hub gives out: {reason}") from error


def _siblings(path: Path) -> str:
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    found = sorted({file.parent for pattern in ("*", "*/*", "*/*/*") for file in parent.glob(f"{pattern}/config.json")})
    runs = [folder.parent if folder.name == "model" else folder for folder in found]
    names = ", ".join(str(run.relative_to(parent)) for run in runs[:10])
    return f"under {parent} there are: {names}" if names else f"there are none under {parent}"


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        unfinished = (folder / "checkpoints").is_dir()
        hint = "the run did not finish, continue it with --resume" if unfinished else "is this a model folder?"
        raise FusionError(f"{folder} has no config.json; {hint}")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise FusionError(f"{file} is damaged: {error}") from error
    if not isinstance(config, dict) or not ("architecture" in config or config.get("architectures")):
        raise FusionError(f"{file} names no architecture, so it is neither a timm nor a transformers config")
    return cast(dict[str, Any], config)


def _state(folder: Path) -> dict[str, Tensor]:
    """The tensors of every safetensors file in `folder`; reading them all finds damage before a library does."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        pickles = sorted(file.name for suffix in ("bin", "pth", "pt", "ckpt") for file in folder.glob(f"*.{suffix}"))
        note = f"; {pickles[0]} is a pickle, which is never read" if pickles else ""
        raise FusionError(f"{folder} has no model.safetensors{note}")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= safetensors.torch.load_file(file)
        except (SafetensorError, OSError) as error:
            raise FusionError(f"{file} is truncated or damaged ({error}); copy or train it again") from error
    return state


def _load_timm(folder: Path, config: dict[str, Any]) -> nn.Module:
    state = _state(folder)
    try:
        model: nn.Module = timm.create_model(f"local-dir:{folder}")
    except Exception as error:  # whatever a broken config makes a constructor raise
        raise FusionError(f"{folder}/config.json: timm cannot build {config['architecture']}: {error}") from error
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | state.keys()):
        if name not in state:
            raise FusionError(f"{folder}/model.safetensors lacks {name}")
        if name not in wanted:
            raise FusionError(f"{folder}/model.safetensors holds {name}, which {config['architecture']} has not")
        if state[name].shape != wanted[name].shape:
            raise _misfit(folder, name, state[name].shape, wanted[name].shape)
    model.load_state_dict(state)
    return model


def _load_transformers(folder: Path, config: dict[str, Any]) -> nn.Module:
    cls: Any = transformers_class(config["architectures"][0])
    _state(folder)
    try:
        with quiet_transformers():
            model, info = cls.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # whatever a broken config makes a constructor raise
        raise FusionError(f"{folder}: transformers cannot load it: {error}") from error
    for name, held, wanted in sorted(info["mismatched_keys"]):
        raise _misfit(folder, name, held, wanted)
    for name in sorted(info["missing_keys"]):
        raise FusionError(f"{folder}/model.safetensors lacks {name}")
    return cast(nn.Module, model)


def _misfit(folder: Path, name: str, held: Any, wanted: Any) -> FusionError:
    return FusionError(f"{folder}/model.safetensors: {name} is {tuple(held)}, but by config.json it is {tuple(wanted)}")
