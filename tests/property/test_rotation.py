"""Rotation of the residual stream: the canonical form and the aligned parent compute what the parent computed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from fusionpl.alignment.config import AlignConfig
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.errors import FusionError
from fusionpl.families import canonical
from fusionpl.families.apply import aligned_state, load_parameters, own_state
from fusionpl.families.binding import bind
from fusionpl.families.proof import permuted
from fusionpl.fusion.config import FuseConfig
from fusionpl.fusion.fuse import fuse
from fusionpl.fusion.result import FusionResult
from fusionpl.transport.maps import TransportMap
from tests.models_for_tests import FAMILIES, images, largest_difference, outputs, timm_vit

ROTATION: dict[str, Any] = {"stream": "rotation", "residual": "tie", "heads": "matched"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale": {"init_values": 0.5},
    "registers": {"reg_tokens": 2},
    "mean pooling": {"global_pool": "avg"},
    "heads of their own width": {"head_dim": 6},
    "heads wider than the stream": {"head_dim": 20},
}


def rotated(parents: list[nn.Module], anchor: int = 0, weights: list[float] | None = None, **options: Any) -> Any:
    config = FuseConfig(anchor, weights, align=AlignConfig(**{"solver": "assignment", **ROTATION, **options}))
    return fuse(parents, [images()], config)


def aligned_outputs(result: FusionResult, index: int) -> Tensor:
    return outputs(result.aligned_parent(index))


def everything(name: str) -> list[nn.Module]:
    return [timm_vit(2, **options) for options in VARIANTS.values()] if name == "vit_timm" else [FAMILIES[name](2)]


def in_canonical_form(model: nn.Module) -> Any:
    return SectionedModel(model, bind(model), prepare=canonical).whole()


def orthogonal(n: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


def rotation_of(model: nn.Module, seed: int) -> nn.Module:
    """A network in canonical form, with its stream and every head's circuits rotated at random."""
    generator = torch.Generator().manual_seed(seed)
    binding = bind(model)

    def turn(matrix: Tensor) -> TransportMap:
        return TransportMap(matrix, "planted", "orthogonal")

    maps = {}
    for members in binding.streams():
        n = binding.axes[members[0]].size
        ones = torch.eye(n, dtype=torch.float64)
        ones[:, 0] = 1
        basis = torch.linalg.qr(ones)[0]
        inner = torch.eye(n, dtype=torch.float64)
        inner[1:, 1:] = orthogonal(n - 1, generator)
        maps.update(dict.fromkeys(members, turn(basis @ inner @ basis.T)))
    for group in binding.attention:
        axis = binding.axes[group[0]]
        qk, vo = (
            turn(torch.block_diag(*(orthogonal(axis.size // axis.heads, generator) for _ in range(axis.heads))))
            for _ in range(2)
        )
        maps.update({name: vo if name.endswith(".v") else qk for name in group})
    own = own_state(model)
    return load_parameters(model, aligned_state(own, binding, own, binding, maps))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_canonical_form_keeps_the_function_and_centres_the_stream(name: str) -> None:
    for model in everything(name):
        binding = bind(model)
        found = in_canonical_form(model)
        torch.testing.assert_close(outputs(found), outputs(model), atol=1e-4, rtol=1e-5)
        assert largest_difference(found, model) > 0
        for key, tensor in found.named_parameters():
            if tensor.ndim == 1 and not key.endswith("bias"):
                assert torch.equal(tensor, torch.ones_like(tensor)), key
        for module in (module for module in found.modules() if isinstance(module, nn.LayerNorm)):
            assert not module.bias.any()
        stream = {axis for members in binding.streams() for axis in members}
        for slot in binding.slots:
            if len(slot.axes) > 1 and slot.axes[0] in stream and not slot.reads[0]:
                means = slot.of(found.get_parameter(slot.parameter)).mean(0)
                torch.testing.assert_close(means, torch.zeros_like(means), atol=1e-6, rtol=0)


def test_the_canonical_form_splits_circuits_evenly() -> None:
    model = timm_vit(3)
    found = in_canonical_form(model).blocks[0].attn
    weight, bias = found.qkv.weight.double(), found.qkv.bias.double()
    rows = torch.cat([weight, bias[:, None]], dim=1).view(3, 4, 4, -1)
    grams = rows @ rows.transpose(-1, -2)
    torch.testing.assert_close(grams[0], grams[1], atol=1e-5, rtol=1e-5)
    written = found.proj.weight.double().T.view(4, 4, -1)
    torch.testing.assert_close(grams[2], written @ written.transpose(-1, -2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_aligned_parent_computes_its_own_function(name: str) -> None:
    for options in VARIANTS.values() if name == "vit_timm" else [{}]:
        parents = [FAMILIES[name](seed, **options) for seed in range(3)]
        result = rotated(parents, anchor=1)
        for index, parent in enumerate(parents):
            torch.testing.assert_close(aligned_outputs(result, index), outputs(parent), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_planted_rotation_is_recovered(name: str) -> None:
    model = in_canonical_form(FAMILIES[name](4))
    other = rotation_of(permuted(model, torch.Generator().manual_seed(1)), seed=2)
    torch.testing.assert_close(outputs(other), outputs(model), atol=1e-4, rtol=1e-5)
    assert max(float((a - b).abs().max()) for a, b in zip(other.parameters(), model.parameters(), strict=True)) > 0.1
    result = rotated([model, other])
    anchor = result.aligned(0)
    for key, tensor in result.aligned(1).items():
        torch.testing.assert_close(tensor, anchor[key], atol=1e-4, rtol=0, msg=lambda text: f"{key}: {text}")  # noqa: B023


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("wider", [{"width": 24}, {"width": 32, "heads": 8}, {"width": 24, "mlp": 48, "head_dim": 7}])
def test_a_narrow_parent_keeps_its_function_in_a_wider_one_and_back(name: str, wider: dict[str, int]) -> None:
    narrow, wide = FAMILIES[name](5), FAMILIES[name](6, **wider)
    there = rotated([wide, narrow], weights=[0.0, 1.0], solver="emd").model
    torch.testing.assert_close(outputs(there), outputs(narrow), atol=1e-4, rtol=1e-5)
    back = rotated([narrow, there], weights=[0.0, 1.0], solver="emd").model
    torch.testing.assert_close(outputs(back), outputs(narrow), atol=1e-3, rtol=1e-4)


def test_post_ln_is_refused_with_what_to_use_instead() -> None:
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    parents: list[nn.Module] = [BertForMaskedLM(config).eval() for _ in range(2)]
    with pytest.raises(FusionError, match=r"bert is post-LN.*use align\.stream transport with align\.residual tie"):
        rotated(parents)


def test_a_shift_without_a_bias_to_take_it_stays_in_the_norm_and_turns() -> None:
    parents = [timm_vit(seed, qkv_bias=False) for seed in range(2)]
    result = rotated(parents)
    for index, parent in enumerate(parents):
        torch.testing.assert_close(aligned_outputs(result, index), outputs(parent), atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        parents[0].get_parameter("blocks.0.norm1.weight")[3] = 0
    with pytest.raises(FusionError, match=r"'blocks\.0\.norm1\.bias' has no bias of the map behind it"):
        rotated(parents)


def test_norms_inside_the_stream_are_refused() -> None:
    with pytest.raises(FusionError, match=r"parent 0: 'norm_pre' normalises inside the stream"):
        rotated([timm_vit(seed, pre_norm=True) for seed in range(2)])


def test_options_that_contradict_a_rotation_are_refused() -> None:
    with pytest.raises(FusionError, match=r"it needs align\.residual tie, align\.heads matched$"):
        AlignConfig(stream="rotation")
    with pytest.raises(FusionError, match=r"it needs align\.evidence activations$"):
        AlignConfig(**{**ROTATION, "evidence": "weights"})
