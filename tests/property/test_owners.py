"""Parents with data and labels of their own: who says what a fused model predicts, and how much whose data count."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

import fusionpl
from fusionpl.calibration.batches import OfEachParent, batches, by_owner
from fusionpl.calibration.config import CalibrationConfig
from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.calibration.forward import logits
from fusionpl.calibration.kept import Kept
from fusionpl.calibration.moments import Moments
from fusionpl.datamodules.joint import Mixed
from fusionpl.errors import FusionError
from fusionpl.fusion.average import vanilla
from fusionpl.fusion.config import FuseConfig, RefineConfig, load_config
from fusionpl.fusion.heads import HeadFit, fit_head
from fusionpl.fusion.prepare import open_team
from fusionpl.fusion.teaching import Teaching
from fusionpl.fusion.unlabelled import Unlabelled
from fusionpl.fusion.voting import Voting
from fusionpl.models.classes import missing_classes, with_classes, with_classes_of
from fusionpl.models.labels import TAGS
from fusionpl.models.load import load_model
from fusionpl.models.resized import refilled
from fusionpl.models.save import class_names, save_model
from fusionpl.training.config import OptimConfig
from fusionpl.training.module import ClassificationModule
from fusionpl.transport.least_squares import NormalEquations
from fusionpl.transport.softmax import fit_softmax
from tests.models_for_tests import hf_vit, images, largest_difference, redrawn

PETS, CARS = ("cat", "dog"), ("bus", "car", "van")
CPU = torch.device("cpu")


def vit(seed: int, names: tuple[str, ...]) -> Any:
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    model: Any = redrawn(timm.create_model("vit_tiny_patch16_224", num_classes=len(names), **args), seed)
    model.pretrained_cfg |= {"label_names": list(names)}
    return model


def transformers_vit(seed: int, names: tuple[str, ...]) -> Any:
    model: Any = hf_vit(seed, num_labels=len(names))
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


def bert(seed: int, names: tuple[str, ...]) -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    config = BertConfig(vocab_size=40, num_labels=len(names), **sizes)
    model: Any = redrawn(BertForSequenceClassification(config), seed)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


BUILD = {"timm": vit, "transformers": transformers_vit, "bert": bert}


def data_for(name: str, count: int, seed: int) -> Any:
    """Samples that can be told from those of another seed."""
    if name != "bert":
        return images(count, seed) + 2.0 * (seed - 1)
    ids = torch.randint(3, 20, (count, 10), generator=torch.Generator().manual_seed(seed)) + 18 * (seed - 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def owned(*sets: Any, **options: Any) -> CalibrationSet:
    return CalibrationSet(OfEachParent(tuple([own] for own in sets)), CalibrationConfig(**options), Kept(10**8))


# data


def test_a_list_of_data_sets_is_told_from_a_list_of_batches() -> None:
    pictures, labels = images(4), torch.arange(4)
    loader = DataLoader([{"pixel_values": picture} for picture in pictures], batch_size=2)
    for pooled in ([pictures], [pictures, pictures], [(pictures, labels)] * 2, [[pictures, labels]] * 2, loader,
                   [{"pixel_values": pictures}] * 2, iter([pictures]), [[pictures, pictures]]):  # fmt: skip
        assert by_owner(pooled, 2) is pooled
    for sets in ([loader, loader], [[pictures], [pictures]], ([pictures, pictures], loader), [iter([pictures])] * 2,
                 [[[pictures, labels]], [[pictures, labels]]]):  # fmt: skip
        assert isinstance(by_owner(sets, 2), OfEachParent)
    with pytest.raises(FusionError, match="there are 2 sets of data and 3 parents; give one for each parent, in their"):
        by_owner([loader, loader], 3)


@pytest.mark.parametrize("wrong", ["one in a list", "a generator", "a mapping", "paths"])
def test_what_holds_no_batches_is_one_line(wrong: str) -> None:
    loader = DataLoader([{"pixel_values": picture} for picture in images(4)], batch_size=2)
    calibration: Any = {
        "one in a list": [loader],
        "a generator": (each for each in (loader, loader)),
        "a mapping": {"a": loader, "b": loader},
        "paths": ["data/a", "data/b"],
    }[wrong]
    with pytest.raises(
        FusionError, match=r"a batch is an image tensor \[B, C, H, W\] or a mapping of model inputs, not"
    ):
        fusionpl.fuse([vit(0, PETS), vit(1, CARS)], calibration, load_config("joint"))


def test_the_parents_data_take_turns_and_are_limited_each() -> None:
    sets = OfEachParent(([images(5)], [images(2)], [images(9)]))
    cut = list(batches(sets, CalibrationConfig(samples=6, batch_size=2)))
    assert [(one.owner, len(one.inputs["pixel_values"])) for one in cut] == [
        (0, 2), (1, 2), (2, 2), (0, 2), (2, 2), (0, 1), (2, 2),
    ]  # fmt: skip
    assert [one.first for one in cut] == [0, 2, 4, 6, 8, 10, 11]
    with pytest.raises(FusionError, match="the calibration set of parent 1 is empty"):
        list(batches(OfEachParent(([images(5)], [])), CalibrationConfig()))


@pytest.mark.parametrize("world", [2, 3])
def test_each_rank_sees_data_of_each_parent(world: int) -> None:
    cut = list(batches(OfEachParent(([images(12)], [images(12)])), CalibrationConfig(batch_size=2)))
    for rank in range(world):
        assert {one.owner for one in cut if one.turn % world == rank} == {0, 1}


def test_all_parents_data_together_count_alike() -> None:
    data = owned(images(30), images(10), images(20), batch_size=8)
    total: dict[int | None, float] = {}
    for batch in data:
        owner, count = data.owners[batch], len(data[batch]["pixel_values"])
        total[owner] = total.get(owner, 0.0) + count * data.weight(batch)
    assert list(total.values()) == pytest.approx([20, 20, 20])
    pooled = CalibrationSet([images(30)], CalibrationConfig(), Kept(10**7))
    assert (pooled.weight(0), pooled.owned, data.owned) == (1.0, False, True)


def test_among_the_first_samples_all_parents_data_count_alike_too() -> None:
    few = owned(images(200), images(10), batch_size=10).head(60)
    assert few.samples == 60
    shares = {owner: sum(10 * few.weight(at) for at in few if few.owners[at] == owner) for owner in (0, 1)}
    assert shares == pytest.approx({0: 30, 1: 30})


@pytest.mark.parametrize(("parents", "size"), [(3, 256), (10, 64)])
def test_among_the_first_samples_are_some_of_each_parent(parents: int, size: int) -> None:
    few = owned(*(torch.full((size, 1, 1, 1), float(at)) for at in range(parents)), batch_size=size).head(512)
    assert {*few.owners[: len(few)]} == {*range(parents)}


def test_a_weight_is_as_good_as_repeated_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(20, n, generator=generator) for n in (3, 4))
    twice, weighted = (NormalEquations.zeros(3, 4) for _ in range(2))
    twice.update(a, b), twice.update(a, b)
    weighted.update(a, b, weight=2.0)
    for one, other in zip(twice.tensors(), weighted.tensors(), strict=True):
        torch.testing.assert_close(one, other)
    moments = [Moments.zeros(3, 4) for _ in range(2)]
    moments[0].update(a, b), moments[0].update(a, b)
    moments[1].update(a, b, 2.0)
    for one, other in zip(moments[0].tensors(), moments[1].tensors(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_a_weight_is_as_good_as_repeated_rows_in_a_softmax_fit(link: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, p = torch.randn(60, 3, generator=generator), torch.randn(60, 4, generator=generator).softmax(-1)
    prior = torch.zeros(4, 4, dtype=torch.float64)
    parts = [(x[:30], p[:30]), (x[30:], p[30:])]
    three = [[(*part, 1.0)] * (3 if place == 0 else 1) for place, part in enumerate(parts)]
    weights = [(*parts[0], 3.0), (*parts[1], 1.0)]
    held = [(x[:20], p[:20], 1.0)]
    repeated = fit_softmax(lambda: [row for rows in three for row in rows], lambda: held, prior, link=link)
    weighted = fit_softmax(lambda: weights, lambda: held, prior, link=link)
    torch.testing.assert_close(repeated.matrix, weighted.matrix, atol=2e-4, rtol=1e-3)
    assert repeated.after == pytest.approx(weighted.after, abs=1e-5)


# who votes


def test_an_owner_votes_alone_and_others_by_their_weights() -> None:
    voting = Voting([0.2, 0.8])
    assert (voting.on(None), voting.on(0), voting.on(1)) == ([0.2, 0.8], [1.0, 0.0], [0.0, 1.0])
    head = Voting([0.5, 0.5], head=1)
    assert (head.on(None), head.on(0), head.on(1)) == ([0.0, 1.0], None, [0.0, 1.0])


def test_a_tag_that_the_owner_does_not_know_is_said_by_the_others() -> None:
    knows = [torch.tensor([True, True, False]), torch.tensor([False, True, True])]
    weights = [torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.0, 0.5, 1.0])]
    first, second = Voting(weights, TAGS, knows).on(0) or ()
    assert torch.as_tensor(first).tolist() == [1.0, 1.0, 0.0]
    assert torch.as_tensor(second).tolist() == [0.0, 0.0, 1.0]


class Counted(nn.Module):
    """Counts how often a model is run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.runs = model, 0

    def forward(self, *args: Any, **keywords: Any) -> Any:
        self.runs += 1
        return self.model(*args, **keywords)


