"""Encoders with decoders, and models of two towers: what goes beyond one stack of blocks."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusionpl
from fusionpl.alignment.config import AlignConfig
from fusionpl.calibration.kept import Kept
from fusionpl.errors import FusionError
from fusionpl.families.binding import bind
from fusionpl.families.proof import allowed, permuted, random_permutations
from fusionpl.fusion.config import FuseConfig, RefitConfig, load_config
from fusionpl.fusion.fuse import fuse, prepare
from tests.models_for_tests import STACKS, batch_for, largest_difference, run, t5

EXACT: dict[str, Any] = {"residual": "tie", "heads": "matched", "solver": "assignment"}


def copy_of(model: nn.Module) -> nn.Module:
    return permuted(model, torch.Generator().manual_seed(4))


def changed(model: nn.Module, names: list[str], permute: Any) -> float:
    """How much the outputs differ after some weights are renumbered."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            parameter = other.get_parameter(name)
            parameter.copy_(permute(name, parameter))
    return float((run("t5", other) - run("t5", model)).abs().max())


def heads_swapped(name: str, weight: Tensor) -> Tensor:
    """The first two of four heads of 4 units change places."""
    order = torch.arange(16)
    order[:8] = order[:8].view(2, 4).flip(0).flatten()
    return weight[:, order] if name.endswith("o.weight") else weight[order]


def test_all_blocks_of_a_stack_have_one_order_of_heads_and_cross_attention_its_own() -> None:
    model = t5(1)
    kinds = ("q", "k", "v", "o")
    own = [f"decoder.block.1.layer.0.SelfAttention.{kind}.weight" for kind in kinds]
    assert changed(model, own, heads_swapped) > 0.01  # in one block alone
    cross = [f"decoder.block.1.layer.1.EncDecAttention.{kind}.weight" for kind in kinds]
    assert changed(model, cross, heads_swapped) < 1e-4
    everywhere = [f"encoder.block.{index}.layer.0.SelfAttention.{kind}.weight" for index in range(2) for kind in kinds]
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"

    def together(name: str, weight: Tensor) -> Tensor:
        return weight[:, [1, 0, 2, 3]] if name == bias else heads_swapped(name, weight)

    assert changed(model, [*everywhere, bias], together) < 1e-4
    maps = random_permutations(bind(model), torch.Generator().manual_seed(0))

    def order(name: str) -> Tensor:
        return maps[name].plan.view(4, 4, 4, 4).sum((1, 3)).argmax(0)

    for stack, depth in (("encoder", 2), ("decoder", 3)):
        wanted = maps[f"{stack}.block.0.head"].plan.argmax(0)
        for index in range(depth):
            assert all(torch.equal(order(f"{stack}.block.{index}.{axis}"), wanted) for axis in ("q", "k", "v"))


@pytest.mark.parametrize("name", ["t5", "t5, gated"])
def test_every_evidence_finds_a_moved_copy(name: str) -> None:
    model = STACKS[name](2)
    options: tuple[dict[str, Any], ...] = (
        {"evidence": "weights"}, {"evidence": "weights", "heads": "matched"}, {"heads": "flat"}, {"qk": "joint"},
    )  # fmt: skip
    for one in options:
        config = FuseConfig(align=AlignConfig(**{"solver": "emd", "residual": "tie", **one}))
        found = fuse([model, copy_of(model)], [batch_for(name, 64)], config)
        assert largest_difference(found.model, model) < 1e-5, one


def test_other_widths_and_numbers_of_heads() -> None:
    narrow, wide = t5(0), t5(1, width=24, heads=6, mlp=40)
    for anchor, parent in ((narrow, wide), (wide, narrow)):
        for evidence in ("activations", "weights"):
            config = FuseConfig(
                align=AlignConfig(evidence=evidence, heads="matched", residual="auto"),  # type: ignore[arg-type]
                refit=RefitConfig("ridge" if evidence == "activations" else "none"),
            )
            found = fuse([anchor, parent], [batch_for("t5", 32)], config).model
            assert [one.shape for one in found.parameters()] == [one.shape for one in anchor.parameters()]
            assert run("t5", found).isfinite().all()


def test_the_solver_identity_needs_one_number_of_heads() -> None:
    config = FuseConfig(align=AlignConfig(solver="identity", heads="matched", residual="tie"))
    with pytest.raises(FusionError, match="identity needs parents of one width, here 6 and 4 units"):
        fuse([t5(0), t5(1, heads=6)], [batch_for("t5", 8)], config)


