"""The task of a command, which decides what options there are: what `--task` says, else what its models are for."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from fusionpl.cli.parsing import said
from fusionpl.datamodules.config import BUILT_IN
from fusionpl.errors import FusionError
from fusionpl.models.folders import model_config, model_folder
from fusionpl.options import read_yaml, settings_in
from fusionpl.training.tasks import TASKS, TaskName, task_named, task_of_model

NOT_SAID = ""  # the path of data that nobody has named


def task_of(argv: Sequence[str], default: TaskName = "image-classification") -> TaskName:
    """The task that `--task`, or else the file of `--config`, names: which options there are depends on it.

    Raises:
        FusionError: there is no such task.
    """
    name, config = said(argv, "--task"), said(argv, "--config")
    if name is None and config and Path(config).is_file():
        name = read_yaml(config).get("task")
    return default if name is None else task_named(str(name))


def parser_for(argv: Sequence[str], option: str, build: Callable[[TaskName], ArgumentParser]) -> ArgumentParser:
    """The parser of a command whose models have a task and data of their own, unless the command line names others.

    Args:
        argv: the arguments.
        option: that names the models, such as `--parents`.
        build: makes the parser for a task.
    """
    models = said(argv, option, "+") or []
    origin = next((settings for settings in map(settings_in, models) if settings), {})
    return parser_like(argv, origin, models[:1], build)


def parser_like(
    argv: Sequence[str], origin: Mapping[str, Any], models: Sequence[str], build: Callable[[TaskName], ArgumentParser]
) -> ArgumentParser:
    """The parser for the task and data of a run, or for the task that a published model's class says.

    Args:
        argv: the arguments; their `--task` comes first.
        origin: the run's settings; empty where the models are no runs.
        models: one of them, or none.
        build: makes the parser for a task.

    Raises:
        FusionError: there is no such task; nothing is known of the model, and so of some of the options.
    """
    foreign, unreadable = not origin and bool(models), None
    trained: TaskName | None = task_named(origin.get("task", "image-classification"))
    if foreign:
        try:
            trained = task_of_model(model_config(model_folder(models[0], weights=False)))
        except FusionError as error:  # is raised again where it is opened, behind mistakes in options
            trained, unreadable = None, error
    task = task_of(argv, trained or "image-classification")
    parser = build(task)
    if task == trained:
        # How images are normalised is in the folders of models: another parent's may be another.
        data = {key: value for key, value in origin.get("data", {}).items() if key != "normalize"}
        parser.set_defaults({f"data.{key}": value for key, value in data.items()})
    known = parser.get_defaults(skip_validation=True).keys()
    if foreign and parser.get_default("data.path") in BUILT_IN:
        parser.set_defaults({"data.path": NOT_SAID})
    words = (word.removeprefix("--").partition("=")[0] for word in argv if word.startswith("--data."))
    if unreadable and any(word not in known for word in words):
        raise unreadable
    return parser


def check_trains(task: TaskName) -> None:
    """Raises FusionError for a task in which nothing is learned."""
    if not TASKS[task].trains:
        raise FusionError(
            "an encoder without a head has no outputs to be taught: fuse or evaluate it as it is, or put a classifier "
            "on it: finetune.py --task text-classification --data.path LABELLED_SENTENCES"
        )
