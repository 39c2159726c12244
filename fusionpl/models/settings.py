"""What parents' settings say of their functions where no tensor shows it."""

import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import zip_longest
from typing import Any, Literal, cast, get_args

import torch
import transformers
import yaml
from torch import Tensor, nn

from fusionpl.errors import FusionError
from fusionpl.models.classes import PartialHead

Outcome = Literal["unused", "tensors", "carried", "warned", "refused"]
# In evaluation all of them are the identity.
_IDENTITIES = ("Dropout", "DropPath", "Identity", "PatchDropout")
# Buffers that follow from settings or sizes, which are compared as such.
_DERIVED = ("position_ids", "inv_freq", "embed_scale")
# How the names of methods begin that a forward pass does not call.
_BESIDES = ("__", "_init", "_load", "_save", "extra_repr", "from_", "get_", "init_", "load_", "reset_", "save_", "set_")
_LONGEST = 60  # characters of a value in a message


@dataclass(frozen=True)
class Judgement:
    """What happens when parents differ in a setting.

    Attributes:
        outcome: see settings.yaml.
        why: in some words.
        elsewhere: where it is compared, if not here.
    """

    outcome: Outcome
    why: str
    elsewhere: str = ""


@functools.cache
def judgements(kind: Literal["config", "modules"]) -> Mapping[str, Judgement]:
    """What happens when parents differ, setting by setting.

    Args:
        kind: settings of transformers' configurations, or attributes of other modules.
    """
    text = (resources.files("fusionpl.models") / "settings.yaml").read_text()
    by_name: dict[str, Judgement] = {}
    for group in yaml.safe_load(text):
        assert group["is"] in get_args(Outcome), group
        for name in group.get(kind, []):
            assert name not in by_name, name
            by_name[name] = Judgement(group["is"], group["why"], group.get("where", ""))
    return by_name


def compare_settings(models: Mapping[str, nn.Module], anchor: str) -> list[str]:
    """Compares what no tensor shows: classes, buffers, settings.

    Args:
        models: name -> parent, of one family, with parameters that fit together; those on the meta device will do.
        anchor: the name of the one whose settings the fused model has.

    Returns:
        A line for each difference with which the fused model computes something other than that parent does.

    Raises:
        FusionError: a difference with which no fused model means anything, naming both parents and what differs.
    """
    lines = []
    for name, model in models.items():
        if name == anchor:
            continue
        pair = _Pair(anchor, models[anchor], name, model)
        pair.check_buffers()
        differences = dict.fromkeys([*pair.classes(), *pair.attributes(), *pair.config()])
        if differences:
            lines.append(
                f"{anchor} and {name} compute differently, and the fused model computes as {anchor} does: "
                f"{'; '.join(differences)}"
            )
    return lines


@dataclass(frozen=True)
class _Pair:
    """The anchor and another parent."""

    anchor: str
    ours: nn.Module
    name: str
    theirs: nn.Module

    def classes(self) -> Iterator[str]:
        """Modules that are run by another function."""
        for path, a, b in self._modules():
            if _runs_alike(a, b) or {type(a), type(b)} == {nn.Linear, PartialHead}:  # one knows more classes
                continue
            if any(True for module in (a, b) for _ in module.parameters()):
                what = f"'{path}'" if path else "the model"
                raise FusionError(
                    f"parents of different function: {what} is a {_class(a)} in {self.anchor} and a {_class(b)} in "
                    f"{self.name}, whose tensors are alike and whose functions are not; take parents of one class"
                )
            if not self._described(a):
                yield self._summary(_without_index(path), type(a).__name__, type(b).__name__, "activation")

    def check_buffers(self) -> None:
        """Refuses buffers of other values."""
        theirs = dict(self.theirs.named_buffers())
        for path, a in self.ours.named_buffers():
            b = theirs.get(path)
            if b is None or path.endswith(_DERIVED):
                continue
            if a.shape != b.shape or not _equal(a, b):
                raise FusionError(
                    f"parents of different function: the buffer '{path}' of {self.name} is not that of {self.anchor}, "
                    "and buffers are not aligned; give both the same"
                )

    def attributes(self) -> Iterator[str]:
        """Attributes of modules that no configuration of transformers describes."""
        known = judgements("modules")
        for path, a, b in self._modules():
            if self._described(a):
                continue
            ours_have, theirs_have = _plain(a), _plain(b)
            for key, ours, theirs in _differing(ours_have, theirs_have):
                if not {key} <= ours_have.keys() & theirs_have.keys():
                    continue  # the class says it
                if key == "scale" and getattr(a, "head_dim", None) != getattr(b, "head_dim", None):
                    continue  # it follows from the size of the heads
                yield from self._judged(_without_index(f"{path}.{key}".strip(".")), known.get(key), ours, theirs)

    def config(self) -> Iterator[str]:
        """Settings of transformers' configurations."""
        if not all(isinstance(model, transformers.PreTrainedModel) for model in (self.ours, self.theirs)):
            return
        known = judgements("config")
        ours, theirs = (dict(_flat(cast(Any, model).config.to_dict())) for model in (self.ours, self.theirs))
        for key, a, b in _differing(ours, theirs):
            judged = known.get(key.rpartition(".")[2].partition("[")[0])
            if key.endswith("classifier_pooling") and not type(self.ours).__name__.endswith("Classification"):
                continue  # nothing else reads it
            yield from self._judged(key, judged, a, b)

    def _judged(self, key: str, judged: Judgement | None, ours: Any, theirs: Any) -> Iterator[str]:
        if judged is None:
            if not isinstance(ours, int) or isinstance(ours, bool) or self._same_shapes():
                yield self._summary(key, ours, theirs, "and what that does is not known here")
        elif judged.outcome == "warned":
            yield self._summary(key, ours, theirs, judged.why)
        elif judged.outcome == "refused" and not judged.elsewhere:
            summary = self._summary(key, ours, theirs, judged.why)
            raise FusionError(f"parents of different function: {summary}; take parents that are alike in it")

    def _described(self, module: nn.Module) -> bool:
        """Whether a configuration of transformers has all settings of a module."""
        home = type(module).__module__
        return isinstance(self.ours, transformers.PreTrainedModel) and home.startswith(("torch.", "transformers."))

    def _same_shapes(self) -> bool:
        a, b = ([tuple(parameter.shape) for parameter in model.parameters()] for model in (self.ours, self.theirs))
        return a == b

    def _summary(self, key: str, ours: Any, theirs: Any, why: str) -> str:
        return f"{key} is {_shown(ours)} in {self.anchor} and {_shown(theirs)} in {self.name} ({why})"

    def _modules(self) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        theirs = dict(self.theirs.named_modules())
        for path, module in self.ours.named_modules():
            if path in theirs:
                yield path, module, theirs[path]


