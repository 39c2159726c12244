"""Calibration: moments against explicit rows, tokens, padding, and models left as they were found."""

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fusionpl.calibration.batches import batches
from fusionpl.calibration.config import CalibrationConfig, Scale
from fusionpl.calibration.cursor import CalibrationSet, Cursor
from fusionpl.calibration.forward import eval_mode, inputs_of, logits
from fusionpl.calibration.kept import Kept
from fusionpl.calibration.moments import Moments
from fusionpl.calibration.observe import Wanted, observe
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.calibration.taps import recorded
from fusionpl.calibration.tokens import select
from fusionpl.errors import FusionError
from fusionpl.families.axes import Binding, section_of
from fusionpl.families.binding import bind
from fusionpl.families.family import parse_family
from fusionpl.transport.costs import Gram, gram, ground_metric
from fusionpl.transport.solvers import solve
from tests.models_for_tests import FAMILIES, hf_vit, images, timm_vit

SCALES: tuple[Scale, ...] = ("standardize", "center", "normalize", "none")


def rows(count: int, units: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, units, dtype=dtype, generator=torch.Generator().manual_seed(seed)) + torch.arange(units)


def moments_of(a: Tensor, b: Tensor, cuts: list[int] | None = None) -> Moments:
    moments = Moments.zeros(a.shape[1], b.shape[1])
    for part_a, part_b in zip(a.tensor_split(cuts or []), b.tensor_split(cuts or []), strict=True):
        moments.update(part_a, part_b)
    return moments


def scaled(values: Tensor, scale: Scale) -> Tensor:
    """The definition, on explicit rows [rows, units]."""
    if scale == "standardize":
        return (values - values.mean(0)) / (values.std(0, unbiased=True) + 1e-9)
    if scale == "center":
        return values - values.mean(0)
    return torch.nn.functional.normalize(values, dim=0) if scale == "normalize" else values


def assert_same(ours: Gram, theirs: Gram, tolerance: float = 1e-9) -> None:
    for name in ("parent", "anchor", "cross"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=tolerance, atol=tolerance)


# moments


@pytest.mark.parametrize("scale", SCALES)
def test_gram_of_moments_is_the_gram_of_scaled_rows(scale: Scale) -> None:
    a, b = rows(50, 4), rows(50, 6, seed=1)
    assert_same(moments_of(a, b).gram(scale), gram(scaled(a, scale).T, scaled(b, scale).T))


@given(st.lists(st.integers(0, 40), max_size=6).map(sorted), st.sampled_from(SCALES))
@settings(max_examples=40, deadline=None)
def test_cutting_batches_changes_nothing(cuts: list[int], scale: Scale) -> None:
    a, b = rows(40, 3), rows(40, 5, seed=1)
    assert_same(moments_of(a, b, cuts).gram(scale), moments_of(a, b).gram(scale))


@pytest.mark.parametrize("scale", SCALES)
def test_sums_of_ranks_add_up(scale: Scale) -> None:
    """What the all-reduce does."""
    a, b = rows(40, 3), rows(40, 5, seed=1)
    first, second = (moments_of(a[part], b[part]).unshifted() for part in (slice(15), slice(15, None)))
    for total, part in zip(first.tensors(), second.tensors(), strict=True):
        total += part
    assert_same(first.gram(scale), moments_of(a, b).gram(scale))


@pytest.mark.parametrize("scale", SCALES)
def test_float32_and_float64_statistics_agree(scale: Scale) -> None:
    a, b = rows(300, 4), rows(300, 6, seed=1)
    assert_same(moments_of(a.float(), b.float(), [100]).gram(scale), moments_of(a, b).gram(scale), 1e-3)


@pytest.mark.parametrize("level", [0.0, 30.0, 1e4])
def test_products_in_float32_do_not_lose_what_is_small_beside_the_mean(level: float) -> None:
    """Some units of language models stand far from zero and hardly vary."""
    a, b = ((rows(5000, 6, seed) + level).float() for seed in range(2))
    exact = moments_of(a.double(), b.double(), [700]).gram("standardize")
    found = moments_of(a, b, [700]).gram("standardize")
    assert_same(found, exact, 2e-3)
    assert (found.cross / 5000 - exact.cross / 5000).abs().max() < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_models_in_float32_and_float64_have_the_same_statistics(name: str) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        parents = [FAMILIES[name](seed).to(dtype) for seed in range(2)]
        found.append(all_moments(parents, [images().to(dtype)]))
    for key, single in found[0][1].items():
        assert_same(single.gram("standardize"), found[1][1][key].gram("standardize"), 1e-2)


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, 1234.567, -3e-8])
@pytest.mark.parametrize("scale", SCALES)
def test_dead_units_give_finite_costs(constant: float, scale: Scale) -> None:
    a, b = rows(1000, 3, dtype=torch.float32), rows(1000, 3, seed=1, dtype=torch.float32)
    a[:, 1] = constant
    inner = moments_of(a, b, [17, 400]).gram(scale)
    if scale in ("standardize", "center"):
        assert inner.parent[1] == 0, "a constant unit is dead, whatever its level"
    cost = ground_metric(inner, "euclidean", "max")
    assert torch.isfinite(cost).all()
    assert torch.isfinite(solve(cost, "sinkhorn").plan).all()


