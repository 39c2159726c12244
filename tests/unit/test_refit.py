"""The least-squares refit: what must stay, what must get better, and what must not matter."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusionpl.alignment.config import AlignConfig
from fusionpl.calibration.config import CalibrationConfig
from fusionpl.families.binding import bind
from fusionpl.families.proof import permuted
from fusionpl.fusion import refit
from fusionpl.fusion.config import FuseConfig, RefitConfig
from fusionpl.fusion.fuse import fuse
from fusionpl.fusion.result import FusionResult
from fusionpl.transport import least_squares
from fusionpl.transport.least_squares import fit_ridge
from tests.models_for_tests import FAMILIES, images, largest_difference, outputs, timm_vit

CALIBRATION = [images(128)]
ROTATION: dict[str, Any] = {"stream": "rotation", "residual": "tie", "heads": "matched", "solver": "assignment"}
ALIGNMENTS: dict[str, dict[str, Any]] = {
    "soft": {},
    "hard": {"solver": "emd"},
    "joint": {"qk": "joint"},
    "tied": {"residual": "tie", "heads": "matched", "solver": "assignment"},
    "rotation": ROTATION,
}


def refitted(
    parents: list[nn.Module],
    align: dict[str, Any],
    *,
    weights: list[float] | None = None,
    calibration: Any = None,
    batch_size: int = 64,
) -> FusionResult:
    config = FuseConfig(
        0, weights, CalibrationConfig(batch_size=batch_size), AlignConfig(**align), RefitConfig("ridge")
    )
    return fuse(parents, CALIBRATION if calibration is None else calibration, config)


def distance(model: nn.Module, wanted: Tensor) -> float:
    """The divergence of a model's predictions from probabilities, in nats."""
    found = outputs(model, CALIBRATION[0]).log_softmax(-1)
    return float((torch.special.xlogy(wanted, wanted) - wanted * found).sum(-1).mean())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("align", ["hard", "tied", "rotation"])
def test_a_parent_with_itself_keeps_its_function(name: str, align: str) -> None:
    parents = [FAMILIES[name](3), permuted(FAMILIES[name](3), torch.Generator().manual_seed(0))]
    result = refitted(parents, ALIGNMENTS[align])
    torch.testing.assert_close(outputs(result.model), outputs(parents[0]), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("align", ALIGNMENTS)
def test_a_refit_is_nearer_to_the_mean_of_the_parents(name: str, align: str) -> None:
    parents = [FAMILIES[name](seed) for seed in range(3)]
    weights = [0.5, 0.3, 0.2]
    given = [outputs(parent, CALIBRATION[0]).softmax(-1) for parent in parents]
    wanted = torch.stack([weight * one for weight, one in zip(weights, given, strict=True)]).sum(0)
    result = refitted(parents, ALIGNMENTS[align], weights=weights)
    assert distance(result.model, wanted) < 0.5 * distance(result.average(), wanted)


@pytest.mark.parametrize("align", ["soft", "rotation"])
def test_widths_may_differ(align: str) -> None:
    options = ALIGNMENTS[align] | ({"solver": "emd"} if align == "rotation" else {})
    for first, second in (({}, {"width": 24, "mlp": 40}), ({"width": 24, "mlp": 40}, {})):
        parents = [timm_vit(0, **first), timm_vit(1, **second)]
        result = refitted(parents, options)
        wanted = torch.stack([outputs(parent, CALIBRATION[0]).softmax(-1) for parent in parents]).mean(0)
        assert distance(result.model, wanted) < distance(result.average(), wanted)


def test_how_batches_are_cut_does_not_matter_nor_that_they_come_from_a_generator() -> None:
    parents: list[nn.Module] = [timm_vit(seed) for seed in range(2)]
    whole = refitted(parents, {}).model
    cut = refitted(parents, {}, calibration=(part for part in CALIBRATION[0].split(50)), batch_size=7).model
    assert largest_difference(whole, cut) < 3e-4


def test_two_blocks_that_chose_one_penalty_settle_it_for_those_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[bool] = []

    def spy(rows: Any, held_out: Any, prior: Tensor, guess: float | None, **options: bool) -> tuple[Tensor, float]:
        searched.append(options["search"])
        return fit_ridge(rows, held_out, prior, guess, **options)

    monkeypatch.setattr(refit, "fit_ridge", spy)
    monkeypatch.setattr(least_squares, "PENALTIES", (1e-3,))  # all that can be chosen
    refitted([timm_vit(seed, depth=4) for seed in range(2)], {})
    blocks = [searched[at : at + 4] for at in range(0, 16, 4)]
    assert blocks == [[True] * 4, [True] * 4, [False] * 4, [False] * 4]
    assert searched[16:] == [True]  # the head


def test_dropout_is_off_whatever_mode_the_parents_are_in() -> None:
    parents = [timm_vit(seed, proj_drop_rate=0.5) for seed in range(2)]
    quiet = refitted(parents, {}).model
    loud = refitted([parent.train() for parent in parents], {}).model
    assert largest_difference(quiet, loud) == 0
    assert all(parent.training for parent in parents)


def test_layer_scale_is_folded_into_the_map_before_it() -> None:
    parents = [timm_vit(seed, init_values=0.5) for seed in range(2)]
    model = refitted([parents[0], permuted(parents[0], torch.Generator().manual_seed(1))], ALIGNMENTS["hard"]).model
    torch.testing.assert_close(outputs(model), outputs(parents[0]), atol=1e-3, rtol=1e-3)
    assert torch.equal(model.get_parameter("blocks.0.ls1.gamma"), torch.ones(16))


def test_the_stem_and_what_is_left_to_the_anchor_stay() -> None:
    parents: list[nn.Module] = [timm_vit(seed) for seed in range(2)]
    result = refitted(parents, {"classifier": False})
    before, after = result.average(), result.model
    changed = {key for key, tensor in after.named_parameters() if not torch.equal(tensor, before.get_parameter(key))}
    linear = {slot.parameter for slot in bind(after).slots if any(slot.reads) and slot.section.startswith("blocks")}
    assert changed == linear | {key.replace("weight", "bias") for key in linear}
    assert torch.equal(after.get_parameter("head.weight"), parents[0].get_parameter("head.weight"))
