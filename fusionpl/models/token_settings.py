"""Settings that choose a token or a position: read where a model's code reads them, renumbered, and compared."""

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from fusionpl.errors import FusionError

# What configurations call numbers of tokens, and modules the number of the token for padding.
_SETTING = re.compile(r"\w+_token_id|padding_idx")
_PADDING = "padding_idx"
# Code of these decides nothing about a forward pass, or is checked elsewhere.
_NO_MODEL = (
    "torch.",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.utils",
    "transformers.integrations",
)
# In place of this token a text model of CLIP takes the one with the largest number: its first files named a wrong one.
LARGEST = 2


@cache
def _reads(cls: type[Any]) -> frozenset[str]:
    """The settings that the forward pass of a class reads by itself, in `forward` or what that calls of it."""
    todo, seen, settings = ["forward"], set[str](), set[str]()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        method = next((vars(base)[name] for base in cls.__mro__
                       if name in vars(base) and not base.__module__.startswith(_NO_MODEL)), None)  # fmt: skip
        if isinstance(method, (staticmethod, classmethod)):
            method = method.__func__
        code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
        names = code.co_names if code else ()
        settings |= {name for name in names if _SETTING.fullmatch(name)}
        todo += names
    return frozenset(settings)


def _configs(model: nn.Module) -> list[Any]:
    """The configurations of a model and of its parts, each once."""
    configs: dict[int, Any] = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }
    for config in list(configs.values()):
        if hasattr(config, "get_text_config"):
            configs.setdefault(id(config.get_text_config()), config.get_text_config())
    return list(configs.values())


def _holders(model: nn.Module) -> Iterator[tuple[str, Any, nn.Module]]:
    """Each setting that a forward pass reads: its name, what holds it, and the module that reads it."""
    for module in model.modules():
        cls: Any = type(module)
        for name in sorted(_reads(cls)):
            config = getattr(module, "config", None)
            holder = module if name in vars(module) else config.get_text_config() if config is not None else None
            if hasattr(holder, name):
                yield name, holder, module


def chosen_by(model: nn.Module) -> dict[str, Any]:
    """The settings that decide which token's or position's numbers a model computes: name -> value."""
    return {"pad_token_id" if name == _PADDING else name: getattr(holder, name) for name, holder, _ in _holders(model)}


def pads_text(model: Any) -> bool:
    """Whether a model is a classifier that reads its answer at the last token that is not padding."""
    return type(model).__name__.endswith("ForSequenceClassification") and "pad_token_id" in _reads(type(model))  # type: ignore[arg-type]  # classes are hashable


def padding_of(model: Any) -> int | None:
    """The number of a model's token for padding; None where it has none."""
    number: int | None = getattr(model.config.get_text_config(), "pad_token_id", None)
    return number


def end_of(model: Any) -> int | None:
    """The number of a model's end of text, the first of several; None where it has none."""
    end = getattr(model.config.get_text_config(), "eos_token_id", None)
    return next(iter(end), None) if isinstance(end, (list, tuple)) else end


def pad_with(model: Any, number: int) -> None:
    """Gives a classifier that has none a token for padding; its weights stay as they are."""
    model.config.get_text_config().pad_token_id = number


def keep_padding(folder: Path, model: nn.Module) -> None:
    """Writes the token for padding of a classifier into a model folder whose configuration names none."""
    if not pads_text(model):
        return
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    place = settings.get("text_config") or settings
    if place.get("pad_token_id") is None:
        place["pad_token_id"] = padding_of(model)
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def renumber_settings(model: nn.Module, places: Mapping[int, int], name: str) -> None:
    """Gives the settings of a model whose tokens are renumbered the new numbers; None to a token that is left out.

    Args:
        model: changed in place.
        places: old number -> new number.
        name: how messages call it.

    Raises:
        FusionError: positions are counted from the old number, or the largest number is what is looked for.
    """
    for setting, holder, module in _holders(model):
        value = getattr(holder, setting)
        if setting == _PADDING and places.get(value) != value:
            raise FusionError(
                f"{name} counts positions from its token for padding, {value}, which is {places.get(value)} where its "
                "tokens are renumbered; give both parents one numbering of tokens"
            )
        if setting == "eos_token_id" and value == LARGEST and type(module).__name__.startswith("CLIPText"):
            raise FusionError(
                f"{name} looks for the token with the largest number (eos_token_id {LARGEST}), and its tokens are "
                "renumbered; set eos_token_id in its text_config to its end of text"
            )
    for holder in [*_configs(model), *model.modules()]:
        for setting, value in list(vars(holder).items()):
            if _SETTING.fullmatch(setting) and value is not None:
                many = isinstance(value, (list, tuple))
                numbers = [places[number] for number in (value if many else [value]) if number in places]
                setattr(holder, setting, numbers if many else next(iter(numbers), None))


def check_token_settings(models: Mapping[str, nn.Module]) -> list[str]:
    """Checks that parents (name -> model), whose tokens are numbered alike, look for the same tokens.

    Returns:
        What a reader should know, a line each: of tokens that only generating looks for.

    Raises:
        FusionError: naming both parents, the setting and its values.
    """
    (first, reference), *others = models.items()
    lines, ours = [], chosen_by(reference)
    for name, model in others:
        theirs = chosen_by(model)
        for setting in sorted(ours.keys() & theirs.keys()):
            if ours[setting] != theirs[setting]:
                raise FusionError(
                    f"parents that look for other tokens: {setting} is {ours[setting]} in {first} and "
                    f"{theirs[setting]} in {name}, and {type(model).__name__} computes by it; train both with one, or "
                    "set one in both config.json where that is what they were trained with"
                )
        lines += _generated(reference, model, first, name)
    return lines


def _generated(a: Any, b: Any, first: str, name: str) -> list[str]:
    """What two models that generate look for differently."""
    if not all(isinstance(model, transformers.PreTrainedModel) and model.can_generate() for model in (a, b)):
        return []
    ours, theirs = (model.config.get_text_config() for model in (a, b))
    return [
        f"{setting} is {values[0]} in {first} and {values[1]} in {name}: the fused model generates with the anchor's"
        for setting in ("bos_token_id", "eos_token_id")
        if (values := [getattr(config, setting, None) for config in (ours, theirs)])[0] != values[1]
    ]
