"""Fusion: identities that must hold exactly, and what a user with a mistake is told."""

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fusionpl.alignment.config import AlignConfig
from fusionpl.calibration.config import CalibrationConfig
from fusionpl.errors import FusionError
from fusionpl.families.proof import permuted
from fusionpl.fusion.config import FuseConfig
from fusionpl.fusion.fuse import fuse
from fusionpl.fusion.result import FusionResult
from fusionpl.models.save import class_names
from tests.models_for_tests import FAMILIES, hf_vit, images, largest_difference, outputs, timm_vit

RESIDUALS = ("average", "branch", "skip", "weighted_scalar", "weighted_matrix", "tie")
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"heads": "flat", "qk": "separate"},
    {"heads": "flat", "qk": "shared"},
    {"heads": "flat", "qk": "joint"},
    {"heads": "matched"},
)
EVIDENCE = ("activations", "weights")
HARD = ("emd", "assignment")
KEEPS_FUNCTION: dict[str, Any] = {"residual": "tie", "heads": "matched", "solver": "assignment"}


def fused(
    parents: list[nn.Module],
    *,
    anchor: int = 0,
    weights: list[float] | None = None,
    calibration: Any = None,
    scale: Any = "standardize",
    **options: Any,
) -> FusionResult:
    config = FuseConfig(anchor, weights, CalibrationConfig(scale=scale), AlignConfig(**options))
    return fuse(parents, [images()] if calibration is None else calibration, config)


# Of two options each, half of all combinations have every pair of them; the other half is slow.
HALVES = pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.slow)])


def of_half(half: int, *options: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """The combinations of options whose places among their kinds have an even sum, or an odd one."""
    for combination in itertools.product(*map(enumerate, options)):
        places, values = zip(*combination, strict=True)
        if sum(places) % 2 == half:
            yield values


def permuted_copy(model: nn.Module, seed: int = 0) -> nn.Module:
    return permuted(model, torch.Generator().manual_seed(seed))


def refusal(parents: list[nn.Module], **options: Any) -> str:
    with pytest.raises(FusionError) as caught:
        fused(parents, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# identities


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("residual", [*RESIDUALS, "identity"])
@HALVES
def test_a_parent_with_itself_is_itself(residual: str, layout: dict[str, Any], half: int) -> None:
    for (name, builder), evidence, solver in of_half(half, FAMILIES.items(), EVIDENCE, HARD):
        model = builder(3)
        result = fused([model, copy.deepcopy(model)], residual=residual, evidence=evidence, solver=solver, **layout)
        for key, tensor in result.model.named_parameters():
            assert torch.equal(tensor, model.get_parameter(key)), (name, evidence, solver, key)


@pytest.mark.parametrize("residual", RESIDUALS)
@HALVES
def test_a_permuted_copy_is_recovered_under_every_residual_policy(residual: str, half: int) -> None:
    for name, evidence, solver, anchor in of_half(half, FAMILIES, EVIDENCE, HARD, range(2)):
        model = FAMILIES[name](5)
        pair = [model, permuted_copy(model)]
        result = fused(pair, anchor=anchor, evidence=evidence, residual=residual, solver=solver)
        assert largest_difference(result.model, pair[anchor]) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@HALVES
def test_a_permuted_copy_is_recovered_with_every_head_layout(layout: dict[str, Any], half: int) -> None:
    for name, evidence, solver in of_half(half, FAMILIES, EVIDENCE, HARD):
        model = FAMILIES[name](6)
        result = fused([model, permuted_copy(model, 1)], evidence=evidence, solver=solver, **layout)
        assert largest_difference(result.model, model) < 1e-5


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine", "correlation"])
@pytest.mark.parametrize("evidence", EVIDENCE)
def test_a_permuted_copy_is_recovered_by_every_metric_and_scale(metric: str, evidence: str) -> None:
    model = timm_vit(7)
    pair = [model, permuted_copy(model, 2)]
    for scale, normalize in (("standardize", "max"), ("center", "mean"), ("normalize", "median"), ("none", "log")):
        options: dict[str, Any] = {"metric": metric, "normalize": normalize, "scale": scale, "residual": "tie"}
        result = fused(pair, evidence=evidence, solver="emd", **options)
        assert largest_difference(result.model, model) < 1e-5, scale


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "correlation"])
@pytest.mark.parametrize("evidence", EVIDENCE)
def test_the_class_token_is_recovered_by_every_metric(metric: str, evidence: str) -> None:
    """One number describes a unit of the class token: its direction and its correlation say nothing."""
    model = timm_vit(7)
    result = fused([model, permuted_copy(model, 2)], evidence=evidence, metric=metric, solver="emd")
    assert largest_difference(result.model, model) < 1e-5


