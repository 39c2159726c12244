"""One stream for all parents: what holds exactly, what is refused, and that it is worth having."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusionpl
from fusionpl.calibration.forward import logits
from fusionpl.errors import FusionError
from fusionpl.families.apply import own_state
from fusionpl.families.binding import bind
from fusionpl.fusion import fuse, prepare, refit, survey
from fusionpl.fusion.average import vanilla
from fusionpl.fusion.config import load_config
from fusionpl.fusion.methods.one_stream import ChosenUnits, choose, joint_problems, joint_stream
from fusionpl.fusion.result import FusionResult
from fusionpl.models.save import save_model
from fusionpl.transport.least_squares import NormalEquations, fit_ridge
from tests.integration.runs import make_run
from tests.models_for_tests import (
    TEXT_MODELS,
    batch_for,
    causal,
    hf_vit,
    images,
    largest_difference,
    run,
    text_model,
    timm_vit,
)
from tests.property.test_newer_families import BUILD as NEWER

JOINT = "conf/fuse/joint.yaml"
BUILD = {**NEWER, **{name: partial(text_model, name) for name in TEXT_MODELS}}
# With each kind of norm: LayerNorm (one that stays with its shift, one with LayerScale), RMSNorm with groups and gates.
# and a decoder that is the embedding.
NAMES = (
    "timm, DINOv2", "dinov2, gate", "gpt2", "gpt2, decoder of its own", "gpt_neox", "llama", "qwen3", "bert masked-lm",
    "bert classifier", "roberta masked-lm", "distilbert masked-lm", "electra masked-lm", "gemma", "opt",
    "phi3, groups, partly rotary",
)  # fmt: skip


def joined(name: str, parents: list[Any], **changes: Any) -> FusionResult:
    return fusionpl.fuse(parents, [batch_for(name, 64)], load_config(JOINT, changes))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_fused_with_itself_keeps_its_function(name: str) -> None:
    """Streams side by side that are equal have as many directions as one."""
    model = BUILD[name](1)
    found = joined(name, [model] * 3).model
    atol = 2e-2 if name == "opt" else 5e-3  # a ReLU near 0 makes the most of what is left over
    torch.testing.assert_close(run(name, found), run(name, model), atol=atol, rtol=5e-3)


# An untrained head's output is nearer to zero, where averages are, than to another's.
@pytest.mark.parametrize("name", [name for name in NAMES if "masked-lm" not in name])
def test_it_is_nearer_to_the_mean_of_the_parents_than_their_average(name: str) -> None:
    parents = [BUILD[name](seed) for seed in range(2)]
    wanted = torch.stack([run(name, parent) for parent in parents]).mean(0)

    def distance(model: nn.Module | None) -> Tensor:
        assert model is not None
        return (run(name, model) - wanted).square().mean()

    assert distance(joined(name, parents).model) < distance(vanilla(parents, [0.5, 0.5]))


def test_a_head_as_wide_as_the_hidden_units_is_not_taken_for_them() -> None:
    """Both have the same units in the same places, but nothing refits what reads the head's."""
    model = text_model("bert masked-lm", 1, mlp=16)
    found = joined("bert masked-lm", [model] * 2).model
    torch.testing.assert_close(run("bert masked-lm", found), run("bert masked-lm", model), atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize(
    "name",
    [
        "dinov2, gate",
        "gpt2",
        "gpt_neox",
        "llama",
        "qwen3",
        "vit",
        "bert masked-lm",
        "roberta classifier",
        "gemma",
        "opt",
        "phi3",
    ],
)
def test_the_width_is_free(name: str) -> None:
    """A parent fused with itself needs no more room; two parents find what they need in twice the width."""
    parents = [hf_vit(seed) if name == "vit" else BUILD[name](seed) for seed in range(2)]
    name = "dinov2" if name == "vit" else name
    own = joined(name, [parents[0]] * 2, width=2).model
    torch.testing.assert_close(run(name, own), run(name, parents[0]), atol=5e-3, rtol=5e-3)
    wanted = torch.stack([run(name, parent) for parent in parents]).softmax(-1).mean(0)
    errors = [divergence(wanted, run(name, joined(name, parents, width=one).model).log_softmax(-1)) for one in (1, 2)]
    assert errors[1] < 0.75 * errors[0]


def test_a_wider_model_is_saved_and_loaded_by_its_library(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"seed-{seed}", seed) for seed in (1, 2)]
    batches = [{"pixel_values": torch.randn(24, 1, 16, 16, generator=torch.Generator().manual_seed(0))}]
    found = fusionpl.fuse(runs, batches, load_config(JOINT, {"width": 1.5}), output=tmp_path / "fused")
    loaded, parent = (fusionpl.load_model(folder) for folder in (tmp_path / "fused", runs[0]))
    assert largest_difference(loaded, found.model) == 0
    sizes = [int(one.embed_dim) for one in (loaded, parent)]  # type: ignore[arg-type]
    assert sizes[0] == 1.5 * sizes[1]
    texts = [tmp_path / f"gpt2-{seed}" for seed in (1, 2)]
    for seed, folder in enumerate(texts, 1):
        save_model(causal("gpt2", seed), folder)
    parted = fusionpl.fuse(texts, [batch_for("gpt2", 16)], load_config(JOINT), output=tmp_path / "text")
    other: Any = fusionpl.load_model(tmp_path / "text")
    assert largest_difference(other, parted.model) == 0
    assert not other.config.tie_word_embeddings
    assert "'transformer.wte.weight' is no longer embedding and decoder in one" in parted.warnings[0]


