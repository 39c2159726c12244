"""One trunk with a head for each parent: each head says what its parent does, whatever the others are."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import fusionpl
from fusionpl.calibration.batches import by_owner
from fusionpl.calibration.config import CalibrationConfig
from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.calibration.forward import logits
from fusionpl.calibration.kept import Kept
from fusionpl.errors import FusionError
from fusionpl.families.binding import bind
from fusionpl.families.proof import permuted
from fusionpl.fusion import predictions
from fusionpl.fusion.config import load_config
from fusionpl.fusion.heads import HeadFit, head_of
from fusionpl.fusion.prepare import open_team
from fusionpl.fusion.result import FusionResult
from fusionpl.fusion.survey import Survey
from fusionpl.models.classes import head_parameters
from fusionpl.models.labels import CLASSES, NUMBERS, TAGS, Kind, kind_of
from fusionpl.models.preprocessing import ImageProcessing
from fusionpl.models.save import class_names, save_model
from fusionpl.transport.softmax import fit_softmax
from tests.models_for_tests import causal_model, hf_vit, images, redrawn, sentences, text_model


def bert(seed: int, count: int = 3, names: Sequence[str] = (), **settings: Any) -> nn.Module:
    if names:
        settings |= {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=20, pad_token_id=0, **({} if names else {"num_labels": count}), **settings,
    )  # fmt: skip
    return redrawn(transformers.BertForSequenceClassification(config), seed)


def timm_model(seed: int, count: int = 3, names: Sequence[str] = (), **options: Any) -> nn.Module:
    model: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=4, mlp_ratio=1.5,
        num_classes=len(names) or count, **options,
    )  # fmt: skip
    if names:
        model.pretrained_cfg["label_names"] = list(names)
    return redrawn(model, seed)


def hf_model(seed: int, count: int = 3, names: Sequence[str] = ()) -> nn.Module:
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}
    return hf_vit(seed, **(labels if names else {}), num_labels=len(names) or count)


BUILD: dict[str, Any] = {"bert": bert, "timm": timm_model, "vit": hf_model}


def seen(name: str, count: int = 200, seed: int = 0) -> Any:
    return sentences(count, seed) if name == "bert" else images(count, seed)


def with_head(model: nn.Module, other: nn.Module) -> nn.Module:
    """The second model with all of the first one but its head."""
    own, heads = dict(model.named_parameters()), head_parameters(bind(other))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name not in heads:
                parameter.copy_(own[name])
    return other


def fused(parents: Sequence[Any], data: Sequence[Any], preset: str = "default", **changes: Any) -> FusionResult:
    return fusionpl.fuse(parents, data, load_config(preset, {"labels": "separate", **changes}), names=["a", "b"])


@torch.no_grad()
def says(model: nn.Module, batch: Any) -> Tensor:
    """The logs of probabilities of classes, else the outputs."""
    found = logits(model, batch)
    return found.log_softmax(-1) if kind_of(model) == CLASSES else found


def far(model: nn.Module, parent: nn.Module, batch: Any) -> float:
    """The squared error of what a model says, as a share of the variance of what its parent does."""
    found, wanted = says(model, batch), says(parent, batch)
    return float((found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def divergence(model: nn.Module, parent: nn.Module, batch: Any) -> float:
    """Of a classifier from its parent, in nats."""
    found, wanted = says(model, batch), says(parent, batch)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def trunks(models: Mapping[str, nn.Module]) -> list[dict[str, nn.Parameter]]:
    heads = head_parameters(bind(next(iter(models.values()))))
    return [{name: one for name, one in model.named_parameters() if name not in heads} for model in models.values()]


# Limits without owners, and with them: joint then wants less of the other's stream, and is right about the head alone.
EXACT = {"joint": ("default", {"units": "anchor"}, 5e-4, 5e-3), "transport": ("transport", {}, 1e-4, 1e-4)}


@pytest.mark.parametrize("strategy", EXACT)
@pytest.mark.parametrize("name", BUILD)
def test_parents_of_one_trunk_come_back_each_with_its_head(name: str, strategy: str) -> None:
    a = BUILD[name](1, 3)
    b = with_head(a, BUILD[name](2, 4))
    data = [[seen(name, seed=seed)] for seed in range(2)]
    preset, changes, *limits = EXACT[strategy]
    for owned, limit in zip((data[0] + data[1], data), limits, strict=True):
        result = fused([a, b], owned, preset, **changes)
        assert list(result.models) == ["a", "b"]
        for model, parent in zip(result.models.values(), (a, b), strict=True):
            assert far(model, parent, seen(name, 64, 99)) < limit
        first, second = trunks(result.models)
        assert first.keys() == second.keys()
        assert all(first[key] is second[key] for key in first)


@pytest.mark.parametrize("strategy", EXACT)
@pytest.mark.parametrize("name", BUILD)
def test_a_parent_whose_units_were_permuted_comes_back(name: str, strategy: str) -> None:
    a = BUILD[name](1, 3)
    b = permuted(with_head(a, BUILD[name](2, 4)), torch.Generator().manual_seed(3))
    preset, changes, limit, _ = EXACT[strategy]
    result = fused([a, b], [seen(name, 300, seed) for seed in range(2)], preset, **changes)
    for model, parent in zip(result.models.values(), (a, b), strict=True):
        assert far(model, parent, seen(name, 64, 99)) < 10 * limit


def test_a_parent_of_weight_0_leaves_its_head_alone() -> None:
    """Its head is fitted to what the other's trunk gives."""
    a = bert(1, 3)
    b = with_head(a, bert(2, 4))
    result = fused([a, b], [seen("bert")], "transport", weights=[1.0, 0.0])
    for model, parent in zip(result.models.values(), (a, b), strict=True):
        assert far(model, parent, seen("bert", 16, 99)) < 1e-3
    plain = fused([a, b], [seen("bert")], "paper", weights=[1.0, 0.0], anchor=0)
    for model in plain.models.values():
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
        assert float(model.get_parameter("classifier.weight").detach().abs().sum()) > 0


