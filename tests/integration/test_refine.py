"""Learned refinement: nearer to the parents' mean, the same twice, and no labels."""

from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusionpl
from fusionpl import schedule
from fusionpl.calibration.config import CalibrationConfig
from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.calibration.kept import Kept
from fusionpl.errors import FusionError
from fusionpl.fusion.config import FuseConfig, RefineConfig
from fusionpl.fusion.methods.refinement import _by_clock, _by_steps
from fusionpl.fusion.result import FusionResult
from fusionpl.fusion.teaching import loss_to, mean_of
from fusionpl.fusion.unlabelled import Unlabelled
from fusionpl.training.fusion_callback import OTFusion
from tests.models_for_tests import TEXT_MODELS, images, largest_difference, outputs, sentences, text_model, timm_vit

CONFIG = FuseConfig(refine=RefineConfig("gradient", start="fused", steps=60, lr=3e-3, augment=True))


def noisy_negatives(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    pixels = batch["pixel_values"]
    return {**batch, "pixel_values": 0.1 * torch.randn(pixels.shape) - pixels}


def distance(model: nn.Module, parents: list[nn.Module], sign: int = 1) -> float:
    seen = sign * images(64)
    wanted = sum(outputs(parent, seen).softmax(-1) for parent in parents) / len(parents)
    return float((outputs(model, seen).softmax(-1) - wanted).square().mean())


def test_refinement_draws_the_model_to_the_ensemble_and_repeats() -> None:
    parents: list[nn.Module] = [timm_vit(seed) for seed in range(2)]
    before = [[tensor.clone() for tensor in parent.parameters()] for parent in parents]
    drawn = torch.get_rng_state()
    first, second = (fusionpl.fuse(parents, [images(64)], CONFIG) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert distance(first.model, parents) < 0.5 * distance(first.average(), parents)
    assert first.refitted is not None
    assert largest_difference(first.refitted, first.average()) == 0
    assert largest_difference(first.model, second.model) == 0
    assert not first.model.training
    for parent, tensors in zip(parents, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(parent.parameters(), tensors, strict=True))


def test_teachers_see_what_the_model_sees_and_the_seed_decides_it() -> None:
    parents: list[nn.Module] = [timm_vit(seed) for seed in range(2)]

    def fused(seed: int) -> FusionResult:
        return fusionpl.fuse(parents, [images(64)], CONFIG, augment=noisy_negatives, seed=seed)

    first, second, third = (fused(seed) for seed in (0, 0, 1))
    assert distance(first.model, parents, -1) < 0.5 * distance(first.average(), parents, -1)
    assert largest_difference(first.model, second.model) == 0
    assert largest_difference(first.model, third.model) > 0


def test_augmentation_can_be_left_out() -> None:
    parents: list[nn.Module] = [timm_vit(seed) for seed in range(2)]
    refine = RefineConfig("gradient", start="fused", steps=3, augment=False)
    plain, left_out = (
        fusionpl.fuse(parents, [images(16)], FuseConfig(refine=refine), augment=one) for one in (None, noisy_negatives)
    )
    assert largest_difference(plain.model, left_out.model) == 0


def drawn(data: CalibrationSet, size: int, seed: int, key: str = "pixel_values") -> Iterator[Tensor]:
    for batch in Unlabelled(data, None, None, torch.device("cpu")).taught(size, seed):
        assert batch is not None
        yield batch[1][key]


def test_samples_are_drawn_anew_each_time_through() -> None:
    numbered = torch.arange(10.0).view(10, 1, 1, 1)
    data = CalibrationSet([numbered], CalibrationConfig(batch_size=4), Kept(10**6))

    def passes(seed: int) -> list[list[set[float]]]:
        batches = drawn(data, 4, seed)
        return [[set(next(batches).flatten().tolist()) for _ in range(2)] for _ in range(4)]

    found = passes(0)
    assert all(first | second == set(range(10)) - {4, 9} for first, second in found)  # those are held out
    assert len({frozenset(batch) for one in found for batch in one}) == 8  # never in the same company
    assert passes(0) == found
    assert passes(1) != found


def test_samples_of_another_length_are_in_other_batches() -> None:
    data = CalibrationSet([{"input_ids": torch.zeros(3, n)} for n in (5, 7)], CalibrationConfig(), Kept(10**6))
    shapes = [tuple(batch.shape) for batch in islice(drawn(data, 2, 0, "input_ids"), 20)]
    assert set(shapes) == {(2, 5), (2, 7)}


def test_minutes_are_over_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100, 1000, 15))
    monkeypatch.setattr(schedule, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    shares = list(_by_clock(90, torch.device("cpu")))
    assert shares == pytest.approx([step / 6 for step in (1, 2, 3, 4, 5)])
    assert list(_by_clock(-1, torch.device("cpu"))) == []
    assert list(_by_steps(4)) == [0.125, 0.375, 0.625, 0.875]


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [schedule.warmup_cosine(share, 0.1) for share in (0, 0.05, 0.1, 0.55, 1.0, 1.5)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0, 0])
    assert schedule.warmup_cosine(0.0, 0.0) == 1


def test_one_number_is_drawn_to_the_weighted_mean() -> None:
    output, given = torch.tensor([[1.0], [2.0]]), [torch.tensor([[0.0], [0.0]]), torch.tensor([[4.0], [8.0]])]
    assert loss_to(mean_of(given, [0.75, 0.25]), output) == 0
    assert loss_to(mean_of(given, [0.5, 0.5]), output) == 2.5


@pytest.mark.parametrize("name", TEXT_MODELS[:2])
def test_text_is_refined_without_its_padding(name: str) -> None:
    parents = [text_model(name, seed) for seed in range(2)]
    batch = sentences(64)
    other = batch | {"input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)}
    first, second = (fusionpl.fuse(parents, [one], CONFIG).model for one in (batch, other))
    assert largest_difference(first, second) < 1e-3


def test_the_callback_refines() -> None:
    parents: list[nn.Module] = [timm_vit(seed) for seed in range(2)]
    data = SimpleNamespace(calibration_dataloader=lambda: [images(64)], augmented=noisy_negatives)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(datamodule=data, strategy=strategy, is_global_zero=True)
    module: Any = SimpleNamespace()
    OTFusion(parents, CONFIG, seed=3).setup(trainer, module, "test")
    expected = fusionpl.fuse(parents, [images(64)], CONFIG, augment=noisy_negatives, seed=3)
    assert largest_difference(module.model, expected.model) == 0


def test_a_rank_without_batches_takes_part() -> None:
    """More processes than batches: those without one add nothing to the gradient."""
    data = CalibrationSet([images(8)], CalibrationConfig(), Kept(10**6))
    mine = Unlabelled(data, None, None, torch.device("cpu"))
    data.firsts.clear()
    assert next(mine.taught(4, seed=0)) is None
    assert list(mine.held(4)) == []


def test_a_refinement_that_diverges_is_told_and_changes_nothing() -> None:
    parents: list[nn.Module] = [timm_vit(seed) for seed in range(2)]
    config = FuseConfig(refine=RefineConfig("gradient", start="fused", steps=20, lr=1e30))
    result = fusionpl.fuse(parents, [images(8)], config)
    assert result.refitted is not None
    assert largest_difference(result.model, result.refitted) == 0
    assert result.notes[-1].endswith("; it diverged, so lower refine.lr")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("steps", 0),
        ("samples", 0),
        ("minutes", 0.0),
        ("minutes", float("inf")),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
    ],
)
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(FusionError, match=f"refine.{option} must be"):
        RefineConfig("gradient", **{option: value})
