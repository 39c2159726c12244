"""A family file: the axis grammar, taps, joins and circuits of one architecture, read from library/*.yaml."""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import yaml

from fusionpl.errors import FusionError
from fusionpl.families.grammar import Dim, parse

STEM, TAIL = "stem", "tail"


@dataclass(frozen=True)
class Section:
    """A part of a network with axes of its own: the stem, the block that repeats, or the tail.

    Attributes:
        path: module path of the section's parameters; `{l}` stands for the block's index, "" for the root.
        parameters: name pattern (`*` matches one name part) -> dimensions.
        taps: axis -> where its units are seen: `module` (output), `input(module)`, or a parameter.
        joins: axis -> the axes added into it: skip, branch, then others that move on their own.
        circuits: name -> axes whose units meet in a product and must move alike (Q and K).
        norms: a pre-LN norm module -> the linear modules that read it; none if it normalises inside the stream.
        scales: a module that multiplies unit by unit (LayerScale) -> the linear module before it.
    """

    path: str
    parameters: Mapping[str, tuple[Dim, ...]]
    taps: Mapping[str, str]
    joins: Mapping[str, tuple[str, ...]]
    circuits: Mapping[str, tuple[str, ...]]
    norms: Mapping[str, tuple[str, ...]]
    scales: Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """What an architecture is. `sizes` are attribute paths on the model (head count)."""

    name: str
    models: tuple[str, ...]
    norm: Literal["pre", "post"]
    sizes: Mapping[str, str]
    fixed: frozenset[str]
    stem: Section
    block: Section
    tail: Section

    def sections(self, depth: int) -> Iterator[tuple[str, str, Section]]:
        """The sections of a model with `depth` blocks, in forward order: name, prefix of its modules, section."""
        yield STEM, "", self.stem
        for index in range(depth):
            name = self.block.path.format(l=index)
            yield name, f"{name}.", self.block
        yield TAIL, "", self.tail

    def block_index(self, name: str) -> tuple[int, str] | None:
        """Splits `blocks.3.norm1.weight` into (3, `norm1.weight`); None outside the blocks."""
        pattern = re.escape(self.block.path).replace(re.escape("{l}"), r"(\d+)") + r"\.(.+)"
        match = re.fullmatch(pattern, name)
        return (int(match[1]), match[2]) if match else None


def _section(raw: Mapping[str, Any]) -> Section:
    return Section(
        path=raw.get("path", ""),
        parameters={name: parse(str(dims)) for name, dims in raw["parameters"].items()},
        taps=dict(raw.get("taps", {})),
        joins={axis: tuple(members) for axis, members in raw.get("joins", {}).items()},
        circuits={name: tuple(members) for name, members in raw.get("circuits", {}).items()},
        norms={name: tuple(readers) for name, readers in raw.get("norms", {}).items()},
        scales=dict(raw.get("scales", {})),
    )


def parse_family(text: str) -> Family:
    """Reads a family from YAML text; see library/*.yaml for the keys.

    Raises:
        GrammarError: a malformed dimension string.
        KeyError: a missing section.
    """
    raw = yaml.safe_load(text)
    return Family(
        name=raw["name"],
        models=tuple(raw["models"]),
        norm=raw["norm"],
        sizes=dict(raw["sizes"]),
        fixed=frozenset(raw["fixed"]),
        stem=_section(raw[STEM]),
        block=_section(raw["block"]),
        tail=_section(raw[TAIL]),
    )


@functools.cache
def library() -> Mapping[str, Family]:
    """The families that ship with fusionpl, by name."""
    files = (resources.files("fusionpl.families") / "library").iterdir()
    families = (parse_family(file.read_text()) for file in files if file.name.endswith(".yaml"))
    return {family.name: family for family in sorted(families, key=lambda family: family.name)}


def family_of(model: object) -> Family:
    """The family of a model, by its class.

    Raises:
        FusionError: no family knows the class; the message lists the ones there are.
    """
    classes = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__}
    for family in library().values():
        if classes & set(family.models):
            return family
    models = [name.rpartition(".") for family in library().values() for name in family.models]
    beside = [name for module, _, name in models if module == type(model).__module__]
    if beside:
        raise FusionError(
            f"no family for {type(model).__qualname__}, but for {', '.join(beside)} "
            "(finetune.py gives a head to an encoder that has none)"
        )
    raise FusionError(
        f"no family for {type(model).__module__}.{type(model).__qualname__}; known: {', '.join(library())} "
        "(a new architecture is one YAML file, see docs/families.md)"
    )