def test_who_does_not_vote_is_not_run() -> None:
    teachers = [Counted(vit(seed, PETS)) for seed in range(2)]
    samples = Unlabelled(owned(images(20), images(20, 1)), None, None, CPU)
    teaching = Teaching(teachers, [Voting([0.5, 0.5])], "attention_mask", samples, 8, None, 0)
    teaching.run(vit(2, PETS), 1e-3, [0.5] * 6)
    assert sum(teacher.runs for teacher in teachers) == 6
    assert all(teacher.runs for teacher in teachers)


def test_of_all_parents_there_are_as_many_samples_however_few_one_has() -> None:
    samples = Unlabelled(owned(images(200), images(20, 1), batch_size=64), None, None, CPU)
    drawn = samples.taught(4, seed=0)
    owners = [next(drawn)[0] for _ in range(400)]  # type: ignore[index]
    assert 160 < owners.count(1) < 240
    held = [(owner, len(batch["pixel_values"])) for owner, batch in samples.held(64)]
    assert {owner for owner, _ in held} == {0, 1}


# classes


@pytest.mark.parametrize("name", BUILD)
def test_classes_in_another_order_are_put_in_the_anchors(name: str) -> None:
    model = BUILD[name](0, CARS)
    turned = refilled(model, *(with_classes(model, ("van", "bus", "car")) or ()))
    batch = data_for(name, 64, 1)
    assert class_names(turned) == ("van", "bus", "car")
    with torch.no_grad():
        torch.testing.assert_close(logits(turned, batch), logits(model, batch)[..., [2, 0, 1]])
    result = fusionpl.fuse([model, turned], [batch], load_config("joint"))
    assert class_names(result.model) == CARS
    assert any("has its classes in another order" in line for line in result.warnings)
    with torch.no_grad():
        torch.testing.assert_close(logits(result.model, batch), logits(model, batch), atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("strategy", ["joint", "transport", "head"])
@pytest.mark.parametrize("name", BUILD)
def test_parents_of_other_classes_become_one_model_of_all(name: str, strategy: str, tmp_path: Path) -> None:
    parents, sets = [BUILD[name](0, PETS), BUILD[name](1, CARS)], [data_for(name, 200, seed) for seed in (1, 2)]
    config = load_config("joint" if strategy == "joint" else "transport", {"strategy": strategy})
    result = fusionpl.fuse(parents, [[own] for own in sets], config)
    assert class_names(result.model) == PETS + CARS
    assert missing_classes(result.model) is None
    save_model(result.model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert class_names(loaded) == PETS + CARS
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), result.model.parameters(), strict=True))
    with torch.no_grad():
        for own, known in zip(sets, (slice(0, 2), slice(2, 5)), strict=True):
            given = logits(result.model, own).softmax(-1)
            assert float(given[..., known].sum(-1).mean()) > 0.65  # who does not know whose data they are gives 0.5
    assert len(list(result.model.parameters())) == len(list(parents[0].parameters()))


