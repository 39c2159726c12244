"""The data of a fused model whose parents had data of their own, where it is trained or measured again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from fusionpl.cli.own_data import Own, data_words, read_data
from fusionpl.cli.parsing import WHICH, configs_in
from fusionpl.errors import FusionError
from fusionpl.models.folders import head_name
from fusionpl.models.hub import named
from fusionpl.options import read_yaml, settings_in
from fusionpl.training.tasks import task_named


def own_again(argv: Sequence[str], origin: Mapping[str, Any], args: Namespace) -> Own | None:
    """The data of each parent of a fused model that is trained or measured again; None where they had one set, the
    command line asks for another set or task, or each head has its own (see `own_of_heads`).

    Args:
        argv: the command line, whose options of data hold for all.
        origin: the settings of the run that made the model.
        args: what the parser read of the command line.
    """
    own, data = args.own_data or origin.get("own_data"), origin.get("data", {})
    if not own or isinstance(own, Mapping) or args.task != task_named(origin.get("task", "image-classification")):
        return None
    if any(args.data.get(key) != data.get(key) for key in ("path", "classes")):
        return None
    return [read_data(args.task, each | _general(argv), data_words(argv)) for each in own]


def own_of_heads(
    argv: Sequence[str], origin: Mapping[str, Any], args: Namespace, folders: Mapping[str, Path]
) -> dict[str, dict[str, Any]]:
    """The data of each head of a fusion with labels separate.

    Args:
        argv: the command line, whose options of data hold for all.
        origin: the settings of the run that made the models: in `own_data` options for each by the names of parents or
            in their order, with the `task` of each where they have several; else one set for all in `data`.
        args: what the parser read of the command line.
        folders: name of a head -> folder of its model.

    Returns:
        Name of a head, in the order of the parents -> its task, as `task`, and options of data.

    Raises:
        FusionError: they are of other heads, or an option means one model, or one set of data.
    """
    _check_one_each(argv, args, folders)
    given, shared = args.own_data or origin.get("own_data"), origin.get("data")
    parents = named(origin.get("parents", []))
    if not given and shared:
        given = dict.fromkeys(parents, shared)
    own = dict(given) if isinstance(given, Mapping) else dict(zip(parents, given or [], strict=False))
    names: list[str] = []
    for name in own:
        names.append(head_name(name, names))
    if {*names} != {*folders}:
        raise FusionError(
            f"the heads of {args.model} are {', '.join(folders)}, and own_data says of {', '.join(names) or 'none'} "
            "which data they are for; give --own-data '{NAME: {path: ...}, ...}' with all of them"
        )
    data = {}
    for name, options in zip(names, own.values(), strict=True):
        task = task_named(options.get("task", args.task))
        known = {key: value for key, value in options.items() if key != "task"}
        data[name] = {"task": task, **read_data(task, known | _general(argv), data_words(argv))}
    return data


def fusion_behind(origin: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the fusion that a run goes back to, through finetunings of it; nothing where it goes back to
    none."""
    while "parents" not in origin and origin.get("model"):
        origin = settings_in(origin["model"])
    return origin if "parents" in origin else {}


def _check_one_each(argv: Sequence[str], args: Namespace, folders: Mapping[str, Path]) -> None:
    """Refuses options that mean one model, or one set of data."""
    first = next(iter(folders.values()))
    if args.push_to is not None:
        raise FusionError(
            f"--push-to takes one model, and {args.model} holds {len(folders)}; leave it out, and upload each "
            "model-NAME/ to a repository of its own"
        )
    for option in ("--data.path", "--data.classes"):
        if any(word.partition("=")[0] == option for word in argv):
            raise FusionError(
                f"{option} would be one for all heads of {args.model}; finetune one alone, such as --model {first}, or "
                "give --own-data '{NAME: {path: ...}, ...}'"
            )


def _general(argv: Sequence[str]) -> dict[str, Any]:
    """Options of data in the files of `--config` that hold for all sets: in a run's own file they stand in each."""
    trees = [read_yaml(file) for _, file in configs_in(argv)]
    options = {key: value for tree in trees if "own_data" not in tree for key, value in tree.get("data", {}).items()}
    return {key: value for key, value in options.items() if key not in WHICH}
