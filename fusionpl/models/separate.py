"""Models of one trunk with a head each: their heads side by side in one network, on disk, and run in one pass."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from fusionpl.calibration.forward import Batch, eval_mode, logits
from fusionpl.errors import FusionError
from fusionpl.families.axes import Binding
from fusionpl.families.binding import bind
from fusionpl.families.family import Family
from fusionpl.models.classes import head_parameters, with_rows
from fusionpl.models.folders import head_name, heads_in
from fusionpl.models.labels import CLASSES, NUMBERS, Kind, kind_of
from fusionpl.models.load import load_model
from fusionpl.models.resized import relabelled
from fusionpl.models.save import class_names


@dataclass(frozen=True)
class Head:
    """The head of one model among those of several, which stand side by side in one network.

    Attributes:
        name: of the model.
        columns: the outputs of the network that are its own.
        kind: what they mean.
        of: the model as it was, whose labels they are.
    """

    name: str
    columns: slice
    kind: Kind
    of: nn.Module

    @property
    def labels(self) -> list[str]:
        """A name for each output: the model's own, or its number."""
        count = self.columns.stop - self.columns.start
        return list(class_names(self.of) or map(str, range(count)))


def heads_of(models: Mapping[str, nn.Module], bindings: Iterable[Binding]) -> tuple[Head, ...]:
    """The heads of models (name -> model), one behind the other, under names that folders can have.

    Raises:
        FusionError: a model has none, or one that is no linear map.
    """
    heads: list[Head] = []
    for (name, model), binding in zip(models.items(), bindings, strict=True):
        modules = {key.rpartition(".")[0] for key in head_parameters(binding)}
        if not modules or not all(isinstance(model.get_submodule(module), nn.Linear) for module in modules):
            raise FusionError(
                f"{name} has no linear map that puts out classes, tags or numbers last, so there is no head to keep "
                "apart; leave labels out"
            )
        start, size = heads[-1].columns.stop if heads else 0, binding.axes["classes"].size
        kind = kind_of(model)
        kind = NUMBERS if kind == CLASSES and size == 1 else kind  # one of one says nothing
        heads.append(Head(head_name(name, [head.name for head in heads]), slice(start, start + size), kind, model))
    return tuple(heads)


def side_by_side(
    head: Head, heads: Iterable[Head], family: Family | None = None
) -> tuple[nn.Module, Callable[[str, Tensor], Tensor]]:
    """The model of a head, with outputs for all heads of which it gives its own.

    Args:
        head: of these heads.
        heads: all of them.
        family: see `bind`.

    Returns:
        See `with_classes`.
    """
    names = [f"{one.name}/{label}" for one in heads for label in one.labels]
    count = head.columns.stop - head.columns.start
    rows = torch.full((len(names),), count)
    rows[head.columns] = torch.arange(count)
    new, moved = with_rows(head.of, names, rows, count, family)
    if isinstance(new, transformers.PreTrainedModel):
        new.config.problem_type = None  # of several kinds; each head knows its own
    return new, moved


def model_of(network: nn.Module, head: Head, binding: Binding) -> nn.Module:
    """An ordinary model with one of the heads of a network; all its other parameters are the network's own.

    Args:
        network: with several heads side by side.
        head: which.
        binding: the network's.
    """
    old: Any = head.of
    model: Any = relabelled(network, head.labels)
    if isinstance(old, transformers.PreTrainedModel):
        for setting in ("id2label", "label2id", "problem_type"):
            setattr(model.config, setting, getattr(old.config, setting))
    elif class_names(old) is None:
        del model.pretrained_cfg["label_names"]
    dims = head_parameters(binding)
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        parameter = network.get_parameter(name)
        if name in dims:
            start, stop = head.columns.start, head.columns.stop
            own = parameter.detach().narrow(dims[name], start, stop - start).clone()
            parameter = nn.Parameter(own, requires_grad=parameter.requires_grad)
        _put(model, name, parameter)
    return cast(nn.Module, model.eval())


