"""Rotary decoders, groups of heads, gates, newer vision models: their exact symmetries are proven, and
that one step beyond breaks the function."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusionpl.errors import FusionError
from fusionpl.families.binding import bind
from fusionpl.families.compatible import check_compatible
from fusionpl.families.proof import allowed, permutation_error, permuted, random_permutations
from tests.models_for_tests import CAUSAL, ELECTRA, MODERN, ROBERTA, STACKS, VISION, causal, run, text_outputs

BUILD: dict[str, Callable[[int], nn.Module]] = {
    **{name: partial(causal, name) for name in CAUSAL},
    **ELECTRA,
    **MODERN,
    **ROBERTA,
    **VISION,
    **STACKS,
}


@pytest.mark.parametrize("name", BUILD)
def test_what_axes_allow_keeps_the_function(name: str) -> None:
    for seed in range(3):
        model = BUILD[name](seed)
        size = float(run(name, model).abs().max())
        assert size > 0.1
        # QK-norm divides by the root of a mean square and 1e-6, which is not quite free of scale.
        assert permutation_error(model, partial(run, name), seed=seed) < (1e-4 if "qwen3" in name else 1e-5) * size


@pytest.mark.parametrize("name", BUILD)
def test_the_proof_moves_every_tensor_and_every_free_axis(name: str) -> None:
    model = BUILD[name](0)
    other = permuted(model, torch.Generator().manual_seed(1))
    same = {key for key, tensor in model.named_parameters() if torch.equal(tensor, other.get_parameter(key))}
    sizes = (1, 5, 40)  # classes, vocabulary
    fixed = ("q_norm.weight", "k_norm.weight", "logit_scale")
    assert all(
        key.endswith(fixed) or (key.endswith("bias") and model.get_parameter(key).shape[0] in sizes) for key in same
    ), same
    binding = bind(model)
    assert set(random_permutations(binding, torch.Generator().manual_seed(0))) == set(binding.free)


def broken(model: nn.Module, change: Callable[[nn.Module], None]) -> float:
    """How much the outputs differ after a change to the parameters."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    return float((text_outputs(other) - text_outputs(model)).abs().max())


def attention(model: Any) -> Any:
    return model.model.layers[0].self_attn


def turned(weight: Tensor, head: int, width: int, pair: tuple[int, int], angle: float, scale: float = 1.0) -> None:
    """Rotates and scales two units of a head."""
    i, j = (head * width + unit for unit in pair)
    c, s = scale * torch.tensor(angle).cos(), scale * torch.tensor(angle).sin()
    weight[[i, j]] = torch.stack([c * weight[i] - s * weight[j], s * weight[i] + c * weight[j]])


def test_in_a_rotary_head_only_frequency_pairs_turn() -> None:
    model = causal("llama, heads apart", 3)  # heads of 4 units: pairs (0, 2) and (1, 3)

    def both(pair: tuple[int, int], scales: tuple[float, float]) -> Callable[[nn.Module], None]:
        def change(other: nn.Module) -> None:
            for module, scale in zip((attention(other).q_proj, attention(other).k_proj), scales, strict=True):
                turned(module.weight, 1, 4, pair, 0.7, scale)

        return change

    assert broken(model, both((0, 2), (1.0, 1.0))) < 1e-5
    assert broken(model, both((1, 3), (2.0, 0.5))) < 1e-5
    assert broken(model, both((1, 3), (2.0, 2.0))) > 1e-3
    assert broken(model, both((0, 1), (1.0, 1.0))) > 1e-3

    def swap(other: nn.Module) -> None:
        for module in (attention(other).q_proj, attention(other).k_proj):
            module.weight[[0, 1]] = module.weight[[1, 0]]

    assert broken(model, swap) > 1e-3


def test_a_part_that_is_not_rotated_is_free() -> None:
    model = causal("gpt_neox", 3)  # heads of 8 units, 4 of them rotated

    def swap(units: tuple[int, int]) -> Callable[[Any], None]:
        def change(other: Any) -> None:
            weight, bias = other.gpt_neox.layers[0].attention.query_key_value.parameters()
            for tensor in (weight, bias):
                rows = tensor.view(4, 3, 8, *tensor.shape[1:])
                rows[0, :2, list(units)] = rows[0, :2, list(units[::-1])]

        return change

    assert broken(model, swap((4, 6))) < 1e-5
    assert broken(model, swap((0, 1))) > 1e-3
    assert broken(model, swap((2, 5))) > 1e-3