def test_the_anchors_units_come_first_and_then_those_that_write_most() -> None:
    parents = [timm_vit(seed) for seed in range(2)]
    with torch.no_grad():
        for unit in (5, 17):
            parents[1].blocks[0].mlp.fc2.weight[:, unit] *= 20  # type: ignore[union-attr,index]
    bindings, goal = [bind(parent) for parent in parents], bind(timm_vit(0, mlp=26))
    problem = next(one for one in joint_problems(goal, load_config(JOINT)) if "blocks.0.ffn" in one.axes)
    assert isinstance(problem, ChosenUnits)
    states = [own_state(parent) for parent in parents]
    both = [True, True]
    (first, places), (others, behind) = choose(problem, bindings, states, 0, goal, both)
    assert (first.tolist(), places.tolist()) == ([*range(24)], [*range(24)])
    assert (sorted(others.tolist()), behind.tolist()) == ([5, 17], [24, 25])
    (narrow, _), (none, _) = choose(problem, bindings[::-1], states[::-1], 0, bind(timm_vit(0, mlp=2)), both)
    assert (narrow.tolist(), len(none)) == ([5, 17], 0)
    (half, places), (other, behind) = choose(
        replace(problem, even=True), bindings, states, 0, bind(timm_vit(0, mlp=5)), both
    )
    assert (len(half), places.tolist(), behind.tolist()) == (3, [0, 1, 2], [3, 4])
    assert other.tolist() == [5, 17]
    (every, _), (rest, _) = choose(replace(problem, even=True), bindings, states, 0, bind(timm_vit(0, mlp=48)), both)
    assert every.tolist() == rest.tolist() == [*range(24)]


