"""Learned refinement: nearer to the parents' mean, the same twice, and no labels."""

from dataclasses import replace
from importlib import import_module
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

import fusionpl
from fusionpl.errors import FusionError
from fusionpl.fusion import FuseConfig, RefineConfig
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
    assert first.averaged is not None
    assert distance(first.model, parents) < 0.5 * distance(first.averaged, parents)
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


def test_refinement_runs_on_the_cpu_where_the_device_has_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    real = L.Trainer

    def trainer(**args: Any) -> L.Trainer:
        asked.append(args.get("accelerator"))
        return real(**args)

    monkeypatch.setattr(L, "Trainer", trainer)
    monkeypatch.setattr(import_module("fusionpl.training.refine"), "has_float64", lambda _: False)
    fusionpl.fuse(
        [timm_vit(seed) for seed in range(2)], [images()], replace(CONFIG, refine=RefineConfig("gradient", 1))
    )
    assert asked[-1] == "cpu"


def test_the_callback_says_that_it_cannot_refine() -> None:
    callback = OTFusion([timm_vit(0), timm_vit(1)], CONFIG)
    with pytest.raises(FusionError, match=r"refine\.method needs its own; use fusionpl\.fuse"):
        callback.setup(None, None, "fit")  # type: ignore[arg-type]
