"""BERT, RoBERTa and DistilBERT, with their language-model and classification heads: what images prove, for text."""

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusionpl.alignment.config import AlignConfig
from fusionpl.alignment.maps import Maps, Plans
from fusionpl.calibration.config import CalibrationConfig
from fusionpl.calibration.kept import Kept
from fusionpl.errors import FusionError
from fusionpl.families.binding import bind
from fusionpl.families.proof import permutation_error, permuted, random_permutations
from fusionpl.fusion.config import FuseConfig, RefitConfig, load_config
from fusionpl.fusion.fuse import fuse
from fusionpl.fusion.result import FusionResult
from tests.models_for_tests import (
    ELECTRA,
    ROBERTA,
    TEXT_MODELS,
    images,
    largest_difference,
    sentences,
    text_model,
    text_outputs,
    timm_vit,
)

RESIDUALS = ("average", "branch", "skip", "identity", "weighted_scalar", "weighted_matrix", "tie")
# One of each family: the heads differ in the tail alone.
SOME = ("bert masked-lm", "roberta classifier", "distilbert masked-lm")
KEEPS_FUNCTION: dict[str, Any] = {"residual": "tie", "heads": "matched", "solver": "assignment"}


def fused(
    parents: list[nn.Module],
    *,
    weights: list[float] | None = None,
    calibration: Any = None,
    tokens: str = "all",
    refit: Any = "none",
    **options: Any,
) -> FusionResult:
    config = FuseConfig(0, weights, CalibrationConfig(tokens=tokens), AlignConfig(**options), RefitConfig(refit))
    return fuse(parents, [sentences(64)] if calibration is None else calibration, config)


def permuted_copy(model: nn.Module, seed: int = 0) -> nn.Module:
    return permuted(model, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TEXT_MODELS)
@pytest.mark.parametrize("depth", [1, 3])
def test_units_may_be_renumbered(name: str, depth: int) -> None:
    for seed in range(3):
        model = text_model(name, seed, depth=depth)
        size = float(text_outputs(model).abs().max())
        assert size > 0.1
        assert permutation_error(model, text_outputs, seed=seed) < 1e-5 * max(size, 1)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_the_proof_moves_every_tensor_and_every_free_axis(name: str) -> None:
    model = text_model(name)
    other = permuted_copy(model)
    same = {key for key, tensor in model.named_parameters() if torch.equal(tensor, other.get_parameter(key))}
    assert all(key.endswith("bias") and model.get_parameter(key).shape[0] in (5, 40) for key in same), same
    assert set(random_permutations(bind(model), torch.Generator())) == set(bind(model).free)


