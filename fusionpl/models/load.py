"""Whole models from a run folder, a timm or transformers folder, or a hub id."""

from pathlib import Path
from typing import Any, cast

from torch import nn

from fusionpl.errors import FusionError
from fusionpl.families import with_parameters
from fusionpl.models.build import transformers_class
from fusionpl.models.folders import misfit, model_config, model_folder, open_model
from fusionpl.models.quiet import quiet_transformers, without_cache
from fusionpl.models.tensors import Tensors


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
    if "architecture" not in model_config(folder):
        return _load_transformers(folder)
    opened = open_model(folder)
    assert opened is not None  # timm renames nothing
    state = {name: opened.read(name) for name, _ in opened.module.named_parameters()}
    return with_parameters(opened.module, state).float().eval()


def _load_transformers(folder: Path) -> nn.Module:
    cls: Any = transformers_class(model_config(folder)["architectures"][0])
    Tensors(folder)  # finds damage before the library does
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
        raise misfit(folder, name, held, wanted)
    for name in sorted(info["missing_keys"]):
        raise FusionError(f"{folder}/model.safetensors lacks {name}")
    without_cache(model)
    return cast(nn.Module, model).float().eval()
