"""Writes what a fusion made into a run folder."""

from contextlib import closing
from pathlib import Path

from torch import nn

from fusionpl.calibration.kept import Kept
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.fusion.pixels import keep_pixels
from fusionpl.fusion.plan import Plan
from fusionpl.fusion.result import FusionResult, InMemory, Writer
from fusionpl.fusion.team import Team
from fusionpl.models.folders import HEAD
from fusionpl.models.opened import ModelFolder
from fusionpl.models.preprocessing import ImageProcessing
from fusionpl.models.save import save_model
from fusionpl.models.sentence import copy_modules, width_of
from fusionpl.models.tokenizers import load_tokenizer
from fusionpl.models.writer import ModelWriter


def writer_of(team: Team, plan: Plan, output: Path | None, kept: Kept) -> Writer:
    """Where the fused parameters go: into a folder as they come where the fused model is the anchor's with other
    weights."""
    folder = _folder_of(team, plan.target)
    return InMemory(plan.target, kept) if output is None or folder is None else ModelWriter(folder, output / "model")


def save(result: FusionResult, team: Team, processing: ImageProcessing | None, output: Path) -> None:
    """Writes what `writer_of` has not: a model of another architecture, or one that was taught; maps and configuration.

    Args:
        result: what was made.
        team: its parents.
        processing: how the fused model takes images.
        output: the run folder.
    """
    folder, taught = _folder_of(team, result.target), result.teaching
    own = taught is not None and taught.parent is not None
    if folder is None or own:
        for name, model in result.by_folder().items():
            _save_model(model, team, output / name)
    elif taught is not None:
        with closing(ModelWriter(folder, output / "model")) as refined:
            refined.write(dict(result.model.named_parameters()))
            refined.finish()
    if processing is not None:
        for name in [f"{HEAD}{head.name}" for head in result.heads] or ["model"]:
            keep_pixels(output / name, result.network if own else result.target.module, processing)
    result.save_maps(output)


def _folder_of(team: Team, target: SectionedModel) -> ModelFolder | None:
    folder = team.folders[team.anchor]
    return folder if folder is not None and folder.module is target.module else None


def _save_model(model: nn.Module, team: Team, place: Path) -> None:
    """Writes a model that is not the anchor's folder with other weights."""
    source, folder = team.sources[team.anchor], team.folders[team.anchor]
    tokenizer = None if isinstance(source, nn.Module) else load_tokenizer(source)
    save_model(model, place, tokenizer=tokenizer)
    if folder:
        copy_modules(folder.path, place, width_of(model))