KINDS: dict[str, dict[str, Any]] = {
    "tags": {"names": ("x", "y", "z", "w"), "problem_type": TAGS},
    "a number": {"count": 1},
    "numbers": {"count": 3, "problem_type": NUMBERS},
    "classes of the same names": {"names": ("u", "v")},
}


@pytest.mark.parametrize("strategy", [*EXACT, "head"])
@pytest.mark.parametrize("other", KINDS)
def test_heads_of_all_kinds_beside_one_of_classes(other: str, strategy: str) -> None:
    a = bert(1, names=("u", "v"))
    b = with_head(a, bert(2, **KINDS[other]))
    data = [[seen("bert", seed=seed)] for seed in range(2)]
    preset, changes, *limits = EXACT.get(strategy, ("default", {"strategy": "head"}, 1e-3, 1e-3))
    for owned, limit in zip((data[0] + data[1], data), limits, strict=True):
        result = fused([a, b], owned, preset, **changes)
        for model, parent in zip(result.models.values(), (a, b), strict=True):
            assert far(model, parent, seen("bert", 64, 99)) < limit
            new, old = (one.config.to_dict() for one in (model, parent))  # type: ignore[operator,union-attr]
            for key in ("id2label", "label2id", "problem_type"):
                assert new[key] == old[key]
            assert model.config.num_labels == parent.config.num_labels  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [CLASSES, TAGS, NUMBERS])
def test_data_of_one_do_not_move_the_head_of_another(kind: Kind) -> None:
    a, b = bert(1, 3, problem_type=kind), bert(2, 4)
    found = []
    for seed in (7, 8):
        team = open_team([a, b], load_config("default", {"labels": "separate"}), names=["a", "b"])
        samples = by_owner([[seen("bert", 100)], [seen("bert", 100, seed)]], 2)
        data = CalibrationSet(samples, CalibrationConfig(), Kept(10**8))
        votings = Survey(team.kind, [{}, {}], heads=team.heads).votings([0.5, 0.5])
        heads = HeadFit([network.whole() for network in team.networks], votings, data)
        # on the trunk of the other
        found.append([heads.fitted(at)[0].get_parameter("classifier.weight") for at in (1, 0)])
    assert torch.equal(found[0][0][:3], found[1][0][:3])
    assert not torch.equal(found[0][1][3:], found[1][1][3:])


