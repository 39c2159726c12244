"""New models from a config: any timm architecture, any transformers class."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import timm
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from fusionpl.errors import FusionError, nearest, reason
from fusionpl.models.config import ModelConfig
from fusionpl.models.quiet import without_cache

KEPT_CFG = ("architecture", "input_size", "fixed_input_size", "pool_size", "first_conv", "classifier")
CHANNELS = {"timm": "in_chans", "transformers": "num_channels"}
EMBEDDINGS = ("pos_embed", "cls_token", "position_embeddings", "cls_embedding")


def build_model(
    config: ModelConfig,
    *,
    num_classes: int,
    class_names: tuple[str, ...] | None = None,
    args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Builds a randomly initialised model; the global RNG decides its weights.

    Args:
        config: architecture and sizes.
        num_classes: outputs of the classifier.
        class_names: their names, remembered by the model and saved with it.
        args: what the data decide, over `config.args`: the size of a vocabulary. `channels`, those of images, are the
            model's where `config.args` doesn't say how many it has.

    Returns:
        The model, in training mode.

    Raises:
        FusionError: the architecture is unknown, an argument does not fit it, or the class names do not fit
            `num_classes`.
    """
    if class_names is not None and len(class_names) != num_classes:
        raise FusionError(f"{len(class_names)} class names for {num_classes} classes")
    decided = dict(args or {})
    channels = decided.pop("channels", None)
    own = {} if channels is None else {CHANNELS[config.library]: channels}
    whole = replace(config, args={**own, **config.args, **decided})
    if config.library == "transformers":
        _check_args(config)
    build = _build_timm if config.library == "timm" else _build_transformers
    try:
        model = build(whole, num_classes, class_names)
    except (TypeError, ValueError, AssertionError, AttributeError, RuntimeError, StrictDataclassError) as error:
        raise FusionError(f"cannot build {config.architecture} with {config.args}: {reason(error)}") from error
    if config.initializer_range is not None:
        redraw(model, config.initializer_range)
    return model


@torch.no_grad()
def redraw(model: nn.Module, std: float) -> None:
    """Redraws linear, convolution and embedding weights from a truncated normal, and zeroes their biases.

    Position embeddings and class tokens are drawn too. A standard deviation of 0.02, the libraries' default,
    leaves narrow ViTs on small images on a plateau for many epochs.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding | transformers.pytorch_utils.Conv1D):
            nn.init.trunc_normal_(module.weight, std=std)
            bias = getattr(module, "bias", None)
            if bias is not None:
                nn.init.zeros_(bias)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in EMBEDDINGS:
            nn.init.trunc_normal_(parameter, std=std)


def transformers_class(name: str) -> type[transformers.PreTrainedModel]:
    """The transformers model class called `name`.

    Raises:
        FusionError: there is no such model class.
    """
    model_class = getattr(transformers, name, None)
    if not (inspect.isclass(model_class) and issubclass(model_class, transformers.PreTrainedModel)):
        hint = nearest(name, (known for known in dir(transformers) if "For" in known))
        raise FusionError(f"transformers has no model class '{name}'{hint}")
    return model_class


def _build_timm(config: ModelConfig, num_classes: int, class_names: tuple[str, ...] | None) -> nn.Module:
    if not timm.is_model(config.architecture):
        hint = nearest(config.architecture, timm.list_models())
        raise FusionError(f"timm has no architecture '{config.architecture}'{hint}")
    model = cast(Any, timm.create_model(config.architecture, num_classes=num_classes, **config.args))
    # timm fills pretrained_cfg with the origin of its published weights, which this model does not have.
    channels = model.in_chans if hasattr(model, "in_chans") else 3
    settings = {key: value for key, value in model.pretrained_cfg.items() if key in KEPT_CFG}
    half = (0.5,) * channels  # and the rest as `ImageProcessing` has it by default
    seen = {"mean": half, "std": half, "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}
    model.pretrained_cfg = {**settings, **seen, "num_classes": num_classes}
    if class_names is not None:
        model.pretrained_cfg["label_names"] = list(class_names)
    return cast(nn.Module, model)


def _build_transformers(config: ModelConfig, num_classes: int, class_names: tuple[str, ...] | None) -> nn.Module:
    cls: Any = transformers_class(config.architecture)
    # The vocabulary is no set of labels.
    labels = {} if config.args.get("vocab_size") == num_classes else {"num_labels": num_classes}
    settings = cls.config_class(**config.args, **labels)
    if class_names is not None:
        settings.id2label = dict(enumerate(class_names))
        settings.label2id = {name: index for index, name in enumerate(class_names)}
    model: nn.Module = cls(settings)
    without_cache(model)
    return model


def _check_args(config: ModelConfig) -> None:
    """Refuses an argument that the config's class does not have: transformers would keep it and ignore it."""
    config_class: Any = transformers_class(config.architecture).config_class
    known = config_class().to_dict().keys() | config_class.attribute_map.keys()
    for name in sorted(config.args.keys() - known):
        raise FusionError(f"{config_class.__name__} has no argument '{name}'{nearest(name, sorted(known))}")
