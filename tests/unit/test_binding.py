"""Binding: what a good family says about a model, and that every mismatch is refused with the tensor's name."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.layers.norm import RmsNorm
from timm.models.vision_transformer import ResPostBlock
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from fusionpl.errors import FusionError
from fusionpl.families.apply import own_state
from fusionpl.families.axes import Binding, Join
from fusionpl.families.binding import bind
from fusionpl.families.compatible import check_compatible, check_finite
from fusionpl.families.family import Family, family_of, library, parse_family
from tests.models_for_tests import FAMILIES, hf_vit, siglip, timm_vit

TOY = """
name: toy
models: [nowhere.Toy]
norm: pre
sizes: {head: heads}
fixed: [features, classes]
stem:
  parameters:
    embed.weight: out <- features
    embed.bias: out
  taps: {out: embed}
block:
  path: blocks.{l}
  parameters:
    norm.*: in
    qk.weight: (head q)|(head k) <- in
    fc1.weight: ffn <- in
    fc1.bias: ffn
    fc2.weight: mlp <- ffn
    fc2.bias: mlp
  taps: {q: qk, k: qk, ffn: fc1, mlp: fc2}
  joins: {out: [in, mlp]}
  circuits: {qk: [q, k]}
tail:
  parameters:
    head.weight: classes <- in
    head.bias: classes
