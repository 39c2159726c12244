"""Teaching never makes worse: held-out samples choose what is taught, how fast and how far."""

import copy
import re
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForMaskedLM

import fusionpl
from fusionpl.calibration.batches import OfEachParent
from fusionpl.calibration.config import CalibrationConfig
from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.calibration.kept import Kept
from fusionpl.datamodules.config import DataConfig, MaskedTextConfig
from fusionpl.datamodules.images import ImageDataModule
from fusionpl.datamodules.text import MaskedTextDataModule
from fusionpl.errors import FusionError
from fusionpl.fusion import survey
from fusionpl.fusion.config import FuseConfig, RefineConfig, load_config
from fusionpl.fusion.methods.refinement import Taught, refine, teach_parent
from fusionpl.fusion.result import FusionResult
from fusionpl.fusion.teaching import Teaching
from fusionpl.fusion.unlabelled import JUDGES, Unlabelled
from fusionpl.fusion.voting import Voting
from tests.integration.runs import make_corpus
from tests.models_for_tests import (
    batch_for,
    causal,
    hf_vit,
    images,
    largest_difference,
    outputs,
    redrawn,
    t5,
    text_model,
    timm_vit,
)

CPU = torch.device("cpu")
REFINE = sys.modules[refine.__module__]
FIGURES = re.compile(r"learning rate (\S+): .* divergence from the parents' mean (\S+) before, (\S+) after")


def pair() -> list[nn.Module]:
    return [timm_vit(seed) for seed in range(2)]


def taught(
    parents: list[nn.Module] | None = None, *, data: Any = None, more: Any = None, **options: Any
) -> FusionResult:
    changes = {"refine.steps": 40, **{f"refine.{key}": value for key, value in options.items()}}
    data = [images(100)] if data is None else data
    return fusionpl.fuse(parents or pair(), data, load_config(None, changes), unlabelled=more)


def figures(result: FusionResult) -> tuple[float, float, float]:
    """Learning rate, held-out divergence before and after, as the note has them."""
    found = FIGURES.search(result.notes[-1])
    assert found is not None, result.notes
    rate, before, after = (float(one) for one in found.groups())
    return rate, before, after


def divergence(model: nn.Module, parents: list[nn.Module], seen: Tensor) -> float:
    wanted = sum(outputs(parent, seen).softmax(-1) for parent in parents) / len(parents)
    return float((torch.special.xlogy(wanted, wanted) - wanted * outputs(model, seen).log_softmax(-1)).sum(-1).mean())


