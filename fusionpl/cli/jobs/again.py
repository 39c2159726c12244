"""The data of each parent of a fusion, for what is made of the fused model or measured beside it."""

from typing import Any

from jsonargparse import Namespace

from fusionpl.cli.again import fusion_behind
from fusionpl.cli.jobs.data import data_of_each
from fusionpl.datamodules.joint import JointSplits
from fusionpl.errors import FusionError
from fusionpl.models.hub import named
from fusionpl.options import settings_in


def data_again(options: Namespace, model: str, tokenizer: Any, seed: int = 0) -> JointSplits:
    """The data of each parent of the fusion that a model goes back to.

    Args:
        options: of a command, with `task`, `own_data` and `allow_pickle`.
        model: a run folder.
        tokenizer: the model's.
        seed: see `data_of_each`.

    Raises:
        FusionError: there are not as many sets as parents; see `data_of_each`.
    """
    fusion = fusion_behind(settings_in(model))
    parents = named(fusion.get("parents", []))
    if len(parents) != len(options.own_data):
        raise FusionError(
            f"own_data has {len(options.own_data)} sets, and {model} goes back to {len(parents)} parents; give one for "
            "each, in their order, or one set of all with --data.path"
        )
    return data_of_each(options, parents, tokenizer, list(parents)[fusion.get("anchor", 0)], seed)
