"""One class, tags of which several hold, or numbers: `problem_type` decides how models are fused and judged."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from torch import Tensor, nn

from fusionpl import fuse, load_config
from fusionpl.cli.evaluate import run as evaluate_command
from fusionpl.cli.finetune import run as finetune
from fusionpl.cli.fuse import run as fuse_command
from fusionpl.cli.running import main
from fusionpl.datamodules.config import TextClassificationConfig
from fusionpl.datamodules.text_classification import TextClassificationDataModule
from fusionpl.errors import FusionError
from fusionpl.evaluation.metrics import evaluate, evaluate_samples
from fusionpl.fusion.answers import log_odds
from fusionpl.fusion.teaching import loss_to, mean_of
from fusionpl.models.heads import with_classifier
from fusionpl.models.labels import kind_of
from fusionpl.models.load import load_model
from fusionpl.training.config import OptimConfig
from fusionpl.training.module import ClassificationModule
from tests.models_for_tests import redrawn

TAGS = ("cat", "dog", "fox", "hen")
REST = ("a", "the", "runs", "sleeps", "sees", "and", "old", "young")
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TAGS, *REST]
MULTI = "multi_label_classification"


def tokenizer() -> Any:
    return transformers.BertTokenizer(vocab={word: number for number, word in enumerate(VOCABULARY)})


def sentences(count: int, seed: int) -> tuple[list[str], Tensor]:
    """Sentences of eight words; each tag holds where its word is there, float [N, tags]."""
    draw = torch.Generator().manual_seed(seed)
    holds = (torch.rand(count, len(TAGS), generator=draw) < 0.25).float()
    texts = []
    for row in holds:
        words = [tag for tag, one in zip(TAGS, row, strict=True) if one]
        words += [REST[at] for at in torch.randint(len(REST), (8 - len(words),), generator=draw)]
        texts.append(" ".join(words[at] for at in torch.randperm(8, generator=draw)))
    return texts, holds


def encoded(texts: Sequence[str], labels: Tensor | None = None) -> dict[str, Tensor]:
    found = dict(tokenizer()(list(texts), return_tensors="pt", padding=True))
    return found if labels is None else {**found, "labels": labels}


def bert(seed: int, **settings: Any) -> Any:
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=70, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
        **settings,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(config)


def of_tags(seed: int, names: Sequence[str] = TAGS) -> Any:
    labels = dict(enumerate(names))
    return bert(seed, problem_type=MULTI, id2label=labels, label2id={name: at for at, name in labels.items()})


@cache
def trained(seed: int, known: tuple[int, ...]) -> Any:
    """A model for which only the tags in `known` ever held."""
    model = of_tags(seed)
    texts, holds = sentences(1500, seed + 10)
    holds = holds * torch.tensor([float(at in known) for at in range(len(TAGS))])
    batch = encoded(texts, holds)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(120):
        rows = torch.arange(step * 64, step * 64 + 64) % len(texts)
        model(**{key: value[rows] for key, value in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def saved(folder: Path, model: Any) -> str:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def test_kinds_are_read_as_transformers_reads_them() -> None:
    assert kind_of(bert(0, num_labels=3)) == "single_label_classification"
    assert kind_of(bert(0, num_labels=1)) == "regression"
    assert kind_of(bert(0, num_labels=3, problem_type="regression")) == "regression"
    assert kind_of(bert(0, num_labels=1, problem_type=MULTI)) == MULTI
    assert kind_of(transformers.BertForMaskedLM(bert(0).config)) == "single_label_classification"
    assert kind_of(nn.Linear(2, 1)) == "single_label_classification"


@pytest.mark.parametrize("named", [True, False])
def test_parents_of_different_kinds_are_refused(named: bool, tmp_path: Path) -> None:
    kinds = {"a": "regression", "b": MULTI, "c": None}
    models: dict[str, Any] = {name: bert(1, num_labels=3, problem_type=kind) for name, kind in kinds.items()}
    parents = {name: saved(tmp_path / name, model) for name, model in models.items()} if named else models
    for pair, message in {
        "ab": r"a gives numbers, b gives tags, several at once \(problem_type regression and multi_label",
        "ac": r"a gives numbers, c gives one class each",
        "bc": r"b gives tags, several at once, c gives one class each",
    }.items():
        with pytest.raises(FusionError, match=message):
            fuse([parents[name] for name in pair], [encoded(["a cat"] * 4)], names=list(pair))
    fuse([parents["c"], parents["c"]], [encoded(["a cat"] * 4)])


def test_the_fused_model_gives_each_tag_of_the_parent_that_knows_it(tmp_path: Path) -> None:
    texts, holds = sentences(400, 1)
    test = [encoded(texts, holds)]
    parents = [trained(1, (0, 1)), trained(2, (2, 3))]
    alone = [evaluate(parent, test)["f1"] for parent in parents]
    calibration = [encoded(sentences(400, 2)[0])]
    result = fuse(parents, calibration, load_config("default"), output=tmp_path / "fused")
    fused = evaluate(result.model, test)["f1"]
    assert max(alone) < 0.75, alone
    assert fused > max(alone) + 0.1, (fused, alone)
    assert "each tag is fitted to what the parents give it, mostly those that know it" in result.notes
    kept: Any = load_model(tmp_path / "fused")
    assert kept.config.problem_type == MULTI
    assert kept.config.id2label == dict(enumerate(TAGS))


def of(model: Any, names: Sequence[str]) -> Any:
    """The same model with outputs for these of its tags alone."""
    found, rows = of_tags(0, names), [TAGS.index(name) for name in names]
    found.load_state_dict({name: tensor[rows] if name.startswith("classifier") else tensor
                           for name, tensor in model.state_dict().items()})  # fmt: skip
    return found.eval()


@pytest.mark.parametrize("preset", ["default", "transport"])
@pytest.mark.parametrize("named", [True, False])
def test_tags_that_one_parent_has_are_those_of_the_union(preset: str, named: bool, tmp_path: Path) -> None:
    models = [of(trained(1, (0, 1)), ("dog", "cat")), of(trained(2, (2, 3)), ("fox", "hen"))]
    parents = [saved(tmp_path / name, one) for name, one in zip("ab", models, strict=True)] if named else models
    calibration = [encoded(sentences(400, 2)[0])]
    result = fuse(parents, calibration, load_config(preset), names=["a", "b"], output=tmp_path / "fused")
    assert "a knows 2 of the 4 tags of all parents; it gives no other" in result.warnings
    kept: Any = load_model(tmp_path / "fused")
    assert list(kept.config.id2label.values()) == ["dog", "cat", "fox", "hen"]
    texts, holds = sentences(400, 1)
    assert evaluate(kept, [encoded(texts, holds[:, [1, 0, 2, 3]])])["f1"] > 0.9
    assert [one.config.num_labels for one in models] == [2, 2]


def test_refinement_teaches_each_tag_by_who_knows_it() -> None:
    texts, holds = sentences(400, 1)
    parents = [trained(1, (0, 1)), trained(2, (2, 3))]
    config = load_config("default", {"refine.method": "gradient", "refine.steps": 60, "refine.lr": 1e-3})
    result = fuse(parents, [encoded(sentences(400, 2)[0])], config)
    assert evaluate(result.model, [encoded(texts, holds)])["f1"] > 0.85


def test_one_of_two_parents_comes_back_exactly() -> None:
    models = [redrawn(of_tags(seed), seed) for seed in (1, 2)]
    batch = encoded(sentences(64, 3)[0])
    config = load_config(None, {"weights": [0.0, 1.0], "align.solver": "emd", "align.heads": "matched",
                                "align.residual": "tie", "align.qk": "shared"})  # fmt: skip
    result: Any = fuse(models, [batch], config)
    with torch.no_grad():
        found, wanted = result.model(**batch).logits, models[1](**batch).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-3


class Fixed(nn.Module):
    """Puts out what it was given."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.weight, self.logits = nn.Parameter(torch.zeros(1)), logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


