"""Learned refinement: nearer to the parents' mean, the same twice, and no labels."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fusionpl
from fusionpl.calibration import CalibrationConfig, CalibrationSet, Kept
from fusionpl.errors import FusionError
from fusionpl.fusion import FuseConfig, RefineConfig
from fusionpl.fusion.refine import _drawn
from fusionpl.training import OTFusion
from tests.models_for_tests import TEXT_MODELS, images, largest_difference, outputs, sentences, text_model, timm_vit

CONFIG = FuseConfig(refine=RefineConfig("gradient", steps=60, lr=3e-3))


def distance(model: nn.Module, parents: list[nn.Module]) -> float:
    wanted = sum(outputs(parent, images(64)).softmax(-1) for parent in parents) / len(parents)
    return float((outputs(model, images(64)).softmax(-1) - wanted).square().mean())


def test_refinement_draws_the_model_to_the_ensemble_and_repeats() -> None:
    parents: list[nn.Module] = [timm_vit(seed) for seed in range(2)]
    before = [[tensor.clone() for tensor in parent.parameters()] for parent in parents]
    first, second = (fusionpl.fuse(parents, [images(64)], CONFIG) for _ in range(2))
    assert distance(first.model, parents) < 0.5 * distance(first.average(), parents)
    assert first.refitted is not None
    assert largest_difference(first.refitted, first.average()) == 0
    assert largest_difference(first.model, second.model) == 0
    assert not first.model.training
    for parent, tensors in zip(parents, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(parent.parameters(), tensors, strict=True))


@pytest.mark.parametrize("name", TEXT_MODELS[:2])
def test_text_is_refined_without_its_padding(name: str) -> None:
    parents = [text_model(name, seed) for seed in range(2)]
    batch = sentences(64)
    other = batch | {"input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)}
    first, second = (fusionpl.fuse(parents, [one], CONFIG).model for one in (batch, other))
    assert largest_difference(first, second) < 1e-3


def test_the_callback_refines() -> None:
    parents: list[nn.Module] = [timm_vit(seed) for seed in range(2)]
    data = SimpleNamespace(calibration_dataloader=lambda: [images(64)])
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(datamodule=data, strategy=strategy, is_global_zero=True)
    module: Any = SimpleNamespace()
    OTFusion(parents, CONFIG).setup(trainer, module, "test")
    assert largest_difference(module.model, fusionpl.fuse(parents, [images(64)], CONFIG).model) == 0


def test_a_rank_without_batches_takes_part() -> None:
    """More processes than batches: those without one add nothing to the gradient."""
    empty = CalibrationSet([images(4)], CalibrationConfig(), Kept(10**6))
    empty.firsts.clear()
    assert next(_drawn(empty, 4, seed=0)) is None


@pytest.mark.parametrize(("option", "value"), [("steps", 0), ("batch_size", 0), ("lr", 0.0), ("lr", float("nan"))])
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(FusionError, match=f"refine.{option} must be"):
        RefineConfig("gradient", **{option: value})
