"""What a model was made of, as its card tells: hub ids, revisions, licences."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub

from fusionpl.errors import FusionError
from fusionpl.models.folders import model_folder
from fusionpl.models.hub import HubId, card_folder, hub_id

Relation = Literal["merge", "finetune"]
INHERITED = ("base_model", "base_model_relation", "license", "license_name")
PARENTS = "## Parents"


@dataclass(frozen=True)
class Ancestor:
    """A model that another one was made of.

    Attributes:
        name: a short one.
        hub: repository and commit, of a model on the hub.
        licence: that its card names, by the hub's name of it.
    """

    name: str
    hub: HubId | None
    licence: str | None


def ancestor(name: str, source: str) -> Ancestor:
    """What the card of a model tells of it; what can't be read is not known.

    Args:
        name: a short one.
        source: see `load_model`.
    """
    hub = hub_id(source)
    if hub is None:
        return Ancestor(name, None, _licence(model_folder(source)))
    try:
        folder = card_folder(hub)
    except FusionError:  # the model itself may lie in the cache
        return Ancestor(name, hub, None)
    return Ancestor(name, HubId(hub.repo, folder.name), _licence(folder))


def base_models(source: str) -> frozenset[str]:
    """The models that the card of a model names as its base; none where it has no card.

    Args:
        source: see `load_model`.
    """
    hub = hub_id(source)
    try:
        card = _card(model_folder(source) if hub is None else card_folder(hub))
    except FusionError:  # see `ancestor`
        return frozenset()
    named = None if card is None else card.data.get("base_model")
    names = named if isinstance(named, list) else [named]
    return frozenset(name for name in names if isinstance(name, str))


def lineage(ancestors: Sequence[Ancestor], relation: Relation) -> dict[str, Any]:
    """The metadata of a card: `base_model`, which are hub ids alone, and `license` where all are known."""
    metadata: dict[str, Any] = {}
    repos = list(dict.fromkeys(parent.hub.repo for parent in ancestors if parent.hub))
    if repos:
        metadata |= {"base_model": repos, "base_model_relation": relation}
    licences = list(dict.fromkeys(parent.licence for parent in ancestors))
    if None in licences:
        return metadata
    if len(licences) == 1:
        return metadata | {"license": licences[0]}
    return metadata | {"license": "other", "license_name": "-and-".join(map(str, licences))}


def parents_section(ancestors: Sequence[Ancestor]) -> str:
    """The ancestors as a section of a card: names, commits, licences."""
    lines = [PARENTS, "", "| | revision | license |", "|---|---|---|"]
    for parent in ancestors:
        name, revision = (
            (f"`{parent.hub.repo}`", f"`{parent.hub.revision or 'main'}`") if parent.hub else (parent.name, "local")
        )
        lines.append(f"| {name} | {revision} | {parent.licence or 'unknown'} |")
    licences = {parent.licence for parent in ancestors}
    if None in licences:
        lines += ["", "The license of a parent is unknown, so this card names none."]
    elif len(licences) > 1:
        lines += ["", "The parents' licenses differ; all of them apply."]
    return "\n".join(lines)


def inherited(folder: Path) -> tuple[str, dict[str, Any]]:
    """What the card in a model folder says of its parents: the section, empty where there is none, and metadata."""
    card = _card(folder)
    if card is None:
        return "", {}
    section = re.search(rf"^{PARENTS}\n.*?(?=^## |\Z)", card.text, re.MULTILINE | re.DOTALL)
    data = card.data.to_dict()
    return section[0].strip() if section else "", {key: data[key] for key in INHERITED if key in data}


def _card(folder: Path) -> huggingface_hub.ModelCard | None:
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        return huggingface_hub.ModelCard(text, ignore_metadata_errors=True)
    except Exception:  # no card, or one by a stranger in whatever state
        return None


def _licence(folder: Path) -> str | None:
    card = _card(folder)
    if card is None:
        return None
    name = card.data.get("license")
    name = card.data.get("license_name", name) if name == "other" else name
    return name if isinstance(name, str) else None