def test_tags_are_judged_by_their_own_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, -3.0], [-1.0, -1.0, 4.0]])
    labels = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    batch = [{"pixel_values": torch.zeros(2, 1), "labels": labels}]
    figures, outcomes = evaluate_samples([Fixed(logits)], batch)
    assert figures["accuracy"] == pytest.approx(4 / 6)
    assert figures["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    wanted = nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert figures["loss"] == pytest.approx(float(wanted))
    assert outcomes.values[:, 1].tolist() == [3, 3]
    other = torch.tensor([[-8.0, 2.0, 0.0], [3.0, -1.0, 1.0]])
    mean = (logits.sigmoid() + other.sigmoid()) / 2
    both, _ = evaluate_samples([Fixed(logits), Fixed(other)], batch)
    assert both["loss"] == pytest.approx(float(nn.functional.binary_cross_entropy(mean, labels)))
    assert torch.allclose(log_odds([logits, other], [0.5, 0.5]).sigmoid(), mean, atol=1e-6)
    weights = [torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])]
    found = log_odds([logits, other], weights)
    assert torch.allclose(found[:, :2], torch.stack([logits[:, 0], other[:, 1]], 1))


def test_losses_of_tags_are_those_of_transformers() -> None:
    model, batch = of_tags(3).eval(), encoded(*sentences(16, 4))
    module = ClassificationModule(model, OptimConfig(), len(TAGS), ("accuracy", "f1"))
    module.log = lambda *given, **more: None  # type: ignore[method-assign,assignment]
    with torch.no_grad():
        assert float(module.training_step(batch, 0)) == pytest.approx(float(model(**batch).loss))
        given = model(**batch).logits
        own = nn.functional.binary_cross_entropy_with_logits(given, given.sigmoid())
    assert loss_to(mean_of([given, given], [0.5, 0.5], MULTI), given, MULTI) == pytest.approx(float(own))