def test_one_row_gives_no_nan() -> None:
    inner = moments_of(rows(1, 3), rows(1, 4)).gram("standardize")
    assert torch.isfinite(inner.cross).all()


# tokens


def tokens_of(batch: int = 3, length: int = 17, units: int = 2) -> Tensor:
    return torch.arange(batch * length * units, dtype=torch.float32).view(batch, length, units)


def test_token_selection() -> None:
    seen = tokens_of()
    assert torch.equal(select(seen, "all"), seen.reshape(-1, 2))
    assert torch.equal(select(seen, "class"), seen[:, 0])
    assert torch.equal(select(seen, "mean"), seen.mean(1))
    centre = [0, 6, 7, 10, 11]  # the class token and the middle 2 x 2 of 4 x 4 patches
    assert torch.equal(select(seen, "window:2"), seen[:, centre].reshape(-1, 2))
    assert torch.equal(select(seen, "window:4"), select(seen, "all"))


def test_pooled_vectors_are_rows_as_they_are() -> None:
    pooled = tokens_of()[:, 0]
    for tokens in ("all", "class", "mean", "window:2"):
        assert torch.equal(select(pooled, tokens), pooled)


def test_patch_convolution_is_never_filtered_only_averaged() -> None:
    seen = torch.randn(3, 2, 4, 4)
    patches = seen.flatten(2).transpose(1, 2)
    for tokens in ("all", "class", "window:2"):
        assert torch.equal(select(seen, tokens), patches.reshape(-1, 2))
    assert torch.equal(select(seen, "mean"), patches.mean(1))


@pytest.mark.parametrize("tokens", ["all", "mean", "class", "window:2"])
def test_padding_never_counts(tokens: str) -> None:
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[1, 5:] = 0
    seen = tokens_of()
    poisoned = torch.where(mask.bool()[..., None], seen, 1e6)
    try:
        found = select(poisoned, tokens, mask)
    except FusionError:
        assert tokens == "window:2"  # a window over padded text may be refused
    else:
        assert found.max() < 1e6


def test_masked_selection_is_that_of_the_sequences_alone() -> None:
    seen, mask = tokens_of(2), torch.ones(2, 17)
    mask[1, 5:] = 0
    assert torch.equal(select(seen, "all", mask), torch.cat([seen[0], seen[1, :5]]))
    torch.testing.assert_close(select(seen, "mean", mask), torch.stack([seen[0].mean(0), seen[1, :5].mean(0)]))


@pytest.mark.parametrize("tokens", ["windows:2", "window", "window:0", "window:-1", "window:2.5", "cls", ""])
def test_unknown_tokens(tokens: str) -> None:
    with pytest.raises(FusionError, match=f"calibration.tokens '{tokens}': use all, class, mean or window:N"):
        CalibrationConfig(tokens=tokens)


@pytest.mark.parametrize(("length", "window"), [(16, 2), (18, 2), (17, 5)])
def test_window_that_does_not_fit(length: int, window: int) -> None:
    with pytest.raises(FusionError, match=f"window:{window} needs a class token and a square grid of at least"):
        select(tokens_of(length=length), f"window:{window}")


# batches


def sizes(calibration: Any, **options: Any) -> list[int]:
    return [len(cut.inputs["pixel_values"]) for cut in batches(calibration, CalibrationConfig(**options))]


def test_batches_are_cut_and_limited() -> None:
    assert sizes([images(10)], samples=7, batch_size=3) == [3, 3, 1]
    assert sizes([images(4), images(4), images(4)], samples=6, batch_size=64) == [4, 2]
    assert sizes([images(4)], samples=100, batch_size=64) == [4]


def test_batches_number_their_samples() -> None:
    cut = batches([images(4), images(4)], CalibrationConfig(samples=7, batch_size=3))
    assert [samples.first for samples in cut] == [0, 3, 4]


