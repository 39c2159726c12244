"""Sentences with labels: columns, splits, padding, heads, and what a mistake is told."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fusionpl.datamodules.config import TextClassificationConfig
from fusionpl.datamodules.text_classification import TextClassificationDataModule
from fusionpl.errors import FusionError
from fusionpl.models.heads import with_classifier
from fusionpl.models.tokenizers import train_wordpiece
from fusionpl.training.config import OptimConfig
from fusionpl.training.module import ClassificationModule
from tests.integration.runs import WORDS, make_sentences
from tests.models_for_tests import text_model

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
PARTS = ("train", "validation", "calibration", "test")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_wordpiece([" ".join(WORDS)] * 3, 100)


def module(folder: Path, tokenizer: Any, seed: int = 0, **options: Any) -> TextClassificationDataModule:
    options = {"path": str(folder), "validation": 30, "calibration": 20, **options}
    return TextClassificationDataModule(TextClassificationConfig(**options), seed, tokenizer)


def table(folder: Path, **columns: list[Any]) -> Path:
    for split in ("train", "test"):
        datasets.Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")
    return folder


def sentences_of(data: TextClassificationDataModule, part: str) -> list[str]:
    return [data.tokenizer.decode(ids) for ids in data.dataset(part).encoded["input_ids"]]


def test_parts_are_fixed_and_labels_fit_their_sentences(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    folder = make_sentences(tmp_path / "data")
    first, second = (module(folder, tokenizer, seed) for seed in range(2))
    assert [len(first.dataset(part)) for part in PARTS] == [110, 30, 20, 60]
    assert first.class_names == ("0", "1")
    for part in PARTS:
        assert sentences_of(first, part) == sentences_of(second, part)
        wanted = [int("cat" in sentence.split()) for sentence in sentences_of(first, part)]
        assert first.dataset(part).labels.tolist() == wanted
    assert len(module(folder, tokenizer, train_limit=40).dataset("train")) == 40


def test_hidden_test_labels_make_validation_the_test(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    folder = make_sentences(tmp_path / "data", validation=True)
    hidden = datasets.load_dataset(str(folder))["test"].map(lambda row: {"label": -1})
    hidden.to_parquet(folder / "test.parquet")
    data = module(folder, tokenizer)
    assert len(data.dataset("test")) == 40
    assert len(data.dataset("validation")) == 30
    assert set(data.dataset("test").labels.tolist()) <= {0, 1}


def test_batches_are_padded_to_their_longest(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    folder = table(tmp_path, text=["cat", "the red dog sleeps"] * 60, label=[1, 0] * 60)
    batch = next(iter(module(folder, tokenizer).test_dataloader()))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (64, 6)
    assert batch["attention_mask"].sum(1).tolist() == [3, 6] * 32
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_pairs_strings_booleans_and_numbers(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    pairs = table(tmp_path / "pairs", one=["cat"] * 80, two=["dog"] * 80, label=[True, False] * 40)
    data = module(pairs, tokenizer)
    assert data.tokenizer.decode(data.dataset("test").encoded["input_ids"][0]).split() == [
        "[CLS]", "cat", "[SEP]", "dog", "[SEP]",
    ]  # fmt: skip
    assert data.class_names == ("False", "True")
    named = module(table(tmp_path / "named", text=["cat"] * 80, label=["no", "yes"] * 40), tokenizer)
    assert named.class_names == ("no", "yes")
    assert named.dataset("test").labels.tolist() == [0, 1] * 40
    scored = module(table(tmp_path / "scored", text=["cat"] * 80, label=[0.5, 4.5] * 40), tokenizer)
    assert (scored.class_names, scored.num_classes) == (None, 1)
    assert scored.metrics == ["pearson", "spearman"]
    assert scored.dataset("test").labels.tolist() == [0.5, 4.5] * 40


def test_coarse_labels_are_the_default(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    labels = datasets.Dataset.from_dict({"text": ["cat"] * 80, "fine_label": [1, 2] * 40, "coarse_label": [0, 1] * 40})
    for split in ("train", "test"):
        labels.cast_column("coarse_label", datasets.ClassLabel(names=["animal", "place"])).to_parquet(
            tmp_path / f"{split}.parquet"
        )
    assert module(tmp_path, tokenizer).class_names == ("animal", "place")
    assert len(module(tmp_path, tokenizer, label_column="fine_label").class_names or ()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_columns": ["body"]}, r"no text column 'body'; its columns of text are sentence$"),
        ({"label_column": "score"}, r"no label column 'score'; its columns are sentence, label: name one with"),
        ({"validation": -5}, r"data.validation is -5; it must be 0 or more"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(FusionError, match=message):
        module(make_sentences(tmp_path / "data"), tokenizer, **options).dataset("train")


def test_labels_that_are_none_and_models_that_do_not_fit(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(FusionError, match=r"the label column 'label' of '.+' holds .*; labels are classes"):
        module(table(tmp_path / "lists", text=["cat"] * 80, label=[{"a": 1}] * 80), tokenizer).dataset("train")
    with pytest.raises(FusionError, match=r"data.max_length is 64, but the model has 20 positions"):
        module(make_sentences(tmp_path / "s"), tokenizer).check_model(text_model("bert masked-lm"))
    with pytest.raises(FusionError, match="text classification starts from a model with a tokenizer"):
        module(tmp_path, None)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_a_classifier_on_a_language_model_has_its_encoder(family: str) -> None:
    model: Any = text_model(f"{family} masked-lm")
    found: Any = with_classifier(model, 3, ("a", "b", "c"), seed=1)
    base = model.base_model_prefix
    encoder = dict(getattr(found, base).named_parameters())
    for key, tensor in getattr(model, base).named_parameters():
        assert torch.equal(encoder[key], tensor), key
    assert found.config.id2label == {0: "a", 1: "b", 2: "c"}
    again, other = (with_classifier(model, 3, None, seed=seed) for seed in (1, 2))
    for key, tensor in found.named_parameters():
        assert torch.equal(tensor, again.get_parameter(key)), key
    assert any(not torch.equal(tensor, other.get_parameter(key)) for key, tensor in found.named_parameters())
    assert with_classifier(found, 3, None, seed=9) is found


def test_only_text_models_take_a_classifier() -> None:
    with pytest.raises(FusionError, match="a Linear has no text encoder to classify with"):
        with_classifier(nn.Linear(2, 2), 2, None, seed=0)


@pytest.mark.parametrize(
    ("metric", "outputs", "labels", "wanted"),
    [
        ("accuracy", [[2.0, 0], [0, 1], [1, 0], [0, 1]], [0, 1, 1, 1], 0.75),
        ("f1", [[2.0, 0], [0, 1], [1, 0], [0, 1]], [0, 1, 1, 1], 0.8),  # precision 1, recall 2/3
        ("matthews", [[2.0, 0], [0, 1], [1, 0], [0, 1]], [0, 1, 1, 1], (2 * 1 - 0) / (2 * 3 * 1 * 2) ** 0.5),
        ("pearson", [[1.0], [2.0], [3.0], [4.0]], [2.0, 4.0, 6.0, 8.0], 1.0),
        ("spearman", [[1.0], [2.0], [3.0], [4.0]], [1.0, 8.0, 27.0, 20.0], 0.8),
    ],
)
def test_metrics_of_glue(metric: str, outputs: list[list[float]], labels: list[Any], wanted: float) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.weight

    found = ClassificationModule(Fixed(), OptimConfig(), len(outputs[0]), [metric])
    logged: dict[str, Any] = {}
    found.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign, assignment]
    found.test_step({"pixel_values": torch.tensor(outputs), "labels": torch.tensor(labels)}, 0)
    assert float(logged[f"test/{metric}"].compute()) == pytest.approx(wanted)


LABELLED = {
    "numbers.csv": ("text,label\n" + "cat,1\ndog,0\n" * 20, ("0", "1")),
    "words.tsv": ("sentence\tlabel\n" + "cat\tgood\ndog\tbad\n" * 20, ("bad", "good")),
    "rows.jsonl": ('{"sentence": "cat", "label": 1}\n{"sentence": "dog", "label": 0}\n' * 20, ("0", "1")),
}


@pytest.mark.parametrize("name", LABELLED)
def test_one_file_of_labelled_lines(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    text, names = LABELLED[name]
    (tmp_path / name).write_text(text)
    data = module(tmp_path / name, tokenizer, validation=400, calibration=400)
    assert data.class_names == names
    assert [len(data.dataset(part)) for part in PARTS] == [20, 6, 6, 8]
    for part in PARTS:
        cats = ["cat" in sentence.split() for sentence in sentences_of(data, part)]
        assert data.dataset(part).labels.tolist() == [int(cat) for cat in cats]
    said = capsys.readouterr().out
    assert "no test split; 8 of 40 training samples are it" in said
    assert "32 training samples, too few for data.calibration 400 and data.validation 400: 6 for calibration" in said


def test_rows_that_lack_text_or_label(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gaps.csv"
    file.write_text('text,label\n"cat\nhouse",1\n\n,0\ncat,\n' + "cat,1\ndog,0\n" * 20)
    with pytest.raises(FusionError, match=r"split train, row 2: column 'label' holds no label; mend it"):
        module(file, tokenizer).dataset("train")
    data = module(file, tokenizer, skip_corrupt=True)
    assert data.class_names == ("0", "1")  # though pandas reads integers beside a gap as floating-point numbers
    assert sum(len(data.dataset(part)) for part in PARTS) == 41
    assert "1 of 43 rows of train are left out, the first is 1: column 'text' holds no text" in capsys.readouterr().out
    file.write_text("text,label\ncat,1\ndog,0\n")
    assert [len(module(file, tokenizer).dataset(part)) for part in PARTS] == [1, 0, 1, 0]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
@pytest.mark.parametrize(("name", "classes", "test"), [("sst2", 2, 1821), ("trec", 6, 500)])
def test_real_data(name: str, classes: int, test: int, tokenizer: PreTrainedTokenizerBase) -> None:
    data = module(SHARED / name, tokenizer)
    assert data.num_classes == classes
    assert len(data.dataset("test")) == test
    batch = next(iter(data.calibration_dataloader()))
    assert set(batch) >= {"input_ids", "attention_mask", "labels"}
