"""A family file: the axis grammar, taps, joins and circuits of one architecture, read from library/*.yaml."""

import difflib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from fusionpl.errors import FusionError, nearest
from fusionpl.families.grammar import Dim, GrammarError, parse

STEM, TAIL = "stem", "tail"
# Of libyaml, where PyYAML was built with it: ten times as fast, of what every command reads.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
VOCABULARY = "vocabulary"  # the axis of tokens
ROTATED = "rotated"  # among sizes: units of a rotary head

Kind = Literal["permutation", "pairs", "signs", "scale"]
Norm = Literal["pre", "rms", "post"]


@dataclass(frozen=True)
class Section:
    """A part of a network with axes of its own: the stem, the block that repeats, or the tail.

    Attributes:
        path: module path of the section's parameters; `{l}` stands for the block's index, "" for the root.
        parameters: name pattern (`*` matches one name part) -> dimensions.
        taps: axis -> where its units are seen: `module` (output), `input(module)`, or a parameter; the first that the
            model has.
        joins: axis -> the axes added into it: skip, branch, then others that move on their own.
        circuits: name -> axes whose units meet in a product and must move alike (Q and K).
        maps: axis -> which maps keep the function inside a head, where that is not any permutation: `pairs` (rotary:
            a rotation and a scaling of each frequency pair), `signs` (rotary behind a norm with gains: the sign of a
            pair, the scale of a head).
        gates: axis -> the axis of the gate that multiplies it: both move alike, and its scale and sign are free.
        norms: a pre-LN norm module -> the linear modules that read it; none if it normalises inside the stream.
        scales: a module that multiplies unit by unit (LayerScale) -> the linear module before it, by each of its names.
        tied: axis -> the axis that it is, where a parameter of it is one with a parameter of another section.
        rooted: embeddings whose output is multiplied by the square root of its width.
    """

    path: str
    parameters: Mapping[str, tuple[Dim, ...]]
    taps: Mapping[str, tuple[str, ...]]
    joins: Mapping[str, tuple[str, ...]]
    circuits: Mapping[str, tuple[str, ...]]
    maps: Mapping[str, Kind]
    gates: Mapping[str, str]
    norms: Mapping[str, tuple[str, ...]]
    scales: Mapping[str, tuple[str, ...]]
    tied: Mapping[str, str]
    rooted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stack:
    """Blocks that repeat, behind a stem of their own: one in most families, an encoder and a decoder in others.

    Attributes:
        stem, block: its sections.
        stem_name: of the stem's section.
        enters: the axis of the hidden states that the first block takes: what the stem leaves as `out`, or another
            section's, where both embed with one matrix.
        shared: axes of the block that are one for all blocks of the stack, such as the order of its heads.
        returns: what a block returns behind its hidden states: the names under which the next block is called with it.
        mask: the model input that marks the stack's real tokens.
    """

    stem: Section
    block: Section
    stem_name: str = STEM
    enters: str = "out"
    shared: tuple[str, ...] = ()
    returns: tuple[str, ...] = ()
    mask: str = "attention_mask"

    def blocks(self, depth: int) -> tuple[str, ...]:
        """The module paths of `depth` blocks, which are the names of their sections."""
        return tuple(self.block.path.format(l=index) for index in range(depth))

    def block_index(self, name: str) -> tuple[int, str] | None:
        """Splits `blocks.3.norm1.weight` into (3, `norm1.weight`); None outside the blocks."""
        pattern = re.escape(self.block.path).replace(re.escape("{l}"), r"(\d+)") + r"\.(.+)"
        match = re.fullmatch(pattern, name)
        return (int(match[1]), match[2]) if match else None