def module(path: Path, **settings: Any) -> TextClassificationDataModule:
    config = TextClassificationConfig(path=str(path), validation=10, calibration=10, **settings)
    return TextClassificationDataModule(config, tokenizer=tokenizer())


def written(folder: Path, rows: Mapping[str, Sequence[Any]], features: Any = None) -> Path:
    folder.mkdir()
    datasets.Dataset.from_dict(dict(rows), features=features).to_parquet(folder / "train.parquet")
    return folder


def test_tags_in_every_form_are_one(tmp_path: Path) -> None:
    texts, holds = sentences(60, 5)
    numbers = [[at for at, one in enumerate(row) if one] for row in holds.tolist()]
    feature = datasets.Features(
        {"text": datasets.Value("string"), "labels": datasets.List(datasets.ClassLabel(names=list(TAGS)))}
    )
    forms = {
        "names": written(tmp_path / "names", {"text": texts, "labels": [[TAGS[at] for at in row] for row in numbers]}),
        "known": written(tmp_path / "known", {"text": texts, "labels": numbers}, feature),
        "numbers": written(tmp_path / "numbers", {"text": texts, "labels": numbers}),
        "hot": written(tmp_path / "hot", {"text": texts, "labels": holds.tolist()}),
    }
    columns = tmp_path / "columns.csv"
    rows = [",".join([text, *(str(int(one)) for one in row)]) for text, row in zip(texts, holds.tolist(), strict=True)]
    columns.write_text("\n".join([",".join(["text", *TAGS]), *rows]) + "\n")
    found = {name: module(path) for name, path in forms.items()}
    found["columns"] = module(columns, label_column=",".join(TAGS))
    for name, one in found.items():
        assert (one.kind, one.num_classes, one.metrics) == (MULTI, len(TAGS), ["accuracy", "f1"]), name
        assert one.class_names == (TAGS if name in ("names", "known", "columns") else ("0", "1", "2", "3"))
        for part in ("train", "test"):
            assert torch.equal(one.dataset(part).labels, found["names"].dataset(part).labels), name
    with pytest.raises(
        FusionError, match="tags, of which several may hold, have no pearson; they have accuracy and f1"
    ):
        assert module(forms["hot"], metrics=["pearson"]).metrics


def test_tags_take_the_order_of_the_model(tmp_path: Path) -> None:
    texts, holds = sentences(60, 5)
    names = [[TAGS[at] for at, one in enumerate(row) if one and at] for row in holds.tolist()]  # never a cat
    data = module(written(tmp_path / "tags", {"text": texts, "labels": names}))
    assert data.class_names == TAGS[1:]
    order = ("hen", "cat", "fox", "dog")
    data.check_model(of_tags(1, order))
    assert data.class_names == order
    first = data.dataset("train")
    words = tokenizer().decode(first[0]["input_ids"]).split()
    assert first.labels[0].tolist() == [float(name in words and name != "cat") for name in order]
    single = module(
        written(tmp_path / "one", {"text": texts, "label": ["dog" if at % 2 else "cat" for at in range(60)]})
    )
    single.check_model(bert(1, id2label={0: "dog", 1: "cat"}, label2id={"dog": 0, "cat": 1}))
    assert single.class_names == ("dog", "cat")


