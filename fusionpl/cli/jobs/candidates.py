"""The models that a finetuning compares."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fusionpl.cli.finetune import Asked
from fusionpl.datamodules.config import AUTO
from fusionpl.errors import FusionError
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import PARENT, best_parent
from fusionpl.families.family import read_family
from fusionpl.fusion.average import vanilla
from fusionpl.fusion.config import mixing_weights
from fusionpl.models.classes import whole_heads
from fusionpl.models.hub import short_name
from fusionpl.models.images import grid_of
from fusionpl.models.load import load_model
from fusionpl.models.processors import image_processing
from fusionpl.models.vocabulary import Vocabulary, load_parent


@dataclass(frozen=True)
class Candidate:
    """A model to finetune.

    Attributes:
        name: of its row in the report.
        model: which is trained in place.
        sources: where its weights came from.
    """

    name: str
    model: nn.Module
    sources: Sequence[str]


def candidates(asked: Asked) -> list[Candidate]:
    """The model itself and, for a fused one, its best parent and the vanilla average.

    For another task than the parents' nobody knows which parent is the best: then all of them.

    Raises:
        FusionError: a model can't be read; nothing tells which parent is the best; nothing says which data are those
            of all parents.
    """
    options = asked.options
    given = asked.origin.get("data", {})
    unsaid = all(getattr(options.data, key, None) == given.get(key) for key in ("path", "classes"))
    if asked.origin.get("own_data") and unsaid:
        raise FusionError(
            f"the parents of {options.model} had data of their own, and those of one would not do; name a set of all "
            "classes with --data.path, and all that are in it with --data.classes null"
        )
    if "parents" not in asked.origin:
        model = load_model(options.model, allow_pickle=options.allow_pickle)
        return [Candidate(short_name(options.model), model, [options.model])]
    fused = Candidate("fused", load_model(options.model), [options.model])
    return [fused, *_baselines(asked, fused.model)] if options.baselines else [fused]


def _baselines(asked: Asked, fused: nn.Module) -> list[Candidate]:
    source, origin = asked.options.model, asked.origin
    parents, paths = _parents(asked, fused), origin["parents"]
    plain = vanilla(parents, mixing_weights(origin.get("weights"), len(parents)))
    report = Report.load(Path(source) / "report").rows
    rows = [row for row in report if row.name.startswith(PARENT) and row.stage == "one-shot"]
    best = best_parent(report)
    if best is None:
        raise FusionError(
            f"nothing was measured when {source} was fused, so nobody knows its best parent; add --baselines false"
        )
    compared = [
        Candidate(row.name, whole_heads(parent), [path])
        for row, parent, path in zip(rows, parents, paths, strict=True)
        if asked.elsewhere or row is best[0]
    ]
    return compared if plain is None else [*compared, Candidate("vanilla", plain, paths)]


def _parents(asked: Asked, fused: nn.Module) -> list[nn.Module]:
    """The parents, with the fused model's vocabulary and its preparation of images."""
    options, origin = asked.options, asked.origin
    family = read_family(origin.get("family"))
    vocabulary = Vocabulary.of(options.model, fused, family)
    decreed = getattr(options.data, "normalize", AUTO) != AUTO
    processing = None if decreed or grid_of(fused) is None else image_processing(options.model)
    allowed = options.allow_pickle or origin.get("allow_pickle", False)
    return [
        load_parent(path, vocabulary, fused, processing=processing, allow_pickle=allowed, family=family)
        for path in origin["parents"]
    ]
