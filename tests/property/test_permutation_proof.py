"""The proof of a family: renumber every free axis at random, and the function stays."""

from importlib import resources
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.norm import LayerNorm
from torch import nn

from fusionpl.families.binding import bind
from fusionpl.families.family import parse_family
from fusionpl.families.proof import permutation_error, permuted, random_permutations
from tests.models_for_tests import FAMILIES, hf_vit, outputs, timm_vit

TIMM: dict[str, dict[str, Any]] = {
    "plain": {},
    "no class token, mean pooling": {"class_token": False, "global_pool": "avg"},
    "class token, mean pooling": {"global_pool": "avg"},
    "max pooling": {"class_token": False, "global_pool": "max"},
    "LayerScale": {"init_values": 0.5},
    "registers": {"reg_tokens": 3},
    "registers, positions for patches only": {"reg_tokens": 2, "no_embed_class": True},
    "no qkv bias": {"qkv_bias": False},
    "no projection bias": {"proj_bias": False},
    "norm before the blocks": {"pre_norm": True},
    "norm of patches": {"embed_norm_layer": LayerNorm},
    "no final norm": {"final_norm": False},
    "one block": {"depth": 1},
    "four blocks": {"depth": 4},
    "one head": {"heads": 1},
    "heads of their own width": {"head_dim": 6},
}
HF: dict[str, dict[str, Any]] = {
    "plain": {},
    "no qkv bias": {"qkv_bias": False},
    "four blocks": {"depth": 4},
    "relu": {"hidden_act": "relu"},
    "heads of their own width": {"head_dim": 6},
}
seeds = st.integers(0, 2**31 - 1)


@pytest.mark.parametrize("variant", TIMM)
@given(seed=seeds)
@settings(max_examples=4, deadline=None)
def test_timm_vit(variant: str, seed: int) -> None:
    model = timm_vit(seed % 97, **TIMM[variant])
    assert permutation_error(model, outputs, seed=seed) < 1e-5


@pytest.mark.parametrize("variant", HF)
@given(seed=seeds)
@settings(max_examples=4, deadline=None)
def test_hf_vit(variant: str, seed: int) -> None:
    model = hf_vit(seed % 97, **HF[variant])
    assert permutation_error(model, outputs, seed=seed) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_proof_moves_every_tensor_and_every_free_axis(name: str) -> None:
    model = FAMILIES[name]()
    other = permuted(model, torch.Generator().manual_seed(0))
    fixed = {"head.bias", "classifier.bias"}
    same = {key for key, tensor in model.named_parameters() if torch.equal(tensor, other.get_parameter(key))}
    assert same == fixed & set(dict(model.named_parameters()))
    maps = random_permutations(bind(model), torch.Generator().manual_seed(0))
    assert set(maps) == set(bind(model).free)
    assert not any(torch.equal(one.plan, one.plan.T.diag().diag()) for one in maps.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_are_not_trivial(name: str) -> None:
    """Else the proof would prove nothing."""
    logits = outputs(FAMILIES[name]())
    assert (logits - logits.mean(0)).abs().max() > 0.1


QKV = "(head q)|(head k)|(head v)"
SWAPPED = "(head q)|(head v)|(head k)"
Q_AND_K_APART = ("circuits: {qk: [q, k]}", "circuits: {}")
WRONG: dict[str, dict[str, tuple[str, str]]] = {
    "vit_timm": {
        "keys and values swapped": (f"attn.qkv.weight: {QKV}", f"attn.qkv.weight: {SWAPPED}"),
        "bias in another order": (f"attn.qkv.bias: {QKV}", f"attn.qkv.bias: {SWAPPED}"),
        "output projection reads keys": ("attn.proj.weight: attn <- (head v)", "attn.proj.weight: attn <- (head k)"),
        "Q and K apart": Q_AND_K_APART,
        "a branch forgotten": ("joins: {mid: [in, attn],", "joins: {mid: [in, in],"),
        "position embedding beside the stream": (
            "joins: {out: [pos, patch, cls, reg, dist]}",
            "joins: {out: [cls, patch, reg, dist]}",
        ),
    },
    "vit_hf": {
        "output projection reads keys": ("o_proj.weight: attn <- (head v)", "o_proj.weight: attn <- (head k)"),
        "bias of values among queries": ("attention.v_proj.bias: (head v)", "attention.v_proj.bias: (head q)"),
        "Q and K apart": Q_AND_K_APART,
        "class token beside the stream": ("joins: {out: [pos, patch, cls]}", "joins: {out: [pos, patch]}"),
    },
}


@pytest.mark.parametrize(("name", "mistake"), [(name, one) for name, mistakes in WRONG.items() for one in mistakes])
def test_a_wrong_line_fails_the_proof(name: str, mistake: str) -> None:
    right, wrong = WRONG[name][mistake]
    text = (resources.files("fusionpl.families") / "library" / f"{name}.yaml").read_text()
    assert text.count(right) == 1
    model: nn.Module = FAMILIES[name]()
    binding = bind(model, parse_family(text.replace(right, wrong)))
    before, after = outputs(model), outputs(permuted(model, torch.Generator().manual_seed(0), binding))
    assert (before - after).abs().max() > 1e-2


def test_the_check_itself_sees_a_wrong_line(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (resources.files("fusionpl.families") / "library" / "vit_timm.yaml").read_text()
    family = parse_family(text.replace("circuits: {qk: [q, k]}", "circuits: {}"))
    monkeypatch.setattr("fusionpl.families.binding.family_of", lambda model: family)
    assert permutation_error(timm_vit(), outputs) > 1e-2