@pytest.mark.parametrize("preset", ["default", "transport"])
def test_each_head_is_fitted_to_the_data_of_its_own_parent(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def counted(rows: Any, held_out: Any, prior: Tensor, **options: Any) -> Any:
        counts.append((prior.shape[1], sum(len(x) for part in (rows, held_out) for x, *_ in part())))
        return fit_softmax(rows, held_out, prior, **options)

    monkeypatch.setattr(predictions, "fit_softmax", counted)
    fused([bert(1, 3), bert(2, 4)], [[seen("bert", 60)], [seen("bert", 90, 1)]], preset)
    assert counts == [(3, 60), (4, 90)]


@pytest.mark.parametrize(("changes", "limit"), [({"width": 2}, 1e-6), ({"depth": 3, "units": "anchor"}, 0.05)])
@pytest.mark.parametrize("name", BUILD)
def test_a_trunk_of_other_width_or_depth(name: str, changes: dict[str, Any], limit: float) -> None:
    a = BUILD[name](1, 3)
    b = with_head(a, BUILD[name](2, 4))
    result = fused([a, b], [seen(name, 300, seed) for seed in range(2)], **changes)
    sizes = [sum(one.numel() for one in trunk.values()) for trunk in trunks({"parent": a, **result.models})]
    assert sizes[0] < sizes[1] == sizes[2]
    for model, parent in zip(result.models.values(), (a, b), strict=True):
        assert far(model, parent, seen(name, 64, 99)) < limit


@pytest.mark.parametrize("preset", ["default", "transport"])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_parents_of_other_width_and_depth(name: str, preset: str) -> None:
    """The second one is the anchor, whose shape the trunk has."""
    parents: list[Any] = [
        text_model(f"{name} classifier", 1),
        text_model(f"{name} classifier", 2, width=24, mlp=36, depth=3),
    ]
    data = [[seen("bert", seed=seed)] for seed in range(2)]
    models = fused(parents, data, preset, anchor=1).models
    assert {key: one.shape for key, one in models["a"].named_parameters()} == {
        key: one.shape for key, one in parents[1].named_parameters()
    }
    far_off = [far(model, parent, own[0]) for model, parent, own in zip(models.values(), parents, data, strict=True)]
    swapped = [
        far(model, parent, own[0]) for model, parent, own in zip(models.values(), parents[::-1], data, strict=True)
    ]
    assert max(far_off) < 1.0 < min(swapped)


def test_the_unit_of_numbers_is_nothing_to_refinement_nor_to_the_choice_of_a_parent() -> None:
    data, told = [[seen("bert", 200, seed)] for seed in range(2)], []
    for factor in (1.0, 100.0):
        a, b = bert(1, 3), bert(2, 3, problem_type=NUMBERS)
        with torch.no_grad():
            for name in ("classifier.weight", "classifier.bias"):
                b.get_parameter(name).mul_(factor)
        taught = fused([a, b], data, **{"refine.steps": 1, "refine.lr": 1e-4, "refine.start": "fused"})
        told.append([taught.notes[-1], fused([a, b], data, strategy="head").notes[-1]])
    assert told[0] == told[1]


def test_refinement_teaches_each_head_by_its_owner() -> None:
    parents = bert(1, 3), bert(2, 1)
    with torch.no_grad():
        for parent, factor in zip(parents, (5.0, 100.0), strict=True):
            for name in ("classifier.weight", "classifier.bias"):
                parent.get_parameter(name).mul_(factor)
    data = [[seen("bert", 400, seed)] for seed in range(2)]
    more = {"refine.steps": 200, "refine.lr": 3e-3, "refine.start": "fused"}
    before, after = (fused(parents, data, **changes) for changes in ({}, more))
    classes = [divergence(result.models["a"], parents[0], data[0][0]) for result in (before, after)]
    numbers = [far(result.models["b"], parents[1], data[1][0]) for result in (before, after)]
    assert classes[1] < 0.7 * classes[0]
    assert numbers[1] < 0.7 * numbers[0]
    first, second = trunks(after.models)
    assert all(first[key] is second[key] for key in first)


def test_refinement_may_start_from_a_parent() -> None:
    data = [[seen("bert", 100, seed)] for seed in range(2)]
    result = fused([bert(1, 3), bert(2, 4)], data, **{"refine.steps": 8, "refine.lr": 1e-3, "refine.start": "parent"})
    assert result.teaching is not None
    assert result.teaching.parent is not None
    assert [model.config.num_labels for model in result.models.values()] == [3, 4]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", BUILD)
def test_one_pass_through_the_trunk_gives_what_each_model_does(name: str) -> None:
    data = [[seen(name, seed=seed)] for seed in range(2)]
    models = fused([BUILD[name](1, 3), BUILD[name](2, 4)], data).models
    calls: list[nn.Module] = []
    blocks = [model.get_submodule(bind(model).stacks[0][0]) for model in models.values()]
    for block in blocks:
        block.register_forward_hook(lambda module, *_: calls.append(module))
    found = fusionpl.predict(models, seen(name, 16, 99))
    assert len(calls) == 1
    assert [one.shape for one in found.values()] == [(16, 3), (16, 4)]
    for key, model in models.items():
        torch.testing.assert_close(found[key], logits(model, seen(name, 16, 99)), atol=1e-6, rtol=0)
    assert not any(
        one._forward_hooks for model in models.values() for one in [model.get_submodule(head_of(model) or "")]
    )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_heads_that_read_every_token_of_a_decoder(name: str) -> None:
    parents: list[Any] = [causal_model(name, seed, classifier=True, num_labels=3 + seed) for seed in range(2)]
    models = fused(parents, [[sentences(64, seed)] for seed in range(2)]).models
    for key, found in fusionpl.predict(models, sentences(8, 5)).items():
        torch.testing.assert_close(found, logits(models[key], sentences(8, 5)), atol=1e-6, rtol=0)


def saved(name: str, model: Any, folder: Path) -> str:
    if name == "timm":
        save_model(model, folder / "model", processing=ImageProcessing(resize=(16, 16)))
        return str(folder)
    model.save_pretrained(folder)
    if name == "bert":
        vocabulary = {
            word: at for at, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(35))])
        }
        transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    else:
        transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("name", BUILD)