def test_items_of_every_kind() -> None:
    pictures, labels = images(4), torch.arange(4)
    for item in (pictures, (pictures, labels), [pictures, labels], {"pixel_values": pictures, "labels": labels}):
        ((first, batch, owner, _),) = batches([item], CalibrationConfig())
        assert (first, owner) == (0, None)
        assert list(batch) == ["pixel_values"]
        assert torch.equal(batch["pixel_values"], pictures)


def test_batches_stop_at_the_limit_without_reading_on() -> None:
    def endless() -> Any:
        while True:
            yield images(4)

    assert sizes(endless(), samples=10, batch_size=4) == [4, 4, 2]


@pytest.mark.parametrize("empty", [[], [torch.empty(0, 3, 16, 16)]], ids=["nothing", "empty batch"])
def test_empty_calibration_set(empty: list[Tensor]) -> None:
    with pytest.raises(FusionError, match=r"the calibration set is empty; give calibration data or use align.evidence"):
        list(batches(empty, CalibrationConfig()))


def test_labels_never_reach_the_model() -> None:
    assert set(inputs_of({"input_ids": images(1), "labels": images(1), "attention_mask": images(1)})) == {
        "input_ids", "attention_mask",
    }  # fmt: skip
    torch.testing.assert_close(logits(hf_vit(), {"pixel_values": images(2), "labels": torch.tensor([9, 9])}),
                               logits(hf_vit(), images(2)))  # fmt: skip


# whole passes


def all_moments(
    parents: list[nn.Module], calibration: list[Tensor], anchor: int = 0, **options: Any
) -> list[dict[tuple[str, ...], Moments]]:
    binding = bind(parents[0])
    keys = [(axis,) for axis in binding.taps if axis in binding.free]
    return surveyed([SectionedModel(parent, bind(parent)) for parent in parents], calibration, keys, anchor, **options)


