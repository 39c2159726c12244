"""The data of each parent: what its run says, or its path of several behind `--data.path`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from jsonargparse import Namespace

from fusionpl.cli.parsing import WHICH, configs_in, new_parser, parse_options
from fusionpl.cli.tasks import NOT_SAID
from fusionpl.errors import FusionError
from fusionpl.options import read_yaml, settings_in
from fusionpl.training.tasks import TASKS, task_named

PATH = "--data.path"
# The fused model takes samples as the anchor does.
PREPARED = (
    "image_size", "channels", "normalize", "max_length", "block_size", "mask_probability", "noise", "span_length",
)  # fmt: skip
Own = list[dict[str, Any]]


def one_path(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line with the first path alone of several behind `--data.path`, and all of them."""
    words: list[str] = []
    paths: list[str] = []
    behind = False
    for word in argv:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            behind = option == PATH
            paths = [value] if behind and equals else [] if behind else paths
        elif behind:
            paths.append(word)
            if len(paths) > 1:
                continue
        words.append(word)
    return words, paths


def own_data(argv: Sequence[str], paths: Sequence[str], args: Namespace) -> Own | None:
    """The options of data of each parent; None where one set of data is that of all, and heads are not kept apart.

    Args:
        argv: the command line, see `one_path`.
        paths: behind `--data.path`.
        args: what the parser read of the command line.

    Raises:
        FusionError: neither one set nor one for each parent.
    """
    files = [read_yaml(file) for _, file in configs_in(argv)]
    repeated = next((tree["own_data"] for tree in reversed(files) if tree.get("own_data")), None)
    general = {} if repeated else {key: value for tree in files for key, value in tree.get("data", {}).items()}
    if not paths and not repeated and "path" in general:
        paths = [general["path"]]
    count = len(args.parents)
    for what, given in ((PATH, paths), ("own_data", repeated or [])):
        if len(given) > 1 and len(given) != count:
            raise FusionError(
                f"{what} names {len(given)} sets of data, and there are {count} parents; give one for each parent, in "
                "their order, or one for all"
            )
    runs = repeated or _of_runs(args)
    apart = args.labels == "separate"
    if len(paths) == 1:
        if apart:
            raise FusionError(f"--labels separate measures each head on its own parent's data, and '{paths[0]}' is one "
                              f"path of all; give one for each parent, in their order: {PATH} A B")  # fmt: skip
        return None
    own = []
    for index in range(count):
        if not (paths or repeated) and settings_in(args.parents[index]).get("own_data"):
            raise FusionError(
                f"{args.parents[index]} was fused of parents with data of their own, which are several sets, and a "
                "parent has one; give a path for each parent, or one of all, with --data.path"
            )
        of_run = runs[index] or ({} if paths else next(filter(None, runs), {}))
        named = {"path": paths[index]} if paths else {}
        own.append(read_data(args.task, {"path": NOT_SAID, **of_run, **general, **named}, data_words(argv)))
    anchor = own[args.anchor % count]
    own = [each | {key: anchor[key] for key in PREPARED if key in anchor} for each in own]
    return own if apart or any(_which(each) != _which(own[0]) for each in own) else None


def of_all_classes(argv: Sequence[str], args: Namespace) -> bool:
    """Whether the runs of parents that share one set of data name other classes, and nothing else names any: it has
    those of all then. Tokens are no classes."""
    if "classes" not in args.data:
        return False
    said = any(word.partition("=")[0] == "--data.classes" for word in argv)
    said |= any("classes" in read_yaml(file).get("data", {}) for _, file in configs_in(argv))
    joint = any(settings_in(parent).get("own_data") for parent in args.parents)  # what it knows is in its model
    lists = [_classes(run) for run in _of_runs(args) if run]
    return not said and (joint or any(own != lists[0] for own in lists))


def _of_runs(args: Namespace) -> Own:
    """What the runs of parents say of their data; nothing of what is no run, or was trained for another task."""
    known = {field.name for field in fields(TASKS[args.task].data)} - {"normalize"}
    runs = []
    for run in map(settings_in, args.parents):
        data = {} if run.get("own_data") else run.get("data", {})
        data = data if task_named(run.get("task", "image-classification")) == args.task else {}
        runs.append({key: value for key, value in data.items() if key in known})
    return runs


def read_data(task: Any, defaults: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """All options of one set of data of a task: `defaults`, and over them what a command line says."""
    parser = new_parser("The data of one parent.", presets=False)
    parser.add_class_arguments(TASKS[task].data, "data")
    parser.set_defaults({f"data.{key}": value for key, value in defaults.items()})
    options: dict[str, Any] = asdict(parser.instantiate(parse_options(parser, words)).data)
    return options


def data_words(argv: Sequence[str]) -> list[str]:
    """The options of data on a command line but for the path, with their values."""
    words, taken = [], False
    for word in argv:
        if word.startswith("--"):
            taken = word.startswith("--data.") and word.partition("=")[0] != PATH
        words += [word] * taken
    return words


def _which(data: Mapping[str, Any]) -> list[Any]:
    return [_classes(data) if key == "classes" else data.get(key) for key in WHICH]


def _classes(data: Mapping[str, Any]) -> list[str] | None:
    return None if data.get("classes") is None else sorted(map(str, data["classes"]))