def test_without_owners_the_mean_of_the_parents_is_fitted() -> None:
    parents, pooled = [vit(0, PETS), vit(1, CARS)], images(200)
    result = fusionpl.fuse(parents, [pooled], load_config("transport"))
    with torch.no_grad():
        given = logits(result.model, pooled).softmax(-1).mean(0)
    assert 0.35 < float(given[:2].sum()) < 0.65


def test_what_a_model_does_not_know_it_never_gives() -> None:
    model, like = vit(0, PETS), vit(1, ("bus", "dog"))
    both = with_classes_of(model, refilled(like, *(with_classes(like, ("bus", "cat", "dog")) or ())))
    known = missing_classes(both)
    assert known is not None
    assert known.tolist() == [True, False, False]
    with torch.no_grad():
        given, own = (logits(one, images(8)).softmax(-1) for one in (both, model))
    assert float(given[:, 0].max()) == 0
    torch.testing.assert_close(given[:, 1:], own)


@pytest.mark.parametrize("kind", ["plain average", "aligned"])
def test_a_class_is_the_mean_of_those_that_know_it(kind: str) -> None:
    names = [("cat", "dog"), ("dog", "car"), ("dog",)]
    parents = [vit(seed, own) for seed, own in enumerate(names)]
    weights, every = [0.5, 0.25, 0.25], ("cat", "dog", "car")
    if kind == "aligned":
        config = load_config(None, {"anchor": 0, "align.solver": "identity", "weights": weights})
        mean: Any = fusionpl.fuse(parents, [images(16)], config).model
    else:
        brought = [refilled(one, *(with_classes(one, every) or ())) for one in parents]
        mean = vanilla(brought, weights)
    cat, dog, car = (parent.head.weight for parent in parents)
    torch.testing.assert_close(mean.head.weight[0], cat[0])
    torch.testing.assert_close(mean.head.weight[1], 0.5 * cat[1] + 0.25 * dog[0] + 0.25 * car[0])
    torch.testing.assert_close(mean.head.weight[2], dog[1])
    assert type(mean.head) is nn.Linear


