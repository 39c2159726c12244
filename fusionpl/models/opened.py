"""Models opened without reading a weight, and read tensor by tensor."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from fusionpl.errors import FusionError, reason
from fusionpl.models.adapters import is_adapter
from fusionpl.models.build import transformers_class
from fusionpl.models.folders import model_config, model_folder, tell_of_adapter
from fusionpl.models.quiet import without_cache
from fusionpl.models.tensors import Tensors


@dataclass(frozen=True)
class ModelFolder:
    """A model whose weights are still in its files.

    Attributes:
        path: the folder.
        module: the model, with its buffers, in evaluation mode; its parameters are on the meta device, in the files'
            types.
        tensors: what the files hold.
        names: parameter -> its name in the files.
        buffers: the names there of what is kept besides.
    """

    path: Path
    module: nn.Module
    tensors: Tensors
    names: Mapping[str, str]
    buffers: tuple[str, ...]

    def read(self, parameter: str) -> Tensor:
        """A parameter, in the type it is kept in."""
        return self.tensors[self.names[parameter]]


def open_model(source: str | Path, *, allow_pickle: bool = False) -> ModelFolder | None:
    """Opens a model folder without reading a weight.

    Args:
        source, allow_pickle: see `load_model`.

    Returns:
        The model, or None where its library does more on loading than rename tensors (merges or quantises them, say),
        and for an adapter.

    Raises:
        FusionError: see `load_model`.
    """
    path = model_folder(str(source), allow_pickle=allow_pickle)
    config = model_config(path)
    if is_adapter(path):
        return None
    tell_of_adapter(path)
    tensors = Tensors(path, allow_pickle=allow_pickle)
    if "quantization_config" in config:
        return None
    check_numbers(tensors)
    module = _timm_skeleton(path, config) if "architecture" in config else _transformers_skeleton(path, config, tensors)
    if "architecture" in config:
        names: dict[str, str] | None = {name: name for name in tensors}
        strange = sorted(tensors.keys() - module.state_dict().keys())
        if strange:
            raise FusionError(f"{tensors.source} holds {strange[0]}, which {config['architecture']} has not")
    else:
        names = _renamed(cast(Any, module), tensors)
    if names is None:
        return None
    sources = _complete(module, tensors, names)
    _settle(module, tensors, sources, names)
    buffers = tuple(names[name] for name in module.state_dict() if name in names and name not in sources)
    return ModelFolder(path, module.eval(), tensors, sources, buffers)


def check_numbers(tensors: Tensors) -> None:
    """Refuses weights that are numbers only together with scales that lie elsewhere: float8 and integers.

    Raises:
        FusionError: naming the first.
    """
    for name, (file, _, dtype) in tensors.entries.items():
        if dtype.itemsize == 1 if dtype.is_floating_point else name.endswith("weight"):
            raise FusionError(f"{file}: {name} is quantised ({str(dtype).removeprefix('torch.')}); dequantise it first")


def misfit(file: Path, name: str, held: Any, wanted: Any) -> FusionError:
    """The error of a tensor whose shape is not the one that config.json asks for."""
    return FusionError(f"{file}: {name} is {tuple(held)}, but by config.json it is {tuple(wanted)}")


def left_out(cls: type[nn.Module], tensors: Tensors) -> dict[str, bool]:
    """Arguments of a transformers class that leave out the pooler of an encoder published without one."""
    takes = "add_pooling_layer" in inspect.signature(cls).parameters
    return {"add_pooling_layer": False} if takes and not any("pooler." in name for name in tensors) else {}


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, modules are made without memory for their parameters; buffers are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _timm_skeleton(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    try:
        with parameters_on_meta():
            model: nn.Module = timm.create_model(f"local-dir:{folder}")
    except Exception as error:  # whatever a broken config makes a constructor raise
        raise FusionError(
            f"{folder}/config.json: timm cannot build {config['architecture']}: {reason(error)}"
        ) from error
    return model


def _transformers_skeleton(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> nn.Module:
    cls: Any = transformers_class(config["architectures"][0])
    try:
        with parameters_on_meta():
            model: nn.Module = cls(cls.config_class.from_pretrained(folder), **left_out(cls, tensors))
    except Exception as error:  # whatever a broken config makes a constructor raise
        raise FusionError(f"{folder}: transformers cannot load it: {reason(error)}") from error
    without_cache(model)
    return model


def _renamed(module: Any, tensors: Tensors) -> dict[str, str] | None:
    """Name in memory -> name in the files, where transformers does no more than rename."""
    transforms = get_model_conversion_mapping(module)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    wanted = module.state_dict()
    names: dict[str, str] = {}
    for name in tensors:
        target, converter = rename_source_key(name, renamings, converters, module.base_model_prefix, wanted)
        if converter is not None:
            return None
        names[target] = name
    return {name: source for name, source in names.items() if name in wanted}


def _complete(module: nn.Module, tensors: Tensors, names: Mapping[str, str]) -> dict[str, str]:
    """Name of every parameter -> its name in the files, under whichever of its own names it stands there.

    Of names that the class ties, transformers takes those apart for which the files hold different tensors, whatever
    config.json says: so does this.

    Raises:
        FusionError: a parameter is not there or has another shape.
    """
    groups: dict[int, list[str]] = {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    order = list(getattr(module, "all_tied_weights_keys", {}))  # without the names that the others are tied to
    ranks = {name: order.index(name) if name in order else -1 for name in parameters}
    for name, parameter in sorted(parameters.items(), key=lambda item: (ranks[item[0]], item[0])):
        groups.setdefault(id(parameter), []).append(name)
    sources: dict[str, str] = {}
    for group in groups.values():
        first = next((names[name] for name in group if name in names), None)
        if first is None:
            raise FusionError(f"{tensors.source} lacks {min(group)}")
        for name in group:
            source = names.get(name, first)
            held, wanted = tensors.entries[source].shape, parameters[name].shape
            if held != wanted:
                raise misfit(tensors.source, source, held, wanted)
            sources[name] = first if source == first or torch.equal(tensors[source], tensors[first]) else source
    return sources


def _settle(module: nn.Module, tensors: Tensors, sources: Mapping[str, str], names: Mapping[str, str]) -> None:
    """Gives parameters on the meta device the types of the files, and buffers the values that are kept there."""
    made: dict[str, nn.Parameter] = {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        source = sources[name]
        if source not in made:
            empty = torch.empty(parameter.shape, dtype=tensors.entries[source].dtype, device="meta")
            made[source] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = made[source]
    for name, buffer in module.named_buffers():
        if name in names and tensors.entries[names[name]].shape == buffer.shape:
            buffer.copy_(tensors[names[name]])
