"""Parents of different depth: what keeps the function keeps it, and the blocks that belong together are found."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPForImageClassification

import fusionpl
from fusionpl.calibration.cut import Run, cut_into
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.errors import FusionError
from fusionpl.families.binding import bind
from fusionpl.fusion.config import load_config
from fusionpl.fusion.result import FusionResult
from fusionpl.models.resized import resized
from tests.models_for_tests import (
    batch_for,
    causal,
    clip_model,
    hf_vit,
    images,
    largest_difference,
    run,
    t5,
    text_model,
)
from tests.property.test_newer_families import BUILD as EVERY

EXACT = {"align.residual": "tie", "align.heads": "matched", "align.solver": "assignment", "calibration.tokens": "all"}
BUILD: dict[str, Any] = {
    "vit_hf": lambda seed, depth=3: hf_vit(seed, depth=depth),
    "gpt2": lambda seed, depth=3: causal("gpt2", seed, depth=depth),
    "llama": lambda seed, depth=3: causal("llama", seed, depth=depth),
    "gpt_neox": lambda seed, depth=3: causal("gpt_neox", seed, depth=depth),
    **{
        f"{name} masked-lm": lambda seed, depth=3, name=name: text_model(f"{name} masked-lm", seed, depth=depth)
        for name in ("bert", "roberta", "distilbert")
    },
}
PRE = [name for name in BUILD if " " not in name]


def batch_of(name: str, count: int = 48, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"pixel_values": images(count, seed)} if name == "vit_hf" else batch_for(name, count, seed)


def shown(name: str, model: nn.Module) -> torch.Tensor:
    return run(name, model, batch_of(name, 16, seed=99))


def expanded(model: nn.Module, places: Sequence[int], seed: int = 0) -> nn.Module:
    """The same function in more blocks: at each place, before the model's block of that number, one that adds nothing,
    although it reads at random."""
    network, depth = SectionedModel(model, bind(model)), bind(model).depth
    module = resized(model, depth=depth + len(places))
    binding, own = bind(module), iter(network.binding.blocks)
    order = [None if kind else next(own) for _, kind in sorted(
        [(place, True) for place in places] + [(at, False) for at in range(depth)], key=lambda one: (one[0], not one[1])
    )]  # fmt: skip
    runs = {block: Run((kept,) if kept else (), kept) for block, kept in zip(binding.blocks, order, strict=True)}
    found = cut_into(network, module, binding, runs).whole()
    generator = torch.Generator().manual_seed(seed)
    for slot in binding.slots:
        if not runs.get(slot.section, Run((), "")).kept and slot.section in binding.blocks and not slot.gain:
            branches = {join.branch for join in binding.joins.values()}
            parameter = found.get_parameter(slot.parameter)
            if parameter.ndim > 1 and not any(slot.writes(axis) for axis in slot.axes if axis in branches):
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return found


def fused(name: str, parents: list[nn.Module], preset: str, **changes: Any) -> FusionResult:
    options = {**(EXACT if preset == "paper" else {}), "calibration.samples": 48, **changes}
    return fusionpl.fuse(parents, [batch_of(name)], load_config(f"conf/fuse/{preset}.yaml", options))


@pytest.mark.parametrize("name", BUILD)
def test_blocks_that_add_nothing_keep_the_function(name: str) -> None:
    model = BUILD[name](1)
    found = expanded(model, [0, 2, 2, 3])
    assert bind(found).depth == 7
    torch.testing.assert_close(shown(name, found), shown(name, model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", ["paper", "transport", "joint"])
@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("deep", [0, 1])
def test_a_parent_fused_with_its_own_expansion_gives_itself(name: str, preset: str, deep: int) -> None:
    """Whichever is the anchor; the blocks that add nothing are found where they are."""
    model = BUILD[name](1)
    parents = [model, model]
    parents[deep] = expanded(model, [1, 3])
    result = fused(name, parents, preset, anchor=0)
    tolerance = 1e-4 if preset == "paper" else 5e-3
    torch.testing.assert_close(shown(name, result.model), shown(name, model), rtol=tolerance, atol=tolerance)
    assert bind(result.model).depth == (3 if deep else 5)
    (matching,) = result.matchings
    runs = [run.kept and matching.numbers[run.kept] for run in matching.runs.values()]
    assert runs == ([1, 3, 4] if deep else [1, None, 2, 3, None])
    assert matching.mean is not None
    assert matching.mean > (0.999 if name in PRE else 0.95)  # the norm before a block that adds nothing is another
    assert matching.warning is None


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["vit_hf", "gpt2", "bert masked-lm"])
def test_blocks_that_add_nothing_are_found_wherever_they_stand(name: str, seed: int) -> None:
    """In post-LN networks not before the first block: the embeddings would end with another norm."""
    draw = random.Random(seed)
    model, first = BUILD[name](seed), 0 if name in PRE else 1
    deep = expanded(model, sorted(draw.randrange(first, 4) for _ in range(draw.randrange(1, 4))), seed)
    for parents in ([model, deep], [deep, model]):
        result = fused(name, parents, "paper", anchor=0)
        torch.testing.assert_close(shown(name, result.model), shown(name, model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["electra masked-lm, small", "deit, distilled", "dinov2, gate", "qwen3", "clip text"])
def test_other_families_of_the_library(name: str) -> None:
    """Where no norm stands before the first block of a post-LN network (ELECTRA's small one), that block is its own."""
    model = EVERY[name](1)
    deep = expanded(model, [1])
    for parents in ([model, deep], [deep, model]):
        config = load_config("conf/fuse/default.yaml", {"calibration.samples": 32})
        result = fusionpl.fuse(parents, [batch_for(name, 32)], config)
        torch.testing.assert_close(run(name, result.model), run(name, model), rtol=1e-2, atol=1e-2)
        assert bind(result.model).depth == bind(parents[0]).depth


def test_a_model_that_its_library_builds_in_one_depth_alone_is_refused() -> None:
    parents = [clip_model(CLIPForImageClassification, 1), clip_model(CLIPForImageClassification, 2, depth=4)]
    with pytest.raises(FusionError, match="a CLIPForImageClassification can't be built with 3 blocks"):
        fusionpl.fuse(parents, [batch_for("clip classifier", 8)], load_config("conf/fuse/transport.yaml"))


@pytest.mark.parametrize("name", ["vit_hf", "bert masked-lm"])
def test_an_aligned_parent_of_another_depth_computes_its_own_function(name: str) -> None:
    """That is its own where no blocks are taken together."""
    parents = [BUILD[name](1, depth=4), BUILD[name](2, depth=3)]
    result = fused(name, parents, "paper", anchor=0)
    there = result.parents[1].network.whole()
    torch.testing.assert_close(shown(name, result.aligned_parent(1)), shown(name, there), rtol=1e-3, atol=1e-3)
    assert result.matchings[0].reduced or torch.allclose(shown(name, there), shown(name, parents[1]), atol=1e-3)


@pytest.mark.parametrize("preset", ["transport", "joint"])
def test_targets_are_those_of_the_whole_parent(preset: str) -> None:
    """Where blocks are taken together the stream behind them is the parent's own: the refit makes up for what the one
    block that stands for them does not do."""
    whole, cut = [], []
    for seed in (0, 2, 4):
        anchor, deep = hf_vit(seed, depth=2), hf_vit(seed + 1, depth=4)
        wanted = (shown("vit_hf", anchor) + shown("vit_hf", deep)) / 2
        result = fused("vit_hf", [anchor, deep], preset)
        other = fused("vit_hf", [anchor, result.parents[1].network.whole()], preset)
        for found, one in ((whole, result), (cut, other)):
            found.append(float((shown("vit_hf", one.model) - wanted).square().mean()))
    assert sum(whole) < 0.5 * sum(cut)


@pytest.mark.parametrize("name", PRE)
@pytest.mark.parametrize("depth", [2, 4, 5])
def test_the_depth_is_free(name: str, depth: int) -> None:
    parents = [BUILD[name](1), BUILD[name](2, depth=2)]
    result = fused(name, parents, "joint", depth=depth, width=1.5)
    assert result.binding.depth == bind(result.model).depth == depth
    assert bool(shown(name, result.model).isfinite().all())
    assert all(len(matching.runs) == depth for matching in result.matchings)
    blocks = [[run.blocks for run in matching.runs.values()] for matching in result.matchings]
    if depth == 5:  # one block after the other
        assert all(bool(first) != bool(second) for first, second in zip(*blocks, strict=True))


def test_depth_and_width_differ_together_and_parents_are_many() -> None:
    parents = [hf_vit(1, depth=4), hf_vit(2, depth=2, width=24, mlp=36), hf_vit(3, depth=3)]
    batch = {"pixel_values": images(48)}
    for anchor in range(3):
        for preset in ("transport", "joint"):
            config = load_config(f"conf/fuse/{preset}.yaml", {"anchor": anchor, "calibration.samples": 48})
            result = fusionpl.fuse(parents, [batch], config)
            assert bind(result.model).depth == bind(parents[anchor]).depth
            assert len(result.matchings) == 2
            assert bool(run("dinov2", result.model, batch).isfinite().all())


def test_bert_of_other_width_and_depth() -> None:
    parents = [text_model("bert masked-lm", 1, depth=2), text_model("bert masked-lm", 2, width=24, mlp=32, depth=3)]
    for anchor in range(2):
        result = fused("bert masked-lm", parents, "transport", anchor=anchor)
        assert bind(result.model).depth == bind(parents[anchor]).depth
        assert bool(shown("bert masked-lm", result.model).isfinite().all())


@pytest.mark.parametrize("evidence", ["weights", "activations"])
@pytest.mark.parametrize("residual", ["tie", "average", "skip", "branch", "weighted_matrix"])
def test_every_residual_policy(residual: str, evidence: str) -> None:
    model = BUILD["vit_hf"](1)
    changes = {**EXACT, "align.residual": residual, "align.evidence": evidence}
    if evidence == "weights" and residual == "weighted_matrix":
        changes["calibration.samples"] = 48
    result = fused("vit_hf", [expanded(model, [1]), model], "paper", **changes)
    assert bool(shown("vit_hf", result.model).isfinite().all())


@pytest.mark.parametrize(
    ("parents", "changes", "words"),
    [
        ([3, 3], {"depth": 0}, "depth must be at least 1"),
        ([3, 3], {"strategy": "joint", "depth": 7}, "depth 7 is not between the shallowest parent's, 3, and the sum"),
        ([3, 2], {"strategy": "joint", "depth": 1}, "depth 1 is not between the shallowest parent's, 2"),
        ([3, 2], {"strategy": "transport", "depth": 2}, "strategy transport fuses into the anchor's depth, 3"),
    ],
)
def test_depths_that_do_not_fit_are_refused(parents: list[int], changes: dict[str, Any], words: str) -> None:
    models = [hf_vit(seed, depth=depth) for seed, depth in enumerate(parents)]
    with pytest.raises(FusionError, match=words):
        fusionpl.fuse(models, [images(8)], load_config("conf/fuse/default.yaml", changes))


def test_families_that_share_parameters_across_blocks_are_refused() -> None:
    with pytest.raises(FusionError, match="t5 has several stacks of blocks"):
        fusionpl.fuse([t5(1), t5(2, depth=3)], [batch_for("t5", 8)], load_config("conf/fuse/transport.yaml"))


def test_streams_that_resemble_each_other_nowhere_are_told() -> None:
    parents = [hf_vit(1, depth=4, width=16), hf_vit(2, depth=2, width=16)]
    noise = [torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))]
    result = fusionpl.fuse(parents, noise, load_config("conf/fuse/transport.yaml"))
    summary = [line for line in result.warnings if "resemble" in line]
    assert bool(summary) == (result.matchings[0].mean < 0.2)  # type: ignore[operator]


def test_parents_in_training_mode_are_run_without_dropout() -> None:
    """What is run is the parent, and not the model of the other depth whose blocks its blocks stand for."""
    found = []
    for training in (False, True):
        parents = [text_model("bert classifier", depth, depth=depth).train(training) for depth in (2, 3)]
        found.append(fusionpl.fuse(parents, [batch_for("bert", 24)], load_config("default")).model)
        assert all(module.training == training for parent in parents for module in parent.modules())
    assert largest_difference(*found) == 0
