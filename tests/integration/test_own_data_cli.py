"""fuse.py on parents that have data of their own: from their runs, or a path for each."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from fusionpl import load_model
from fusionpl.calibration.config import CalibrationConfig
from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.calibration.kept import Kept
from fusionpl.cli import evaluate, finetune, fuse, sweep
from fusionpl.cli.running import main
from fusionpl.datamodules.base import calibration_of
from fusionpl.datamodules.config import DataConfig
from fusionpl.datamodules.images import ImageDataModule
from fusionpl.datamodules.joint import JointSplits
from fusionpl.evaluation.joint import JointBench
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import baseline
from fusionpl.models.save import class_names, save_model
from fusionpl.training.callbacks import SeedEpochs
from tests.integration.runs import DATA, WORDS, make_run

ROOT = Path(__file__).parents[2]
QUICK = ["--trainer.accelerator", "cpu", "--logger", "none"]
FIRST, SECOND = ("0", "1", "2", "3", "4"), ("5", "6", "7", "8", "9")


def of_classes(folder: Path, seed: int, names: tuple[str, ...], **data: Any) -> str:
    """A run that knows some of the digits."""
    return str(make_run(folder, seed, names, {"classes": [int(name) for name in names], **data}))


def refused(capsys: pytest.CaptureFixture[str], argv: Sequence[str], command: Callable[..., None] = fuse.run) -> str:
    capsys.readouterr()
    assert main(command, list(argv)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def rows(run: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((run / "report/report.json").read_text())["rows"]}


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    return [of_classes(folder / f"seed-{seed}", seed, names) for seed, names in ((1, FIRST), (2, SECOND))]


@pytest.fixture(scope="module")
def fused(parents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("fused") / "fused"
    words = ["--parents", *parents, "--compare", "distilled", "--output", str(output), *QUICK]
    assert main(fuse.run, words) == 0
    return output


def images_of(names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The test images of some digits, and their digits."""
    data = ImageDataModule(DataConfig(image_size=16, channels=1, classes=[int(name) for name in names]))
    test = data.dataset("test")
    batch = test.__getitems__(list(range(len(test))))
    return batch["pixel_values"], torch.tensor([int(name) for name in names])[batch["labels"]]


@torch.no_grad()
def joint_and_own(answer: Callable[[Tensor], Tensor]) -> tuple[float, list[float]]:
    """The mean accuracy over ten digits, and that of each half among its own; of what gives scores of ten."""
    joint, own = zip(*(joint_of(answer, names) for names in (FIRST, SECOND)), strict=True)
    return sum(joint) / 2, list(own)


@torch.no_grad()
def joint_of(answer: Callable[[Tensor], Tensor], names: Sequence[str]) -> tuple[float, float]:
    """The accuracy on some digits, over all ten and among themselves."""
    pixels, digits = images_of(names)
    scores, places = answer(pixels), torch.tensor([int(name) for name in names])
    own = places[scores[:, places].argmax(1)]
    joint, alone = ((found == digits).double().mean() for found in (scores.argmax(1), own))
    return float(joint), float(alone)


def test_figures_are_those_of_the_written_models(fused: Path, parents: list[str]) -> None:
    model: nn.Module = load_model(fused)
    assert class_names(model) == FIRST + SECOND
    one, other = (load_model(parent) for parent in parents)
    by_hand: dict[str, Callable[[Tensor], Tensor]] = {
        "fused": model,
        "ensemble": lambda x: torch.cat([one(x).softmax(1), other(x).softmax(1)], 1),
        "logits side by side": lambda x: torch.cat([one(x), other(x)], 1),
    }
    found = rows(fused)
    for name, answer in by_hand.items():
        joint, own = joint_and_own(answer)
        assert found[name]["accuracy"] == pytest.approx(joint)
        assert found[name]["tasks"] == pytest.approx({"seed-1": own[0], "seed-2": own[1]})
    pixels, digits = images_of(FIRST)
    alone = float((one(pixels).argmax(1) == digits).double().mean())
    assert found["parent seed-1"]["tasks"] == pytest.approx({"seed-1": alone})  # it can't answer for the other
    assert found["parent seed-1"]["accuracy"] == pytest.approx(alone / 2)