def test_models_on_disk_are_those_of_their_own_library(name: str, named: bool, tmp_path: Path) -> None:
    models = [BUILD[name](1, names=("u", "v")), BUILD[name](2, 3)]
    parents = [saved(name, one, tmp_path / at) for at, one in zip("ab", models, strict=True)] if named else models
    data = [[seen(name, 64, seed)] for seed in range(2)]
    config = load_config("default", {"labels": "separate"})
    run = tmp_path / "fused"
    result = fusionpl.fuse(parents, data, config, names=["first task", "b/2"], output=run)
    result.save(tmp_path / "again")
    for folder in (run, tmp_path / "again"):
        assert sorted(one.name for one in folder.iterdir() if one.is_dir()) == ["model-b-2", "model-first-task"]
        loaded = fusionpl.load_models(folder)
        batch = seen(name, 16, 99)
        found = fusionpl.predict(loaded, batch)
        for key, model in result.models.items():
            torch.testing.assert_close(found[key], logits(model, batch), atol=1e-6, rtol=0)
            place = folder / f"model-{key}"
            if name == "timm":
                own: Any = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
                assert own.num_classes == own.pretrained_cfg["num_classes"]
            else:
                auto: Any = (
                    transformers.AutoModelForSequenceClassification
                    if name == "bert"
                    else transformers.AutoModelForImageClassification
                )
                own = auto.from_pretrained(place)
            torch.testing.assert_close(logits(own, batch), logits(model, batch), atol=1e-6, rtol=0)
        first, second = trunks(loaded)
        assert all(first[one] is second[one] for one in first)
    files = {one.name for one in (run / "model-b-2").iterdir()}
    if named and name != "timm":
        assert ("tokenizer_config.json" if name == "bert" else "preprocessor_config.json") in files
    names = [class_names(fusionpl.load_model(run / f"model-{key}")) for key in result.models]
    assert names == [("u", "v"), None]
    with pytest.raises(
        FusionError, match=r"fused holds a model for each parent, model-b-2, model-first-task; give one of"
    ):
        fusionpl.load_model(run)


def test_models_that_share_no_trunk_are_refused(tmp_path: Path) -> None:
    models = {"a": bert(1, 3), "b": bert(2, 4)}
    with pytest.raises(FusionError, match=r"a and b share no trunk in memory; take FusionResult.models"):
        fusionpl.predict(models, sentences(4))
    for name, model in models.items():
        save_model(model, tmp_path / f"model-{name}")
    with pytest.raises(
        FusionError, match=r"share no trunk: 'bert\..+' of model-b is not that of model-a; load each with"
    ):
        fusionpl.load_models(tmp_path)
    with pytest.raises(
        FusionError, match=r"holds no model-NAME/ of a fusion with labels separate; use fusionpl.load_mod"
    ):
        fusionpl.load_models(tmp_path / "model-a")


def test_a_callback_takes_no_heads_apart() -> None:
    with pytest.raises(FusionError, match=r"labels separate makes one for each parent; use fusionpl.fuse"):
        fusionpl.OTFusion([bert(1), bert(2)], load_config(None, {"labels": "separate"}))


