"""Some classes of a data set: which samples are left in which part, their labels, and what a mistake is told."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from fusionpl.datamodules.config import Class, DataConfig, TextClassificationConfig, TextEmbeddingConfig
from fusionpl.datamodules.embeddings import TextEmbeddingDataModule
from fusionpl.datamodules.images import ImageDataModule
from fusionpl.datamodules.labelled import LabelledSplits
from fusionpl.datamodules.text_classification import TextClassificationDataModule
from fusionpl.errors import FusionError
from fusionpl.models.build import build_model
from fusionpl.models.config import ModelConfig
from fusionpl.models.heads import with_classifier
from fusionpl.models.save import class_names
from fusionpl.models.tokenizers import train_wordpiece
from tests.integration.runs import ARGS as RUN_ARGS
from tests.models_for_tests import text_model

SHARED = Path(__file__).parents[3] / "shared" / "data"
PARTS = ("train", "validation", "calibration", "test")
KINDS = ("hot dog", "cat", "dog", "ox")
ARGS: dict[str, Any] = {**RUN_ARGS, "img_size": 8}
Rows = dict[str, set[tuple[Any, str]]]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def digits(classes: list[Class] | None = None, **options: Any) -> ImageDataModule:
    return ImageDataModule(DataConfig(image_size=8, classes=classes, **options))


def text(path: Path, classes: list[Class] | None = None, **options: Any) -> TextClassificationDataModule:
    words = [f"number{index}" for index in range(200)]
    options = {"path": str(path), "validation": 20, "calibration": 20, **options}
    return TextClassificationDataModule(
        TextClassificationConfig(classes=classes, **options), 0, train_wordpiece([" ".join(words)] * 3, 1000)
    )


def images_of(data: ImageDataModule) -> Rows:
    """The images of each part with the names of their classes."""
    return {part: {(pixels.numpy().tobytes(), data.class_names[label])
                   for pixels, label in zip(data.dataset(part).pixels, data.dataset(part).labels.tolist(), strict=True)}
            for part in PARTS}  # fmt: skip


def sentences_of(data: TextClassificationDataModule) -> Rows:
    names = data.class_names or ()
    return {part: {(tuple(ids), names[label])
                   for ids, label in zip(data.dataset(part).encoded["input_ids"], data.dataset(part).labels.tolist(),
                                         strict=True)}
            for part in PARTS}  # fmt: skip


def of_classes(rows: Rows, names: tuple[str, ...]) -> Rows:
    return {part: {row for row in found if row[1] in names} for part, found in rows.items()}


def told(data: LabelledSplits) -> str:
    with pytest.raises(FusionError) as raised:
        data.dataset("train")
    return str(raised.value)


def named_images(folder: Path) -> Path:
    """Images by class, of which each has a colour of its own."""
    for number, name in enumerate(KINDS):
        (folder / name).mkdir(parents=True)
        for index in range(20):
            Image.new("RGB", (4, 4), (number * 60, index * 10, 0)).save(folder / name / f"{index}.png")
    return folder


def labelled_text(folder: Path, labels: list[Any], **features: Any) -> Path:
    rows = datasets.Dataset.from_dict(
        {"text": [f"number{index}" for index in range(len(labels))], "label": labels},
        features=datasets.Features({"text": datasets.Value("string"), **features}) if features else None,
    )
    folder.mkdir(exist_ok=True)
    rows.to_parquet(folder / "train.parquet")
    return folder


def test_no_choice_of_classes_moves_an_image() -> None:
    whole = images_of(digits())
    for classes in ([4, 0, 7], [7, 4, 0], ["1", "9"]):
        assert images_of(digits(classes)) == of_classes(whole, tuple(map(str, classes)))


def test_labels_are_numbered_as_asked_for() -> None:
    data = digits([4, 0, 7])
    assert (data.class_names, data.num_classes) == (("4", "0", "7"), 3)
    for part in PARTS:
        assert data.dataset(part).labels.unique().tolist() == [0, 1, 2]
        assert data.dataset(part).labels.dtype == torch.int64


def test_a_limit_counts_images_of_these_classes() -> None:
    whole, limited = images_of(digits([4, 0])), images_of(digits([4, 0], train_limit=100))
    assert len(limited["train"]) == 100
    assert limited["train"] < whole["train"]
    assert all(limited[part] == whole[part] for part in PARTS[1:])
    assert images_of(digits([4, 0], train_limit=500)) == whole


def test_what_is_left_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    digits([4, 0, 7]).dataset("train")
    assert capsys.readouterr().out == (
        "digits: samples of the classes asked for: 299 of 1,000 for train, 120 of 400 for test, "
        "59 of 197 for calibration, 60 of 200 for validation\n"
    )


def test_names_and_numbers_of_image_folders(tmp_path: Path) -> None:
    options: dict[str, Any] = {"path": str(named_images(tmp_path / "images")), "validation": 8, "calibration": 8}
    whole = digits(**options)
    assert whole.class_names == ("cat", "dog", "hot dog", "ox")  # as `datasets` sorts them
    rows = images_of(whole)
    for classes in (["hot dog", "cat"], [2, 0], ["2", "cat"], ["hot dog", 0]):
        data = digits(classes, **options)
        assert data.class_names == ("hot dog", "cat")
        assert images_of(data) == of_classes(rows, data.class_names)
    for wrong, words in {
        "hotdog": "no class 'hotdog'; did you mean 'hot dog'?",
        "zebra": "no class 'zebra'; its classes are cat, dog, hot dog, ox; null is all of them",
    }.items():
        assert words in told(digits(["cat", wrong], **options))
    for number in (4, -1):
        assert f"no class {number}; its 4 classes have the numbers 0 to 3" in told(digits(["cat", number], **options))
    assert "data.classes has the class 'dog'" in told(digits(["cat", "dog", 1], **options))


@pytest.mark.parametrize("kind", ["ClassLabel", "strings"])
def test_classes_of_sentences(tmp_path: Path, kind: str) -> None:
    if kind == "ClassLabel":
        label = {"label": datasets.ClassLabel(names=list(KINDS))}
        path = labelled_text(tmp_path / "data", [index % 4 for index in range(200)], **label)
    else:
        path = tmp_path / "data.csv"
        path.write_text("text,label\n" + "".join(f"number{index},{KINDS[index % 4]}\n" for index in range(200)))
    whole = text(path)
    rows = sentences_of(whole)
    for classes in (["ox", "hot dog"], ["hot dog", "ox", "cat"], [(whole.class_names or ()).index("ox"), "cat"]):
        data = text(path, classes)
        assert data.class_names is not None
        assert set(data.class_names) == {"ox" if isinstance(name, int) else name for name in classes}
        assert sentences_of(data) == of_classes(rows, data.class_names)
        assert data.num_classes == len(classes)
        assert data.dataset("test").labels.unique().tolist() == list(range(len(classes)))


def test_a_model_that_numbers_classes_otherwise_moves_no_sentence(tmp_path: Path) -> None:
    path = labelled_text(tmp_path / "data", [KINDS[index % 4] for index in range(200)])
    rows = sentences_of(text(path))
    model = text_model("bert_classifier")
    for classes in (None, ["ox", "cat"]):
        data = text(path, classes)
        names = tuple(reversed(data.class_names or ()))
        model.config.id2label = dict(enumerate(names))
        data.follow(model)
        assert data.class_names == names
        assert sentences_of(data) == of_classes(rows, names)


def test_a_model_of_other_classes_is_refused(tmp_path: Path) -> None:
    model = build_model(ModelConfig("timm", "vit_tiny_patch16_224", ARGS), num_classes=3, class_names=("4", "0", "7"))
    digits([7, 0]).check_model(model)
    for classes, others in {(1, 2, 3): "1, 2, 3", (4, 0, 9): "9", (): "1, 2, 3, 5, 6, 8, 9"}.items():
        with pytest.raises(FusionError) as raised:
            digits(list(classes) or None).check_model(model)
        assert str(raised.value) == (
            f"the VisionTransformer knows the classes 4, 0, 7 of 'digits' and not {others}; its own are "
            "--data.classes '[4, 0, 7]'"
        )
    foreign = build_model(ModelConfig("timm", "vit_tiny_patch16_224", ARGS), num_classes=3, class_names=("a", "b", "c"))
    digits([1, 2, 3]).check_model(foreign)


def test_a_classifier_of_other_classes_is_renamed() -> None:
    model: Any = with_classifier(text_model("bert"), 3, ("5", "0", "3"), seed=0)
    other: Any = with_classifier(model, 3, ("0", "1", "2"), seed=0)
    assert class_names(other) == ("0", "1", "2")
    named: Any = with_classifier(text_model("bert"), 2, ("bad", "good"), seed=0)
    assert class_names(with_classifier(named, 2, ("0", "1"), seed=0)) == ("bad", "good")
    assert class_names(with_classifier(named, 2, ("good", "bad"), seed=0)) == ("bad", "good")  # data follow its order


@pytest.mark.parametrize(
    ("labels", "asked", "names"),
    [
        ([3, 5, 7], [7, 3], ("7", "3")),  # the names are numbers
        ([3, 5, 7], ["7", "3"], ("7", "3")),
        (["no", "yes", "maybe"], [False, True], ("no", "yes")),  # as YAML reads [no, yes]
        (["007", "1.5", "x"], [1.5, 7], ("1.5", "007")),
        ([True, False], [True, False], ("True", "False")),
    ],
)
def test_names_that_yaml_reads_as_something_else(
    tmp_path: Path, labels: list[Any], asked: list[Class], names: tuple[str, ...]
) -> None:
    path = labelled_text(tmp_path / "data", labels * (180 // len(labels)))
    assert text(path, asked).class_names == names


def test_numbers_are_names_where_names_are_numbers(tmp_path: Path) -> None:
    path = labelled_text(tmp_path / "data", [3, 5, 7] * 60)
    assert "has no class 0; its classes are 3, 5, 7; null is all of them" in told(text(path, [0, 3]))


def test_labels_that_are_no_classes(tmp_path: Path) -> None:
    scores = labelled_text(tmp_path / "scores", [0.25, 0.5] * 80)
    assert told(text(scores, [0, 1])).endswith("are numbers; leave data.classes out")
    tags = labelled_text(tmp_path / "tags", [["a"], ["a", "b"]] * 80)
    assert told(text(tags, ["a", "b"])).endswith("are tags, several at once; leave data.classes out")
    (tmp_path / "lines.txt").write_text("".join(f"number{index}\n" for index in range(160)))
    config = TextEmbeddingConfig(path=str(tmp_path / "lines.txt"), classes=["a", "b"])
    data = TextEmbeddingDataModule(config, 0, text(scores).tokenizer)
    assert "lines.txt' has no labels; name their column with --data.label_column" in told(data)


def test_classes_without_samples(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["a", "b", "none"])
    path = labelled_text(tmp_path / "data", [0, 1] * 80, label=names)
    assert "has no sample of class 'none'; leave it out" in told(text(path, ["a", "none"]))
    elsewhere = labelled_text(tmp_path / "test", [1, 2] * 20, label=names) / "train.parquet"
    elsewhere.rename(labelled_text(tmp_path / "one", [0] * 160, label=names) / "test.parquet")
    words = "these classes leave nothing to train on (0 of 120 for train, 40 of 40 for test, "
    assert words in told(text(tmp_path / "one", ["b", "none"]))


@pytest.mark.parametrize("classes", [[], ["cat"], [3]])
def test_fewer_than_two_classes(classes: list[Class]) -> None:
    for config in (DataConfig, TextClassificationConfig):
        with pytest.raises(FusionError, match="a classifier needs two or more classes"):
            config(classes=classes)


@pytest.mark.parametrize("classes", [["cat", "dog", "cat"], [1, "1"]])
def test_a_class_twice(classes: list[Class]) -> None:
    for config in (DataConfig, TextClassificationConfig):
        with pytest.raises(FusionError, match=f"data.classes has '{classes[0]}' twice; give each class once"):
            config(classes=classes)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
def test_trec_and_sst2() -> None:
    trec = text(SHARED / "trec", [5, 0, "3"], validation=400, calibration=400)
    assert trec.class_names == ("5", "0", "3")
    whole = datasets.load_dataset("parquet", data_files={"test": str(SHARED / "trec" / "test.parquet")})["test"]
    counts = np.bincount(whole["label"], minlength=6)
    assert torch.bincount(trec.dataset("test").labels).tolist() == counts[[5, 0, 3]].tolist()
    assert sum(len(trec.dataset(part)) for part in ("train", "validation", "calibration")) < 5452
    sst2 = text(SHARED / "sst2", [1, 0])
    straight = text(SHARED / "sst2")
    assert torch.equal(sst2.dataset("test").labels, 1 - straight.dataset("test").labels)