def test_labels_anchor_keeps_the_anchors_classes() -> None:
    parents = [vit(0, ("cat", "dog")), vit(1, ("dog", "car", "cat"))]
    result = fusionpl.fuse(parents, [images(64)], load_config("transport", {"labels": "anchor"}))
    assert class_names(result.model) == ("cat", "dog")
    assert any("1 of its own are dropped" in line for line in result.warnings)
    with pytest.raises(
        FusionError, match=r"parent 1 \('cat', ...\) knows none of the classes of parent 0 \('bus', ...\)"
    ):
        fusionpl.prepare([vit(0, CARS), vit(1, PETS)], FuseConfig(labels="anchor"))


@pytest.mark.parametrize(("names", "message"), [
    ((PETS, ("dog", "dog")), "parent 1 has two classes called 'dog'; give each its own name in id2label"),
    ((PETS, ()), "parent 0 has 2 classes, parent 1 has 3, and parent 1 has no names for its own"),
])  # fmt: skip
def test_classes_that_can_not_be_told_apart(names: Any, message: str) -> None:
    first, second = (vit(seed, own or CARS) for seed, own in enumerate(names))
    if not names[1]:
        del second.pretrained_cfg["label_names"]
    with pytest.raises(FusionError, match=message):
        fusionpl.prepare([first, second])