def test_a_model_or_models_is_said_in_one_line() -> None:
    parents = [bert(1, 3), bert(2, 3)]
    with pytest.raises(
        FusionError, match=r"labels separate has a model for each parent, a, b; take FusionResult.models"
    ):
        _ = fused(parents, [sentences(32)]).model
    with pytest.raises(FusionError, match=r"fused to one, FusionResult.model; labels separate makes one for each"):
        _ = fused(parents, [sentences(32)], labels="union").models


NO_HEAD = "has no linear map that puts out classes, tags or numbers last, so there is no head to keep apart; leave"
LACKING = "^align.classifier false keeps the head of a, which has not the outputs of the others; leave align.classif"
REFUSED: dict[str, tuple[Callable[[], list[Any]], dict[str, Any], str]] = {
    "language models": (lambda: [text_model("bert masked-lm", seed) for seed in range(2)], {}, f"^a {NO_HEAD}"),
    "encoders": (lambda: [bert(seed).base_model for seed in range(2)], {}, f"^a {NO_HEAD}"),
    "one encoder": (lambda: [bert(1), bert(2).base_model], {}, f"^b {NO_HEAD}"),
    "other poolings": (
        lambda: [timm_model(1), timm_model(2, global_pool="avg")],
        {},
        r"^parents of different architecture: . has '(fc_)?norm.weight', . has not$",
    ),
    "the anchor's head": (
        lambda: [bert(1), bert(2)],
        {"strategy": "transport", "align.classifier": False},
        LACKING,
    ),
    "the anchor's classes": (
        lambda: [bert(1, names=("u", "v")), bert(2, names=("v", "w"))],
        {"strategy": "transport", "align.classifier": False, "labels": "union"},
        LACKING,
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_heads_of_its_own_is_refused_in_one_line(what: str) -> None:
    parents, changes, message = REFUSED[what]
    with pytest.raises(FusionError, match=message) as raised:
        fusionpl.prepare(parents(), load_config("default", {"labels": "separate", **changes}), names=["a", "b"])
    assert "\n" not in str(raised.value)


def test_names_that_are_no_names_of_folders_are_made_such() -> None:
    team = open_team(
        [bert(1), bert(2), bert(3)], load_config(None, {"labels": "separate"}), names=["x y", "X/y", "../"]
    )
    assert [head.name for head in team.heads] == ["x-y", "X-y-2", "head"]


def test_units_are_those_of_all_parents() -> None:
    config = load_config("default", {"labels": "separate"})
    assert fusionpl.prepare([bert(1), bert(2)], config).plan.config.units == "even"
    asked = load_config("default", {"labels": "separate", "units": "anchor"})
    assert fusionpl.prepare([bert(1), bert(2)], asked).plan.config.units == "anchor"


def trained(seed: int, order: Sequence[int], names: Sequence[str] = ()) -> nn.Module:
    """A model that tells which of four corners of an image is bright, and calls it by its place in `order`."""
    torch.manual_seed(seed)
    model = timm_model(seed, len(order), names)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(150):
        batch, corner = corners(64, 1000 * seed + step)
        loss = nn.functional.cross_entropy(model(batch), torch.tensor(order)[corner])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def corners(count: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    batch, corner = torch.randn(count, 3, 16, 16, generator=draw), torch.randint(4, (count,), generator=draw)
    for image, place in zip(batch, corner.tolist(), strict=True):
        image[:, 8 * (place // 2) :, 8 * (place % 2) :][:, :8, :8] += 1.0
    return batch, corner


def test_classes_that_are_numbered_in_another_order_are_told() -> None:
    plain, same, other = trained(1, [0, 1, 2, 3]), trained(2, [0, 1, 2, 3]), trained(3, [0, 2, 3, 1])
    data = [corners(200, 9)[0]]
    config = load_config("default")
    told = [line for line in fusionpl.fuse([plain, other], data, config).warnings if "another order" in line]
    assert len(told) == 1
    assert "parent 1 seems to number its classes in another order than parent 0: they agree on" in told[0]
    assert "where its 2 is 1, its 3 is 2, its 1 is 3; name the classes of both in id2label" in told[0]
    for parents in ([plain, same], [plain, timm_model(4, 4)]):
        assert not any("another order" in line for line in fusionpl.fuse(parents, data, config).warnings)
    named = [copy.deepcopy(one) for one in (plain, other)]
    for one in named:
        one.pretrained_cfg["label_names"] = ["p", "q", "r", "s"]  # type: ignore[operator,index]
    assert not any("another order" in line for line in fusionpl.fuse(named, data, config).warnings)
