"""What happens when parents differ in a setting, for every setting of every family: the table of docs/reliability.md.

python -m benchmarks.settings
"""

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import markdown
from fusionpl.cli.running import main as run_command
from fusionpl.families.family import library
from fusionpl.models.settings import judgements

DOCS = Path("docs/reliability.md")
BEGIN, END = "<!-- settings: python -m benchmarks.settings -->", "<!-- end of settings -->"
WORDS = {
    "unused": "nothing: outputs do not depend on it",
    "tensors": "tensors show it: aligned, or refused",
    "carried": "brought to the anchor's",
    "warned": "a line",
    "refused": "refused",
}


def classes() -> list[Any]:
    """The configurations of transformers that the library's families have."""
    found = {}
    for family in library().values():
        for path in family.models:
            module, _, name = path.rpartition(".")
            if module.startswith("transformers."):
                config = getattr(importlib.import_module(module), name).config_class
                found[config.__name__] = config
    return [found[name] for name in sorted(found)]


def settings_of(config: Any) -> list[str]:
    """The attributes of a configuration, with those of its towers."""

    def flat(settings: dict[str, Any]) -> Iterator[str]:
        for key, value in settings.items():
            if key.endswith("_config") and isinstance(value, dict):
                yield from flat(value)
            else:
                yield key

    return list(dict.fromkeys(flat(config().to_dict())))


def section() -> str:
    """The table, between its marks."""
    having: dict[str, list[str]] = {}
    every = classes()
    for config in every:
        for key in settings_of(config):
            having.setdefault(key, []).append(config.__name__.removesuffix("Config"))
    kinds = [("config", ""), ("modules", "modules of timm, torch and users")]
    rows = []
    for kind, where in kinds:
        for key, judged in judgements(kind).items():
            names = having.get(key, [])
            shown = where or ("all" if len(names) == len(every) else ", ".join(names) or "older files")
            becomes = WORDS[judged.outcome] + (f" ({judged.elsewhere})" if judged.elsewhere else "")
            rows.append([f"`{key}`", becomes, judged.why, shown])
    return "\n".join([BEGIN, "", markdown(["setting", "parents that differ", "why", "of"], rows), "", END])


def run(argv: Sequence[str]) -> None:
    """Writes the table into the docs."""
    text = DOCS.read_text()
    before, rest = text.split(BEGIN)
    DOCS.write_text(before + section() + rest.split(END)[1])
    print(f"{DOCS}: {section().count(chr(10)) - 5} settings")


if __name__ == "__main__":
    sys.exit(run_command(run))
