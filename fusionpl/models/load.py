"""Whole models from a run folder, a timm or transformers folder, or a hub id."""

from collections.abc import Set
from pathlib import Path
from typing import Any, cast

from torch import nn

from fusionpl.errors import FusionError, reason
from fusionpl.families.apply import with_parameters
from fusionpl.models.adapters import CONFIG, check_mergeable, given_by, is_adapter, labels_of, merged
from fusionpl.models.build import transformers_class
from fusionpl.models.folders import base_folder, model_config, model_folder, tell_of_adapter
from fusionpl.models.layouts import ADAPTERS
from fusionpl.models.opened import check_numbers, left_out, misfit, open_model
from fusionpl.models.quiet import quiet_transformers, without_cache
from fusionpl.models.tensors import Tensors


def load_model(source: str | Path, *, allow_pickle: bool = False) -> nn.Module:
    """Loads a model in evaluation mode. Safetensors are read: nothing is unpickled, no remote code runs.

    Args:
        source: a run folder (its `model/` is taken), a folder in timm's or transformers' layout, one with an adapter of
            peft, which is merged into its base, or such a model on the hub: `org/name`, or `org/name@revision` (a
            branch, a tag, a commit, `refs/pr/1`).
        allow_pickle: whether `torch.load(weights_only=True)` may read pytorch_model.bin where there are no safetensors.

    Returns:
        The model, on the CPU, in float32.

    Raises:
        FusionError: names the path and what is wrong with it: no such folder (lists the models beside it), no
            config.json or model.safetensors, a damaged file, tensors that do not fit the config; a repository or
            revision that is not there or holds no weights (lists the revisions that do); an adapter without peft,
            without its base, or that does not fit it.
    """
    folder = model_folder(str(source), allow_pickle=allow_pickle)
    if is_adapter(folder):
        return _load_adapter(folder, allow_pickle)
    tell_of_adapter(folder)
    if "architecture" not in model_config(folder):
        return _load_transformers(folder, allow_pickle)
    opened = open_model(folder, allow_pickle=allow_pickle)
    assert opened is not None  # timm renames nothing
    state = {name: opened.read(name) for name, _ in opened.module.named_parameters()}
    return with_parameters(opened.module, state).float().eval()


def _load_adapter(folder: Path, allow_pickle: bool) -> nn.Module:
    check_mergeable(folder)
    tensors = Tensors(folder, allow_pickle=allow_pickle, layouts=ADAPTERS)
    base = base_folder(folder, allow_pickle=allow_pickle)
    if "architecture" in model_config(base):
        model = load_model(base, allow_pickle=allow_pickle)
    else:
        name = model_config(folder)["architectures"][0]
        model = _load_transformers(base, allow_pickle, name, labels_of(tensors), given_by(tensors).keys())
    return merged(folder, model, tensors).eval()


def _load_transformers(
    folder: Path, allow_pickle: bool, name: str | None = None, labels: int | None = None, given: Set[str] = frozenset()
) -> nn.Module:
    """Reads a folder by its own library.

    Args:
        folder, allow_pickle: see `load_model`.
        name: of the class; by default what config.json names.
        labels: the number of labels, where it is not what config.json says.
        given: parameters that come from elsewhere afterwards.
    """
    cls: Any = transformers_class(name or model_config(folder)["architectures"][0])
    tensors = Tensors(folder, allow_pickle=allow_pickle)  # finds damage before the library does
    if "quantization_config" not in model_config(folder):
        check_numbers(tensors)
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, **left_out(cls, tensors)}
    try:
        config = cls.config_class.from_pretrained(folder, local_files_only=True)
        if labels is not None and labels != config.num_labels:
            config.num_labels = labels
        with quiet_transformers():
            # From a folder transformers would apply an adapter beside the model, where peft is installed.
            if tensors.pickled or (folder / CONFIG).is_file():
                model, info = cls.from_pretrained(None, config=config, state_dict=dict(tensors), **options)
            else:
                model, info = cls.from_pretrained(
                    folder, config=config, use_safetensors=True, local_files_only=True, **options
                )
    except Exception as error:  # whatever a broken config makes a constructor raise
        raise FusionError(f"{folder}: transformers cannot load it: {reason(error)}") from error
    for key, held, wanted in sorted(info["mismatched_keys"]):
        if key not in given:
            raise misfit(tensors.source, key, held, wanted)
    for key in sorted(info["missing_keys"] - given):
        raise FusionError(f"{tensors.source} lacks {key}")
    for key, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.dtype.itemsize == 1:
            raise FusionError(f"{folder}: {key} stays quantised as transformers loads it; dequantise the model first")
    without_cache(model)
    return cast(nn.Module, model).float().eval()