def test_a_permuted_copy_is_recovered_from_raw_weights() -> None:
    model = hf_vit(8)
    result = fused([model, permuted_copy(model)], evidence="weights", scale="none", calibration=[], solver="emd")
    assert largest_difference(result.model, model) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_permuted_copies_in_any_number_are_recovered(name: str) -> None:
    model = FAMILIES[name](9)
    parents = [permuted_copy(model, 1), permuted_copy(model, 2), model, permuted_copy(model, 3)]
    result = fused(parents, anchor=2, solver="emd", weights=[0.1, 0.2, 0.3, 0.4])
    assert largest_difference(result.model, model) < 1e-5


@pytest.mark.parametrize("solver", ["sinkhorn", "emd"])
def test_order_of_the_other_parents_does_not_matter(solver: str) -> None:
    a, b, c = (timm_vit(seed) for seed in range(3))
    first = fused([a, b, c], anchor=0, weights=[0.5, 0.3, 0.2], solver=solver).model
    second = fused([a, c, b], anchor=0, weights=[0.5, 0.2, 0.3], solver=solver).model
    third = fused([c, b, a], anchor=2, weights=[0.2, 0.3, 0.5], solver=solver).model
    assert largest_difference(first, second) < 1e-6
    assert largest_difference(first, third) < 1e-6


def test_negative_anchor_counts_from_the_end() -> None:
    parents = [timm_vit(seed) for seed in range(3)]
    assert largest_difference(fused(parents, anchor=-1).model, fused(parents, anchor=2).model) == 0


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("evidence", EVIDENCE)
@pytest.mark.parametrize("count", [2, 3])
def test_weight_one_returns_that_parents_function(name: str, evidence: str, count: int) -> None:
    parents = [FAMILIES[name](seed) for seed in range(count)]
    for chosen in range(count):
        weights = [float(index == chosen) for index in range(count)]
        result = fused(parents, weights=weights, evidence=evidence, **KEEPS_FUNCTION)
        torch.testing.assert_close(outputs(result.model), outputs(parents[chosen]), atol=1e-4, rtol=0)
        assert chosen == 0 or largest_difference(result.model, parents[chosen]) > 0.1


