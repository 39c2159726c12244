"""Adapters of peft: a folder with one is read as its base, with the adapter merged in."""

import importlib.util
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fusionpl.errors import FusionError, reason
from fusionpl.models.layouts import ADAPTERS, PICKLES, SAFETENSORS

if TYPE_CHECKING:
    from torch import nn

    from fusionpl.models.tensors import Tensors

CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."  # of all names in an adapter's file
_HEAD = re.compile(r"\.(classifier|score)(\.out_proj)?\.weight")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no whole model that it lies beside."""
    names = [file.name for file in folder.glob("*")]
    if CONFIG not in names or any(layout.held(names) for layout in (SAFETENSORS, PICKLES)):
        return False
    # Some trainers leave the base's config.json; of a whole model whose weights are not wanted the hub gives no more.
    return "config.json" not in names or any(layout.held(names) for layout in ADAPTERS)


def adapter_settings(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says. Raises FusionError where it is damaged or names no base."""
    file = folder / CONFIG
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FusionError(f"{file} is damaged: {reason(error)}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("base_model_name_or_path"), str):
        raise FusionError(f"{file} names no base; set base_model_name_or_path to the model that it was trained on")
    return settings


def base_of(folder: Path) -> str:
    """The model that an adapter was trained on, as `load_model` takes it; a path may start at the adapter's folder."""
    settings = adapter_settings(folder)
    name, revision = settings["base_model_name_or_path"], settings.get("revision")
    places = [Path(name).expanduser(), folder / name]
    # Something else may bear the name where the command is run.
    of_models = [place for place in places if (place / "config.json").is_file() or (place / "model").is_dir()]
    for place in (*of_models, *places):
        if place.exists():
            return str(place)
    return f"{name}@{revision}" if revision else str(name)


def class_with_head(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The class for the head that an adapter brings; None where it brings none, or for an unknown architecture.

    Args:
        folder: the folder of the adapter.
        config: what the base's config.json says.
    """
    from transformers.models.auto import modeling_auto

    settings = adapter_settings(folder)
    if settings.get("task_type") == "SEQ_CLS":
        known: Mapping[str, Any] = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    elif "classifier" in (settings.get("modules_to_save") or ()):  # adapters for images name no task
        known = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    else:
        return None
    head_class = known.get(config.get("model_type", ""))
    own = (config.get("architectures") or [None])[0]
    # A tuple lists variants, the base's own among them or the first.
    return (own if own in head_class else head_class[0]) if isinstance(head_class, tuple) else head_class


def given_by(tensors: "Tensors") -> dict[str, str]:
    """The parameters of the base that an adapter replaces as a whole: name -> name in the adapter's file."""
    return {name.removeprefix(_PREFIX): name for name in tensors if "lora_" not in name}


def labels_of(tensors: "Tensors") -> int | None:
    """The number of labels of the head that an adapter brings; None where it brings none."""
    return next((entry.shape[0] for name, entry in tensors.entries.items() if _HEAD.search(name)), None)


def check_mergeable(folder: Path) -> None:
    """Refuses an adapter that can't be merged, as far as that shows before its base is read.

    Raises:
        FusionError: peft is not installed or doesn't know the adapter's kind, or the adapter is no change of weights.
    """
    if importlib.util.find_spec("peft") is None:
        raise FusionError(f"{folder} holds an adapter, which peft reads: pip install 'fusionpl[peft]'")
    kind = adapter_settings(folder).get("peft_type")
    if _peft_config(folder).is_prompt_learning:
        raise FusionError(f"{folder}: {kind} changes no weights, so it can't be merged; name a LoRA's folder")


def merged(folder: Path, base: "nn.Module", tensors: "Tensors") -> "nn.Module":
    """The base with the adapter in its weights.

    Args:
        folder: the folder of the adapter.
        base: the base, which is used up.
        tensors: the tensors of the adapter.

    Raises:
        FusionError: the adapter doesn't fit the base, or peft can't merge one of its kind.
    """
    import peft

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how to train it
            model: Any = peft.get_peft_model(cast(Any, base), _peft_config(folder))
            report: Any = peft.set_peft_model_state_dict(model, dict(tensors))
    except Exception as error:  # peft and torch raise whatever a config or a shape leads to; the last line names it
        words = reason(Exception(str(error).strip().rpartition("\n")[2]))
        raise FusionError(f"{folder}: the adapter doesn't fit {type(base).__name__}: {words}") from error
    lacking = sorted(name for name in report.missing_keys if ".default" in name)
    if report.unexpected_keys or lacking:
        name = (sorted(report.unexpected_keys) or lacking)[0].removeprefix(_PREFIX).replace(".default", "")
        what = f"holds {name}, which it has not" if report.unexpected_keys else f"lacks {name}"
        raise FusionError(f"{folder}: the adapter doesn't fit {type(base).__name__}: it {what}")
    try:
        whole: Any = model.merge_and_unload()
    except Exception as error:  # what a kind of adapter has instead of merging
        kind = adapter_settings(folder).get("peft_type")
        raise FusionError(f"{folder}: peft can't merge an adapter of kind {kind}: {reason(error)}") from error
    vars(whole).pop("peft_config", None)
    return cast("nn.Module", whole.requires_grad_(True))


def adapter_beside(folder: Path) -> str | None:
    """What a user should know of a whole model in whose folder an adapter lies, too; None where none does."""
    if not (folder / CONFIG).is_file() or is_adapter(folder):
        return None
    return (
        f"{folder} holds a whole model, which is taken as it is, and an adapter, which is not applied; to merge that, "
        "name a folder with the adapter alone"
    )


def _peft_config(folder: Path) -> Any:
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever a kind that peft doesn't know, or a broken config, makes it raise
        raise FusionError(f"{folder}/{CONFIG}: peft can't read it: {reason(error)}") from error
    if getattr(config, "megatron_config", None):
        raise FusionError(f"{folder}/{CONFIG} is for Megatron's modules; name an adapter of a model of transformers")
    return config