def test_behind_norms_with_gains_a_pair_turns_only_where_its_gains_agree() -> None:
    model: Any = causal("qwen3", 3)  # heads of 8 units: pairs (0, 4), ...

    def turn(other: nn.Module, angle: float = 0.7) -> None:
        for head in range(2):
            turned(attention(other).q_proj.weight, head, 8, (0, 4), angle)
        turned(attention(other).k_proj.weight, 0, 8, (0, 4), angle)

    assert broken(model, turn) > 1e-3
    assert broken(model, partial(turn, angle=torch.pi)) < 1e-5
    with torch.no_grad():
        for norm in (attention(model).q_norm, attention(model).k_norm):
            norm.weight[4] = norm.weight[0]
    assert broken(model, turn) < 1e-5


def test_a_query_does_not_leave_its_group() -> None:
    model = causal("llama", 3)  # 4 queries, 2 key-value heads

    def swap(heads: tuple[int, int]) -> Callable[[nn.Module], None]:
        def change(other: nn.Module) -> None:
            for weight in (attention(other).q_proj.weight, attention(other).o_proj.weight.T):
                rows = weight.view(4, 4, -1) if weight.is_contiguous() else weight.unflatten(0, (4, 4))
                rows[list(heads)] = rows[list(heads[::-1])]

        return change

    assert broken(model, swap((0, 1))) < 1e-5
    assert broken(model, swap((1, 2))) > 1e-3


def test_a_gate_moves_with_what_it_multiplies() -> None:
    model = causal("llama", 3)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))

    def change(other: Any, *, gate: bool, scale: float = 1.0, scaled: str = "up_proj") -> None:
        mlp = other.model.layers[0].mlp
        mlp.up_proj.weight.copy_(mlp.up_proj.weight[order])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order] / scale)
        if gate:
            mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[order])
        getattr(mlp, scaled).weight.mul_(scale)

    assert broken(model, partial(change, gate=True)) < 1e-5
    assert broken(model, partial(change, gate=True, scale=-2.0)) < 1e-5
    assert broken(model, partial(change, gate=True, scale=-2.0, scaled="gate_proj")) > 1e-3
    assert broken(model, partial(change, gate=False)) > 1e-3


def test_a_binding_knows_groups_pairs_and_repeated_heads() -> None:
    axes = bind(causal("llama")).axes
    q, k, v, out = (axes[f"model.layers.0.{name}"] for name in ("q", "k", "v", "v@group"))
    assert (q.heads, q.members, q.groups, q.width, q.kind, q.pairs) == (4, 2, 2, 4, "pairs", 2)
    assert (k.heads, k.members, k.kind) == (2, 1, "pairs")
    assert (v.heads, v.kind, v.pairs) == (2, "permutation", 0)
    assert (out.heads, out.members, out.size, out.repeats) == (4, 2, 16, "model.layers.0.v")
    assert bind(causal("gpt_neox")).axes["gpt_neox.layers.1.k"].pairs == 2
    assert bind(causal("llama, tied")).closed == {"model.embed_tokens.weight"}
    assert not bind(causal("llama")).closed


def test_slots_in_turns_cover_a_parameter_once() -> None:
    for name in ("gpt_neox", "timm, packed gate", "dinov2"):
        model = BUILD[name](0)
        hits = {key: torch.zeros_like(tensor) for key, tensor in model.named_parameters()}
        for slot in bind(model).slots:
            slot.put(hits[slot.parameter], slot.of(hits[slot.parameter]) + 1)
        assert all((tensor == 1).all() for tensor in hits.values())


def test_the_table_of_what_axes_allow() -> None:
    table = allowed(bind(causal("llama")))
    assert "rotation, once norms are folded" in table
    assert (
        "model.layers.*.q        permutation of 2 groups of 2 heads x rotation and scale of 2 frequency pairs" in table
    )
    assert "as its gate, ffn; scale and sign" in table
    assert "signs of 4 frequency pairs, scale" in allowed(bind(causal("qwen3")))
    assert "rotation, once" not in allowed(bind(causal("gpt2")))  # tied


def test_parents_with_and_without_biases_are_refused() -> None:
    with pytest.raises(FusionError, match=r"parents of different architecture: B has .*, A has not"):
        check_compatible({"A": bind(causal("llama")), "B": bind(causal("llama, biases"))})