@pytest.mark.parametrize("name", SOME)
def test_a_permuted_copy_is_recovered(name: str) -> None:
    model = text_model(name, 5)
    layouts: tuple[dict[str, Any], ...] = ({"heads": "flat"}, {"heads": "matched"}, {"qk": "joint"})
    for evidence, solver, layout in itertools.product(("activations", "weights"), ("emd", "assignment"), layouts):
        # A soft join of exact maps is exact too: every residual policy must give the copy back.
        for residual in ("average", "tie"):
            result = fused([model, permuted_copy(model)], evidence=evidence, solver=solver, residual=residual, **layout)
            assert largest_difference(result.model, model) < 1e-5, (evidence, solver, layout, residual)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_weight_one_returns_that_parents_function(name: str) -> None:
    parents = [text_model(name, seed) for seed in range(3)]
    for chosen in range(3):
        model = fused(parents, weights=[float(index == chosen) for index in range(3)], **KEEPS_FUNCTION).model
        torch.testing.assert_close(text_outputs(model), text_outputs(parents[chosen]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SOME)
def test_every_residual_policy_and_evidence_runs_at_equal_and_other_widths(name: str) -> None:
    anchor, equal, wide = (text_model(name, 0), text_model(name, 1), text_model(name, 2, width=24, mlp=40))
    for residual, evidence in itertools.product(RESIDUALS, ("activations", "weights")):
        parents = [anchor, equal] if residual == "identity" else [anchor, equal, wide]
        found = text_outputs(fused(parents, residual=residual, evidence=evidence).model)
        assert found.isfinite().all()


@pytest.mark.parametrize("name", ["bert masked-lm", "roberta masked-lm", "distilbert masked-lm"])
def test_a_tied_decoder_stays_tied(name: str) -> None:
    model: Any = fused([text_model(name, 0), text_model(name, 1)], refit="ridge").model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("tokens", ["all", "mean", "class"])
def test_what_stands_in_the_padding_changes_nothing(name: str, tokens: str) -> None:
    parents = [text_model(name, seed) for seed in range(2)]
    batch = sentences(64)
    noise = torch.randint(1, 40, batch["input_ids"].shape, generator=torch.Generator().manual_seed(1))
    other = batch | {"input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], noise)}
    if name.startswith("roberta"):  # numbers its positions by which ids are padding; at the end that moves nothing real
        assert (batch["attention_mask"].diff() <= 0).all()
    first, second = (fused(parents, calibration=[one], tokens=tokens, refit="ridge") for one in (batch, other))
    assert largest_difference(first.model, second.model) < 1e-4


@pytest.mark.parametrize("name", SOME)
def test_a_refit_of_a_parent_with_itself_keeps_its_function(name: str) -> None:
    model = text_model(name, 3)
    for align in ({"solver": "emd"}, KEEPS_FUNCTION):
        result = fused([model, permuted_copy(model)], refit="ridge", **align)
        torch.testing.assert_close(text_outputs(result.model), text_outputs(model), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_a_refit_is_nearer_to_the_mean_of_the_parents(name: str) -> None:
    parents = [text_model(name, seed) for seed in range(2)]
    batch = sentences(64)
    wanted = (text_outputs(parents[0], batch) + text_outputs(parents[1], batch)) / 2

    def distance(model: nn.Module) -> Tensor:
        return (text_outputs(model, batch) - wanted).square().mean()

    result = fused(copy.deepcopy(parents), refit="ridge")
    assert distance(result.model) < distance(result.average())


def test_a_window_of_patches_is_all_tokens_of_a_text() -> None:
    """conf/fuse/paper.yaml, made for images, works on text parents."""
    parents = [text_model("bert masked-lm", seed) for seed in range(2)]
    paper = load_config("conf/fuse/paper.yaml")
    assert paper.calibration.tokens == "window:6"
    for batch in (sentences(64), {"input_ids": sentences(64)["input_ids"]}):
        found = fuse(parents, [batch], paper).model
        wanted = fuse(parents, [batch], load_config("conf/fuse/paper.yaml", {"calibration.tokens": "all"})).model
        assert largest_difference(found, wanted) == 0


def test_residual_auto_ties_post_ln_and_averages_pre_ln() -> None:
    texts = [text_model("bert classifier", seed) for seed in range(2)]
    assert largest_difference(fused(texts, residual="auto").model, fused(texts, residual="tie").model) == 0
    vits = [timm_vit(seed) for seed in range(2)]
    auto, average = (fused(vits, calibration=[images()], residual=one).model for one in ("auto", "average"))
    assert largest_difference(auto, average) == 0


@pytest.mark.parametrize("size", [3, 4, 12])
def test_blocks_that_take_tokens_in_chunks(size: int) -> None:
    """Of the chunks only the last would be seen."""
    models = [text_model("bert classifier", seed) for seed in (0, 1)]
    plain = fuse(models, [sentences()], load_config("default")).model
    layers = [layer for model in models for layer in model.bert.encoder.layer]  # type: ignore[union-attr]
    for layer in layers:
        layer.chunk_size_feed_forward = size
    chunked = fuse(models, [sentences()], load_config("default")).model
    assert largest_difference(plain, chunked) == 0
    assert {layer.chunk_size_feed_forward for layer in layers} == {size}


@pytest.mark.parametrize("name", [*(name for name in ELECTRA if "small" in name), *ROBERTA])
@pytest.mark.parametrize("evidence", ["weights", "activations"])
@pytest.mark.parametrize("refit", ["none", "ridge"])
def test_a_copy_comes_back_from_streams_that_are_tied(name: str, evidence: str, refit: str) -> None:
    """Of ELECTRA-small nothing but a projection writes the stream; XLM-RoBERTa defines its head before its stem."""
    model = {**ELECTRA, **ROBERTA}[name](1)
    copied = permuted(model, torch.Generator().manual_seed(3))
    config = {
        "anchor": 1, "strategy": "transport", "align.solver": "emd", "align.residual": "tie", "align.qk": "shared",
        "align.heads": "matched", "align.evidence": evidence, "refit.method": refit,
    }  # fmt: skip
    found = fuse([copied, model], [sentences()], load_config("default", config)).model
    torch.testing.assert_close(text_outputs(found), text_outputs(model), atol=1e-4, rtol=1e-4)


def test_an_axis_without_a_map_is_named() -> None:
    models = [text_model("bert classifier", seed) for seed in (0, 1)]
    found = fuse(models, [sentences()], load_config("paper", {"calibration.tokens": "all"}))
    whole = found.alignments[0]
    assert whole is not None
    part = Maps(Plans(Kept(10**9))).joined(
        {axis: one for axis, one in whole.items() if axis != "bert.encoder.layer.1.ffn"}
    )
    parents = [dataclasses.replace(found.parents[0], maps=part), *found.parents[1:]]
    found = dataclasses.replace(found, parents=parents)
    with pytest.raises(FusionError, match=r"no map was found for axis 'bert\.encoder\.layer\.1\.ffn' of '.*dense"):
        found.aligned_parent(0)
