"""Encoders without a head: their families, fused with themselves, and one stream that holds both parents'."""

import copy
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from fusionpl import fuse, load_config
from fusionpl.calibration.embeddings import embed
from fusionpl.evaluation.neighbours import agreement, similarities
from fusionpl.families.binding import bind
from fusionpl.families.canonical import unrotatable
from fusionpl.families.proof import permutation_error
from tests.models_for_tests import redrawn

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TOKENS = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGES = {"image_size": 16, "patch_size": 4}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}


def models() -> dict[str, Any]:
    """Name -> config; `Model` is behind each class' name."""
    t = transformers
    return {
        "BertModel": t.BertConfig(**SIZES, vocab_size=50),
        "XLMRobertaModel": t.XLMRobertaConfig(**SIZES, **TOKENS),
        "DistilBertModel": t.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=50),
        "ElectraModel": t.ElectraConfig(**SIZES, vocab_size=50, embedding_size=32),
        "ModernBertModel": t.ModernBertConfig(**SIZES, **TOKENS, cls_token_id=1, sep_token_id=2),
        "ViTModel": t.ViTConfig(**SIZES, **IMAGES),
        "DeiTModel": t.DeiTConfig(**SIZES, **IMAGES),
        "Dinov2Model": t.Dinov2Config(**SIZES, **IMAGES),
        "GPT2Model": t.GPT2Config(**GPT2),
        "GemmaModel": t.GemmaConfig(**SIZES, **TOKENS, num_key_value_heads=2, head_dim=8),
        "Qwen3Model": t.Qwen3Config(**SIZES, **TOKENS, num_key_value_heads=2, head_dim=8),
        "timm": None,
    }


def encoder(name: str, seed: int) -> nn.Module:
    if name == "timm":
        args = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}
        return redrawn(timm.create_model("vit_tiny_patch16_224", **args), seed)
    return redrawn(getattr(transformers, name)(models()[name]), seed)


def batches(name: str, count: int = 6) -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    if name in ("timm", "ViTModel", "DeiTModel", "Dinov2Model"):
        return [torch.randn(32, 3, 16, 16, generator=draw) for _ in range(count)]
    return [
        {
            "input_ids": torch.randint(5, 50, (32, 8), generator=draw),
            "attention_mask": torch.ones(32, 8, dtype=torch.long),
        }
        for _ in range(count)
    ]


def shown(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        return embed(model, batch, "mean")


@pytest.mark.parametrize("name", models())
def test_inner_products_survive_renumbered_units(name: str) -> None:
    model, (batch, *_) = encoder(name, 0), batches(name)
    products = shown(model, batch) @ shown(model, batch).T
    error = permutation_error(model, lambda one: shown(one, batch) @ shown(one, batch).T)
    assert error < 1e-5 * float(products.abs().max())


@pytest.mark.parametrize("name", models())
def test_an_encoder_fused_with_itself_is_itself(name: str) -> None:
    model, (batch, *rest) = encoder(name, 0), batches(name)
    found = fuse([model, copy.deepcopy(model)], rest, load_config("default"))
    apart = (shown(found.model, batch) - shown(model, batch)).abs().max()
    assert float(apart) < 2e-3 * float(shown(model, batch).abs().max())


@pytest.mark.parametrize("name", ["BertModel", "ViTModel", "GemmaModel", "timm"])
def test_a_stream_of_both_widths_keeps_the_sum_of_the_similarities(name: str) -> None:
    parents, (batch, *rest) = [encoder(name, seed) for seed in (0, 1)], batches(name, 10)
    each = [similarities(shown(model, batch)) for model in parents]
    result = fuse(parents, rest, load_config("default", {"width": 2.0}))
    assert result.config.strategy == "joint"
    wanted = torch.stack(each).mean(0)
    alike = agreement(similarities(shown(result.model, batch)), wanted).figures["accuracy"]
    assert alike > max(agreement(one, wanted).figures["accuracy"] for one in each)
    assert alike > 0.75


def test_a_last_norm_that_nothing_reads_may_not_be_rotated() -> None:
    for name in ("ViTModel", "timm", "GPT2Model"):
        assert "encoder without a head" in str(unrotatable(bind(encoder(name, 0))))


def test_pooling() -> None:
    model = encoder("BertModel", 0)
    (batch, *_) = batches("BertModel", 1)
    batch["attention_mask"][:, 5:] = 0
    states = model(**batch).last_hidden_state
    assert torch.allclose(embed(model, batch, "mean"), states[:, :5].mean(1), atol=1e-6)
    assert torch.equal(embed(model, batch, "cls"), states[:, 0])
    assert torch.equal(embed(model, batch, "max"), states[:, :5].amax(1))
    assert torch.equal(embed(model, batch, "lasttoken"), states[:, 4])
