"""Names of files and folders in what others may read: model cards, reports, dashboards."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def public(path: str) -> str:
    """A path without where it lies on this machine: below the working directory as it is from there, else its name.

    Anything else, such as a hub id or a path from the working directory down, stays as it is.
    """
    given = Path(path).expanduser()
    if "\n" in path or not (given.is_absolute() or ".." in given.parts):
        return path
    full, here = Path(os.path.abspath(given)), Path.cwd()
    if full.is_relative_to(here) and here not in Path.home().parents:
        return str(full.relative_to(here))
    return full.name


def public_settings(settings: Any) -> Any:
    """Settings with every path in them as `public` names it; mappings, lists and tuples are gone through."""
    if isinstance(settings, Mapping):
        return {key: public_settings(value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [public_settings(value) for value in settings]
    return public(str(settings)) if isinstance(settings, str | Path) else settings


def public_command(words: Sequence[str]) -> str:
    """A command line as a shell takes it, with every path in it as `public` names it."""
    return shlex.join(_public_word(word) for word in words)


def _public_word(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    try:
        nested = yaml.safe_load(value) if value[:1] in ("[", "{") else None
    except yaml.YAMLError:
        nested = None
    if nested is not None:
        value = yaml.safe_dump(public_settings(nested), default_flow_style=True, sort_keys=False, width=2**31).strip()
    return option + equals + public(value)