@dataclass(frozen=True)
class Family:
    """What an architecture is.

    Attributes:
        name: of the family.
        models: the classes it describes.
        when: attribute path on the model -> the value it must have, where classes alone don't tell families apart.
        norm: where norms stand: `pre` (before a branch), `rms` (the same without a mean), `post` (in the stream).
        sizes: attribute paths on the model for what is in no tensor's shape: the numbers of heads, and `rotated`, the
            units of a rotary head that are rotated, or up to 1 their share, if not all are.
        fixed: axes that no map moves.
        stacks: of blocks, in forward order.
        tail: the section behind them.
        offset: what norms add to their weights before they multiply by them.
        unitwise: attribute path on the model -> the values with which something compares the stream unit by unit (a
            maximum over tokens), so that it can't be rotated.
    """

    name: str
    models: tuple[str, ...]
    when: Mapping[str, Any]
    norm: Norm
    sizes: Mapping[str, str]
    fixed: frozenset[str]
    stacks: tuple[Stack, ...]
    tail: Section
    offset: int = 0
    unitwise: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def sections(self, depths: Sequence[int]) -> Iterator[tuple[str, str, Section]]:
        """The sections of a model, in forward order: name, prefix of its modules, section.

        Args:
            depths: the number of blocks of each stack.
        """
        for stack, depth in zip(self.stacks, depths, strict=True):
            yield stack.stem_name, "", stack.stem
            for name in stack.blocks(depth):
                yield name, f"{name}.", stack.block
        yield TAIL, "", self.tail

    def without_head(self, prefix: str) -> "Family":
        """What stands at `prefix` of the models, as a model of its own: an encoder without a head (BERT's `bert`)."""

        def local(path: str) -> str:
            return path.replace(f"{prefix}.", "", 1) if path.startswith((f"{prefix}.", f"input({prefix}.")) else path

        def inside(paths: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(local(path) for path in paths)

        def part(section: Section) -> Section:
            return replace(
                section,
                path=local(section.path),
                parameters={local(pattern): dims for pattern, dims in section.parameters.items()},
                taps={axis: inside(places) for axis, places in section.taps.items()},
                norms={local(norm): inside(readers) for norm, readers in section.norms.items()},
                scales={local(scale): inside(modules) for scale, modules in section.scales.items()},
                rooted=inside(section.rooted),
            )

        return replace(
            self,
            when={local(path): value for path, value in self.when.items()},
            unitwise={local(path): values for path, values in self.unitwise.items()},
            sizes={group: local(path) for group, path in self.sizes.items()},
            stacks=tuple(replace(stack, stem=part(stack.stem), block=part(stack.block)) for stack in self.stacks),
            tail=part(self.tail),
        )


def _all(place: str, one_or_more: Any) -> tuple[str, ...]:
    names = one_or_more if isinstance(one_or_more, list) else [one_or_more]
    if not all(isinstance(name, str) for name in names):
        raise FusionError(f"{place}: '{one_or_more}' is no name and no list of names")
    return tuple(names)


_MAPPINGS = ("parameters", "taps", "joins", "circuits", "maps", "gates", "norms", "scales", "tied")


def _section(name: str, raw: Any) -> Section:
    _keys(raw, name, ("parameters",), ("path", "rooted", *_MAPPINGS))
    for key in _MAPPINGS:
        if not isinstance(raw.get(key, {}), Mapping):
            raise FusionError(f"{name}.{key} is no mapping")
    lists = [("joins", 2), ("circuits", 1), ("norms", 0)]
    for key, least in lists:
        for axis, members in raw.get(key, {}).items():
            if not isinstance(members, list) or len(members) < least:
                raise FusionError(
                    f"{name}.{key}.{axis}: '{members}' is no list" + f" of {least} names or more" * (least > 0)
                )
    for axis, kind in raw.get("maps", {}).items():
        if kind not in get_args(Kind):
            raise FusionError(f"{name}.maps.{axis}: '{kind}' is not {' or '.join(get_args(Kind))}")
    return Section(
        path=raw.get("path", ""),
        parameters={
            pattern: _dims(f"{name}.parameters.{pattern}", line) for pattern, line in raw["parameters"].items()
        },
        taps={axis: _all(f"{name}.taps.{axis}", places) for axis, places in raw.get("taps", {}).items()},
        joins={axis: tuple(members) for axis, members in raw.get("joins", {}).items()},
        circuits={name: tuple(members) for name, members in raw.get("circuits", {}).items()},
        maps=dict(raw.get("maps", {})),
        gates=dict(raw.get("gates", {})),
        norms={name: tuple(readers) for name, readers in raw.get("norms", {}).items()},
        scales={scale: _all(f"{name}.scales.{scale}", modules) for scale, modules in raw.get("scales", {}).items()},
        tied=dict(raw.get("tied", {})),
        rooted=_all(f"{name}.rooted", raw.get("rooted", [])),
    )


def _dims(place: str, line: object) -> tuple[Dim, ...]:
    try:
        return parse(str(line))
    except GrammarError as error:
        raise GrammarError(f"{place}: {error}") from error


def _keys(raw: Any, place: str, needed: tuple[str, ...], known: tuple[str, ...]) -> None:
    if not isinstance(raw, Mapping):
        raise FusionError(f"{place} is no mapping of {', '.join(known)}")
    for key in needed:
        if key not in raw:
            raise FusionError(f"{place} lacks the key {key}")
    for key in raw:
        if key not in known:
            raise FusionError(f"{place} has an unknown key {key}{nearest(str(key), known)}")


_NEEDED = ("name", "models", "norm", "sizes", "fixed", TAIL)
_STACK = (STEM, "block")
_OF_STACK = ("enters", "shared", "returns", "mask")


def _stacks(raw: Mapping[str, Any]) -> tuple[Stack, ...]:
    if "stacks" not in raw:
        return (_stack("", raw, STEM),)
    if not isinstance(raw["stacks"], Mapping) or not raw["stacks"]:
        raise FusionError("stacks is no mapping of names to stem and block")
    stacks = []
    for number, (name, entry) in enumerate(raw["stacks"].items()):
        place = f"stacks.{name}"
        _keys(entry, place, _STACK, (*_STACK, *_OF_STACK))
        stacks.append(_stack(f"{place}.", entry, f"{name}.{STEM}" if number else STEM))
    return tuple(stacks)


def _stack(place: str, raw: Mapping[str, Any], stem_name: str) -> Stack:
    for key in ("shared", "returns"):
        if not isinstance(raw.get(key, []), list):
            raise FusionError(f"{place}{key} is no list")
    stem, block = _section(f"{place}{STEM}", raw[STEM]), _section(f"{place}block", raw["block"])
    if "{l}" not in block.path:
        raise FusionError(f"{place}block.path has no {{l}}, which stands for the number of a block")
    given: dict[str, Any] = {key: tuple(raw[key]) for key in ("shared", "returns") if key in raw}
    given |= {key: str(raw[key]) for key in ("enters", "mask") if key in raw}
    return Stack(stem, block, stem_name, **given)


def parse_family(text: str) -> Family:
    """Reads a family from YAML text; see library/*.yaml for the keys.

    Raises:
        GrammarError: a malformed dimension string; names its key.
        FusionError: a key that is missing, unknown or of the wrong kind.
        yaml.YAMLError: it is not YAML.
    """
    raw = yaml.load(text, _LOADER)
    needed = _NEEDED if isinstance(raw, Mapping) and "stacks" in raw else (*_NEEDED, *_STACK)
    _keys(
        raw,
        "the family",
        needed,
        (*needed, "when", "offset", "unitwise", *(("stacks",) if needed is _NEEDED else _OF_STACK)),
    )
    if raw["norm"] not in get_args(Norm):
        raise FusionError(f"norm: '{raw['norm']}' is not {' or '.join(get_args(Norm))}")
    if raw.get("offset", 0) not in (0, 1):
        raise FusionError(f"offset: '{raw['offset']}' is not 0 or 1, which norms add to their weights")
    for key in ("sizes", "when", "unitwise"):
        if not isinstance(raw.get(key, {}), Mapping):
            raise FusionError(f"{key} is no mapping")
    for path, values in raw.get("unitwise", {}).items():
        if not isinstance(values, list):
            raise FusionError(f"unitwise.{path}: '{values}' is no list of values")
    for key in ("models", "fixed"):
        if not isinstance(raw[key], list):
            raise FusionError(f"{key} is no list")
    family = Family(
        name=raw["name"],
        models=tuple(raw["models"]),
        when=dict(raw.get("when", {})),
        norm=raw["norm"],
        sizes=dict(raw["sizes"]),
        fixed=frozenset(raw["fixed"]),
        stacks=_stacks(raw),
        tail=_section(TAIL, raw[TAIL]),
        offset=raw.get("offset", 0),
        unitwise={path: tuple(values) for path, values in raw.get("unitwise", {}).items()},
    )
    for part in (*(part for stack in family.stacks for part in (stack.stem, stack.block)), family.tail):
        groups = {
            group for dims in part.parameters.values() for dim in dims for s in dim.segments for group in s.groups
        }
        for group in sorted(groups - family.sizes.keys()):
            raise FusionError(f"sizes lacks the key {group}, by which units are grouped")
    return family


def read_family(source: "Family | str | Path | None") -> Family | None:
    """A family that a user has written.

    Args:
        source: the path of a YAML file; a Family, or None, is returned as it is.

    Raises:
        FusionError: no such file, no YAML (names the line), a key that is missing, unknown or of the wrong kind, a
            dimension string that is not in the grammar (names the key).
    """
    if source is None or isinstance(source, Family):
        return source
    try:
        return parse_family(Path(source).read_text())
    except FileNotFoundError as error:
        raise FusionError(f"there is no family file {source}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise FusionError(f"{source} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise FusionError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    except FusionError as error:
        raise type(error)(f"{source}: {error}") from error


@functools.cache
def library() -> Mapping[str, Family]:
    """The families that ship with fusionpl, by name."""
    files = (resources.files("fusionpl.families") / "library").iterdir()
    families = (parse_family(file.read_text()) for file in files if file.name.endswith(".yaml"))
    return {family.name: family for family in sorted(families, key=lambda family: family.name)}


def attribute(model: object, path: str) -> Any:
    """What stands at a dotted path on a model, such as `blocks.0.attn.num_heads`; None where there is nothing."""

    def step(owner: Any, part: str) -> Any:
        if part.isdigit() and hasattr(owner, "__getitem__"):
            return owner[int(part)] if int(part) < len(owner) else None
        if isinstance(owner, Mapping):
            return owner.get(part)
        return getattr(owner, part, None)

    return functools.reduce(step, path.split("."), model)


def is_bare(model: object) -> bool:
    """Whether a model is an encoder without a head: of transformers one that is its own base, such as `BertModel`, of
    timm one with `num_classes=0`."""
    own_base = attribute(model, "base_model_prefix") not in (None, "") and attribute(model, "base_model") is model
    decoder = getattr(model, "get_output_embeddings", lambda: None)  # T5 for generation is its own base, too
    return (own_base and decoder() is None) or attribute(model, "num_classes") == 0


def family_of(model: object) -> Family:
    """The family of a model, by its class.

    Raises:
        FusionError: no family knows the class, or a model of its configuration; the message names the nearest.
    """
    classes = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__}
    nearest = [family for family in library().values() if classes & set(family.models)]
    nearest.sort(key=lambda family: -len(family.when))  # what says more of a model is nearer to it
    for family in nearest:
        if all(attribute(model, path) == it for path, it in family.when.items()):
            return family
    if is_bare(model) and hasattr(model, "base_model"):
        module = type(model).__module__
        for family in library().values():
            bare = family.without_head(str(attribute(model, "base_model_prefix")))
            with_head = any(name.rpartition(".")[0] == module for name in family.models)
            if with_head and all(attribute(model, path) == it for path, it in bare.when.items()):
                return bare
    raise FusionError(f"no family for {_unknown(model, nearest)}")


_DRAFTS = "`python -m fusionpl.cli.family MODEL --output my.yaml` drafts one for --family my.yaml, see docs/families.md"


def _unknown(model: object, nearest: Sequence[Family]) -> str:
    """What is said of a model that no family describes, or only with other settings (`nearest`)."""
    cls = type(model)
    unmet = {family.name: [f"{path} is {it}" for path, it in family.when.items() if attribute(model, path) != it]
             for family in nearest}  # fmt: skip
    if nearest:
        least = min(map(len, unmet.values()))
        ways = " or ".join(
            f"{name} ({', '.join(settings)})" for name, settings in unmet.items() if len(settings) == least
        )
        return f"this {cls.__qualname__}, but for {ways}; {_DRAFTS}"
    names = [name.rpartition(".") for family in library().values() for name in family.models]
    beside = [name for module, _, name in names if module == cls.__module__]
    if beside:
        return f"{cls.__qualname__}, but for {', '.join(beside)} (finetune.py gives a head to an encoder that has none)"
    near = difflib.get_close_matches(cls.__qualname__, [name for *_, name in names], n=1, cutoff=0.5)
    return f"{cls.__module__}.{cls.__qualname__}{''.join(f', nearest is {name}' for name in near)}; {_DRAFTS}"