def test_models_and_data_of_different_kinds_are_refused(tmp_path: Path) -> None:
    texts, holds = sentences(60, 5)
    tags = module(written(tmp_path / "tags", {"text": texts, "labels": holds.tolist()}))
    with pytest.raises(
        FusionError, match=r"gives one class each \(problem_type single.+ are tags, several at once; give"
    ):
        tags.check_model(bert(1, num_labels=4))
    with pytest.raises(FusionError, match="puts out 3 numbers a sample, which does not fit the 4 classes"):
        tags.check_model(bert(1, num_labels=3, problem_type=MULTI))
    one = module(written(tmp_path / "one", {"text": texts, "label": [at % 2 for at in range(60)]}))
    with pytest.raises(FusionError, match=r"gives tags, several at once .+ are one class each; give data with a list"):
        one.check_model(of_tags(1))
    broken = [*holds.tolist()[:-1], None]
    with pytest.raises(FusionError, match="row 59: column 'labels' holds None, which are no tags"):
        module(written(tmp_path / "broken", {"text": texts, "labels": broken})).dataset("train")
    kept = module(written(tmp_path / "kept", {"text": texts, "labels": broken}), skip_corrupt=True)
    assert sum(len(kept.dataset(part)) for part in ("train", "validation", "calibration", "test")) == 59


def test_a_new_head_is_of_the_kind_of_the_data() -> None:
    model = bert(1, num_labels=4)
    found: Any = with_classifier(model, 4, TAGS, seed=0, kind=MULTI)
    assert found is not model
    assert kind_of(found) == MULTI
    assert with_classifier(found, 4, TAGS, seed=0, kind=MULTI) is found
    assert kind_of(with_classifier(found, 4, TAGS, seed=0)) == "single_label_classification"


def test_commands_fuse_measure_and_finetune_models_of_tags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [saved(tmp_path / "a", trained(1, (0, 1))), saved(tmp_path / "b", trained(2, (2, 3)))]
    texts, holds = sentences(300, 7)
    names = [[TAGS[at] for at, one in enumerate(row) if one] for row in holds.tolist()]
    lines = [json.dumps({"text": text, "labels": row}) for text, row in zip(texts, names, strict=True)]
    (tmp_path / "tags.jsonl").write_text("\n".join(lines) + "\n")
    data = ["--data.path", str(tmp_path / "tags.jsonl")]
    assert main(evaluate_command, ["--models", *paths, *data]) == 0
    assert "f1" in capsys.readouterr().out
    fused = str(tmp_path / "fused")
    more = ["--compare", "distilled", "--trainer.accelerator", "cpu", "--logger", "none"]
    assert main(fuse_command, ["--parents", *paths, *data, "--output", fused, *more]) == 0
    report = json.loads((tmp_path / "fused" / "report" / "report.json").read_text())
    f1 = {row["name"]: row["f1"] for row in report["rows"]}
    assert f1["fused"] > max(f1["parent a"], f1["parent b"])
    quick = ["--trainer.max_epochs", "1", "--logger", "none", "--trainer.accelerator", "cpu", "--baselines", "false"]
    assert main(finetune, ["--model", fused, "--output", str(tmp_path / "tuned"), *quick]) == 0
    tuned: Any = load_model(tmp_path / "tuned")
    assert tuned.config.problem_type == MULTI
    halves = [saved(tmp_path / "h1", of(trained(1, (0, 1)), ("dog", "cat"))),
              saved(tmp_path / "h2", of(trained(2, (2, 3)), ("fox", "hen")))]  # fmt: skip
    union = ["--output", str(tmp_path / "union"), "--logger", "none", "--trainer.accelerator", "cpu"]
    assert main(fuse_command, ["--parents", *halves, *data, *union]) == 0
    report = json.loads((tmp_path / "union" / "report" / "report.json").read_text())
    f1 = {row["name"]: row["f1"] for row in report["rows"]}
    assert f1["fused"] > 0.9
    assert max(f1["parent h1"], f1["parent h2"]) < 0.8
    regressing = saved(tmp_path / "n", bert(3, num_labels=1))
    assert main(evaluate_command, ["--models", regressing, *data]) == 2
    assert "gives numbers (problem_type regression), but the labels of" in capsys.readouterr().err
