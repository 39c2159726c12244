"""Where figures come from, for people and for programs."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "lightning", "timm", "transformers", "POT", "numpy")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where, when and by what figures were measured.

    Attributes:
        machine: the processor or GPU.
        date: of the measurement, YYYY-MM-DD.
        commit: of this project, with a + where files differed from it.
        versions: of Python and the packages that compute; empty where they were not recorded.
    """

    machine: str
    date: str
    commit: str
    versions: Mapping[str, str] = field(default_factory=dict)


def here() -> dict[str, Any]:
    """The fields of an `Origin`: this machine, now."""
    versions = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
    return {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "commit": commit(), "versions": versions}


def machine() -> str:
    """The GPU, or the processor with its cores and the threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{name}, {os.cpu_count()} cores, threads: {torch.get_num_threads()}"


def commit() -> str:
    """The commit that measures, with a + where files differ from it."""
    words = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def footer(command: str, origins: Sequence[Origin], seeds: Iterable[str], more: str = "") -> str:
    """The last lines of a table: a sentence, and the same as JSON in a comment that starts with `origin:`.

    Args:
        command: that makes the table.
        origins: of its figures.
        seeds: what was drawn with: a seed, or the parents' seeds, of each repeat.
        more: the end of the sentence.
    """
    found = {what: list(dict.fromkeys(getattr(one, what) for one in origins)) for what in ("machine", "date", "commit")}
    versions = list({json.dumps(dict(one.versions)): dict(one.versions) for one in origins if one.versions}.values())
    data = {"command": command, "seeds": list(dict.fromkeys(seeds)), **found, "versions": versions}
    summary = {what: ", ".join(values) for what, values in found.items()}
    sentence = f"`{command}`, {summary['machine']}, {summary['date']}, commit {summary['commit']}{more}."
    return f"{sentence}\n\n<!-- origin: {json.dumps(data)} -->\n"
