"""Fusion of decoders with rotary attention and groups of heads, of gated MLPs and of newer vision models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusionpl.alignment.config import AlignConfig
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.errors import FusionError
from fusionpl.families.binding import bind
from fusionpl.families.proof import permuted
from fusionpl.fusion.average import vanilla
from fusionpl.fusion.config import FuseConfig, RefitConfig
from fusionpl.fusion.fuse import fuse
from fusionpl.fusion.result import FusionResult
from fusionpl.models.load import load_model
from fusionpl.models.save import save_model
from tests.models_for_tests import batch_for, causal, largest_difference, real, run, sentences
from tests.property.test_newer_families import BUILD

EXACT: dict[str, Any] = {"residual": "tie", "heads": "matched", "solver": "assignment"}
# One of each kind: what the others add is only names.
SOME = ("gpt2", "gpt_neox", "llama", "llama, tied", "qwen3 classifier", "electra masked-lm, small",
        "modernbert masked-lm", "timm, packed gate", "dinov2, gate", "t5", "t5, gated", "clip",
        "gemma", "gemma2", "gemma3", "opt", "opt, post-LN", "phi3, groups, partly rotary")  # fmt: skip
ROTARY = (
    "gpt_neox",
    "llama",
    "llama, one key-value head",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3 classifier",
    "phi3, groups, partly rotary",
)


def fused(
    name: str, parents: list[Any], weights: list[float] | None = None, refit: Any = "none", **options: Any
) -> FusionResult:
    return fuse(
        parents, [batch_for(name, 64)], FuseConfig(0, weights, align=AlignConfig(**options), refit=RefitConfig(refit))
    )


def copy_of(model: nn.Module, seed: int = 4) -> nn.Module:
    return permuted(model, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", BUILD)
def test_a_model_fused_with_its_moved_copy_is_itself(name: str) -> None:
    """Permuted, its queries and keys rotated and scaled pair by pair, its gated units scaled and signed."""
    model = BUILD[name](1)
    other = copy_of(model)
    assert largest_difference(other, model) > 0.1
    result = fused(name, [model, other], **EXACT)
    for index in range(2):
        assert largest_difference(result.aligned_parent(index), model) < 1e-5
    size = float(run(name, model).abs().max())
    torch.testing.assert_close(run(name, result.model), run(name, model), atol=1e-5 * max(size, 1), rtol=0)


@pytest.mark.parametrize("name", ROTARY)
def test_all_options_find_a_moved_copy(name: str) -> None:
    model = BUILD[name](2)
    options: tuple[dict[str, Any], ...] = (
        {"evidence": "weights", "residual": "tie"},
        {"evidence": "weights", "heads": "matched"},
        {"qk": "joint"},
        {"qk": "shared", "metric": "cosine"},
        {"residual": "auto"},
    )
    for one in options:
        found = fused(name, [model, copy_of(model)], **{"solver": "emd", **one})
        assert largest_difference(found.model, model) < 1e-5, one


@pytest.mark.parametrize("name", SOME)
def test_weight_one_returns_that_parents_function(name: str) -> None:
    parents = [BUILD[name](seed) for seed in range(2)]
    found = fused(name, parents, [0.0, 1.0], **EXACT).model
    torch.testing.assert_close(run(name, found), run(name, parents[1]), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SOME)
def test_a_model_is_run_section_by_section(name: str) -> None:
    model = BUILD[name](3)
    batch = batch_for(name, 16, seed=99)
    found = real(SectionedModel(model, bind(model)).logits(batch), batch)
    torch.testing.assert_close(found, run(name, model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SOME)
def test_the_refit_keeps_one_function_and_draws_two_to_their_mean(name: str) -> None:
    model = BUILD[name](1)
    same = fused(name, [model, copy_of(model)], refit="ridge", **EXACT).model
    torch.testing.assert_close(run(name, same), run(name, model), atol=2e-3, rtol=2e-3)
    parents = [model, BUILD[name](2)]
    result = fused(name, parents, refit="ridge", residual="auto", reg=0.02)
    wanted = (run(name, parents[0]) + run(name, parents[1])) / 2

    def distance(one: nn.Module | None) -> Tensor:
        assert one is not None
        return (run(name, one) - wanted).square().mean()

    assert distance(result.model) < distance(result.average())
    assert distance(result.model) < distance(vanilla(parents, [0.5, 0.5]))


def packed(model: nn.Module) -> nn.Module:
    """A Llama as a Phi-3, whose class names o_proj before the map that runs first."""
    found, own = causal("phi3", kv=2, sliding_window=None, rms_norm_eps=1e-6), model.state_dict()

    def tensor(name: str) -> Tensor:
        for whole, parts in {
            "qkv_proj": ("q_proj", "k_proj", "v_proj"),
            "gate_up_proj": ("gate_proj", "up_proj"),
        }.items():
            if whole in name:
                return torch.cat([own[name.replace(whole, part)] for part in parts])
        return own[name]

    found.load_state_dict({name: tensor(name) for name in found.state_dict()})
    return found


@pytest.mark.parametrize("refit", ["none", "ridge"])
def test_packed_maps_are_fused_as_those_apart(refit: str) -> None:
    apart = [causal("llama", seed) for seed in (1, 2)]
    one, other = (
        fused("llama", parents, refit=refit, residual="auto", reg=0.02).model
        for parents in (apart, [packed(parent) for parent in apart])
    )
    torch.testing.assert_close(run("llama", other), run("llama", one), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", SOME)
def test_folders_fuse_as_models_do(name: str, tmp_path: Path) -> None:
    parents = [BUILD[name](seed) for seed in range(2)]
    for index, parent in enumerate(parents):
        if name == "timm, packed gate":
            pytest.skip("timm builds its models by name; this one has none")
        save_model(parent, tmp_path / str(index))
        torch.testing.assert_close(run(name, load_model(tmp_path / str(index))), run(name, parent))
    config = FuseConfig(align=AlignConfig(residual="auto"), refit=RefitConfig("ridge"))
    calibration = [batch_for(name, 64)]
    paths = [tmp_path / str(index) for index in range(2)]
    fuse(paths, calibration, config, output=tmp_path / "out")
    found = load_model(tmp_path / "out")
    assert largest_difference(found, fuse(parents, calibration, config).model) < 1e-5


@pytest.mark.parametrize(
    ("name", "wider"),
    [
        ("llama", {"width": 32, "heads": 8, "kv": 4, "mlp": 40}),
        ("llama", {"width": 24, "head_dim": 4}),
        ("llama", {"width": 32, "heads": 8, "kv": 2}),
        ("gpt_neox", {"width": 64, "heads": 8}),
        ("gpt2", {"width": 24, "mlp": 40}),
        ("qwen3", {"width": 24, "heads": 8}),
    ],
)
def test_other_widths_with_heads_of_one_width(name: str, wider: dict[str, int]) -> None:
    narrow, wide = causal(name, 0), causal(name, 1, **wider)
    for anchor, parent in ((narrow, wide), (wide, narrow)):
        for evidence in ("activations", "weights"):
            found = fused(name, [anchor, parent], evidence=evidence, heads="matched", residual="auto").model
            assert [one.shape for one in found.parameters()] == [one.shape for one in anchor.parameters()]
            assert run(name, found).isfinite().all()


def test_heads_of_other_widths_are_refused_in_one_line() -> None:
    with pytest.raises(FusionError, match=r"different rotary heads: 8 units with 4 .* and 4 with 2, .*one head_dim"):
        fused("llama", [causal("llama", 0), causal("llama", 1, head_dim=8)])


def test_more_queries_and_more_heads_are_found_in_their_copies() -> None:
    """A model whose key-value heads, with their queries, each stand there twice computes the same."""
    narrow, wide = causal("llama", 5), causal("llama", 6, heads=8, kv=4, head_dim=4)
    with torch.no_grad():
        for ours, theirs in zip(wide.named_parameters(), narrow.parameters(), strict=True):
            key, parameter = ours
            if any(part in key for part in ("q_proj", "k_proj", "v_proj")):
                parameter.copy_(theirs.repeat(2, 1))
            elif "o_proj" in key:
                parameter.copy_(theirs.repeat(1, 2) / 2)
            else:
                parameter.copy_(theirs)
    torch.testing.assert_close(run("llama", wide), run("llama", narrow), atol=1e-5, rtol=1e-5)
    for anchor, parent in ((narrow, copy_of(wide)), (wide, copy_of(narrow))):
        found = fused("llama", [anchor, parent], [0.0, 1.0], solver="emd", heads="matched", residual="tie").model
        torch.testing.assert_close(run("llama", found), run("llama", narrow), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3", "gpt2", "t5"])
def test_the_solver_identity_is_the_plain_average(name: str) -> None:
    parents = [BUILD[name](seed) for seed in range(2)]
    plain = vanilla(parents, [0.5, 0.5])
    assert plain is not None
    assert largest_difference(fused(name, parents, solver="identity", residual="identity").model, plain) < 1e-6


def test_auto_ties_what_the_ends_of_the_stream_share() -> None:
    for name, tied in (("gpt2", True), ("gpt2, decoder of its own", False), ("llama", False), ("llama, tied", True),
                       ("electra classifier", True), ("deit", False)):  # fmt: skip
        model = BUILD[name](0)
        maps = fused(name, [model, BUILD[name](1)], residual="auto").maps
        section = bind(model).blocks
        ends = [maps[f"{one}.out"].plan for one in (section[0], section[-1])]
        assert torch.equal(*ends) == tied, name


def test_padding_changes_nothing_and_nothing_is_cached() -> None:
    batch = sentences(32)
    noise = torch.randint(1, 40, batch["input_ids"].shape, generator=torch.Generator().manual_seed(1))
    other = batch | {"input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], noise)}
    parents = [causal("llama", seed) for seed in range(2)]
    config = FuseConfig(align=AlignConfig(residual="auto"), refit=RefitConfig("ridge"))
    first, second = (fuse(parents, [one], config).model for one in (batch, other))
    assert largest_difference(first, second) < 1e-4
    assert parents[0].config.use_cache


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
def test_tied_embeddings_that_are_scaled_by_the_width_want_one_width(name: str) -> None:
    parents = [causal(name, seed, width=width) for seed, width in enumerate((16, 32))]
    with pytest.raises(
        FusionError, match=r"'model\.embed_tokens\.weight' is both .*; take parents of one width$"
    ) as summary:
        fused(name, parents)
    assert "\n" not in str(summary.value)
    parents = [causal(name, seed, width=width, tie_word_embeddings=False) for seed, width in enumerate((16, 32))]
    assert fused(name, parents).model is not None
