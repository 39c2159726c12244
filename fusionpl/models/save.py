"""Models on disk: the hub layouts of timm and transformers, with a model card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import timm.models
import transformers
from torch import nn

from fusionpl.errors import FusionError
from fusionpl.files import whole
from fusionpl.models.preprocessing import ImageProcessing
from fusionpl.models.processors import save_image_processing
from fusionpl.models.quiet import quiet_transformers

# Keys of configurations, by other versions of the libraries too, that hold paths of the machine that wrote them.
PLACES = ("_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file")


def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    class_names: tuple[str, ...] | None = None,
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    processing: ImageProcessing | None = None,
    card: str = "",
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Saves config.json, model.safetensors and README.md; `load_model` and the model's own library read them.

    Everything is written next to `folder` and moved into place at the end, so a crash leaves nothing half
    written. An existing `folder` is replaced.

    Args:
        model: a model that timm's `create_model` or transformers made, or a deep copy of one.
        folder: where it goes.
        class_names: names of the outputs; by default those the model remembers.
        tokenizer: kept beside the model.
        processing: how the model takes its images, kept for its own library; by default a timm model's is what its
            `pretrained_cfg` says, and of transformers' nothing is written.
        card: Markdown body of the model card.
        metadata: of the model card, see `write_card`.

    Raises:
        FusionError: `model` is from neither library, or a timm model not made by `create_model`.
    """
    folder = Path(folder)
    names = class_names or _remembered(model)
    with whole(folder) as staged:
        if isinstance(model, transformers.PreTrainedModel):
            if names is not None:
                model.config.id2label = dict(enumerate(names))
                model.config.label2id = {name: index for index, name in enumerate(names)}
            with quiet_transformers():
                model.save_pretrained(staged)
        else:
            _save_timm(model, staged, names)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        if processing is not None:
            save_image_processing(staged, processing)
        forget_places(staged)
        write_card(staged, library_of(model), card or f"# {folder.parent.name}", metadata)


def forget_places(folder: Path) -> None:
    """Takes out of a model folder's configurations where on whose machine the model and its tokenizer once lay."""
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        if file.is_file():
            settings = json.loads(file.read_text(encoding="utf-8"))
            rest = {key: value for key, value in settings.items() if key not in PLACES}
            if rest != settings:
                file.write_text(json.dumps(rest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_card(folder: Path, library: str, card: str, data: Mapping[str, Any] | None = None) -> None:
    """Writes the model card of a model folder.

    Args:
        folder: the model folder.
        library: timm or transformers.
        card: its Markdown body.
        data: more metadata, see `huggingface_hub.ModelCardData`.
    """
    metadata = huggingface_hub.ModelCardData(**{"library_name": library, "tags": ["fusionpl"], **(data or {})})
    huggingface_hub.ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{card}\n").save(folder / "README.md")


def add_to_card(folder: Path, paragraph: str, data: Mapping[str, Any] | None = None) -> None:
    """Adds a paragraph to the model card of a model folder, unless it is there already, and sets metadata."""
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    for key, value in (data or {}).items():
        card.data[key] = value
    if paragraph not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{paragraph}\n"
    card.save(folder / "README.md")


def library_of(model: nn.Module) -> str:
    """The library that a model is of, as model cards name it."""
    return "transformers" if isinstance(model, transformers.PreTrainedModel) else "timm"


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """The names of the model's classes, or None if it does not know them.

    transformers fills in `LABEL_0`, `LABEL_1`, ... where a model was given no names: that counts as not knowing.
    """
    if isinstance(model, transformers.PreTrainedModel):
        labels: dict[Any, str] = model.config.id2label or {}
        names = tuple(labels[index] for index in sorted(labels))
        return None if all(name == f"LABEL_{index}" for index, name in enumerate(names)) else names
    labels_of: Any = getattr(model, "pretrained_cfg", {}).get("label_names")
    return tuple(str(name) for name in labels_of) if labels_of else None


_remembered = class_names  # the keyword of save_model hides the function


def _save_timm(model: nn.Module, folder: Path, names: tuple[str, ...] | None) -> None:
    if "architecture" not in getattr(model, "pretrained_cfg", {}):
        raise FusionError(
            f"cannot save a {type(model).__name__}: only models made by timm.create_model or of transformers"
            " remember how to be built again"
        )
    timm.models.save_for_hf(
        model, str(folder), model_config={"label_names": list(names)} if names else None, safe_serialization=True
    )