def test_names_that_differ_in_capitals_are_told_of() -> None:
    team = open_team([vit(0, ("NEGATIVE", "POSITIVE")), vit(1, ("negative", "positive"))], FuseConfig())
    (line,) = (line for line in team.lines if "are taken for two classes" in line)
    assert line.startswith("'NEGATIVE' of parent 0 and 'negative' of parent 1")


# heads, teaching, Lightning


def test_a_head_is_fitted_by_the_owners() -> None:
    names = PETS + CARS
    parents = [refilled(one, *(with_classes(one, names) or ())) for one in (vit(0, PETS), vit(1, CARS))]
    sets = [data_for("timm", 200, seed) for seed in (1, 2)]
    data = owned(*sets, samples=200)
    found = fit_head(parents[0], parents, [Voting([0.5, 0.5])], data)
    assert found is not None
    assert missing_classes(found[0]) is None
    beside = HeadFit(parents, [Voting([0.5, 0.5])], data).side_by_side()
    with torch.no_grad():
        wanted = torch.cat([logits(parent, own).softmax(-1) for parent, own in zip(parents, sets, strict=True)])
        far = [divergence(wanted, logits(one, torch.cat(sets))) for one in (found[0], beside)]
    assert far[1] < far[0] < 0.3  # log 2 is who does not know whose data they are


def divergence(wanted: Tensor, given: Tensor) -> float:
    return float((torch.special.xlogy(wanted, wanted) - wanted * given.log_softmax(-1)).sum(-1).mean())


def test_teaching_by_the_owner_brings_a_model_nearer() -> None:
    parents, sets = [vit(0, PETS), vit(1, CARS)], [data_for("timm", 200, seed) for seed in (1, 2)]
    loaders = [DataLoader([{"pixel_values": one} for one in own], batch_size=16) for own in sets]
    config = load_config("joint", {"refine.steps": 100, "refine.lr": 1e-4, "refine.start": "fused"})
    result = fusionpl.fuse(parents, loaders, config, unlabelled=loaders)
    assert result.teaching is not None
    before, after = (float(result.teaching.summary.split(f" {word}")[0].split()[-1]) for word in ("before,", "after"))
    assert after < before < 0.1


class Own(L.LightningDataModule):
    """A calibration loader for each parent."""

    def calibration_dataloader(self) -> list[Any]:
        return [DataLoader([{"pixel_values": one} for one in images(48, seed)], batch_size=16) for seed in (1, 2)]

    def val_dataloader(self) -> Any:
        items = [{"pixel_values": one, "labels": torch.tensor(0)} for one in images(8)]
        return DataLoader(items, batch_size=8)


def test_the_callback_takes_a_calibration_loader_for_each_parent(tmp_path: Path) -> None:
    parents, config = [vit(0, PETS), vit(1, CARS)], load_config("joint")
    module = ClassificationModule(vit(2, PETS + CARS), OptimConfig(), 5)
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path, callbacks=[
        fusionpl.OTFusion(parents, config)
    ], enable_progress_bar=False, enable_checkpointing=False)  # fmt: skip
    trainer.validate(module, Own(), verbose=False)
    wanted = fusionpl.fuse(parents, Own().calibration_dataloader(), config)
    assert largest_difference(module.model, wanted.model) == 0


def test_the_same_data_twice_are_as_good_as_once() -> None:
    """Owners that agree: the model itself."""
    model = vit(0, CARS)
    sets = [images(100, 1), images(100, 2)]
    result = fusionpl.fuse([model, model], [[own] for own in sets], load_config("joint"))
    torch.testing.assert_close(out(result.model), out(model), atol=2e-2, rtol=1e-2)


