"""A parent whose head alone is fitted to what all parents predict."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fusionpl.calibration.config import CalibrationConfig
from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.calibration.forward import logits
from fusionpl.calibration.kept import Kept
from fusionpl.errors import FusionError
from fusionpl.families.proof import permuted
from fusionpl.fusion.config import FuseConfig, RefitConfig
from fusionpl.fusion.fitting import predicting
from fusionpl.fusion.fuse import fuse
from fusionpl.fusion.heads import fit_head, head_of
from fusionpl.fusion.voting import Voting
from fusionpl.models.load import load_model
from fusionpl.models.save import save_model
from tests.models_for_tests import FAMILIES, images, largest_difference, redrawn, timm_vit

EVEN = [Voting([0.5, 0.5])]
SIZES: dict[str, Any] = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def gpt2(cls: Any, seed: int = 0, **settings: Any) -> nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_head=4, n_layer=2, n_positions=32, **SIZES, **settings)
    return redrawn(cls(config), seed)


def texts(count: int = 256, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 40, (count, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[::2, 8:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def cut(batch: Any) -> CalibrationSet:
    return CalibrationSet([batch], CalibrationConfig(samples=256), Kept(10**8))


SAMPLES = cut(texts())


def divergence(models: list[nn.Module], model: nn.Module, batch: Any) -> float:
    with torch.no_grad():
        wanted = torch.stack([logits(one, batch).softmax(-1) for one in models]).mean(0)
        found = logits(model, batch).log_softmax(-1)
    return float((torch.special.xlogy(wanted, wanted) - wanted * found).sum(-1).mean())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fitted_head_predicts_more_as_all_parents_do(name: str) -> None:
    parents = [FAMILIES[name](seed) for seed in range(2)]
    before = copy.deepcopy(parents[0].state_dict())
    found = fit_head(parents[0], parents, EVEN, cut(images(256)))
    assert found is not None
    model, fit = found
    batch = images(64, seed=7)
    assert divergence(parents, model, batch) < 0.8 * divergence(parents, parents[0], batch)
    assert fit.after < fit.before
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert {key.split(".")[0] for key in moved} <= {"head", "classifier"}
    assert all(torch.equal(value, before[key]) for key, value in parents[0].state_dict().items())


def test_a_parent_alone_keeps_its_head() -> None:
    parent = timm_vit()
    found = fit_head(parent, [parent, permuted(parent, torch.Generator().manual_seed(0))], EVEN, cut(images(256)))
    assert found is not None
    torch.testing.assert_close(logits(found[0], images(8)), logits(parent, images(8)), atol=1e-3, rtol=1e-3)


def test_a_decoder_that_is_the_embedding_comes_apart() -> None:
    parents = [gpt2(transformers.GPT2LMHeadModel, seed) for seed in range(2)]
    found = fit_head(parents[0], parents, EVEN, SAMPLES)
    assert found is not None
    model: Any = found[0]
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert torch.equal(model.transformer.wte.weight, parents[0].get_parameter("transformer.wte.weight"))
    assert divergence(parents, model, texts(64, seed=3)) < divergence(parents, parents[0], texts(64, seed=3))


def test_a_classifier_of_sequences_is_fitted_at_the_token_that_it_reads() -> None:
    parents = [gpt2(transformers.GPT2ForSequenceClassification, seed, num_labels=3) for seed in range(2)]
    found = fit_head(parents[0], parents, EVEN, SAMPLES)
    assert found is not None
    assert divergence(parents, found[0], texts(64, seed=3)) < divergence(parents, parents[0], texts(64, seed=3))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]])
    where = predicting(parents[0], torch.zeros(3, 4, 16), mask)
    assert where.nonzero().tolist() == [[0, 1], [1, 3], [2, 3]]


def test_what_has_no_head_of_that_kind_has_none_fitted() -> None:
    regression = [gpt2(transformers.GPT2ForSequenceClassification, seed, num_labels=1) for seed in range(2)]
    assert fit_head(regression[0], regression, EVEN, cut(texts())) is None
    bare = timm_vit(num_classes=0)
    assert head_of(bare) is None
    assert fit_head(bare, [bare, bare], EVEN, cut(images(16))) is None
    assert head_of(gpt2(transformers.GPT2LMHeadModel)) == "lm_head"


def test_strategy_head_keeps_one_parent_and_fits_its_head() -> None:
    parents = [timm_vit(seed) for seed in range(3)]
    result = fuse(parents, [images(256)], FuseConfig(strategy="head"))
    kept = result.anchor
    assert largest_difference(result.model, parents[kept]) > 0
    trunk = {key for key in result.model.state_dict() if not key.startswith("head.")}
    assert all(torch.equal(result.model.state_dict()[key], parents[kept].state_dict()[key]) for key in trunk)
    far = [divergence(parents, one, images(256)) for one in (result.model, *parents)]
    assert far[0] < min(far[1:])
    (note,) = result.notes
    assert note.startswith(f"head: parent {kept} is nearest to the mean of all with its head fitted")


def test_strategy_head_by_path_writes_a_model_that_loads(tmp_path: Path) -> None:
    for seed in range(2):
        save_model(gpt2(transformers.GPT2LMHeadModel, seed), tmp_path / f"{seed}")
    result = fuse([tmp_path / "0", tmp_path / "1"], [texts()], FuseConfig(strategy="head"), output=tmp_path / "fused")
    loaded: Any = load_model(tmp_path / "fused")
    assert largest_difference(loaded, result.model) == 0
    assert not loaded.config.tie_word_embeddings


@pytest.mark.parametrize(("changes", "message"), [
    ({"width": 2.0}, "strategy head keeps one parent's body; width needs strategy joint"),
    ({"depth": 3}, "depth needs strategy joint"),
])  # fmt: skip
def test_what_strategy_head_does_not_take(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FusionError, match=message):
        FuseConfig(strategy="head", **changes)
    bare = [timm_vit(seed, num_classes=0) for seed in range(2)]
    with pytest.raises(FusionError, match="so there is no head to fit"):
        fuse(bare, [images(16)], FuseConfig(strategy="head"))


def test_of_many_tokens_a_part_of_the_samples_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    parents = [gpt2(transformers.GPT2LMHeadModel, seed) for seed in range(2)]
    monkeypatch.setattr("fusionpl.transport.softmax.MOST", 256 * 12 * 16 * 40 // 4)
    found = fit_head(parents[0], parents, EVEN, SAMPLES)
    assert found is not None
    assert divergence(parents, found[0], texts(64, seed=3)) < divergence(parents, parents[0], texts(64, seed=3))


def test_a_decoder_that_is_too_large_stays_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    parents = [gpt2(transformers.GPT2LMHeadModel, seed, tie_word_embeddings=False) for seed in range(2)]
    config = FuseConfig(refit=RefitConfig("ridge"))
    fitted = fuse(parents, [texts()], config).model.get_parameter("lm_head.weight")
    for place in ("heads", "predictions"):
        monkeypatch.setattr(f"fusionpl.fusion.{place}.LARGEST", 100)
    assert fit_head(parents[0], parents, EVEN, SAMPLES) is None
    result = fuse(parents, [texts()], config)
    left = result.model.get_parameter("lm_head.weight")
    assert torch.equal(left, result.average().get_parameter("lm_head.weight"))
    assert not torch.equal(left, fitted)