def surveyed(
    networks: list[SectionedModel], calibration: list[Any], keys: list[tuple[str, ...]], anchor: int = 0, **options: Any
) -> list[dict[tuple[str, ...], Moments]]:
    config, kept = CalibrationConfig(**options), Kept(10**9)
    found: list[dict[tuple[str, ...], Moments]] = [{} for _ in networks]
    data = CalibrationSet(calibration, config, kept)
    cursors = [Cursor(network, data, network.name + str(index)) for index, network in enumerate(networks)]
    with torch.no_grad(), eval_mode(*(network.module for network in networks)):
        for section in networks[anchor].binding.sections:
            own = [key for key in keys if section_of(key[0]) == section]
            states = [network.states(section) for network in networks]
            shown = observe(cursors, anchor, states, data, Wanted(section, own, tokens=config.tokens))
            for moments, more in zip(found, shown.moments, strict=True):
                moments |= more
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_taps_see_what_the_modules_compute(name: str) -> None:
    """MLP units before the nonlinearity; Q, K, V before the heads mix; the attention's output after its projection."""
    model, pictures = FAMILIES[name](), images(3)
    binding = bind(model)
    with recorded(model, binding, binding.taps) as seen:
        logits(model, pictures)
    (block,) = {axis.rpartition(".")[0] for axis in binding.taps if axis.endswith("0.q")}
    state = {key: tensor.detach() for key, tensor in model.named_parameters()}
    prefix = f"{block}."
    if name == "vit_timm":
        weights = state[f"{prefix}attn.qkv.weight"].chunk(3), state[f"{prefix}attn.qkv.bias"].chunk(3)
        norm, fc1 = "norm1", "mlp.fc1"
    else:
        layers = [f"{prefix}attention.{one}_proj" for one in "qkv"]
        weights = [state[f"{layer}.weight"] for layer in layers], [state[f"{layer}.bias"] for layer in layers]  # type: ignore[assignment]
        norm, fc1 = "layernorm_before", "mlp.fc1"
    stream = seen["stem.out"] if "stem.out" in seen else seen[f"{block}.in"]
    after = model.get_submodule(f"{prefix}{norm}")(stream)
    for axis, weight, bias in zip("qkv", *weights, strict=True):
        torch.testing.assert_close(seen[f"{prefix}{axis}"], after @ weight.T + bias, atol=1e-5, rtol=1e-5)
    middle = seen[f"{prefix}mid"]
    torch.testing.assert_close(middle, stream + seen[f"{prefix}attn"], atol=1e-5, rtol=1e-5)
    norm = {"norm1": "norm2", "layernorm_before": "layernorm_after"}[norm]
    hidden = model.get_submodule(f"{prefix}{norm}")(middle) @ state[f"{prefix}{fc1}.weight"].T
    hidden = hidden + state[f"{prefix}{fc1}.bias"]
    torch.testing.assert_close(seen[f"{prefix}ffn"], hidden, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cut", [[24], [1] * 24, [5, 19], [20, 4]], ids=str)
def test_moments_do_not_depend_on_batches(cut: list[int]) -> None:
    parents = [timm_vit(seed) for seed in range(2)]
    whole = all_moments(parents, [images()])
    parts = all_moments(parents, list(images().split(cut)), batch_size=7)
    for key in whole[1]:
        assert_same(parts[1][key].gram("standardize"), whole[1][key].gram("standardize"), 1e-3)
        assert parts[1][key].count == whole[1][key].count


@pytest.mark.parametrize("tokens", ["all", "class", "mean", "window:2"])
def test_rows_counted(tokens: str) -> None:
    found = all_moments([timm_vit(0), timm_vit(1)], [images()], samples=10, tokens=tokens)[1]
    per_image = {"all": 17, "class": 1, "mean": 1, "window:2": 5}[tokens]
    assert found["blocks.0.ffn",].count == 10 * per_image
    assert found["stem.patch",].count == 10 * (1 if tokens == "mean" else 16)
    assert found["stem.pos",].count == 17
    assert found["stem.cls",].count == 1


def test_parents_are_left_as_they_were_found() -> None:
    parents = [timm_vit(0).train(), timm_vit(1).eval()]
    before = [{key: tensor.clone() for key, tensor in parent.state_dict().items()} for parent in parents]
    all_moments(parents, [images()])
    assert [parent.training for parent in parents] == [True, False]
    for parent, state in zip(parents, before, strict=True):
        assert all(torch.equal(tensor, state[key]) for key, tensor in parent.state_dict().items())
        assert not hooks(parent)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_removed_after_an_exception() -> None:
    parents = [timm_vit(0).train(), timm_vit(1)]
    with pytest.raises(AssertionError, match="Input height"):
        all_moments(parents, [torch.randn(2, 3, 12, 12)])
    assert [hooks(parent) for parent in parents] == [0, 0]
    assert parents[0].training
    binding: Binding = bind(parents[0])
    with contextlib.suppress(KeyboardInterrupt), recorded(parents[0], binding, binding.taps):
        assert hooks(parents[0]) > 0
        raise KeyboardInterrupt
    assert hooks(parents[0]) == 0


def test_dropout_does_not_reach_the_evidence() -> None:
    parents = [timm_vit(0, proj_drop_rate=0.5).train(), timm_vit(1)]
    first, second = (all_moments(parents, [images()])[1] for _ in range(2))
    assert all(torch.equal(first[key].cross, second[key].cross) for key in first)


TEXT = """
name: text
models: [nowhere.Text]
norm: pre
sizes: {}
fixed: [vocabulary, classes]
stem: {parameters: {embed.weight: vocabulary out}, taps: {out: embed}}
block:
  path: blocks.{l}
  parameters: {fc.weight: mlp <- in, fc.bias: mlp}
  taps: {mlp: fc}
  joins: {out: [in, mlp]}
tail: {parameters: {head.weight: classes <- in, head.bias: classes}, taps: {in: input(head)}}
"""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor) -> Tensor:
        added: Tensor = self.fc(hidden_states)
        return hidden_states + added


class Text(nn.Module):
    config_class = "transformers-like: called with keywords"

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)
        self.blocks = nn.ModuleList([Block()])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks[0](hidden_states=self.embed(input_ids)))
        return out


@pytest.mark.parametrize("tokens", ["all", "mean", "class"])
def test_padded_text_has_the_moments_of_its_words(tokens: str) -> None:
    torch.manual_seed(0)
    parents: list[nn.Module] = [Text(), Text()]
    binding = bind(parents[0], parse_family(TEXT))
    keys = [("stem.out",), ("blocks.0.out",)]

    def moments(pad: int, length: int) -> dict[tuple[str, ...], Moments]:
        ids = torch.full((3, length), pad)
        mask = torch.zeros(3, length, dtype=torch.long)
        for row, words in enumerate(([1, 2, 3], [4], [5, 6, 7, 1, 1])):
            ids[row, : len(words)], mask[row, : len(words)] = torch.tensor(words), 1
        batch = {"input_ids": ids, "attention_mask": mask}
        return surveyed([SectionedModel(parent, binding) for parent in parents], [batch], keys, tokens=tokens)[1]

    short, long = moments(0, 5), moments(8, 11)
    for key in keys:
        assert_same(short[key].gram("none"), long[key].gram("none"), 1e-6)
