"""Models on the hub: `org/name`, or `org/name@revision` for a branch, a tag, a commit or `refs/pr/1`."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from fusionpl.errors import FusionError, nearest, reason
from fusionpl.models.adapters import CONFIG
from fusionpl.models.layouts import ADAPTERS, PICKLES, SAFETENSORS, Layout, pickle_hint

HUB_ID = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^\s@]+))?")
# What makes a model besides its weights: configuration, tokenizer, templates.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
# No folders but the numbered ones, in which sentence encoders keep their modules.
ELSEWHERE = ("[!0-9]*/*", "*/*/*")
SHOWN, ASKED = 8, 24  # revisions that a message lists, and that are looked into for it


class HubId(NamedTuple):
    """A repository and a revision of it; None is its main branch."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def hub_id(source: str) -> HubId | None:
    """Reads `org/name@revision`; None where `source` is a path, or could only be one."""
    match = HUB_ID.fullmatch(source)
    if match is None or Path(source).expanduser().exists():
        return None
    home = Path(match["repo"]).parent
    return None if home != Path(".") and home.is_dir() else HubId(match["repo"], match["revision"])


def short_name(source: str | Path) -> str:
    """The last part of a path or hub id with its revision, as a name that a folder can have."""
    hub = hub_id(str(source))
    if hub is None:
        return Path(source).name
    revision = "" if hub.revision is None else f"@{hub.revision.replace('/', '-')}"
    return hub.repo.rpartition("/")[2] + revision


def named(paths: Sequence[str]) -> dict[str, str]:
    """Gives each model the shortest name that tells it from the others: name -> path."""
    names = [short_name(path) for path in paths]
    if len(set(names)) < len(names):
        names = [f"{name}#{index + 1}" for index, name in enumerate(names)]
    return dict(zip(names, paths, strict=True))


def download(source: HubId, *, allow_pickle: bool = False, weights: bool = True) -> Path:
    """Downloads a model, or takes it from the cache. Pickles are downloaded only where they are allowed and needed.

    Args:
        source: which model.
        allow_pickle: whether pytorch_model.bin will do where there are no safetensors.
        weights: whether weights are wanted, or configuration and tokenizer alone.

    Returns:
        The folder with its files.

    Raises:
        FusionError: the hub doesn't give it out, has no such revision, or none of weights that can be read.
    """
    folder = _snapshot(source, SMALL_FILES + (SAFETENSORS.patterns if weights else ()))
    if not weights or SAFETENSORS.held(_names(folder)):
        return folder
    if CONFIG in _names(folder):
        return _adapter(source, allow_pickle)
    if allow_pickle:
        folder = _snapshot(source, SMALL_FILES + PICKLES.patterns)
        if PICKLES.held(_names(folder)):
            return folder
    raise FusionError(_without_weights(source, _names(folder), allow_pickle))


def _adapter(source: HubId, allow_pickle: bool) -> Path:
    """Downloads an adapter."""
    for layout in ADAPTERS if allow_pickle else ADAPTERS[:1]:
        folder = _snapshot(source, SMALL_FILES + layout.patterns)
        if layout.held(_names(folder)):
            return folder
    advice = "" if allow_pickle else f"; if it has one, {pickle_hint(ADAPTERS[1].whole)}"
    raise FusionError(f"'{source}' is an adapter without {ADAPTERS[0].whole}{advice}")


def card_folder(source: HubId) -> Path:
    """Downloads the card of a model, or takes it from the cache; the folder is named by the commit.

    Raises:
        FusionError: the hub doesn't give it out, or has no such revision.
    """
    return _snapshot(source, ("README.md",))


def _snapshot(source: HubId, patterns: Iterable[str]) -> Path:
    try:
        folder = huggingface_hub.snapshot_download(
            source.repo, revision=source.revision, allow_patterns=list(patterns), ignore_patterns=list(ELSEWHERE)
        )
    except RevisionNotFoundError as error:
        raise FusionError(_without_revision(source)) from error
    except GatedRepoError as error:
        raise FusionError(f"'{source}' is given out on request; ask on its page, then: hf auth login") from error
    except RepositoryNotFoundError as error:
        raise FusionError(
            f"'{source}' is neither a folder nor a model on the hub (if it is a private one: hf auth login)"
        ) from error
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
        raise FusionError(f"'{source}' is neither a folder nor a model the hub gives out: {reason(error)}") from error
    return Path(folder)


def _names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()] if folder.is_dir() else []


def _without_revision(source: HubId) -> str:
    try:
        known = list(_revisions(source))
    except Exception:  # see _snapshot; the message goes without a list
        known = []
    hint = nearest(source.revision or "main", known) or (f"; it has {_listed(known)}" if known else "")
    return f"'{source.repo}' has no revision '{source.revision or 'main'}'{hint}"


def _without_weights(source: HubId, downloaded: list[str], allow_pickle: bool) -> str:
    where = f"'{source.repo}' at revision {source.revision or 'main'}"
    try:
        names = huggingface_hub.HfApi().list_repo_files(source.repo, revision=source.revision)
        pickles = PICKLES.held(names)
        wanted = (SAFETENSORS, PICKLES) if allow_pickle else (SAFETENSORS,)
        others, all_asked = _revisions_with(source, wanted)
        if not (others or pickles or allow_pickle):
            others, all_asked = _revisions_with(source, (PICKLES,))
    except Exception:  # see _snapshot; the message goes without a list
        pickles = PICKLES.held(downloaded)
        return f"{where} holds no model.safetensors" + (f"; {pickle_hint(pickles[0])}" if pickles else "")
    what = "safetensors" if pickles else "weights"
    more = f"; revisions that hold {what}: {_listed(others)}{'' if all_asked else ', and maybe more'}" if others else ""
    if pickles:
        return f"{where} holds {pickles[0]} and no model.safetensors; {pickle_hint(pickles[0])}{more}"
    foreign = sorted(name for name in names if name.endswith((".h5", ".msgpack", ".ckpt", ".pt", ".pth", ".onnx")))
    note = f" but {foreign[0]}, which is never read" if foreign else ""
    advice = f"; name one as {source.repo}@{others[0]}" if others else "; no other revision has any" * all_asked
    return f"{where} holds no weights{note}{more}{advice}"


def _revisions(source: HubId) -> Iterator[str]:
    """Branches, tags and pull requests, those with the highest number first."""
    refs = huggingface_hub.HfApi().list_repo_refs(source.repo, include_pull_requests=True)
    named = [ref.name for ref in (*refs.branches, *refs.tags)]
    for group in (named, [ref.ref for ref in refs.pull_requests or ()]):
        yield from sorted(group, key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)], reverse=True)


def _revisions_with(source: HubId, layouts: Iterable[Layout]) -> tuple[list[str], bool]:
    """Other revisions with weights in one of the layouts, and whether all revisions were looked into."""
    revisions: list[str] = []
    others = [name for name in _revisions(source) if name != (source.revision or "main")]
    for count, name in enumerate(others):
        if count == ASKED or len(revisions) == SHOWN:
            return revisions, False
        names = huggingface_hub.HfApi().list_repo_files(source.repo, revision=name)
        if any(layout.held(names) for layout in layouts):
            revisions.append(name)
    return revisions, True


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