def test_what_stands_beside_it_and_the_verdict(fused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(fused)
    names = list(found)
    fitted = names[4].removeprefix("head-fitted parent ")
    assert fitted in ("seed-1", "seed-2")
    assert names == ["parent seed-1", "parent seed-2", "ensemble", "logits side by side", names[4],
                     "all trunks, one head", "vanilla", "distilled", "fused"]  # fmt: skip
    assert all(found[name]["tasks"].keys() == {"seed-1", "seed-2"} for name in names[2:])
    report = json.loads((fused / "report/report.json").read_text())
    one, other = report["kept"]
    assert (one["task"], other["task"]) == ("seed-1", "seed-2")
    assert one["kept"] == pytest.approx(found["fused"]["tasks"]["seed-1"] / found["parent seed-1"]["tasks"]["seed-1"])
    assert one["cost"] == pytest.approx(found["fused"]["flops"] / found["ensemble"]["flops"])
    assert one["standard_error"] >= 0
    for file in ("report.md", "report.html"):
        text = (fused / "report" / file).read_text()
        assert one["words"] in text
        assert "on seed-2" in text
    loaded = Report.load(fused / "report")
    assert [kept.words for kept in loaded.kept] == [one["words"], other["words"]]
    assert "parents know other classes" not in (fused / "report/report.md").read_text()


def test_the_best_trunk_is_the_one_that_is_best_once_its_head_is_fitted(fused: Path) -> None:
    found = rows(fused)
    (name,) = (name for name in found if name.startswith("head-fitted "))
    verdict = json.loads((fused / "report/report.json").read_text())["verdict"][0]
    if verdict["head_fitted"]:
        assert verdict["parent"] == name.removeprefix("head-fitted parent ")
        assert verdict["best_parent"] == found[name]["accuracy"]
    assert found[name]["validation"] >= max(found[f"parent seed-{seed}"]["validation"] for seed in (1, 2)) - 0.05


def test_its_settings_repeat_it(fused: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((fused / "config.yaml").read_text())
    assert [own["classes"] for own in settings["own_data"]] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    again = tmp_path / "again"
    words = ["--config", str(fused / "config.yaml"), "--output", str(again)]
    assert main(fuse.run, [*words, "--report", "none"]) == 2  # its comparison makes rows
    settings["compare"] = []
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    words[1] = str(tmp_path / "config.yaml")
    assert main(fuse.run, [*words, "--data.batch_size", "25"]) == 0
    assert {name: row.get("tasks") for name, row in rows(again).items()} == {
        name: row.get("tasks") for name, row in rows(fused).items() if name != "distilled"
    }
    own = yaml.safe_load((again / "config.yaml").read_text())["own_data"]
    assert [each["batch_size"] for each in own] == [25, 25]  # options apply to all


def test_each_parent_is_calibrated_and_taught_on_its_own(parents: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from fusionpl.cli.jobs.parents import Job

    asked = fuse.Asked.of(["--parents", *reversed(parents), "--output", "unused", *QUICK])
    job = Job.of(asked, torch.device("cpu"))
    assert job.data.class_names == SECOND + FIRST  # the anchor's first
    calibration = calibration_of(job.data, job.asked.config.calibration)
    assert {*calibration.owners} == {0, 1}
    names = job.data.class_names
    more: Any = job.data.unlabelled_dataloader()
    assert [len(loader.dataset) for loader in more.sets] == [100, 100]
    for loader, own in zip(more.sets, (SECOND, FIRST), strict=True):
        assert {names[label] for batch in loader for label in batch["labels"].tolist()} == {*own}
    trained = {names[label] for batch in job.data.train_dataloader() for label in batch["labels"].tolist()}
    assert trained == {*FIRST, *SECOND}
    both, one = (job.prepared(asked.config).needs(job.data.calibration_batch(64), sizes, job.device).memory
                 for sizes in (job.data.calibration_sizes(), job.data.calibration_sizes()[0]))  # fmt: skip
    assert both > one


@pytest.mark.parametrize("look", ["--advise", "--check", "--dry-run"])
def test_what_only_looks(parents: list[str], look: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(fuse.run, ["--parents", *parents, look, *QUICK]) == 0
    said = capsys.readouterr().out
    assert {"--advise": "advice: ", "--check": "seed-2: ok; ", "--dry-run": "classes (10)"}[look] in said


def test_the_head_alone_is_fitted_by_owner_too(parents: list[str], tmp_path: Path) -> None:
    words = ["--parents", *parents, "--strategy", "head", "--report", "rows", *QUICK]
    assert main(fuse.run, [*words, "--output", str(tmp_path / "head")]) == 0
    found = rows(tmp_path / "head")
    assert found["fused"]["tasks"].keys() == {"seed-1", "seed-2"}


def test_pooled_data_are_those_of_nobody(parents: list[str], tmp_path: Path) -> None:
    words = ["--parents", *reversed(parents), "--data.path", "digits", "--report", "rows", *QUICK]
    assert main(fuse.run, [*words, "--output", str(tmp_path / "pooled")]) == 0
    found, notes = rows(tmp_path / "pooled"), (tmp_path / "pooled/report/report.md").read_text()
    assert "with the data of each parent (--data.path A B" in notes
    assert not any("tasks" in row for row in found.values())
    model = load_model(tmp_path / "pooled")
    pixels, digits = images_of(FIRST + SECOND)
    answered = torch.tensor([int(name) for name in class_names(model) or ()])[model(pixels).argmax(1)]
    assert found["fused"]["accuracy"] == pytest.approx(float((answered == digits).double().mean()))
    assert "own_data" not in yaml.safe_load((tmp_path / "pooled/config.yaml").read_text())


def test_parents_of_one_data_set_stay_as_they_are(tmp_path: Path) -> None:
    runs = [str(make_run(tmp_path / f"seed-{seed}", seed, data={"shift": seed})) for seed in (1, 2)]
    asked = fuse.Asked.of(["--parents", *runs, "--output", str(tmp_path / "out")])
    assert asked.args.own_data is None
    assert "own_data" not in asked.settings
    assert asked.settings["data"]["shift"] == 1  # the first one's, as ever
    same = [of_classes(tmp_path / f"same-{seed}", seed, FIRST) for seed in (1, 2)]
    assert fuse.Asked.of(["--parents", *same, "--output", str(tmp_path / "out")]).args.own_data is None


def pictures(folder: Path, names: Sequence[str], count: int, mode: str = "RGB", size: int = 20) -> str:
    for number, name in enumerate(names):
        place = folder / name
        place.mkdir(parents=True)
        for index in range(count):
            pixels = (25 * number, 5 * index, 90)
            Image.new("RGB", (size, size), pixels).convert(mode).save(place / f"{index}.png")
    return str(folder)


def test_foreign_folders_with_a_path_for_each(tmp_path: Path) -> None:
    animals, cars = ("cat", "dog"), ("bus", "dog", "tram")
    models = [
        str(make_run(tmp_path / f"m{at}", at, names, in_chans=3) / "model") for at, names in ((1, animals), (2, cars))
    ]
    paths = [pictures(tmp_path / "a", animals, 20), pictures(tmp_path / "b", cars, 20, "L", 9)]
    words = ["--parents", *models, "--data.path", *paths, "--report", "rows", *QUICK]
    assert main(fuse.run, [*words, "--output", str(tmp_path / "fused")]) == 0
    assert class_names(load_model(tmp_path / "fused")) == ("cat", "dog", "bus", "tram")
    found = rows(tmp_path / "fused")
    assert "logits side by side" not in found  # both know dogs
    assert len(found["fused"]["tasks"]) == 2
    own = yaml.safe_load((tmp_path / "fused/config.yaml").read_text())["own_data"]
    assert [each["path"] for each in own] == paths


def classifier(folder: Path, seed: int, names: Sequence[str], **more: Any) -> str:
    """A BERT of a few words that gives classes of these names."""
    words = {word: at for at, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    cut = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    cut.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=cut, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=24, num_labels=len(names),
                        id2label=dict(enumerate(names)), initializer_range=0.3, **more)  # fmt: skip
    save_model(BertForSequenceClassification(config).eval(), folder, tokenizer=tokenizer)
    return str(folder)


def sentences(folder: Path, labels: Sequence[Any], count: int, kind: str = "csv") -> str:
    folder.mkdir()
    generator = torch.Generator().manual_seed(len(labels))
    rows = [" ".join(WORDS[at] for at in torch.randint(len(WORDS), (5,), generator=generator)) for _ in range(count)]
    data = datasets.Dataset.from_dict({"text": rows, "label": [labels[at % len(labels)] for at in range(count)]})
    file = folder / f"train.{kind}"
    _ = data.to_csv(file) if kind == "csv" else data.to_parquet(file)
    return str(file)


def test_sentences_of_two_kinds_with_a_path_for_each(tmp_path: Path) -> None:
    models = [
        classifier(tmp_path / "films", 1, ("bad", "good")),
        classifier(tmp_path / "topics", 2, ("art", "war", "sea")),
    ]
    # The labels of the first are numbers, which are its outputs; those of the second names, in another order.
    paths = [sentences(tmp_path / "a", (0, 1), 90), sentences(tmp_path / "b", ("war", "sea", "art"), 150, "parquet")]
    words = ["--parents", *models, "--data.path", *paths, "--data.max_length", "12", "--report", "rows", *QUICK]
    assert main(fuse.run, [*words, "--output", str(tmp_path / "fused")]) == 0
    model: Any = load_model(tmp_path / "fused")
    assert class_names(model) == ("bad", "good", "art", "war", "sea")
    found = rows(tmp_path / "fused")
    asked = fuse.Asked.of([*words, "--output", str(tmp_path / "other")])
    from fusionpl.cli.jobs.parents import Job

    job: Any = Job.of(asked, torch.device("cpu"))
    joint, own = [], {}
    with torch.no_grad():
        for name, data, places in zip(asked.parents, job.data.own.values(), ([0, 1], [2, 3, 4]), strict=True):
            batch = next(iter(data.test_dataloader()))
            labels = batch.pop("labels")
            assert {*labels.tolist()} <= {*places}
            scores = model(**batch).logits
            joint.append(float((scores.argmax(1) == labels).double().mean()))
            own[name] = float((torch.tensor(places)[scores[:, places].argmax(1)] == labels).double().mean())
            assert len(labels) == len(data.dataset("test"))
    assert found["fused"]["tasks"] == pytest.approx(own)
    assert found["fused"]["accuracy"] == pytest.approx(sum(joint) / 2)  # although one set is larger


def test_numbers_and_tags_of_each_parent(tmp_path: Path) -> None:
    words = ["--report", "rows", "--data.max_length", "12", *QUICK]
    models = [classifier(tmp_path / f"n{seed}", seed, ("LABEL_0",)) for seed in (1, 2)]
    paths = [sentences(tmp_path / f"{count}", (0.5, 1.5, 2.25), count) for count in (60, 90)]
    out = ["--output", str(tmp_path / "numbers")]
    assert main(fuse.run, ["--parents", *models, "--data.path", *paths, *words, *out]) == 0
    fused = rows(tmp_path / "numbers")["fused"]
    assert {"loss", "pearson"} < fused.keys()
    assert "tasks" not in fused
    tags = ((("rude", "loud"), 3), (("loud", "sad", "odd"), 4))
    kind = {"problem_type": "multi_label_classification"}
    models = [classifier(tmp_path / f"t{seed}", seed, own, **kind) for own, seed in tags]
    paths = [sentences(tmp_path / f"t-{seed}", [[own[0]], list(own), [own[-1]]], 60, "parquet") for own, seed in tags]
    out = ["--output", str(tmp_path / "tags")]
    assert main(fuse.run, ["--parents", *models, "--data.path", *paths, *words, *out]) == 0
    found = rows(tmp_path / "tags")
    assert len(found["fused"]["tasks"]) == 2
    # Tags that a parent does not know are not scored on its data.
    assert found["fused"]["accuracy"] == pytest.approx(sum(found["fused"]["tasks"].values()) / 2, abs=0.05)
    report = Report.load(tmp_path / "tags" / "report")
    for scores, own in zip(report.tasks["fused", "one-shot"].values(), (2, 3), strict=True):
        right = own * scores.values
        assert torch.allclose(right, right.round())  # of so many tags a sample


def test_mistakes(parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--parents", *parents, "--output", str(tmp_path / "out"), *QUICK]
    line = refused(capsys, [*words, "--data.path", "a", "b", "c"])
    assert "--data.path names 3 sets of data, and there are 2 parents; give one for each parent, in their order" in line
    models = [f"{parent}/model" for parent in parents]
    words[1:3] = models
    paths = [pictures(tmp_path / at, names, 12, "L") for at, names in (("a", FIRST), ("b", SECOND))]
    line = refused(capsys, [*words, "--data.path", *reversed(paths)])
    assert (
        f"the data of model#1 ('{paths[1]}') have the class '5', which model#1 does not know; model#2 does: give"
        in line
    )
    line = refused(capsys, [*words, "--data.path", paths[0], pictures(tmp_path / "c", ("owl", "emu"), 12, "L")])
    assert "have the class 'emu', which model#2 does not know; no parent knows any of their classes: name" in line
    line = refused(capsys, [*words, "--data.path", paths[0], pictures(tmp_path / "d", ("5", "owl"), 12, "L")])
    assert "have the class 'owl', which model#2 does not know; it knows 5, 6, 7, 8, 9: leave other samples out" in line
    line = refused(capsys, words)
    assert "nothing says which data" in line
    line = refused(capsys, [*words, "--data.path", paths[0]])
    assert (
        f"model#2 knows none of the classes of '{paths[0]}' (its own are 5, 6, 7, 8, 9); give the data of each" in line
    )


def test_one_parent_without_data(parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = [parents[0], f"{parents[1]}/model"]
    line = refused(capsys, ["--parents", *mixed, "--labels", "anchor", "--output", str(tmp_path / "out"), *QUICK])
    assert "knows none of the classes of seed-1" in line
    overlapping = of_classes(tmp_path / "seed-3", 3, ("4", "5", "6"))
    words = ["--parents", parents[0], overlapping, "--output", str(tmp_path / "out"), *QUICK, "--labels", "anchor"]
    line = refused(capsys, words)
    assert "the data of seed-3 ('digits') have the class '5', and the fused model has none of that name" in line


def test_three_parents_two_of_which_know_the_same(parents: list[str], tmp_path: Path) -> None:
    third = of_classes(tmp_path / "seed-3", 3, FIRST)
    words = ["--parents", *parents, third, "--report", "rows", *QUICK]
    assert main(fuse.run, [*words, "--output", str(tmp_path / "fused")]) == 0
    found = rows(tmp_path / "fused")
    assert found["parent seed-1"]["tasks"].keys() == {"seed-1", "seed-3"}
    columns, _ = Report.load(tmp_path / "fused" / "report").rows_as_table()
    assert [name for name in columns if name.startswith("on ")] == ["on seed-1", "on seed-2", "on seed-3"]
    model = load_model(tmp_path / "fused")
    (one, _), (other, _) = (joint_of(model, names) for names in (FIRST, SECOND))
    assert found["fused"]["accuracy"] == pytest.approx((2 * one + other) / 3)  # each set counts alike


@pytest.mark.parametrize("turned", [False, True])
def test_one_that_knows_all_and_one_that_knows_some(tmp_path: Path, turned: bool) -> None:
    runs = [of_classes(tmp_path / "all", 1, FIRST + SECOND), of_classes(tmp_path / "some", 2, SECOND)]
    words = ["--parents", *(reversed(runs) if turned else runs), "--report", "rows", *QUICK]
    assert main(fuse.run, [*words, "--output", str(tmp_path / "fused")]) == 0
    names = class_names(load_model(tmp_path / "fused"))
    assert names == (SECOND + FIRST if turned else FIRST + SECOND)
    found = rows(tmp_path / "fused")
    assert found["parent all"]["tasks"].keys() == {"all", "some"}  # it can answer for both
    assert "logits side by side" not in found


def finetuned_rows(run: Path) -> dict[str, dict[str, Any]]:
    rows = json.loads((run / "report/report.json").read_text())["rows"]
    return {row["name"]: row for row in rows if row["stage"] == "finetuned"}


def test_a_fused_model_is_finetuned_on_the_data_of_all(
    fused: Path, parents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusionpl.cli.jobs import finetune as job

    seen: list[list[set[str]]] = []

    def watched(model: nn.Module, data: Any, *args: Any, **more: Any) -> Any:
        names = data.class_names
        seen.append([{names[label] for label in batch["labels"].tolist()} for batch in data.train_dataloader()])
        return fit(model, data, *args, **more)

    fit = job.fit
    monkeypatch.setattr(job, "fit", watched)
    run = Path(shutil.copytree(fused, tmp_path / "fused"))
    words = ["--model", str(run), "--output", str(tmp_path / "more"), *QUICK, "--trainer.max_epochs", "1"]
    words += ["--optim.lr", "0.01", "--data.batch_size", "20"]
    assert main(finetune.run, words) == 0
    batches = seen[0]
    assert len(batches) == 10  # of 100 images each, 20 at a time
    assert all(batch & {*FIRST} and batch & {*SECOND} for batch in batches)  # samples of both meet
    found = finetuned_rows(run)
    held = json.loads((run / "report/report.json").read_text())["verdict"]
    best = ("head-fitted " if held[0]["head_fitted"] else "") + f"parent {held[0]['parent']}"
    assert found.keys() == {"fused", best, "vanilla"}
    model = load_model(tmp_path / "more")
    assert class_names(model) == FIRST + SECOND
    joint, own = joint_and_own(model)
    assert found["fused"]["accuracy"] == pytest.approx(joint)
    assert found["fused"]["tasks"] == pytest.approx({"seed-1": own[0], "seed-2": own[1]})
    assert json.loads((tmp_path / "more/metrics.json").read_text())["tasks"] == found["fused"]["tasks"]
    assert [verdict["stage"] for verdict in held] == ["one-shot", "finetuned"]
    kept = json.loads((run / "report/report.json").read_text())["kept"]
    assert [(one["stage"], one["task"]) for one in kept[2:]] == [("finetuned", "seed-1"), ("finetuned", "seed-2")]
    settings = yaml.safe_load((tmp_path / "more/config.yaml").read_text())
    assert [each["batch_size"] for each in settings["own_data"]] == [20, 20]
    # Its settings repeat it, and it can be finetuned again.
    again = ["--model", str(tmp_path / "more"), "--config", str(tmp_path / "more/config.yaml"), "--output"]
    assert main(finetune.run, [*again, str(tmp_path / "again"), "--trainer.max_epochs", "1"]) == 0
    assert json.loads((tmp_path / "again/metrics.json").read_text())["tasks"].keys() == {"seed-1", "seed-2"}


def test_the_best_trunk_is_finetuned_with_the_head_that_the_report_has(fused: Path) -> None:
    from fusionpl.cli.jobs.candidates import candidates, data_for

    asked = finetune.Asked.of(["--model", str(fused), *QUICK])
    held = baseline(Report.load(fused / "report").rows)
    assert held is not None
    model = {one.name: one.model for one in candidates(asked)}[held.name]
    data: Any = data_for(asked)
    data.follow(model)
    report = Report()
    JointBench(report, data, torch.device("cpu")).add("again", [model])
    assert report.rows[0].tasks == pytest.approx(held.tasks)


@pytest.mark.parametrize("turned", [False, True])
def test_evaluate_measures_on_the_data_of_all(fused: Path, parents: list[str], tmp_path: Path, turned: bool) -> None:
    models = [*parents, str(fused)] if turned else [str(fused), *parents]
    assert main(evaluate.run, ["--models", *models, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    found, wanted = rows(tmp_path / "out"), rows(fused)
    for mine, theirs in (("model fused", "fused"), *((f"model seed-{one}", f"parent seed-{one}") for one in (1, 2))):
        assert found[mine]["accuracy"] == pytest.approx(wanted[theirs]["accuracy"])
        assert found[mine]["tasks"] == pytest.approx(wanted[theirs]["tasks"])
    settings = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert len(settings["own_data"]) == 2
    words = ["--models", str(fused), "--device", "cpu", "--data.classes", "null", "--output", str(tmp_path / "pooled")]
    assert main(evaluate.run, words) == 0  # one set of all
    assert "tasks" not in rows(tmp_path / "pooled")["model fused"]


def test_a_fusion_of_other_data_as_a_parent_wants_its_data_named(
    fused: Path, parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--parents", str(fused), parents[0], "--report", "rows", *QUICK]
    line = refused(capsys, [*words, "--output", str(tmp_path / "out")])
    assert f"{fused} was fused of parents with data of their own, which are several sets, and a parent has" in line
    asked = fuse.Asked.of([*words, "--data.path", "digits", "--output", str(tmp_path / "out")])
    assert asked.args.own_data is None
    assert asked.args.data.classes is None  # not the anchor's
    asked = fuse.Asked.of([*words, "--data.path", "digits", "elsewhere", "--output", str(tmp_path / "out")])
    assert [own["classes"] for own in asked.args.own_data] == [None, [0, 1, 2, 3, 4]]


def test_a_sweep_wants_parents_of_one_list_of_classes(
    parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--parents", *parents, "--sweep", "width=1,2", "--output", str(tmp_path / "sweep")]
    assert "a sweep measures all cells on one set of data" in refused(capsys, words, sweep.run)
    line = refused(capsys, [*words, "--data.path", "digits", "--data.classes", "null"], sweep.run)
    assert "a sweep measures parents that know the same classes, and seed-2 knows others than seed-1" in line


def test_one_set_of_all_classes_to_finetune_on(fused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(fused, tmp_path / "fused"))
    words = ["--model", str(run), "--output", str(tmp_path / "more"), *QUICK, "--trainer.max_epochs", "1"]
    assert main(finetune.run, [*words, "--data.classes", "null"]) == 0
    found = finetuned_rows(run)
    assert {"fused", "vanilla"} < found.keys()
    assert not any("tasks" in row for row in found.values())
    assert "own_data" not in yaml.safe_load((tmp_path / "more/config.yaml").read_text())
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["own_data"] = settings["own_data"][:1]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    line = refused(capsys, [*words, "--overwrite"], finetune.run)
    assert f"own_data has 1 sets, and {run} goes back to 2 parents; give one for each, in their order" in line


def stops_in_epoch(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Ctrl-C were pressed when an epoch, counted from 0, starts."""
    seeded = SeedEpochs.on_train_epoch_start

    def stop(self: SeedEpochs, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == number:
            raise KeyboardInterrupt
        seeded(self, trainer, module)

    monkeypatch.setattr(SeedEpochs, "on_train_epoch_start", stop)


def test_a_stopped_finetuning_on_the_data_of_all_goes_on(fused: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(fused, tmp_path / "fused"))
    words = ["--model", str(run), *QUICK, "--baselines", "false", "--trainer.max_epochs", "2", "--output"]
    assert main(finetune.run, [*words, str(tmp_path / "whole")]) == 0
    with pytest.MonkeyPatch.context() as patched:
        stops_in_epoch(1, patched)
        assert main(finetune.run, [*words, str(tmp_path / "parts")]) == 130
    assert main(finetune.run, [*words, str(tmp_path / "parts"), "--resume"]) == 0
    whole, parts = (load_model(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    whole, parts = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts"))
    assert parts["tasks"] == whole["tasks"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_finetuning_on_the_data_of_all_in_two_processes(fused: Path, tmp_path: Path, strategy: str) -> None:
    run = Path(shutil.copytree(fused, tmp_path / "fused"))
    command = [sys.executable, "finetune.py", "--model", str(run), "--output", str(tmp_path / "two"), *QUICK]
    two = ["--trainer.devices", "2", "--trainer.strategy", strategy, "--trainer.max_epochs", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *two], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    joint, own = joint_and_own(load_model(tmp_path / "two"))
    found = finetuned_rows(run)
    assert len(found) == 3
    assert found["fused"]["accuracy"] == pytest.approx(joint)
    assert found["fused"]["tasks"] == pytest.approx({"seed-1": own[0], "seed-2": own[1]})


def test_a_sweep_takes_parents_of_colours_beside_grey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey, colour = make_run(tmp_path / "grey", 1), make_run(tmp_path / "colour", 2, in_chans=3)
    words = ["--parents", str(grey), str(colour), "--sweep", "units=anchor,even", "--output", str(tmp_path / "swept")]
    assert main(sweep.run, [*words, "--logger", "none"]) == 0
    assert len(re.findall("(?m)^units=", capsys.readouterr().out)) == 2


def test_data_of_colour_follow_the_anchor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Colours become grey for an anchor of grey images, and the parent of colours is rewritten for that."""
    grey = of_classes(tmp_path / "grey", 1, FIRST)
    names = ("cat", "dog")
    path = pictures(tmp_path / "pets", names, 20)
    colour = str(make_run(tmp_path / "colour", 2, names, {**DATA, "path": path, "channels": 3}, in_chans=3))
    assert main(fuse.run, ["--parents", grey, colour, "--output", str(tmp_path / "out"), *QUICK]) == 0
    assert "trained on images of another number of channels" in capsys.readouterr().out
    assert class_names(load_model(tmp_path / "out")) == FIRST + names


def test_each_parents_training_inputs_stand_behind_its_calibration_data() -> None:
    own = [ImageDataModule(DataConfig(**{**DATA, "classes": [*names], "calibration": 20})) for names in (FIRST, SECOND)]
    joint = JointSplits(dict(zip("ab", own, strict=True)), {"a": FIRST, "b": SECOND}, "a")
    sizes = [len(one.dataset("calibration")) + len(one.dataset("train")) for one in own]
    assert joint.calibration_sizes() == sizes
    given = CalibrationSet(joint.calibration_dataloader(16), CalibrationConfig(samples=70, batch_size=16), Kept(10**7))
    for owner, data in enumerate(own):
        pixels = torch.cat([given[at]["pixel_values"] for at in given if given.owners[at] == owner])
        first = next(iter(data.calibration_dataloader(16)))["pixel_values"]
        assert torch.equal(pixels[: len(first)], first)
        assert torch.equal(pixels[len(data.dataset("calibration"))], data.dataset("train")[0]["pixel_values"])
        assert len(pixels) == min(70, sizes[owner])
