"""The data of commands, and what they take from models."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jsonargparse import Namespace
from torch import nn

from fusionpl.cli.tasks import NOT_SAID
from fusionpl.datamodules.base import PIXELS, FixedSplits
from fusionpl.datamodules.joint import LISTED, JointSplits
from fusionpl.errors import FusionError
from fusionpl.models.classes import missing_classes
from fusionpl.models.folders import model_folder
from fusionpl.models.load import load_model
from fusionpl.models.opened import open_model
from fusionpl.models.pipelines import check_tokenizers
from fusionpl.models.processors import image_processing
from fusionpl.models.save import class_names
from fusionpl.models.sentence import check_pooling, sentence_pooling
from fusionpl.models.tokenizers import load_tokenizer
from fusionpl.training.data import DATA_MODULES
from fusionpl.training.tasks import TASKS, TaskName


def data_module(task: TaskName, config: Any, seed: int, tokenizer: Any, models: Sequence[str]) -> FixedSplits:
    """The data of a task.

    Args:
        task: which.
        config: the options under `data`.
        seed, tokenizer: see `DATA_MODULES`.
        models: that are for it.

    Raises:
        FusionError: nothing says which data they are; sentence encoders that pool differently.
    """
    if config.path == NOT_SAID or (config.path == "glue" and config.name is None):
        raise FusionError(
            f"nothing says which data {models[0]} is for; give --data.path: a file, a folder or a hub id of samples "
            "like those that it was trained on"
        )
    if task == "feature-extraction" and config.pooling == "auto":
        poolings = {model: sentence_pooling(model_folder(model, weights=False)) for model in models}
        check_pooling(poolings)
        config = replace(config, pooling=poolings[models[0]] or "auto")
    return DATA_MODULES[task](config, seed, tokenizer)


def sets_of_each(
    options: Namespace, parents: Mapping[str, str], tokenizer: Any, seed: int = 0
) -> dict[str, FixedSplits]:
    """Each parent's data, by its name.

    Args:
        options: of a command, with `task`, `own_data` and `allow_pickle`.
        parents: name -> where the parent comes from.
        tokenizer: the anchor's.
        seed: decides, with the epoch, the order of each one's training data.

    Raises:
        FusionError: see `data_module`.
    """
    made, every = TASKS[options.task].data, [*parents.values()]
    return {
        name: data_module(options.task, made(**given), seed, tokenizer, [path, *every])
        for (name, path), given in zip(parents.items(), options.own_data, strict=True)
    }


def data_of_each(
    options: Namespace, parents: Mapping[str, str], tokenizer: Any, anchor: str, seed: int = 0
) -> JointSplits:
    """The data of each parent, side by side; see `JointSplits`.

    Args:
        options, parents, tokenizer, seed: see `sets_of_each`.
        anchor: its name.

    Raises:
        FusionError: see `data_module` and `JointSplits`.
    """
    known = {}
    for name, path in parents.items():
        opened = open_model(path, allow_pickle=options.allow_pickle)
        model = load_model(path, allow_pickle=options.allow_pickle) if opened is None else opened.module
        known[name] = class_names(model)
    return JointSplits(sets_of_each(options, parents, tokenizer, seed), known, anchor)


def check_known(parents: Mapping[str, nn.Module], data: FixedSplits) -> None:
    """Raises FusionError where a parent knows none of the classes of one set of data for all.

    Args:
        parents: by their names, brought to the classes of all.
        data: before a model is followed.
    """
    for name, parent in parents.items():
        missing, every = missing_classes(parent), class_names(parent) or ()
        if missing is None or not data.class_names:
            continue
        own = [one for one, lacks in zip(every, missing.tolist(), strict=True) if not lacks]
        if not {*own} & {*data.class_names}:
            raise FusionError(
                f"{name} knows none of the classes of '{data.config.path}' (its own are "
                f"{', '.join(own[:LISTED])}{', ...' * (len(own) > LISTED)}); give the data of each parent, a path for "
                "each, in their order: --data.path A B"
            )


def data_of(options: Namespace, models: Mapping[str, str]) -> FixedSplits:
    """The data of models that are measured side by side, with the first one's tokenizer; warns of others that are not
    the same and cut text alike.

    Args:
        options: of a command, with `task` and `data`.
        models: name -> where the model comes from.

    Raises:
        FusionError: see `data_module`; models read text otherwise.
    """
    tokenizers = {name: load_tokenizer(path) for name, path in models.items()}
    tokenizer = common_tokenizer(tokenizers, 0, renumbered=False)
    data = data_module(options.task, options.data, 0, tokenizer, list(models.values()))
    for line in check_tokenizers(tokenizers, renumbered=False, texts=data.texts()):
        print(f"warning: {line}")
    return data


def follow(data: FixedSplits, model: nn.Module, source: str) -> None:
    """Lets data take from a model, and from what its folder says of images, what the options leave open.

    Raises:
        FusionError: see `image_processing`.
    """
    data.follow(model, image_processing(source) if data.reads == PIXELS else None)


def common_tokenizer(tokenizers: Mapping[str, Any], anchor: int, *, renumbered: bool = True) -> Any:
    """The anchor's tokenizer, or None; before there are data that could show more.

    Args:
        tokenizers: of the parents, by their names.
        anchor: index of the anchor.
        renumbered: see `check_tokenizers`.

    Raises:
        FusionError: other parents read text otherwise.
    """
    check_tokenizers(tokenizers, renumbered=renumbered)
    return list(tokenizers.values())[anchor]