def out(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return logits(model, images(16, 5))


def test_refine_options_hold_for_owned_data() -> None:
    with pytest.raises(FusionError, match="unlabelled data are drawn in any order"):
        fusionpl.fuse([vit(0, PETS), vit(1, CARS)], [[images(20)], [images(20)]],
                      FuseConfig(refine=RefineConfig(steps=2)), unlabelled=[[images(4)], [images(4)]])  # fmt: skip


# images of other channels


def colour_vit(seed: int, channels: int, library: str) -> Any:
    if library == "transformers":
        return transformers_of(seed, channels)
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    return redrawn(timm.create_model("vit_tiny_patch16_224", num_classes=3, in_chans=channels, **args), seed)


def transformers_of(seed: int, channels: int) -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    config = ViTConfig(image_size=16, patch_size=4, num_channels=channels, num_labels=3, **sizes)
    return redrawn(ViTForImageClassification(config), seed)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_parent_of_grey_images_sees_the_luma_of_colours(library: str) -> None:
    grey, colour = colour_vit(0, 1, library), colour_vit(1, 3, library)
    team = open_team([colour, grey], FuseConfig())
    assert any("its patch embedding is rewritten for parent 0's" in line for line in team.lines)
    picture = images(8)
    luma = (picture * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    with torch.no_grad():
        torch.testing.assert_close(logits(team.networks[1].whole(), picture), logits(grey, luma), atol=1e-4, rtol=1e-4)
    result = fusionpl.fuse([colour, grey], [[picture], [picture]], load_config("joint"))
    assert out(result.model).shape == (16, 3)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_parent_of_colours_sees_grey_in_all_channels(library: str) -> None:
    grey, colour = colour_vit(0, 1, library), colour_vit(1, 3, library)
    team = open_team([grey, colour], FuseConfig())
    picture = images(8)[:, :1]
    with torch.no_grad():
        found, wanted = logits(team.networks[1].whole(), picture), logits(colour, picture.expand(-1, 3, -1, -1))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


# training


class Numbered(Dataset[dict[str, Tensor]]):
    """Samples whose label is what all of a parent have, and whose tokens are of a length of their own."""

    def __init__(self, label: int, count: int, length: int) -> None:
        self.label, self.count, self.length = label, count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.full((self.length,), 10 * self.label + index % 7 + 1)
        return {"input_ids": ids, "labels": torch.tensor(self.label), "index": torch.tensor(index)}


@pytest.mark.parametrize("side", ["left", "right"])
def test_in_batches_of_training_samples_of_all_parents_meet(side: str) -> None:
    counts, lengths = (64, 30, 9), (4, 6, 5)
    loaders = [
        DataLoader(Numbered(label, count, length), batch_size=8)
        for label, (count, length) in enumerate(zip(counts, lengths, strict=True))
    ]
    mixed = Mixed(loaders, SimpleNamespace(pad_token_id=99, padding_side=side))
    batches = list(mixed)
    assert len(batches) == len(mixed) == sum(map(len, loaders))
    assert max(len(batch["labels"]) for batch in batches) <= 8
    seen = [pair for batch in batches for pair in zip(batch["labels"].tolist(), batch["index"].tolist(), strict=True)]
    assert sorted(seen) == [(label, at) for label, count in enumerate(counts) for at in range(count)]
    assert sum(len(batch["labels"].unique()) > 1 for batch in batches) > len(batches) / 2
    for batch in batches:
        for ids, label in zip(batch["input_ids"], batch["labels"], strict=True):
            own = ids[ids != 99]
            assert len(own) == lengths[label]
            assert torch.equal(own, ids[-len(own) :] if side == "left" else ids[: len(own)])
    again = [batch["index"].tolist() for batch in mixed]
    assert again == [batch["index"].tolist() for batch in batches]
    mixed.set_epoch(1)
    assert [batch["index"].tolist() for batch in mixed] != again