def test_parents_of_different_data_give_units_alike() -> None:
    """Each knows half of what there is to know: a network with the units of one can't compute the other's."""
    parents = [timm_vit(seed) for seed in range(2)]
    with torch.no_grad():
        for index, parent in enumerate(parents):  # half of the units of each are dead, other halves
            dead = slice(0, 12) if index else slice(12, 24)
            for block in parent.blocks:  # type: ignore[union-attr]
                block.mlp.fc2.weight[:, dead] = 0  # type: ignore[union-attr,index]
    wanted = torch.stack([run("timm, DINOv2", parent) for parent in parents]).mean(0)
    errors = [
        float((run("timm, DINOv2", joined("timm, DINOv2", parents, units=units).model) - wanted).square().mean())
        for units in ("anchor", "even")
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", ["timm, DINOv2", "bert classifier"])
def test_a_classifier_is_fitted_to_the_mean_of_probabilities(name: str) -> None:
    """The mean of logits hides a parent that is sure behind one that is less sure of something else."""
    parents = [BUILD[name](seed) for seed in range(2)]
    with torch.no_grad():
        for parent, scale in zip(parents, (60.0, 20.0), strict=True):
            head = parent.get_submodule("classifier" if name.startswith("bert") else "head")
            for parameter in head.parameters():
                parameter *= scale
    given = [run(name, parent) for parent in parents]
    of_logits = torch.stack(given).mean(0).log_softmax(-1)
    wanted, found = (
        torch.stack(given).softmax(-1).mean(0),
        run(name, joined(name, parents, units="even").model),
    )
    assert divergence(wanted, found.log_softmax(-1)) < divergence(wanted, of_logits)
    same = joined(name, [parents[0]] * 2).model
    assert (run(name, same).softmax(-1) - given[0].softmax(-1)).abs().max() < 1e-2


def divergence(wanted: Tensor, found: Tensor) -> float:
    """In nats, of log-probabilities from probabilities."""
    return float((torch.special.xlogy(wanted, wanted) - wanted * found).sum(-1).mean())


@pytest.mark.parametrize("name", ["timm, DINOv2", "bert classifier"])
def test_the_share_of_classes_in_what_parents_disagree_about_is_told(name: str) -> None:
    """Parents that differ by chance put out each class as often; those that saw other classes do not."""
    batch = batch_for(name, 64)
    parents = [BUILD[name](1) for _ in range(2)]
    again = joined(name, parents)
    assert again.config.units == "anchor"
    assert again.notes == [
        "units: the anchor's first, for the parents know the same (0.0% of their disagreement is about how often each "
        "class occurs; the limit is 3%)"
    ]
    head = parents[1].get_submodule("classifier" if name.startswith("bert") else "head")
    assert isinstance(head.bias, Tensor)
    with torch.no_grad():
        head.bias[0] += 1
        shown = torch.stack([logits(parent, batch) for parent in parents]).double().softmax(-1)

    def divergence(given: Tensor) -> float:
        entropy = -(given * given.log()).sum(-1)
        mean = given.mean(0)
        return float((-(mean * mean.log()).sum(-1) - entropy.mean(0)).mean())

    share = divergence(shown.mean(1, keepdim=True)) / divergence(shown)
    assert share >= 0.9
    result = joined(name, parents)
    assert result.config.units == "even"
    assert [note.partition(":")[0] for note in result.notes] == ["units"]
    assert all(f"({share:.1%} of their disagreement" in note for note in result.notes)
    asked = joined(name, parents, units="anchor")
    assert (asked.config.units, asked.notes) == ("anchor", [])


@pytest.mark.parametrize("name", ["timm, DINOv2", pytest.param("bert classifier", marks=pytest.mark.slow)])
def test_between_the_limits_a_trial_decides_whose_units(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent beside itself needs all of its own heads, half of them and their copies are less. Parents that have
    nothing in common do not."""
    monkeypatch.setattr(survey, "specialisation", lambda walk: 0.5)
    batch = batch_for(name, 1024)
    one, other = (BUILD[name](seed) for seed in (1, 2))

    def fused(parents: list[nn.Module], samples: int = 1024, **changes: Any) -> FusionResult:
        given = {key: value[:samples] for key, value in batch.items()}
        return fusionpl.fuse(parents, [given], load_config(JOINT, changes))

    result = fused([one, one])
    assert result.config.units == "anchor"
    assert result.notes[0].startswith(
        "units: the anchor's first; with them, predictions of held-out samples are clearly"
    )
    assert largest_difference(result.model, fused([one, one], units="anchor").model) == 0
    result = fused([one, other])
    assert result.config.units == "even"
    assert "are not clearly nearer" in result.notes[0]
    assert largest_difference(result.model, fused([one, other], units="even").model) == 0
    few = fused([one, other], 1023)  # on which no trial could tell
    assert few.config.units == "even"
    assert few.notes[0].endswith("both ways are tried with 1,024 samples or more, and here are 1,023")


def test_a_trial_takes_a_part_of_the_samples_and_leaves_out_what_judges_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "specialisation", lambda walk: 0.5)
    calls: list[tuple[bool, float, float]] = []

    def spy(rows: NormalEquations, held_out: NormalEquations, *args: Any, **options: bool) -> tuple[Tensor, float]:
        calls.append((options["both"], float(rows.count), float(held_out.count)))
        return fit_ridge(rows, held_out, *args, **options)

    monkeypatch.setattr(refit, "fit_ridge", spy)
    fusionpl.fuse([timm_vit(seed) for seed in (1, 2)], [images(1024)], load_config(JOINT))
    third = len(calls) // 3
    assert [both for both, *_ in calls] == [False] * 2 * third + [True] * third
    classifiers = [calls[at * third - 1] for at in (1, 2, 3)]  # one row a sample
    assert classifiers == [(False, 410, 102), (False, 410, 102), (True, 820, 204)]


def test_language_models_take_the_anchors_units_and_are_not_looked_at_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "specialisation", lambda walk: pytest.fail("looked at"))
    result = joined("llama", [BUILD["llama"](seed) for seed in (1, 2)])
    assert (result.config.units, result.notes) == ("anchor", [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 30}, "width 30 leaves a part of a head; with heads like the anchor's it may be 24 or 32"),
        ({"width": 3}, "'blocks.0.q' would have 6 heads and the parents have 4 .* at most 2 times the anchor's"),
        ({"width": -1}, "width must be above 0, not -1"),
        ({"units": "even", "strategy": "transport"}, "transport averages the units .*; units needs strategy joint"),
        ({"width": 2, "strategy": "transport"}, "transport fuses into the anchor's width; width needs strategy joint"),
    ],
)
def test_widths_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"seed-{seed}", seed) for seed in (1, 2)]
    with pytest.raises(FusionError, match=message):
        fusionpl.fuse(runs, [torch.zeros(4, 1, 16, 16)], load_config(JOINT, changes))


def test_auto_is_one_stream_where_the_family_allows_it_and_nobody_asked_for_anything_else() -> None:
    def strategy(parents: list[nn.Module], **changes: Any) -> str:
        return fuse.prepare(parents, load_config("conf/fuse/default.yaml", changes)).plan.config.strategy

    images_of, small = ([build(seed) for seed in range(2)] for build in (timm_vit, BUILD["electra classifier, small"]))
    assert strategy(images_of) == "joint"
    assert strategy([causal("gpt2", seed) for seed in range(2)]) == "joint"
    for changes in (
        {"align.reg": 0.1},
        {"align.reg": 0.08},
        {"align.solver": "emd"},
        {"refit.method": "none"},
        {"weights": [1.0, 0.0]},
    ):
        assert strategy(images_of, **changes) == "transport"
    assert strategy([text_model("bert masked-lm", seed) for seed in range(2)]) == "joint"
    assert strategy(small) == "transport"
    with pytest.raises(FusionError, match=r"width needs strategy joint, and parent 0: no norm stands behind the emb"):
        strategy(small, width=1.5)
    with pytest.raises(FusionError, match=r"units needs strategy joint, and align\.solver asks for strategy transport"):
        strategy(images_of, units="even", **{"align.solver": "emd"})


def test_parents_of_other_widths_and_numbers_of_heads() -> None:
    narrow, wide = timm_vit(0), timm_vit(1, width=24, heads=6, mlp=40)
    for parents in ([narrow, wide], [wide, narrow]):
        found = fusionpl.fuse(parents, [images(64)], load_config(JOINT)).model
        assert [one.shape for one in found.parameters()] == [one.shape for one in parents[0].parameters()]
        assert run("timm, DINOv2", found).isfinite().all()


def test_the_basis_holds_all_that_fits_and_nothing_where_means_are() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(200, 5, generator=generator).double()
    streams = [low @ torch.randn(5, 8, generator=generator).double() for _ in range(2)]
    streams = [one - one.mean(1, keepdim=True) for one in streams]
    both = torch.cat(streams, 1)
    weights = [0.3, 0.7]
    for centred in (True, False):
        maps = joint_stream(both.T @ both, [8, 8], weights, 8, centred=centred)
        target = sum(w * one @ found.to_output for w, one, found in zip(weights, streams, maps, strict=True))
        assert isinstance(target, Tensor)
        energy = sum(w * one.square().sum() for w, one in zip(weights, streams, strict=True))
        torch.testing.assert_close(target.square().sum(), energy)
        if centred:
            assert target.sum(1).abs().max() < 1e-9
        for one, found in zip(streams, maps, strict=True):  # read back, but for what a norm divides by
            torch.testing.assert_close(target @ found.to_input.T, one, atol=1e-9, rtol=0)


def test_weights_tell_how_much_of_each_parent_stays() -> None:
    parents = [timm_vit(seed) for seed in range(2)]
    outputs = [run("timm, DINOv2", parent) for parent in parents]
    gaps = []
    for weight in (0.1, 0.9):
        found = fusionpl.fuse(parents, [images(64)], load_config(JOINT, {"weights": [weight, 1 - weight]})).model
        gaps.append([float((run("timm, DINOv2", found) - one).square().mean()) for one in outputs])
    assert gaps[0][1] < gaps[1][1]
    assert gaps[1][0] < gaps[0][0]


def test_streams_on_disk_give_the_same_bits() -> None:
    parents = [timm_vit(seed) for seed in range(2)]
    whole, cut = (
        fusionpl.fuse(parents, [images(24)], load_config(JOINT, {"calibration.memory": gib})).model for gib in (8, 0)
    )
    assert largest_difference(whole, cut) == 0


@pytest.mark.parametrize(
    "name", ["electra masked-lm, small", "t5", "clip", "gemma2", "gemma3 classifier", "opt, post-LN"]
)
def test_streams_that_cannot_be_rotated_are_refused_in_one_line(name: str) -> None:
    make = BUILD[name]
    with pytest.raises(FusionError, match="use strategy transport") as caught:
        joined(name, [make(seed) for seed in range(2)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refit.method": "none"}, r"needs refit\.method ridge"),
        ({"align.solver": "emd"}, r"align\.solver has nothing to do; leave it out"),
        ({"weights": [1.0, 0.0]}, r"needs weights above 0, not 0; leave that parent out"),
    ],
)
def test_options_that_contradict_it(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FusionError, match=message):
        load_config(JOINT, changes)


def test_a_width_that_heads_do_not_divide_stays() -> None:
    parents = [timm_vit(seed, width=16, heads=3, head_dim=4) for seed in range(2)]
    for preset in ("joint", "transport"):
        result = fusionpl.fuse(parents, [images(32)], load_config(preset))
        assert result.binding.axes["blocks.0.out"].size == 16


def test_a_parent_that_lacks_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    parents = [BUILD["llama"](seed) for seed in range(2)]
    real = prepare.open_parents

    def opened(*args: Any, **keywords: Any) -> Any:
        team = real(*args, **keywords)
        return team.of([team.networks[0], team.networks[1].but(missing_tokens=torch.tensor([3]))])

    monkeypatch.setattr(prepare, "open_parents", opened)
    with pytest.raises(FusionError, match=r"parent 1 lacks tokens of parent 0, .*use strategy transport"):
        joined("llama", parents)


def test_the_plan_tells_what_it_does() -> None:
    text = fuse.prepare([timm_vit(0), timm_vit(1)], load_config(JOINT)).describe()
    assert "one stream for all parents; whose units, the calibration set decides" in text
    assert "units of the parents, the anchor's first, output of blocks.0.mlp.fc1" in text