def load_models(
    source: str | Path, *, allow_pickle: bool = False, family: Family | None = None
) -> dict[str, nn.Module]:
    """Loads the models of a fusion with `labels: separate`, which share one trunk in memory.

    Args:
        source: a run folder that holds a `model-NAME/` for each.
        allow_pickle: see `load_model`.
        family: what they are, where the library does not say.

    Returns:
        Name -> model, in evaluation mode; all but their heads are the same parameters. `predict` takes a batch through
        all of them at once.

    Raises:
        FusionError: the folder holds no such models, or their trunks are not the same; see `load_model`.
    """
    folders = heads_in(Path(source).expanduser())
    if not folders:
        raise FusionError(f"{source} holds no model-NAME/ of a fusion with labels separate; use fusionpl.load_model")
    models = {name: load_model(folder, allow_pickle=allow_pickle) for name, folder in folders.items()}
    (first, shared), *others = models.items()
    trunk = _trunk(shared, family)
    for name, model in others:
        own = _trunk(model, family)
        for key in [*trunk, *(key for key in own if key not in trunk)]:
            ours, theirs = trunk.get(key), own.get(key)
            if ours is None or theirs is None or not torch.equal(ours, theirs):
                raise FusionError(
                    f"the models in {source} share no trunk: '{key}' of model-{name} is not that of model-{first}; "
                    "load each with fusionpl.load_model"
                )
            _put(model, key, ours)
    return models


def predict(models: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
    """What models that share a trunk put out for a batch, in one pass through it.

    Args:
        models: name -> model: `FusionResult.models`, or what `load_models` gives.
        batch: an image tensor [B, C, H, W], or a mapping of model inputs; `labels` are ignored.

    Returns:
        Name -> logits or numbers, [B, outputs], without gradients; each is what its model puts out by itself.

    Raises:
        FusionError: the models share no trunk.
    """
    first = next(iter(models.values()))
    heads = [[model.get_submodule(name) for model in models.values()] for name in _head_modules(models)]
    sizes = [cast(nn.Linear, head).out_features for head in heads[0]] if heads else None
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(eval_mode(*models.values()))
        for own, *others in heads:
            hook = own.register_forward_hook(partial(_beside, others))
            stack.callback(hook.remove)
        given = logits(first, batch)
    return dict(zip(models, [given] if sizes is None else given.split(sizes, dim=-1), strict=True))


def _beside(others: Iterable[nn.Module], _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """What a head puts out, and beside it what others do of the same."""
    return torch.cat([output, *(other(args[0]) for other in others)], dim=-1)


def _head_modules(models: Mapping[str, nn.Module]) -> list[str]:
    """The linear modules whose parameters models have each for themselves.

    Raises:
        FusionError: other modules have, too.
    """
    (first, one), *others = models.items()
    own = dict(one.named_parameters(remove_duplicate=False))
    names: dict[str, None] = {}
    for name, other in others:
        theirs = dict(other.named_parameters(remove_duplicate=False))
        apart = [key for key in (own | theirs) if own.get(key) is not theirs.get(key)]
        modules = dict.fromkeys(key.rpartition(".")[0] for key in apart)
        linear = theirs.keys() == own.keys() and all(isinstance(one.get_submodule(key), nn.Linear) for key in modules)
        if not linear or len(apart) == len(own):
            raise FusionError(
                f"{first} and {name} share no trunk in memory; take FusionResult.models of a fusion with labels "
                "separate, or what fusionpl.load_models gives"
            )
        names |= modules
    return list(names)


def _trunk(model: nn.Module, family: Family | None) -> dict[str, nn.Parameter]:
    """All parameters but those of heads, ties under each of their names."""
    heads = head_parameters(bind(model, family))
    return {name: one for name, one in model.named_parameters(remove_duplicate=False) if name not in heads}


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = parameter
