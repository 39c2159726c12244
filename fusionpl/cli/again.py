"""The data of a fused model whose parents had data of their own, where it is trained or measured again."""

from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import Namespace

from fusionpl.cli.own_data import WHICH, Own, data_words, read_data
from fusionpl.cli.parsing import configs_in
from fusionpl.options import read_yaml, settings_in
from fusionpl.training.tasks import task_named


def own_again(argv: Sequence[str], origin: Mapping[str, Any], args: Namespace) -> Own | None:
    """The data of each parent of a fused model that is trained or measured again; None where they had one set, or the
    command line asks for another set or task.

    Args:
        argv: the command line, whose options of data hold for all.
        origin: the settings of the run that made the model.
        args: what the parser read of the command line.
    """
    own, data = args.own_data or origin.get("own_data"), origin.get("data", {})
    if not own or args.task != task_named(origin.get("task", "image-classification")):
        return None
    if any(args.data[key] != data.get(key) for key in ("path", "classes")):
        return None
    files = [read_yaml(file) for _, file in configs_in(argv)]
    general = {key: value for tree in files if "own_data" not in tree for key, value in tree.get("data", {}).items()}
    return [read_data(args.task, {**each, **_but(general, WHICH)}, data_words(argv)) for each in own]


def fusion_behind(origin: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the fusion that a run goes back to, through finetunings of it; nothing where it goes back to
    none."""
    while "parents" not in origin and origin.get("model"):
        origin = settings_in(origin["model"])
    return origin if "parents" in origin else {}


def _but(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in names}