"""


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qk = nn.Linear(width, 12, bias=False)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)


class Toy(nn.Module):
    heads = 2

    def __init__(self, width: int = 6, hidden: int = 10, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(depth))
        self.head = nn.Linear(width, 4)


def toy_family(*edits: tuple[str, str]) -> Family:
    text = TOY
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return parse_family(text)


def refused(model: nn.Module, *edits: tuple[str, str]) -> str:
    with pytest.raises(FusionError) as caught:
        bind(model, toy_family(*edits))
    message = str(caught.value)
    assert "\n" not in message
    return message


# what a binding knows


def test_axes_slots_taps_and_joins_of_a_toy() -> None:
    binding = bind(Toy(), toy_family())
    assert binding.depth == 2
    assert {name: axis.size for name, axis in binding.axes.items()} == {
        "features": 3, "classes": 4, "stem.out": 6,
        "blocks.0.q": 6, "blocks.0.k": 6, "blocks.0.ffn": 10, "blocks.0.mlp": 6, "blocks.0.out": 6,
        "blocks.1.q": 6, "blocks.1.k": 6, "blocks.1.ffn": 10, "blocks.1.mlp": 6, "blocks.1.out": 6,
    }  # fmt: skip
    assert {name for name, axis in binding.axes.items() if axis.fixed} == {"features", "classes"}
    assert {name for name, axis in binding.axes.items() if axis.heads == 2} == {
        "blocks.0.q", "blocks.0.k", "blocks.1.q", "blocks.1.k",
    }  # fmt: skip
    assert binding.joins == {
        "blocks.0.out": Join("stem.out", "blocks.0.mlp"),
        "blocks.1.out": Join("blocks.0.out", "blocks.1.mlp"),
    }
    assert binding.circuits == (("blocks.0.q", "blocks.0.k"), ("blocks.1.q", "blocks.1.k"))
    assert binding.taps["blocks.1.k"].units == slice(6, 12)
    assert binding.taps["blocks.1.k"].target == "blocks.1.qk"


def test_slots_cover_every_parameter_exactly_once() -> None:
    for builder in FAMILIES.values():
        model = builder()
        hits = {name: torch.zeros_like(tensor) for name, tensor in model.named_parameters()}
        for slot in bind(model).slots:
            slot.of(hits[slot.parameter]).add_(1)
        assert all((tensor == 1).all() for tensor in hits.values())


def test_what_must_move_alike() -> None:
    tied = bind(Toy(), toy_family()).tied()
    stream = {"stem.out", "blocks.0.mlp", "blocks.0.out", "blocks.1.mlp", "blocks.1.out"}
    assert {axis for axis in tied if tied[axis] == tied["stem.out"]} == stream
    assert tied["blocks.0.q"] == tied["blocks.0.k"] != tied["blocks.1.q"]
    assert "classes" not in tied


def test_rows_that_describe_an_axis() -> None:
    binding = bind(timm_vit())
    assert [slot.parameter for slot in binding.writers("blocks.0.k")] == ["blocks.0.attn.qkv.weight"]
    assert [slot.parameter for slot in binding.writers("blocks.1.mlp")] == ["blocks.1.mlp.fc2.weight"]


def test_transposed_weights_bind_alike() -> None:
    class Transposed(Toy):
        def __init__(self) -> None:
            super().__init__()
            for block in self.blocks:
                block.get_submodule("fc1").weight = nn.Parameter(torch.zeros(6, 10))

    straight, transposed = (
        bind(Toy(), toy_family()),
        bind(Transposed(), toy_family(("fc1.weight: ffn <- in", "fc1.weight: in -> ffn"))),
    )
    assert straight.axes == transposed.axes
    (slot,) = [slot for slot in transposed.slots if slot.parameter == "blocks.0.fc1.weight"]
    assert (slot.axes, slot.reads) == (("stem.out", "blocks.0.ffn"), (True, False))


# refusals


def test_unmatched_parameter() -> None:
    assert refused(Toy(), ("    fc1.bias: ffn\n", "")) == "toy: no pattern matches parameter 'blocks.0.fc1.bias' [10]"


def test_unmatched_parameter_outside_the_blocks() -> None:
    model = Toy()
    model.extra = nn.Linear(2, 2)
    assert refused(model) == "toy: no pattern matches parameter 'extra.weight' [2, 2]"


def test_a_star_matches_one_name_part_only() -> None:
    model = Toy()
    model.get_submodule("blocks.1.norm").inner = nn.LayerNorm(6)
    assert "'blocks.1.norm.inner.weight'" in refused(model)


def test_doubly_matched_parameter() -> None:
    message = refused(Toy(), ("    fc1.bias: ffn", "    fc1.bias: ffn\n    fc*.bias: ffn"))
    assert message == "toy: 2 patterns match parameter 'blocks.0.fc1.bias' [10]"


def test_parameter_of_stem_and_tail() -> None:
    message = refused(Toy(), ("    head.weight: classes <- in", "    head.weight: classes <- in\n    embed.bias: in"))
    assert message == "toy: 2 patterns match parameter 'embed.bias' [6]"


def test_wrong_rank() -> None:
    message = refused(Toy(), ("fc1.weight: ffn <- in", "fc1.weight: ffn"))
    assert message == "toy: 'blocks.0.fc1.weight' has 2 dimensions, the family says 1"


def test_sizes_that_disagree() -> None:
    model = Toy()
    model.blocks[1].fc2 = nn.Linear(11, 6)
    message = refused(model)
    assert "'blocks.1.fc2.weight': dimension 1 has 11 units" in message
    assert "blocks.1.ffn (10, from 'blocks.1.fc1.weight')" in message


def test_residual_stream_of_two_sizes() -> None:
    model = Toy()
    model.blocks[1].fc2 = nn.Linear(10, 5)
    message = refused(model)
    assert "blocks.1.mlp" in message
    assert "5" in message
    assert "6" in message


def test_a_dimension_of_size_one_that_is_not() -> None:
    class Cut(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(2, 6))

    stem = ("    embed.bias: out", "    embed.bias: out\n    token: 1 out")
    assert refused(Cut(), stem) == "'token': dimension 0 has 2 units, the family says 1"


def test_units_that_do_not_divide_among_axes() -> None:
    model = Toy()
    for block in model.blocks:
        block.qk = nn.Linear(6, 13, bias=False)
    message = refused(model)
    assert "'blocks.0.qk.weight': 13 units do not divide among" in message
    assert "blocks.0.q, blocks.0.k" in message


def test_units_that_do_not_divide_into_heads() -> None:
    model = Toy()
    model.heads = 4
    assert refused(model) == "axis 'blocks.0.q': 6 units do not divide into 4 heads"


def test_axis_with_neither_tap_nor_join() -> None:
    message = refused(Toy(), ("ffn: fc1, mlp: fc2", "mlp: fc2"))
    assert message == "toy: axis 'blocks.0.ffn' has neither tap nor join"


def test_tap_on_a_module_that_does_not_write_the_axis() -> None:
    assert "axis 'blocks.0.ffn'" in refused(Toy(), ("ffn: fc1, mlp: fc2", "ffn: fc2, mlp: fc2"))


def test_tied_weights_on_conflicting_axes() -> None:
    class Tied(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(6, 6)
            self.head = nn.Linear(6, 6)
            self.head.weight = self.embed.weight

    message = refused(Tied())
    assert "'embed.weight' and 'head.weight' are one tied tensor on conflicting axes" in message


def test_tied_weights_on_the_same_axes_are_one_slot() -> None:
    class Tied(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.embed

    family = toy_family(
        ("    embed.bias: out", "    embed.bias: out\n    again.weight: out <- features\n    again.bias: out")
    )
    slots = bind(Tied(), family).slots
    assert [slot.parameter for slot in slots if slot.section == "stem"] == ["embed.weight", "embed.bias"]


def test_no_blocks() -> None:
    assert refused(Toy(depth=0)) == "toy: the model has no block blocks.{l}"


def test_an_unknown_class_is_told_the_nearest_and_how_to_draft_a_family() -> None:
    drafts = r"`python -m fusionpl\.cli\.family MODEL --output my\.yaml` drafts one for --family my\.yaml"
    with pytest.raises(FusionError, match=rf"^no family for torch\.nn\.modules\.linear\.Linear; {drafts}"):
        bind(nn.Linear(2, 2))
    config = Qwen3MoeConfig(hidden_size=64, num_hidden_layers=1, num_experts=2, vocab_size=9, intermediate_size=8)
    with pytest.raises(FusionError, match=rf"Qwen3MoeForCausalLM, nearest is Qwen3ForCausalLM; {drafts}"):
        bind(Qwen3MoeForCausalLM(config))


def test_siglips_pooling_by_attention_is_refused() -> None:
    with pytest.raises(FusionError, match=r"but for siglip_vision \(vision_model\.use_head is False\); "):
        bind(siglip())


def test_a_class_with_other_settings_is_told_which_there_are() -> None:
    model = GPTNeoXForCausalLM(GPTNeoXConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9))
    model.config = SimpleNamespace(use_parallel_residual=None)
    words = r"this GPTNeoXForCausalLM, but for gpt_neox \(config\.use_parallel_residual is True\) or gpt_neox_seq"
    with pytest.raises(FusionError, match=words):
        bind(model)


@pytest.mark.parametrize(
    ("build", "tensor"),
    [
        (lambda: timm_vit(qk_norm=True), "blocks.0.attn.q_norm.weight"),
        (lambda: timm_vit(scale_attn_norm=True), "blocks.0.attn.norm.weight"),
    ],
)
def test_timm_variants_that_the_family_does_not_describe(build: Callable[[], nn.Module], tensor: str) -> None:
    with pytest.raises(FusionError, match=f"vit_timm: no pattern matches parameter '{tensor}'"):
        bind(build())


@pytest.mark.parametrize("pool", ["map", "prr"])
def test_pooling_by_attention_is_refused(pool: str) -> None:
    """That of `prr` has no parameters to show it."""
    words = r"no family for this VisionTransformer, but for vit_timm \(attn_pool is None\); `python -m"
    with pytest.raises(FusionError, match=words):
        bind(timm_vit(global_pool=pool))


def test_no_position_embedding_is_one_clear_line() -> None:
    """A stem without the `pos` axis: bound or refused, but never a KeyError."""
    try:
        binding = bind(timm_vit(pos_embed="none"))
    except FusionError as error:
        assert "pos" in str(error)  # noqa: PT017
    else:
        assert "stem.pos" not in binding.axes


@pytest.mark.parametrize("name", FAMILIES)
def test_library_families_bind_their_models(name: str) -> None:
    model = FAMILIES[name]()
    assert family_of(model) is library()[name]
    binding = bind(model)
    assert binding.family.name == name
    assert binding.depth == 2
    assert {axis.heads for axis in binding.axes.values()} == {1, 4}
    assert [len(group) for group in binding.attention] == [3, 3]


# parents that do not fit together


def compatible(a: Binding, b: Binding) -> str:
    with pytest.raises(FusionError) as caught:
        check_compatible({"A": a, "B": b})
    return str(caught.value)


def test_parents_of_different_families() -> None:
    assert compatible(bind(timm_vit()), bind(hf_vit())) == ("parents of different families: A is vit_timm, B is vit_hf")


def test_parents_of_other_blocks_and_norms() -> None:
    plain, behind = bind(timm_vit()), bind(timm_vit(block_fn=ResPostBlock))
    assert compatible(plain, behind) == "parents of different families: A is vit_timm, B is vit_timm_res_post"
    other = bind(timm_vit(norm_layer=RmsNorm))
    assert compatible(plain, other) == "parents of different norms: A has LayerNorms, B has RMSNorms"


def test_parents_of_different_depth_fit_where_their_blocks_do() -> None:
    check_compatible({"A": bind(timm_vit()), "B": bind(timm_vit(depth=3))})
    message = compatible(bind(timm_vit(init_values=0.5)), bind(timm_vit(depth=3)))
    assert message == "parents of different architecture: A has 'blocks.0.ls1.gamma', B has not"


def test_parents_of_different_classes() -> None:
    message = compatible(bind(timm_vit()), bind(timm_vit(num_classes=7)))
    assert message == "parents differ on the fixed axis 'classes': A has 5, B has 7"


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    "options", [{"reg_tokens": 2}, {"qkv_bias": False}, {"init_values": 0.1}, {"pre_norm": True}], ids=str
)
def test_parents_with_and_without_a_part(options: dict[str, Any], swap: bool) -> None:
    pair = [bind(timm_vit()), bind(timm_vit(**options))]
    message = compatible(*(pair[::-1] if swap else pair))
    assert "A" in message
    assert "B" in message


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_tensor_that_is_not_finite_is_named(name: str, bad: float) -> None:
    model = copy.deepcopy(FAMILIES[name]())
    check_finite(own_state(model), "runs/seed-1")
    key, tensor = list(model.named_parameters())[7]
    with torch.no_grad():
        tensor.view(-1)[-1] = bad
    with pytest.raises(FusionError, match=f"runs/seed-1: tensor '{key}' holds NaN or infinite values"):
        check_finite(own_state(model), "runs/seed-1")


def test_asking_norms_calls_nobodys_hooks_and_changes_nothing() -> None:
    model, called = timm_vit(norm_layer=RmsNorm), []
    norm = model.get_submodule("blocks.0.norm1")
    norm.register_forward_hook(lambda *_: called.append(1))
    weight = norm.weight
    assert bind(model).family.norm == "rms"
    assert not called
    assert norm.weight is weight