@pytest.mark.parametrize("heads", [1, 2, 16])
def test_weight_one_returns_the_function_whatever_the_number_of_heads(heads: int) -> None:
    parents = [timm_vit(seed, heads=heads) for seed in range(2)]
    result = fused(parents, weights=[0.0, 1.0], **KEEPS_FUNCTION)
    torch.testing.assert_close(outputs(result.model), outputs(parents[1]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_reach_every_tensor(name: str) -> None:
    parents = [FAMILIES[name](seed) for seed in range(3)]
    aligned = [fused(parents, weights=[float(i == k) for i in range(3)]).model.state_dict() for k in range(3)]
    mixed = fused(parents, weights=[0.2, 0.3, 0.5]).model
    for key, tensor in mixed.named_parameters():
        wanted = sum(weight * state[key] for weight, state in zip([0.2, 0.3, 0.5], aligned, strict=True))
        torch.testing.assert_close(tensor.detach(), wanted, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(aligned[0][key], aligned[1][key])
        assert not torch.allclose(aligned[1][key], aligned[2][key])


def test_uniform_weights_are_the_default() -> None:
    parents = [timm_vit(seed) for seed in range(2)]
    assert largest_difference(fused(parents).model, fused(parents, weights=[0.5, 0.5]).model) == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_left_to_the_anchor(name: str) -> None:
    parents = [FAMILIES[name](seed) for seed in range(2)]
    both = fused(parents).model
    kept = fused(parents, embeddings=False, classifier=False).model
    stem, head = ("pos_embed", "cls_token", "patch_embed", "vit.embeddings"), ("head.", "classifier.")
    for key, tensor in kept.named_parameters():
        source = parents[0] if key.startswith((*stem, *head)) else both
        assert torch.equal(tensor, source.get_parameter(key)), key
        if key.startswith((*stem, *head)):
            assert not torch.equal(tensor, both.get_parameter(key)), key


def test_parents_stay_untouched_and_share_no_memory() -> None:
    parents = [timm_vit(seed).train() for seed in range(2)]
    before = [copy.deepcopy(parent.state_dict()) for parent in parents]
    result = fused(parents, weights=[1.0, 0.0])
    with torch.no_grad():
        for tensor in result.model.parameters():
            tensor.fill_(7)
    for parent, state in zip(parents, before, strict=True):
        assert all(torch.equal(tensor, state[key]) for key, tensor in parent.state_dict().items())
    assert not result.model.training
    assert all(tensor.requires_grad for tensor in result.model.parameters())


def test_trainability_is_the_anchors() -> None:
    parents = [timm_vit(seed) for seed in range(2)]
    assert outputs(fused(parents).model).isfinite().all()
    loss = fused(parents).model(images(2)).sum()
    loss.backward()  # a model made under inference mode could not be finetuned


def test_calibration_may_be_a_generator() -> None:
    parents = [timm_vit(seed) for seed in range(2)]
    stream = ({"pixel_values": part, "labels": torch.zeros(8)} for part in images().split(8))
    assert largest_difference(fused(parents, calibration=stream).model, fused(parents).model) < 1e-4


def test_half_precision_parents_keep_their_type() -> None:
    parents = [timm_vit(seed).bfloat16() for seed in range(2)]
    result = fused(parents, calibration=[images().bfloat16()])
    assert {tensor.dtype for tensor in result.model.parameters()} == {torch.bfloat16}


# units without variance


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("evidence", EVIDENCE)
@pytest.mark.parametrize("solver", ["sinkhorn", "emd"])
def test_dead_units_give_a_finite_model(name: str, evidence: str, solver: str) -> None:
    parents = [FAMILIES[name](seed) for seed in range(2)]
    layers = {"vit_timm": ("mlp.fc1", "attn.qkv", "patch_embed.proj"), "vit_hf": ("mlp.fc1", "k_proj", "projection")}
    with torch.no_grad():
        for key, tensor in itertools.chain(*(parent.named_parameters() for parent in parents)):
            if any(layer in key for layer in layers[name]):
                tensor[:3] = 0  # no variance, and rows of weights without length
    for metric, scale in itertools.product(("euclidean", "cosine"), ("standardize", "normalize")):
        result = fused(parents, evidence=evidence, solver=solver, metric=metric, scale=scale)
        assert all(torch.isfinite(tensor).all() for tensor in result.model.parameters())


def test_one_calibration_image_is_enough_to_run() -> None:
    result = fused([timm_vit(0), timm_vit(1)], calibration=[images(1)])
    assert all(torch.isfinite(tensor).all() for tensor in result.model.parameters())


# warnings


def test_unconverged_solvers_are_reported_by_parent_and_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused([timm_vit(0), timm_vit(1)], reg=0.1).warnings == []
    monkeypatch.setattr("fusionpl.transport.solvers.SINKHORN_ITERATIONS", 11)
    (line,) = fused([timm_vit(0), timm_vit(1)], reg=0.02).warnings
    assert line.startswith("parent 1: sinkhorn did not converge on ")
    assert "worst '" in line
    assert "marginal error" in line


def test_unconverged_joint_maps_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionpl.transport.solvers.SINKHORN_ITERATIONS", 11)
    result = fused([timm_vit(0), timm_vit(1)], qk="joint", reg=0.02)
    (alignment,) = [one for one in result.alignments if one]
    assert not alignment.joint["blocks.0.q", "blocks.0.k"].converged
    assert not alignment["blocks.0.q"].converged


# refusals


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_parents(count: int) -> None:
    message = refusal([timm_vit(0)][:count])
    assert message.startswith(f"fusion needs at least two parents, not {count}")


@pytest.mark.parametrize(("ours", "theirs"), [(4, 2), (2, 4), (4, 1), (1, 4)])
def test_different_heads(ours: int, theirs: int) -> None:
    message = refusal([timm_vit(0, heads=ours), timm_vit(1, heads=theirs)])
    assert f"different head count: {theirs} and {ours}" in message


def test_different_image_size() -> None:
    message = refusal([timm_vit(0), timm_vit(1, class_token=False, global_pool="avg")])
    assert "parent 0" in message
    assert "parent 1" in message


def test_different_libraries() -> None:
    assert "different families: parent 0 is vit_timm, parent 1 is vit_hf" in refusal([timm_vit(0), hf_vit(0)])


@pytest.mark.parametrize("options", [{"qkv_bias": False}, {"init_values": 0.1}, {"pre_norm": True}], ids=str)
@pytest.mark.parametrize("swap", [False, True])
def test_one_parent_with_a_part_the_other_lacks(options: dict[str, Any], swap: bool) -> None:
    parents = [timm_vit(0), timm_vit(1, **options)]
    message = refusal(parents[::-1] if swap else parents)
    assert "parent 0" in message
    assert "parent 1" in message


@pytest.mark.parametrize("name", FAMILIES)
def test_tensor_that_is_not_finite_is_named(name: str) -> None:
    parents = [FAMILIES[name](0), FAMILIES[name](1)]
    key, tensor = list(parents[1].named_parameters())[9]
    with torch.no_grad():
        tensor.view(-1)[3] = float("nan")
    assert refusal(parents).startswith(f"parent 1: tensor '{key}' holds NaN or infinite values")


def test_empty_calibration() -> None:
    assert refusal([timm_vit(0), timm_vit(1)], calibration=[]).startswith("the calibration set is empty")
    assert "is empty" in refusal(
        [timm_vit(0), timm_vit(1)], calibration=[], evidence="weights", residual="weighted_scalar"
    )
    assert fused([timm_vit(0), timm_vit(1)], calibration=[], evidence="weights").model


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_calibration_data_that_is_not_finite(bad: float) -> None:
    poisoned = images()
    poisoned[0, 0, 0, 0] = bad
    assert "NaN or infinite" in refusal([timm_vit(0), timm_vit(1)], calibration=[poisoned])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "weights: 1 numbers for 2 parents"),
        ([0.2, 0.3, 0.5], "weights: 3 numbers for 2 parents"),
        ([0.5, 0.6], "weights must sum to 1"),
        ([float("nan"), 0.5], "weights"),
    ],
)
def test_bad_weights(weights: list[float], message: str) -> None:
    assert message in refusal([timm_vit(0), timm_vit(1)], weights=weights)