class Numbered(Dataset[dict[str, Tensor]]):
    """Images that hold their own number, and labels that must not be read."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first = count, first
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.read.append(index)
        return {"pixel_values": torch.full((3, 16, 16), float(self.first + index)), "labels": torch.tensor(-7)}


def numbered(count: int, more: Any = None, limit: int | None = None) -> Unlabelled:
    pixels = torch.arange(float(count)).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    return Unlabelled(CalibrationSet([pixels], CalibrationConfig(batch_size=16), Kept(10**7)), more, limit, CPU)


def numbers(drawn: tuple[int | None, dict[str, Tensor]] | None) -> list[int]:
    assert drawn is not None
    owner, batch = drawn
    assert owner is None
    assert batch.keys() == {"pixel_values"}
    return batch["pixel_values"][:, 0, 0, 0].int().tolist()


def test_samples_of_each_parent_say_whose_they_are() -> None:
    more = OfEachParent(tuple(DataLoader(Numbered(40, first), batch_size=8) for first in (100, 200)))
    pixels = [torch.full((10, 3, 16, 16), float(first)) for first in (100, 200)]
    own = OfEachParent(tuple([one] for one in pixels))
    samples = Unlabelled(CalibrationSet(own, CalibrationConfig(), Kept(10**7)), more, None, CPU)
    for drawn in (samples.held(8), islice(samples.taught(8, 0), 40)):
        owners = set()
        for owner, batch in filter(None, drawn):
            assert {*(batch["pixel_values"][:, 0, 0, 0] // 100).int().tolist()} == {1 + (owner or 0)}
            owners.add(owner)
        assert owners == {0, 1}


# never worse


def test_an_absurd_learning_rate_leaves_the_start() -> None:
    result = taught(start="fused", lr=10.0)
    assert result.refitted is not None
    assert largest_difference(result.model, result.refitted) == 0
    rate, before, after = figures(result)
    assert (rate, before) == (10, after)
    assert "the start is kept" in result.notes[-1]


@pytest.mark.parametrize("lr", [1e-3, 0.03, 0.3])
@pytest.mark.parametrize("start", ["fused", "parent"])
def test_the_divergence_of_held_out_samples_never_rises(start: str, lr: float) -> None:
    parents = pair()
    result = taught(parents, start=start, lr=lr)
    assert result.teaching is not None
    rows = images(100)[4::5]  # every fifth
    _, before, after = figures(result)
    assert after <= before
    assert divergence(result.model, parents, rows) == pytest.approx(after, abs=1e-4)


def test_teaching_with_a_sane_rate_helps_on_samples_of_neither_kind() -> None:
    parents = pair()
    result = taught(parents, start="fused", lr=3e-3)
    assert result.refitted is not None
    fresh = images(256, seed=5)
    assert divergence(result.model, parents, fresh) < 0.8 * divergence(result.refitted, parents, fresh)


# the race


def test_the_race_takes_a_sane_rate_and_leaves_an_absurd_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REFINE, "RATES", (10.0, 1e-3))
    rate, before, after = figures(taught(start="fused"))
    assert rate == 1e-3
    assert after < before


def test_a_given_rate_is_taken_without_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REFINE, "RATES", ())
    assert figures(taught(start="fused", lr=0.002))[0] == 0.002


def test_the_race_takes_a_quarter_of_the_minutes_and_looks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(REFINE, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(REFINE, "_by_clock", lambda seconds, _: seconds)
    course = REFINE._Course(RefineConfig(minutes=1), CPU, now)
    now = 104.0  # the heads are fitted, and 56 seconds are left
    looks: Any = SimpleNamespace(seconds=1.0)
    assert course.heat(0.5, 0.5, looks) == 56 / 8 - 1
    now = 112.0  # which was a second too long
    assert course.heat(0.5, 1.0, looks) == 104 + 56 / 4 - 112 - 1
    now = 118.0
    assert course.rest(looks) == 160 - 118 - 4


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second = taught(), taught()
    assert first.notes == second.notes
    assert largest_difference(first.model, second.model) == 0


# what it starts from


def test_it_starts_from_the_fused_model_or_from_a_parent() -> None:
    parents = pair()
    fused, parent = (taught(parents, start=start, lr=1e-6) for start in ("fused", "parent"))
    assert fused.teaching is not None
    assert parent.teaching is not None
    assert fused.refitted is not None
    assert fused.teaching.parent is None
    assert "taught from the fused model" in fused.notes[-1]
    assert largest_difference(fused.model, fused.refitted) < 1e-3
    index = parent.teaching.parent
    assert index is not None
    assert f"taught from parent {index} with its head fitted" in parent.notes[-1]
    moved = {
        name for name, tensor in parent.model.named_parameters()
        if (tensor - parents[index].get_parameter(name)).abs().max() > 1e-3
    }  # fmt: skip
    assert moved <= {"head.weight", "head.bias"}
    assert moved


def test_auto_takes_a_parent_that_is_nearer() -> None:
    """One parent has nearly all the weight, and so is nearly the mean."""
    changes = {"refine.steps": 10, "weights": [0.01, 0.99]}
    result = fusionpl.fuse(pair(), [images(100)], load_config(None, changes))
    assert result.teaching is not None
    assert result.teaching.parent == 1
    assert "(the fused model: " in result.notes[-1]


def test_auto_takes_the_fused_model_where_it_is_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = REFINE.Start("a stranger", timm_vit(7), 0, 9.0)
    monkeypatch.setattr(REFINE, "_best_parent", lambda *_: stranger)
    result = taught()
    assert result.teaching is not None
    assert result.teaching.parent is None
    assert result.notes[-1].endswith("(a stranger: 9.0000 before)")


def test_parents_that_know_other_classes_are_taught_from_the_fused_model(monkeypatch: pytest.MonkeyPatch) -> None:
    parents, config = pair(), load_config("joint", {"refine.steps": 2})
    near = REFINE.Start("a parent", parents[1], 1, 0.0)
    monkeypatch.setattr(REFINE, "_best_parent", lambda *_: near)
    for share, parent in ((0.0, 1), (1.0, None)):
        monkeypatch.setattr(survey, "specialisation", lambda walk, share=share: share)
        result = fusionpl.fuse(parents, [images(100)], config)
        assert result.teaching is not None
        assert result.teaching.parent == parent


def test_a_parent_keeps_its_own_width_and_depth() -> None:
    parents = [hf_vit(0), hf_vit(1, width=32, mlp=48, depth=3)]
    config = load_config(None, {"refine.steps": 4, "refine.start": "parent", "weights": [0.05, 0.95]})
    before = copy.deepcopy(parents[1].state_dict())
    result = fusionpl.fuse(parents, [images(100)], config)
    model: Any = result.model
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (32, 3)
    assert result.refitted is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in parents[1].state_dict().items())


def test_a_width_that_is_asked_for_is_kept() -> None:
    parents = [hf_vit(seed) for seed in range(2)]
    result = fusionpl.fuse(parents, [images(100)], load_config("joint", {"refine.steps": 4, "width": 2}))
    model: Any = result.model
    assert model.config.hidden_size == 32
    assert result.teaching is not None
    assert result.teaching.parent is None


def test_a_parent_without_such_a_head_is_refused_before_the_work() -> None:
    config = FuseConfig(refine=RefineConfig(start="parent", steps=2))
    numbers = [timm_vit(seed, num_classes=1) for seed in range(2)]
    with pytest.raises(FusionError, match=r"these parents have none, or several; use refine.start fused"):
        fusionpl.fuse(numbers, [images(8)], config)
    result = fusionpl.fuse(numbers, [images(20)], FuseConfig(refine=RefineConfig(steps=2)))
    assert result.teaching is not None
    assert result.teaching.parent is None


# one parent that is given


def taught_parent(parents: list[nn.Module], batch: Any, more: Any = None, **options: Any) -> Taught:
    data = CalibrationSet([batch], CalibrationConfig(), Kept(10**7))
    config = RefineConfig(**{"steps": 20, "lr": 1e-3, **options})
    return teach_parent(1, parents, [Voting([0.5, 0.5])], data, config, more=more)


def test_a_given_parent_is_taught_as_what_starts_from_a_parent() -> None:
    """The same judge, data and race: where it is the best one, the same model."""
    parents = pair()
    result = taught(parents, start="parent", lr=None)
    assert result.teaching is not None
    index, data = result.teaching.parent, CalibrationSet([images(100)], CalibrationConfig(), Kept(10**7))
    assert index is not None
    found = teach_parent(index, parents, [Voting([0.5, 0.5])], data, RefineConfig(steps=40))
    assert found.summary == result.teaching.summary.replace(f"parent {index}", "the parent")
    assert (found.parent, found.steps) == (index, result.teaching.steps)
    assert largest_difference(found.model, result.model) < 1e-5


def test_a_given_parent_stays_as_it_is_and_comes_back_in_float32() -> None:
    parents = [parent.bfloat16() for parent in pair()]
    before = copy.deepcopy(parents[1].state_dict())
    model = taught_parent(parents, images(20)).model
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert all(torch.equal(tensor, before[name]) for name, tensor in parents[1].state_dict().items())


def test_a_given_parent_learns_from_the_training_inputs_too() -> None:
    more = Numbered(60)
    taught_parent(pair(), images(5), DataLoader(more))
    assert {index for index in more.read if (index + 1) % 5} == {index for index in range(60) if (index + 1) % 5}


GIVEN: dict[str, tuple[Callable[[int], nn.Module], bool]] = {  # and whether its head is one that can be fitted
    "a number": (lambda seed: timm_vit(seed, num_classes=1), False),
    "masked-lm": (lambda seed: text_model("bert masked-lm", seed), True),
    "classifier": (lambda seed: text_model("bert classifier", seed), True),
    "gpt2": (lambda seed: causal("gpt2", seed), True),
    "t5": (t5, False),
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_given_parent_of_any_kind_is_taught(name: str) -> None:
    make, fits = GIVEN[name]
    found = taught_parent([make(0), make(1)], images(40) if name == "a number" else batch_for(name, 40))
    assert found.summary.startswith(
        f"taught from the parent{' with its head fitted' if fits else ''}, learning rate 0.001"
    )
    figures = FIGURES.search(found.summary)
    assert figures is not None
    assert float(figures[3]) <= float(figures[2])


def test_steps_or_minutes_are_enough_to_ask() -> None:
    assert RefineConfig(minutes=2).asked
    assert RefineConfig(steps=2).asked
    assert RefineConfig("gradient").asked
    assert not RefineConfig().asked
    assert not RefineConfig("none").asked


# samples


def test_more_samples_are_drawn_as_the_calibration_set_is() -> None:
    more = Numbered(30, first=100)
    samples = numbered(20, DataLoader(more, batch_size=7))
    batches = samples.taught(6, seed=0)
    seen = {number for _ in range(40) for number in numbers(next(batches))}
    assert seen == {n for n in range(20) if (n + 1) % 5} | {100 + n for n in range(30) if (n + 1) % 5}
    held = [number for batch in samples.held(4) for number in numbers(batch)]
    assert held == [4, 9, 14, 19, *range(104, 130, 5)]
    again = samples.taught(6, seed=0)
    first = [numbers(next(again)) for _ in range(5)]
    third = samples.taught(6, seed=0)
    assert [numbers(next(third)) for _ in range(5)] == first


def test_no_more_is_read_than_is_taught() -> None:
    more = Numbered(10**6)
    result = taught(data=[images(5)], more=DataLoader(more), start="fused", steps=4, lr=1e-4, batch_size=8)
    assert result.teaching is not None
    assert len(more.read) <= 4 * 8 + 9 * JUDGES
    assert JUDGES <= len({index for index in more.read if (index + 1) % 5 == 0}) < 2 * JUDGES


def test_samples_are_limited_to_the_first() -> None:
    samples = numbered(20, DataLoader(Numbered(30, first=100)), limit=30)
    batches = samples.taught(6, seed=0)
    seen = {number for _ in range(40) for number in numbers(next(batches))}
    assert max(seen) == 108
    assert set(range(4)) < seen


@pytest.mark.parametrize("more", [[images(8)], iter([images(8)])], ids=["a list", "a generator"])
def test_what_has_no_order_of_its_own_is_refused(more: Any) -> None:
    with pytest.raises(FusionError, match=r"must be a torch DataLoader of a data set with a length, not a "):
        numbered(20, more)


def test_too_few_samples_to_hold_one_out_are_refused() -> None:
    with pytest.raises(FusionError, match=r"every fifth unlabelled sample, and there are 4; give at least 5"):
        taught(data=[images(4)])


def test_text_is_judged_where_it_is_real() -> None:
    parents = [text_model("bert masked-lm", seed) for seed in range(2)]
    ids = torch.randint(3, 40, (40, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    found = []
    for padding in (0, 7):
        batch = {"input_ids": torch.where(mask.bool(), ids, padding), "attention_mask": mask}
        found.append(taught(parents, data=[batch], steps=4, lr=1e-3))
    first, second = (figures(one) for one in found)
    assert first == pytest.approx(second, abs=2e-3)


# the data modules' training data


def test_training_images_are_read_without_their_labels() -> None:
    data = ImageDataModule(DataConfig(image_size=16, channels=3, calibration=50, shift=4))
    calibration = CalibrationSet(data.calibration_dataloader(), CalibrationConfig(), Kept(10**7))
    samples = Unlabelled(calibration, data.unlabelled_dataloader(), None, CPU)
    drawn = next(samples.taught(32, seed=0))
    assert drawn is not None
    _, batch = drawn
    assert {key: tuple(value.shape) for key, value in batch.items()} == {"pixel_values": (32, 3, 16, 16)}
    train = data.dataset("train")
    held = torch.cat([one["pixel_values"] for _, one in samples.held(64)])
    assert len(held) == 10 + len(train) // 5
    assert torch.equal(held[10], train[4]["pixel_values"])


def test_training_text_is_masked_anew_where_it_is_taught_and_never_where_it_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    settings: dict[str, Any] = {"path": str(make_corpus(tmp_path / "corpus")), "vocab_size": 60, "block_size": 20}
    data = MaskedTextDataModule(MaskedTextConfig(**settings))
    calibration = CalibrationSet(data.calibration_dataloader(), CalibrationConfig(), Kept(10**7))
    samples = Unlabelled(calibration, data.unlabelled_dataloader(), None, CPU)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(data.tokenizer), **sizes)
    parents = [redrawn(BertForMaskedLM(config), seed) for seed in range(3)]
    teaching = Teaching(parents[:2], [Voting([0.5, 0.5])], "attention_mask", samples, 16, None, 0)
    state = torch.get_rng_state()
    first, second = (teaching.divergence(parents[2]) for _ in range(2))
    assert first == second
    assert torch.equal(state, torch.get_rng_state())
    streamed = MaskedTextDataModule(MaskedTextConfig(**settings, streaming=True))
    assert streamed.unlabelled_dataloader() is None
