"""Whole models from a run folder, a timm or transformers folder, or a hub id."""

from pathlib import Path
from typing import Any, cast

from torch import nn

from fusionpl.errors import FusionError, reason
from fusionpl.families import with_parameters
from fusionpl.models.build import transformers_class
from fusionpl.models.folders import left_out, misfit, model_config, model_folder, open_model
from fusionpl.models.quiet import quiet_transformers, without_cache
from fusionpl.models.tensors import Tensors


def load_model(source: str | Path, *, allow_pickle: bool = False) -> nn.Module:
    """Loads a model in evaluation mode. Safetensors are read: nothing is unpickled, no remote code runs.

    Args:
        source: a run folder (its `model/` is taken), a folder in timm's or transformers' layout, or such a model on the
            hub: `org/name`, or `org/name@revision` (a branch, a tag, a commit, `refs/pr/1`).
        allow_pickle: whether `torch.load(weights_only=True)` may read pytorch_model.bin where there are no safetensors.

    Returns:
        The model, on the CPU, in float32.

    Raises:
        FusionError: names the path and what is wrong with it: no such folder (lists the models beside it), no
            config.json or model.safetensors, a damaged file, tensors that do not fit the config; a repository or
            revision that is not there or holds no weights (lists the revisions that do).
    """
    folder = model_folder(str(source), allow_pickle=allow_pickle)
    if "architecture" not in model_config(folder):
        return _load_transformers(folder, allow_pickle)
    opened = open_model(folder, allow_pickle=allow_pickle)
    assert opened is not None  # timm renames nothing
    state = {name: opened.read(name) for name, _ in opened.module.named_parameters()}
    return with_parameters(opened.module, state).float().eval()


def _load_transformers(folder: Path, allow_pickle: bool) -> nn.Module:
    cls: Any = transformers_class(model_config(folder)["architectures"][0])
    tensors = Tensors(folder, allow_pickle=allow_pickle)  # finds damage before the library does
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, **left_out(cls, tensors)}
    try:
        with quiet_transformers():
            if tensors.pickled:
                config = cls.config_class.from_pretrained(folder)
                model, info = cls.from_pretrained(None, config=config, state_dict=dict(tensors), **options)
            else:
                model, info = cls.from_pretrained(folder, use_safetensors=True, local_files_only=True, **options)
    except Exception as error:  # whatever a broken config makes a constructor raise
        raise FusionError(f"{folder}: transformers cannot load it: {reason(error)}") from error
    for name, held, wanted in sorted(info["mismatched_keys"]):
        raise misfit(tensors.source, name, held, wanted)
    for name in sorted(info["missing_keys"]):
        raise FusionError(f"{tensors.source} lacks {name}")
    without_cache(model)
    return cast(nn.Module, model).float().eval()