def test_three_parents_and_both_presets() -> None:
    for name in ("t5", "clip"):
        parents = [STACKS[name](seed) for seed in range(3)]
        for preset in ("default", "paper"):
            found = fuse(parents, [batch_for(name, 32)], load_config(f"conf/fuse/{preset}.yaml"))
            assert run(name, found.model).isfinite().all()


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_what_stands_in_the_padding_of_either_side_changes_nothing(side: str) -> None:
    parents = [t5(seed) for seed in range(2)]
    batch = batch_for("t5", 64)
    ids, mask = (
        ("input_ids", "attention_mask") if side == "encoder" else ("decoder_input_ids", "decoder_attention_mask")
    )
    noise = torch.randint(1, 40, batch[ids].shape, generator=torch.Generator().manual_seed(1))
    other = batch | {ids: torch.where(batch[mask].bool(), batch[ids], noise)}
    config = FuseConfig(align=AlignConfig(residual="auto"), refit=RefitConfig("ridge"))
    first, second = (fuse(parents, [one], config).model for one in (batch, other))
    assert largest_difference(first, second) < 1e-4


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_streams_on_disk_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parents, spilled = [STACKS[name](seed) for seed in range(2)], []
    read = Kept._read
    monkeypatch.setattr(Kept, "_read", lambda self, place: spilled.append(place) or read(self, place))
    changes = {"align.residual": "auto", "refit.method": "ridge", "calibration.batch_size": 5}
    whole, cut = (
        fusionpl.fuse(parents, [batch_for(name, 24)], load_config(None, {**changes, "calibration.memory": gib}))
        for gib in (8, 0)
    )
    assert spilled
    assert largest_difference(whole.model, cut.model) == 0


@pytest.mark.parametrize("name", ["t5", "clip", "clip vision"])
def test_a_rotation_is_refused_in_one_line(name: str) -> None:
    config = load_config(None, {"align.stream": "rotation", "align.residual": "tie", "align.heads": "matched"})
    with pytest.raises(FusionError, match=r"align\.stream transport") as caught:
        fuse([STACKS[name](seed) for seed in range(2)], [batch_for(name, 8)], config)
    assert "\n" not in str(caught.value)


def test_parents_of_other_depths_name_both_stacks() -> None:
    with pytest.raises(FusionError, match="has 2 and 3 blocks, parent 1 has 3 and 4"):
        fuse([t5(0), t5(1, depth=3)], [batch_for("t5", 8)])


def test_the_plan_and_the_table_name_the_order_of_heads() -> None:
    binding = bind(t5())
    text = prepare([t5(0), t5(1)], load_config("conf/fuse/default.yaml")).describe()
    assert "the heads of 3 blocks: one order for all" in text
    table = allowed(binding)
    assert "decoder.block.*.cross_q" in table
    assert "encoder.block.*.q" in table


@pytest.mark.parametrize(("name", "line"), [("clip", "each stream"), ("t5, gated", "the stream")])
def test_the_table_allows_no_rotation_that_a_fusion_refuses(name: str, line: str) -> None:
    (shown,) = (one for one in allowed(bind(STACKS[name](0))).splitlines() if "stream" in one)
    assert shown.split("  ")[0] == line
    assert shown.endswith("permutation, one for all")


@pytest.mark.parametrize("name", [name for name in STACKS if "clip" in name])
@pytest.mark.parametrize("evidence", ["activations", "weights"])
def test_a_planted_copy_of_a_tied_stream_comes_back(name: str, evidence: str) -> None:
    """Each tower has its own stream, and the maps of one are not forgotten for the other's."""
    model = STACKS[name](1)
    config = {
        "anchor": 1, "strategy": "transport", "align.solver": "emd", "align.residual": "tie", "align.qk": "shared",
        "align.heads": "matched", "align.evidence": evidence, "refit.method": "none",
    }  # fmt: skip
    copy = permuted(model, torch.Generator().manual_seed(3))
    found = fuse([copy, model], [batch_for(name)], load_config("default", config))
    torch.testing.assert_close(run(name, found.model), run(name, model), atol=1e-5, rtol=1e-5)
    maps = found.alignments[0]
    assert maps is not None
    assert set(maps) >= set(bind(model).free)