def _runs_alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules are run by one function, as far as classes say."""
    if hasattr(a, "_hf_hook") or hasattr(b, "_hf_hook"):  # accelerate's, around the module's own forward
        return True
    if vars(a).get("forward") != vars(b).get("forward"):
        return False
    kinds = [type(module) for module in (a, b)]
    homes, names = [kind.__module__ for kind in kinds], [kind.__name__ for kind in kinds]
    if _same_methods(*kinds) or all(any(kind in name for kind in _IDENTITIES) for name in names):
        return True
    if names[0] == names[1] and {home.partition(".")[0] for home in homes} == {"torch", "timm"}:
        return True  # timm's norms are torch's, faster
    # Two classes of transformers that one family describes (Llama and Mistral) are one function but for settings.
    return homes[0] != homes[1] and all(home.startswith("transformers.models.") for home in homes)


def _same_methods(a: type, b: type) -> bool:
    """Whether what both classes can do they do alike, but for how they are built, read and written."""
    return a is b or all(
        inspect.getattr_static(a, name) is inspect.getattr_static(b, name)
        for name in {*dir(a)} & {*dir(b)}
        if callable(getattr(a, name)) and not name.startswith(_BESIDES)
    )


def _class(module: nn.Module) -> str:
    own = " with a forward of its own" if "forward" in vars(module) else ""
    return f"{type(module).__module__.partition('.')[0]} {type(module).__qualname__}{own}"


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b.to(a)) or bool(a.is_floating_point() and torch.allclose(a, b.to(a), equal_nan=True))


def _plain(module: nn.Module) -> dict[str, Any]:
    """Public attributes that are plain values or functions."""
    attributes: dict[str, Any] = {}
    for key, value in vars(module).items():
        if key.startswith("_") or key in ("training", "forward", "config", "default_cfg", "pretrained_cfg"):
            continue
        if isinstance(value, bool | int | float | str | tuple | list | type(None)):
            attributes[key] = value
        elif callable(value) and not isinstance(value, nn.Module):
            attributes[key] = getattr(value, "__qualname__", type(value).__qualname__)
    return attributes


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings with those of towers (`text_config`) among them."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and key.endswith("_config"):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Settings that differ, what is not set being as good as off; of lists, one a layer, where both have the layer."""
    for key in dict.fromkeys((*ours, *theirs)):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            for name, left, right in _differing(a, b):
                yield f"{key}[{name}]", left, right
        elif isinstance(a, list) and isinstance(b, list) and key.endswith("layer_types"):
            if a[: len(b)] != b[: len(a)]:
                layer = next(index for index, (x, y) in enumerate(zip_longest(a, b)) if x != y)
                yield f"{key}[{layer}]", a[layer], b[layer]
        elif a != b and (a or b):
            yield key, a, b


def _without_index(path: str) -> str:
    """A path with `*` for the numbers of blocks, so that a difference of all blocks is one."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