@pytest.mark.parametrize("anchor", [2, -3, 100])
def test_bad_anchor(anchor: int) -> None:
    assert f"anchor {anchor} is not an index into 2 parents; use 0 to 1" in refusal(
        [timm_vit(0), timm_vit(1)], anchor=anchor
    )


# class names


def named(model: nn.Module, names: tuple[str, ...] | None) -> nn.Module:
    if hasattr(model, "config_class"):
        if names:
            model.config.id2label = dict(enumerate(names))  # type: ignore[union-attr]
    else:
        model.pretrained_cfg = {"label_names": list(names)} if names else {}  # type: ignore[assignment]
    return model


NAMES = ("zero", "one", "two", "three", "four")


@pytest.mark.parametrize("name", FAMILIES)
def test_class_names_of_either_library(name: str) -> None:
    assert class_names(FAMILIES[name]()) is None
    assert class_names(named(FAMILIES[name](), NAMES)) == NAMES
    many = FAMILIES[name](**{"num_classes" if name == "vit_timm" else "num_labels": 12})
    assert class_names(named(many, tuple("abcdefghijkl"))) == tuple("abcdefghijkl")


def test_parents_without_names_fit_any() -> None:
    assert fused([named(timm_vit(0), NAMES), named(timm_vit(1), None)]).model


def test_parents_without_names_between_others_of_other_names() -> None:
    other = ("zero", "one", "deux", "three", "four")
    message = refusal([named(timm_vit(0), None), named(timm_vit(1), NAMES), named(timm_vit(2), other)])
    assert "parent 0 has no names for its classes, and parent 1 and parent 2 name theirs differently" in message
