"""Rotation of the stream in newer families: RMSNorm keeps every rotation, LayerNorm those that fix the
ones vector; a decoder that is the embedding gets parameters of its own."""

from typing import Any

import pytest
import torch
from torch import nn

from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.errors import FusionError
from fusionpl.families import canonical
from fusionpl.families.apply import aligned_state, load_parameters, own_state
from fusionpl.families.binding import bind
from fusionpl.families.proof import permuted
from fusionpl.fusion.result import FusionResult
from fusionpl.transport.maps import TransportMap
from tests.models_for_tests import causal, run
from tests.property.test_newer_families import BUILD
from tests.property.test_newer_fusions import fused

ROTATION: dict[str, Any] = {"stream": "rotation", "residual": "auto", "heads": "matched", "solver": "assignment"}
NAMES = ("gpt2, decoder of its own", "gpt2 classifier", "gpt_neox", "gpt_neox, sequential", "llama",
         "llama, one key-value head", "llama, biases", "mistral",
         "qwen2", "qwen3",
         "qwen3 classifier", "deit", "dinov2", "dinov2, gate", "dinov2, registers", "timm, distilled",
         "gemma, decoder of its own", "gemma classifier",
         "siglip", "opt, decoder of its own", "phi3, groups, partly rotary")  # fmt: skip


def rotated(name: str, parents: list[nn.Module], **options: Any) -> FusionResult:
    return fused(name, parents, **{**ROTATION, **options})


def in_canonical_form(model: nn.Module) -> nn.Module:
    return SectionedModel(model, bind(model), prepare=canonical).whole()


def turned(model: nn.Module, seed: int) -> nn.Module:
    """A network in canonical form with its stream rotated at random."""
    generator = torch.Generator().manual_seed(seed)
    binding = bind(model)
    maps = {}
    for members in binding.streams():
        n = binding.axes[members[0]].size
        turn = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
        if binding.family.norm == "pre":
            ones = torch.eye(n, dtype=torch.float64)
            ones[:, 0] = 1
            basis = torch.linalg.qr(ones)[0]
            inner = torch.eye(n, dtype=torch.float64)
            inner[1:, 1:] = torch.linalg.qr(turn[1:, 1:])[0]
            turn = basis @ inner @ basis.T
        maps.update(dict.fromkeys(members, TransportMap(turn, "planted", "orthogonal")))
    own = own_state(model)
    return load_parameters(model, aligned_state(own, binding, own, binding, maps))


@pytest.mark.parametrize("name", NAMES)
def test_the_canonical_form_and_its_rotations_keep_the_function(name: str) -> None:
    model = BUILD[name](3)
    wanted = run(name, model)
    found = in_canonical_form(model)
    torch.testing.assert_close(run(name, found), wanted, atol=1e-4, rtol=1e-4)
    for key, tensor in found.named_parameters():
        if "norm" in key and not key.endswith(("bias", "q_norm.weight", "k_norm.weight")):
            assert torch.equal(tensor, torch.full_like(tensor, 1 - bind(model).family.offset)), key
    torch.testing.assert_close(run(name, turned(found, 1)), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*NAMES, "gpt2", "llama, tied"])
def test_an_aligned_parent_computes_its_own_function(name: str) -> None:
    parents = [BUILD[name](seed) for seed in range(2)]
    result = rotated(name, parents)
    for index, parent in enumerate(parents):
        found = run(name, result.aligned_parent(index))
        torch.testing.assert_close(found, run(name, parent), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_rotation_is_recovered(name: str) -> None:
    model = in_canonical_form(BUILD[name](4))
    other = turned(permuted(model, torch.Generator().manual_seed(1)), seed=2)
    result = rotated(name, [model, other])
    anchor = result.aligned(0)
    for key, tensor in result.aligned(1).items():
        torch.testing.assert_close(tensor, anchor[key], atol=2e-4, rtol=0, msg=lambda text: f"{key}: {text}")  # noqa: B023


def test_the_mean_of_a_layer_norm_forbids_what_an_rms_norm_allows() -> None:
    """One step beyond: a rotation that does not fix the ones vector, and one of gains that are not folded."""
    for name, kept in (("llama", True), ("gpt_neox", False)):
        model = in_canonical_form(BUILD[name](3))
        wanted = run("llama", model)
        binding = bind(model)
        turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
        (members,) = binding.streams()
        n = binding.axes[members[0]].size
        turn = torch.linalg.qr(turn[:n, :n])[0]
        maps = dict.fromkeys(members, TransportMap(turn, "planted", "orthogonal"))
        own = own_state(model)
        # norms have gains of 1: only what reads and writes the stream is turned
        state = aligned_state(own, binding, own, binding, maps)
        state |= {key: tensor for key, tensor in own.items() if "norm" in key}
        difference = (run("llama", load_parameters(model, state)) - wanted).abs().max()
        assert (difference < 1e-4) == kept, name


def test_an_embedding_at_both_ends_of_the_stream_comes_apart() -> None:
    for name in ("gpt2", "llama, tied"):
        parents: list[Any] = [causal(name, seed) for seed in range(2)]
        model: Any = rotated(name, parents).model
        assert parents[0].config.tie_word_embeddings
        assert not model.config.tie_word_embeddings
        assert not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)
    with pytest.raises(FusionError, match=r"stands at both ends of the stream.*align\.residual tie"):
        rotated("t5", [BUILD["t5"](seed) for seed in range(2)])  # its decoder scales by the tie


def test_a_rotation_between_widths_keeps_the_narrow_function() -> None:
    narrow, wide = causal("llama", 0), causal("llama", 1, width=32, head_dim=4, mlp=48)
    found = fused("llama", [wide, narrow], [0.0, 1.0], **{**ROTATION, "solver": "emd"}).model
    torch.testing.assert_close(run("llama", found), run("llama", narrow), atol=1e-3, rtol=1e-3)
