"""Models like another, whose parameters are still to come: of other width or depth, or with a decoder of their own."""

import copy
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, cast

import timm
import torch
import transformers
from torch import Tensor, nn

from fusionpl.errors import FusionError, reason
from fusionpl.families.apply import with_parameters
from fusionpl.models.opened import parameters_on_meta
from fusionpl.models.quiet import without_cache

# What configs of transformers call the number of hidden units of an MLP, where it is no multiple of the width.
_HIDDEN = ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim", "d_ff")
# What they call the width of embeddings, which is that of the stream unless they are projected to it.
_EMBEDDED = ("embedding_size", "word_embed_proj_dim")
_HEADS = ("num_attention_heads", "num_key_value_heads")


def resized(
    model: nn.Module, *, times: Fraction = Fraction(1), heads: int | None = None, depth: int | None = None
) -> nn.Module:
    """A model of the same architecture with `times` the stream, heads and hidden units; heads are as wide as before.

    Args:
        model: of timm's `create_model` or of transformers.
        times: by which everything grows or shrinks.
        heads: the model's number of attention heads, of which `times` makes a whole number; None where it is 1.
        depth: the number of blocks; None for as many as before.

    Returns:
        The new model in evaluation mode, its parameters on the meta device, in the types of the other's.

    Raises:
        FusionError: its library can't build it.
    """
    build = _transformers if isinstance(model, transformers.PreTrainedModel) else _timm
    try:
        with parameters_on_meta():
            new_model = build(cast(Any, model), times, heads, depth)
    except (TypeError, ValueError, AssertionError, AttributeError, KeyError, RuntimeError) as error:
        what = f"with {depth} blocks" if depth is not None else f"{float(times):g} times as wide"
        raise FusionError(f"a {type(model).__name__} can't be built {what}: {reason(error)}") from error
    return _like(new_model, model)


def untied(model: nn.Module) -> tuple[nn.Module, dict[str, str]] | None:
    """A model of the same architecture whose decoder is not its embedding.

    Args:
        model: of transformers, with a decoder that is its embedding.

    Returns:
        The new model in evaluation mode, its parameters on the meta device, and each parameter that is new -> its name
        in `model`; None where nothing comes apart.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        return None
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    with parameters_on_meta():
        new_model = _new(model, config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    new = [name for name, _ in new_model.named_parameters() if name not in names.values()]
    return (_like(new_model, model), {name: names[id(model.get_parameter(name))] for name in new}) if new else None


def reshaped(model: nn.Module, config: Any) -> nn.Module:
    """A model of the same class with another config, its parameters on the meta device; see `resized`."""
    with parameters_on_meta():
        new_model = _new(model, config)
    return _like(new_model, model)


def relabelled(model: Any, names: Sequence[str]) -> nn.Module:
    """A model of the same architecture with other classes, its parameters on the meta device; see `resized`."""
    if isinstance(model, transformers.PreTrainedModel):
        config = copy.deepcopy(model.config)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: at for at, name in enumerate(names)}
        return reshaped(model, config)
    new_model: Any = remade(model, num_classes=len(names))
    new_model.pretrained_cfg |= {"num_classes": len(names), "label_names": list(names)}
    return cast(nn.Module, new_model)


def remade(model: Any, **changes: Any) -> nn.Module:
    """A model of timm made again with some arguments changed, its parameters on the meta device; see `resized`."""
    with parameters_on_meta():
        new_model = _of_timm(model, changes)
    return _like(new_model, model)


def refilled(model: nn.Module, empty: nn.Module, moved: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """A model that holds another's parameters, changed.

    Args:
        model: the other; its mode is kept.
        empty: what the model looks like; its parameters may be on the meta device.
        moved: makes a parameter, by its name, of the other's.
    """
    with torch.no_grad():
        state = {name: moved(name, parameter.detach()) for name, parameter in model.named_parameters()}
    return with_parameters(empty, state).train(model.training)


def _new(model: Any, config: Any) -> nn.Module:
    """A model of the same class, with a pooler if the other has one."""
    without_pooler = {"add_pooling_layer": False} if getattr(model, "pooler", True) is None else {}
    new_model: nn.Module = type(model)(config, **without_pooler)
    without_cache(new_model)
    return new_model


def _like(new_model: nn.Module, model: nn.Module) -> nn.Module:
    """Gives the parameters of a model the type of another's, and buffers that are saved what they hold there; others,
    such as the factor of an embedding, follow from the width. What is not tied there comes apart."""
    _part(new_model, model)
    buffers = dict(model.named_buffers())
    device, dtype = next(iter(buffers.values())).device if buffers else None, next(model.parameters()).dtype
    for prefix, owner in new_model.named_modules():
        for key, buffer in owner.named_buffers(recurse=False):
            other = buffers.get(f"{prefix}.{key}" if prefix else key)
            same = other is not None and other.shape == buffer.shape and key not in owner._non_persistent_buffers_set
            owner._buffers[key] = other.clone() if same and other is not None else buffer.to(device)
    for parameter in new_model.parameters():
        parameter.data = parameter.data.to(dtype)
    return new_model.eval()


def _part(new_model: nn.Module, model: nn.Module) -> None:
    """Takes parameters apart that the class ties, and whose names are parameters of their own in another model: of
    files that hold two different tensors."""
    others = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    made: dict[tuple[int, int | None], nn.Parameter] = {}
    for name, parameter in list(new_model.named_parameters(remove_duplicate=False)):
        own = made.setdefault(
            (id(parameter), others.get(name)), nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        )
        owner, _, leaf = name.rpartition(".")
        new_model.get_submodule(owner)._parameters[leaf] = own


def _timm(model: Any, times: Fraction, heads: int | None, depth: int | None) -> nn.Module:
    changes: dict[str, Any] = {}
    if heads is not None:
        changes |= {"embed_dim": int(model.embed_dim * times), "num_heads": int(heads * times)}
    if depth is not None:
        changes["depth"] = depth
    return _of_timm(model, changes)


def _of_timm(model: Any, changes: Mapping[str, Any]) -> nn.Module:
    """A model of timm that is made again, with some arguments changed."""
    if "architecture" not in getattr(model, "pretrained_cfg", {}):
        raise FusionError(
            f"a {type(model).__name__} of another width, depth, or of other classes or channels, needs parents that "
            "were made by create_model of timm"
        )
    args = {**timm.models.get_model_args(model), **changes}
    new_model = cast(Any, timm.create_model(model.pretrained_cfg["architecture"], **args))
    new_model.pretrained_cfg = copy.deepcopy(model.pretrained_cfg)
    return cast(nn.Module, new_model)


def _transformers(model: Any, times: Fraction, heads: int | None, depth: int | None) -> nn.Module:
    config = copy.deepcopy(model.config)
    # Where nothing says how wide a head is, it is the share of the stream.
    if heads is not None:
        embedded = [name for name in _EMBEDDED if getattr(config, name, None) == config.hidden_size]
        config.hidden_size = int(config.hidden_size * times)
        for name in (*_HEADS, *_HIDDEN, *embedded):
            if getattr(config, name, None) is not None:
                setattr(config, name, int(getattr(config, name) * times))
    if depth is not None:
        kinds = getattr(config, "layer_types", None)
        config.num_hidden_layers = depth
        if kinds:
            config.layer_types = [kinds[at % len(kinds)] for at in range(depth)]
    return _new(model, config)
