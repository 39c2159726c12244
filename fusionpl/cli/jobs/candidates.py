"""The models that a finetuning compares."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fusionpl.calibration.config import CalibrationConfig
from fusionpl.cli.finetune import Asked
from fusionpl.cli.jobs.again import data_again
from fusionpl.cli.jobs.data import data_module, follow
from fusionpl.datamodules.base import FixedSplits, calibration_of
from fusionpl.datamodules.config import AUTO
from fusionpl.errors import FusionError
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import HEAD_FITTED, PARENT, baseline, best_parent
from fusionpl.families.family import read_family
from fusionpl.fusion.average import vanilla
from fusionpl.fusion.config import mixing_weights
from fusionpl.fusion.heads import fit_head
from fusionpl.fusion.voting import votings_of
from fusionpl.models.classes import whole_heads
from fusionpl.models.hub import short_name
from fusionpl.models.images import grid_of
from fusionpl.models.load import load_model
from fusionpl.models.processors import image_processing
from fusionpl.models.tokenizers import load_tokenizer
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
        FusionError: a model can't be read; nothing tells which parent is the best.
    """
    options = asked.options
    if "parents" not in asked.origin:
        model = load_model(options.model, allow_pickle=options.allow_pickle)
        return [Candidate(short_name(options.model), model, [options.model])]
    fused = Candidate("fused", load_model(options.model), [options.model])
    return [fused, *_baselines(asked, fused.model)] if options.baselines else [fused]


def device_of_run(asked: Asked) -> torch.device:
    """Where models are run besides the training."""
    on_gpu = torch.cuda.is_available() and asked.options.trainer.accelerator != "cpu"
    return torch.device("cuda" if on_gpu else "cpu")


def data_for(asked: Asked) -> FixedSplits:
    """The data to finetune on: one set, or those of each parent of the fusion that the model goes back to.

    Raises:
        FusionError: see `data_module` and `data_again`.
    """
    options, tokenizer = asked.options, load_tokenizer(asked.options.model)
    if options.own_data:
        return data_again(options, options.model, tokenizer, options.seed)
    return data_module(options.task, options.data, options.seed, tokenizer, [options.model])


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
    held = baseline(report)
    if asked.options.own_data and held is not None and held.name.startswith(HEAD_FITTED):
        # What the fused model has to beat, which is on no disk: its head is fitted to the parents' predictions anew.
        place = [row.name for row in rows].index(held.name.removeprefix(HEAD_FITTED))
        fitted = Candidate(held.name, _head_fitted(asked, parents, place, fused), [paths[place]])
        return [fitted] if plain is None else [fitted, Candidate("vanilla", plain, paths)]
    compared = [
        Candidate(row.name, whole_heads(parent), [path])
        for row, parent, path in zip(rows, parents, paths, strict=True)
        if asked.elsewhere or row is best[0]
    ]
    return compared if plain is None else [*compared, Candidate("vanilla", plain, paths)]


def _head_fitted(asked: Asked, parents: Sequence[nn.Module], place: int, fused: nn.Module) -> nn.Module:
    """A parent with its head fitted to what each parent says on its own data, as for the report of the fusion."""
    origin, options = asked.origin, asked.options
    models = [parent.to(device_of_run(asked)) for parent in parents]
    data, config = data_for(asked), CalibrationConfig(**origin.get("calibration", {}))
    follow(data, fused, options.model)
    votings = votings_of(models, mixing_weights(origin.get("weights"), len(models)))
    calibration, family = calibration_of(data, config), read_family(origin.get("family"))
    fitted = fit_head(models[place], models, votings, calibration, family=family)
    assert fitted is not None  # as the report has a row of it
    return fitted[0].cpu()


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
