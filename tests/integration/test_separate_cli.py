"""fuse.py --labels separate: one trunk, and a head for each parent, each with its own data."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from torch import Tensor
from torchmetrics.functional.classification import binary_f1_score

import fusionpl
from fusionpl import load_model
from fusionpl.cli import fuse, push, sweep
from fusionpl.cli.jobs.parents import Job
from fusionpl.cli.running import main
from fusionpl.evaluation.report import Report
from fusionpl.models.save import class_names
from tests.integration.runs import make_run
from tests.integration.test_own_data_cli import QUICK, classifier, pictures, refused, rows, sentences

APART = ["--labels", "separate", "--data.max_length", "12", *QUICK]


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """Classifiers of films and topics, one of numbers and one of tags, and their data."""
    folder = tmp_path_factory.mktemp("parents")
    tags = {"problem_type": "multi_label_classification"}
    models = [
        classifier(folder / "films", 1, ("bad", "good")),
        classifier(folder / "topics", 2, ("art", "war", "sea")),
        classifier(folder / "stars", 3, ("LABEL_0",)),
        classifier(folder / "moods", 4, ("rude", "loud"), **tags),
    ]
    paths = [
        sentences(folder / "a", ("good", "bad"), 90, "parquet"),
        sentences(folder / "b", ("war", "sea", "art"), 150, "parquet"),
        sentences(folder / "c", (0.5, 1.5, 2.25), 120),
        sentences(folder / "d", [["rude"], ["rude", "loud"], ["loud"]], 100, "parquet"),
    ]
    return models, paths


def words(parents: tuple[list[str], list[str]], output: Path, *more: str) -> list[str]:
    models, paths = parents
    return ["--parents", *models, "--data.path", *paths, "--output", str(output), *APART, *more]


@pytest.fixture(scope="module")
def fused(parents: tuple[list[str], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("fused") / "fused"
    assert main(fuse.run, words(parents, output, "--compare", "distilled", "transport")) == 0
    return output


@torch.no_grad()
def figure(model: Any, data: Any) -> float:
    """What a task is measured by, of a model of its own."""
    batches = list(data.test_dataloader())
    given = torch.cat([model(**{k: v for k, v in batch.items() if k != "labels"}).logits for batch in batches])
    labels: Tensor = torch.cat([batch["labels"] for batch in batches])
    if not labels.is_floating_point():
        return float((given.argmax(1) == labels).double().mean())
    if labels.ndim == 2:
        return float(binary_f1_score(given.sigmoid().flatten(), labels.flatten().int()))
    return float(torch.corrcoef(torch.stack([given[:, 0], labels]))[0, 1])


def data_of(argv: list[str]) -> Mapping[str, Any]:
    job: Any = Job.of(fuse.Asked.of([*argv, "--overwrite"]), torch.device("cpu"))
    return job.data.own  # type: ignore[no-any-return]


def test_figures_are_those_of_the_written_models(fused: Path, parents: tuple[list[str], list[str]]) -> None:
    own, found = data_of(words(parents, fused)), rows(fused)
    models = fusionpl.load_models(fused)
    assert list(own) == ["films", "topics", "stars", "moods"]
    metrics = {"films": "accuracy", "topics": "accuracy", "stars": "pearson", "moods": "f1"}
    by_hand = {name: figure(models[name], data) for name, data in own.items()}
    assert found["fused"]["tasks"] == pytest.approx(by_hand, abs=1e-5)
    assert found["fused"]["metrics"] == metrics
    assert "accuracy" not in found["fused"]
    each = {name: figure(load_model(path), data) for path, (name, data) in zip(parents[0], own.items(), strict=True)}
    assert found["all parents"]["tasks"] == pytest.approx(each, abs=1e-5)
    for name, value in each.items():
        assert found[f"parent {name}"]["tasks"] == pytest.approx({name: value}, abs=1e-5)
    trunks = [{k: v for k, v in model.state_dict().items() if "classifier" not in k} for model in models.values()]
    assert all(torch.equal(trunks[0][key], trunk[key]) for trunk in trunks[1:] for key in trunk)
    assert class_names(models["topics"]) == ("art", "war", "sea")


def test_what_stands_beside_it(fused: Path) -> None:
    found = rows(fused)
    names = list(found)
    (trunk,) = (name for name in names if name.startswith("head-fitted parent "))
    assert names == [
        "parent films", "parent topics", "parent stars", "parent moods", "all parents", trunk,
        "all trunks, one head each", "fused (transport)", "distilled", "fused",
    ]  # fmt: skip
    tasks = {"films", "topics", "stars", "moods"}
    assert all(found[name]["tasks"].keys() == tasks for name in names[4:])
    parents = sum(found[name]["flops"] for name in names[:4])
    assert found["all parents"]["flops"] == parents
    assert found["fused"]["flops"] == pytest.approx(parents / 4, rel=0.02)  # one pass for all heads


def test_the_verdict_is_one_for_each_task(fused: Path) -> None:
    found, report = rows(fused), json.loads((fused / "report/report.json").read_text())
    (trunk,) = (name for name in found if name.startswith("head-fitted parent "))
    assert [(one["against"], one["task"]) for one in report["verdict"]] == [
        (row, task) for row in ("all parents", trunk) for task in ("films", "topics", "stars", "moods")
    ]
    for one in report["verdict"]:
        gain = found["fused"]["tasks"][one["task"]] - found[one["against"]]["tasks"][one["task"]]
        assert one["difference"] == pytest.approx(gain, abs=1e-9)
        assert one["standard_error"] >= 0
    for one in report["kept"]:
        before = found[f"parent {one['task']}"]["tasks"][one["task"]]
        assert one["kept"] == pytest.approx(found["fused"]["tasks"][one["task"]] / before)
        assert one["cost"] == pytest.approx(found["fused"]["flops"] / found["all parents"]["flops"])
    loaded = Report.load(fused / "report")
    assert [one.as_dict() for one in loaded.on_tasks] == report["verdict"]
    assert [one.words for one in loaded.kept] == [one["words"] for one in report["kept"]]
    page, text = ((fused / "report" / name).read_text() for name in ("report.html", "report.md"))
    for shown in (page, text, loaded.table()):
        assert "fused, against running all parents, at " in shown
        assert f"against the trunk of {trunk.removeprefix('head-fitted parent ')} with all heads fitted: " in shown
        assert "pearson on stars" in shown
        assert "f1 on moods" in shown
        assert report["kept"][0]["words"] in shown


def test_what_is_written_repeats_and_tells_of_itself(
    fused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not (fused / "model").exists()
    assert (fused / "maps.safetensors").is_file()
    settings = yaml.safe_load((fused / "config.yaml").read_text())
    assert (settings["labels"], len(settings["own_data"])) == ("separate", 4)
    card = huggingface_hub.ModelCard.load(fused / "model-moods" / "README.md")
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("f1", pytest.approx(rows(fused)["fused"]["tasks"]["moods"]))
    assert "One of model-films, model-moods, model-stars, model-topics, whose trunks are the same" in card.text
    assert (fused / "model-moods" / "tokenizer.json").is_file()
    settings["compare"] = []
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    again = ["--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "again")]
    assert main(fuse.run, again) == 0
    said = capsys.readouterr().out
    assert re.search(r"^next: .*\b(finetune|fuse)(\.py)? --", said, re.MULTILINE)
    assert "model-films/, model-moods/, model-stars/, model-topics/, report/report.html" in said
    assert rows(tmp_path / "again")["fused"]["tasks"] == rows(fused)["fused"]["tasks"]


@pytest.mark.parametrize(
    "more", [["--strategy", "head"], ["--width", "1.5"], ["--refine.minutes", "0.02"], ["--report", "none"]]
)
def test_other_ways_to_fuse(parents: tuple[list[str], list[str]], tmp_path: Path, more: list[str]) -> None:
    two = ([parents[0][0], parents[0][2]], [parents[1][0], parents[1][2]])
    argv = words(two, tmp_path / "fused", "--report", "rows", *more)
    assert main(fuse.run, argv) == 0
    models = fusionpl.load_models(tmp_path / "fused")
    if "none" in more:
        assert list(models) == ["films", "stars"]
        return
    own, found = data_of(argv), rows(tmp_path / "fused")
    by_hand = {name: figure(models[name], data) for name, data in own.items()}
    assert found["fused"]["tasks"] == pytest.approx(by_hand, abs=1e-4)
    if "head" in more:  # which is the trunk with its heads fitted, if the same is chosen
        fitted = next(found[name] for name in found if name.startswith("head-fitted "))
        assert found["fused"]["flops"] == fitted["flops"]


@pytest.mark.parametrize("look", ["--check", "--dry-run"])
def test_what_only_looks(
    parents: tuple[list[str], list[str]], tmp_path: Path, look: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fuse.run, words(parents, tmp_path / "fused", look)) == 0
    assert {"--check": "moods: ok; ", "--dry-run": "classes (8)"}[look] in capsys.readouterr().out


def test_runs_of_images_bring_their_own(tmp_path: Path) -> None:
    names = (("cat", "dog"), ("bus", "dog", "tram"))
    paths = [pictures(tmp_path / at, own, 20) for at, own in zip("ab", names, strict=True)]
    runs = [
        str(make_run(tmp_path / f"m{at}", at, own, {"path": path, "channels": 3}, in_chans=3))
        for at, (own, path) in enumerate(zip(names, paths, strict=True))
    ]
    argv = ["--parents", *runs, "--labels", "separate", "--output", str(tmp_path / "fused"), *QUICK]
    assert main(fuse.run, argv) == 0
    models = fusionpl.load_models(tmp_path / "fused")
    assert [class_names(model) for model in models.values()] == list(names)
    found = rows(tmp_path / "fused")["fused"]["tasks"]
    for name, data in data_of(argv).items():
        (batch,) = data.test_dataloader()
        with torch.no_grad():
            right = models[name](batch["pixel_values"]).argmax(1) == batch["labels"]
        assert found[name] == pytest.approx(float(right.double().mean()))


def test_parents_of_one_data_set_have_a_head_each(tmp_path: Path) -> None:
    runs = [str(make_run(tmp_path / f"seed-{seed}", seed)) for seed in (1, 2)]
    argv = ["--parents", *runs, "--labels", "separate", "--report", "rows", "--output", str(tmp_path / "fused")]
    assert main(fuse.run, [*argv, *QUICK]) == 0
    assert rows(tmp_path / "fused")["fused"]["tasks"].keys() == {"seed-1", "seed-2"}


def test_mistakes(parents: tuple[list[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (films, topics, stars, moods), paths = parents
    output = tmp_path / "out"
    argv = words(parents, output)
    assert "--push-to pushes one model, and labels separate makes one for each parent; leave it out" in refused(
        capsys, [*argv, "--push-to", "org/name"]
    )
    assert "--advise asks what parents disagree about" in refused(capsys, [*argv, "--advise"])
    assert "--compare trained-on trains one head on labels" in refused(capsys, [*argv, "--compare", "trained-on"])
    two = ["--parents", films, stars, "--output", str(output), *APART]
    line = refused(capsys, [*two, "--data.path", paths[0]])
    assert f"measures each head on its own parent's data, and '{paths[0]}' is one path of all; give one for" in line
    line = refused(capsys, [*two, "--data.path", paths[0], paths[1]])
    assert "stars: the BertForSequenceClassification gives numbers (problem_type regression), but the labels of" in line
    two[1:3] = [films, topics]
    line = refused(capsys, [*two, "--data.path", paths[1], paths[0]])
    assert "which films does not know; topics does: give the paths of --data.path in the order of --parents" in line
    two[1:3] = [films, moods]
    assert "moods: the BertForSequenceClassification gives tags" in refused(
        capsys, [*two, "--data.path", paths[0], paths[2]]
    )
    assert not output.exists()


def test_commands_that_take_one_model_say_so(
    fused: Path, parents: tuple[list[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, [str(fused), "--to", "org/name"], push.run)
    assert line.endswith(f"upload each: hf upload ORG/NAME {fused / 'model-films'}")
    argv = ["--parents", *parents[0], "--data.path", parents[1][0], "--sweep", "labels=union,separate"]
    assert "a sweep measures one model a cell, and labels separate makes one" in refused(capsys, argv, sweep.run)
