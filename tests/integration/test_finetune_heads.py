"""finetune.py on a fusion with labels separate: one trunk, all heads at once, each on its own data."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer

import fusionpl
from fusionpl.cli import evaluate, finetune
from fusionpl.cli.running import main
from fusionpl.datamodules.heads import HeadSplits
from fusionpl.evaluation.metrics import evaluate_samples
from fusionpl.evaluation.report import Report
from fusionpl.fusion.config import load_config
from fusionpl.models.load import load_model
from fusionpl.models.save import class_names
from fusionpl.options import settings_in
from fusionpl.training.config import OptimConfig
from fusionpl.training.heads import HeadsModule
from tests.integration.runs import WORDS
from tests.integration.test_own_data_cli import classifier, of_classes, refused, sentences, stops_in_epoch

ROOT = Path(__file__).parents[2]
QUICK = ["--trainer.accelerator", "cpu", "--logger", "none", "--trainer.max_epochs", "2", "--optim.lr", "0.01"]
HEADS = ("films", "stars", "moods")
TAGS = {"problem_type": "multi_label_classification"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fusion of three BERTs that give classes, a number and tags."""
    folder = tmp_path_factory.mktemp("heads")
    models = [
        classifier(folder / "films", 1, ("bad", "good")),
        classifier(folder / "stars", 2, ("LABEL_0",)),
        classifier(folder / "moods", 3, ("sad", "loud", "odd"), **TAGS),
    ]
    paths = [
        sentences(folder / "a", (0, 1), 90),
        sentences(folder / "b", (10.0, 20.0, 45.0), 150),
        sentences(folder / "c", [["sad"], ["sad", "odd"], ["loud"]], 120, "parquet"),
    ]
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    text = [" ".join(WORDS[at % len(WORDS)] for at in range(start, start + 5)) for start in range(24)]
    batches = [dict(tokenizer(text, return_tensors="pt", padding=True))]
    config = load_config("default", {"labels": "separate"})
    fusionpl.fuse(models, [batches] * 3, config, names=list(HEADS), output=folder / "fused")
    own = {name: {"path": path, "batch_size": 16, "max_length": 12} for name, path in zip(HEADS, paths, strict=True)}
    settings = {"parents": models, "task": "text-classification", "data": own["films"], "own_data": own}
    (folder / "fused/config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder / "fused"


@pytest.fixture(scope="module")
def tuned(made: Path) -> Path:
    output = made.parent / "tuned"
    assert main(finetune.run, ["--model", str(made), "--output", str(output), *QUICK]) == 0
    return output


def data_of(run: Path) -> HeadSplits:
    from fusionpl.cli.jobs.heads import _data

    asked = finetune.Asked.of(["--model", str(run), *QUICK])
    return _data(asked, {name: load_model(run / f"model-{name}") for name in HEADS})


def by_name(models: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    return {name: dict(model.named_parameters()) for name, model in models.items()}


def test_all_heads_and_one_trunk_are_trained(made: Path, tuned: Path) -> None:
    before, after = (by_name(fusionpl.load_models(run)) for run in (made, tuned))  # which refuses unequal trunks
    assert {*after} == {*HEADS}
    for name in HEADS:
        moved = {key for key, tensor in after[name].items() if not torch.equal(tensor, before[name][key])}
        assert {"classifier.weight", "classifier.bias", "bert.encoder.layer.0.intermediate.dense.weight"} <= moved
    for name in HEADS:  # ordinary folders, with the labels of each
        one, other = (load_model(run / f"model-{name}") for run in (made, tuned))
        for setting in ("id2label", "problem_type"):
            assert getattr(one.config, setting) == getattr(other.config, setting)
        AutoTokenizer.from_pretrained(tuned / f"model-{name}")


def test_figures_are_those_of_the_written_models(made: Path, tuned: Path) -> None:
    figures, data = json.loads((tuned / "heads.json").read_text()), data_of(made)
    assert figures["stars"].keys() == {"pearson", "spearman", "loss"}
    for name in HEADS:
        found, _ = evaluate_samples([load_model(tuned / f"model-{name}")], data.own[name].test_dataloader())
        assert figures[name] == pytest.approx(found, nan_ok=True)
        shown = f"loss {found['loss']:.4f}"
        assert shown in (tuned / f"model-{name}/README.md").read_text()
    (row,) = Report.load(tuned / "report").rows
    assert (row.name, row.stage) == ("fused", "finetuned")
    assert row.tasks == pytest.approx({name: figures[name]["accuracy"] for name in ("films", "moods")})
    assert row.accuracy is None  # one head has none
    each = [load_model(tuned / f"model-{name}") for name in HEADS]
    trunk = sum(tensor.numel() for key, tensor in each[0].named_parameters() if not key.startswith("classifier"))
    assert row.parameters == trunk + sum(tensor.numel() for one in each for tensor in one.classifier.parameters())
    scaled = figures["stars"]["loss"] / data.units()["stars"]
    assert row.loss == pytest.approx((figures["films"]["loss"] + figures["moods"]["loss"] + scaled) / 3)
    settings = yaml.safe_load((tuned / "config.yaml").read_text())
    assert [own["task"] for own in settings["own_data"].values()] == ["text-classification"] * 3


def test_a_step_is_of_all_heads_each_with_its_own_loss(made: Path) -> None:
    models, data = fusionpl.load_models(made), data_of(made)
    module = HeadsModule(nn.ModuleList(models[name] for name in HEADS), OptimConfig(), 0, (), data=data).eval()
    module.log = lambda *_, **__: None  # type: ignore[method-assign]  # there is no Trainer
    steps = [batch for batch, _, _ in iter(data.train_dataloader())]
    assert len(steps) == max(len(own.train_dataloader()) for own in data.own.values())
    batch = steps[-1]
    assert all(batch[name] is not None for name in HEADS)
    outputs = {
        name: models[name](**{key: value for key, value in batch[name].items() if key != "labels"}).logits
        for name in HEADS
    }
    stars = torch.tensor([item["labels"] for item in data.own["stars"].dataset("train")])  # type: ignore[attr-defined]
    wanted = [
        functional.cross_entropy(outputs["films"], batch["films"]["labels"]),
        functional.mse_loss(outputs["stars"][:, 0], batch["stars"]["labels"]) / stars.var(correction=0),
        functional.binary_cross_entropy_with_logits(outputs["moods"], batch["moods"]["labels"]),
    ]
    loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss, torch.stack(wanted).mean())
    loss.backward()
    assert all(parameter.grad is not None for name, parameter in module.named_parameters() if "pooler" not in name)


def test_a_stopped_one_goes_on(made: Path, tuned: Path, tmp_path: Path) -> None:
    words = ["--model", str(made), "--output", str(tmp_path / "parts"), *QUICK]
    with pytest.MonkeyPatch.context() as patched:
        stops_in_epoch(1, patched)
        assert main(finetune.run, words) == 130
    assert main(finetune.run, [*words, "--resume"]) == 0
    whole, parts = (by_name(fusionpl.load_models(run)) for run in (tuned, tmp_path / "parts"))
    assert all(torch.equal(whole[name][key], parts[name][key]) for name in HEADS for key in whole[name])
    assert (tmp_path / "parts/heads.json").read_text() == (tuned / "heads.json").read_text()


def test_it_can_be_finetuned_again_and_settings_may_be_in_order(made: Path, tuned: Path, tmp_path: Path) -> None:
    words = ["--model", str(tuned), "--output", str(tmp_path / "again"), *QUICK, "--data.batch_size", "50"]
    assert main(finetune.run, words) == 0
    own = yaml.safe_load((tmp_path / "again/config.yaml").read_text())["own_data"]
    assert [each["batch_size"] for each in own.values()] == [50, 50, 50]
    run = Path(shutil.copytree(made, tmp_path / "fused"))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["own_data"] = list(settings["own_data"].values())
    (run / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    asked, listed = (finetune.Asked.of(["--model", str(path), *QUICK]).options.own_data for path in (made, run))
    assert listed == asked


def test_mistakes(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, say = ["--model", str(made), "--output", str(tmp_path / "out"), *QUICK], partial(refused, capsys)
    line = say([*words, "--data.path", "elsewhere"], finetune.run)
    assert f"--data.path would be one for all heads of {made}; finetune one alone, such as --model" in line
    assert "--push-to takes one model" in say([*words, "--push-to", "me/it"], finetune.run)
    assert "can't be shared out by fsdp" in say([*words, "--trainer.strategy", "fsdp"], finetune.run)
    line = say(["--models", str(made), str(made / "model-films")], evaluate.run)
    assert "holds a model for each parent, model-films, model-moods, model-stars; give one of them" in line
    run = Path(shutil.copytree(made, tmp_path / "fused"))
    settings: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    del settings["own_data"]["stars"]
    (run / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    words[1] = str(run)
    line = say(words, finetune.run)
    assert "are films, moods, stars, and own_data says of films, moods which data they are for; give --own-data" in line
    (run / "config.yaml").unlink()
    words += ["--task", "text-classification"]
    assert "own_data says of none which data" in say(words, finetune.run)
    told = finetune.Asked.of([*words, "--own-data", "{films: {path: a}, stars: {path: b}, moods: {path: c}}"])
    assert [(own["path"], own["task"]) for own in told.options.own_data.values()] == [
        (path, "text-classification") for path in "abc"
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes(made: Path, tmp_path: Path) -> None:
    command = [sys.executable, "finetune.py", "--model", str(made), "--output", str(tmp_path / "two"), *QUICK]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *two], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    figures, data = json.loads((tmp_path / "two/heads.json").read_text()), data_of(made)
    for name, model in fusionpl.load_models(tmp_path / "two").items():
        found, _ = evaluate_samples([model], data.own[name].test_dataloader())
        assert figures[name] == pytest.approx(found, nan_ok=True)


def test_two_heads_of_images_learn(tmp_path: Path) -> None:
    halves = {"low": tuple("01234"), "high": tuple("56789")}
    runs = [
        of_classes(tmp_path / name, seed, names, flip=bool(seed)) for seed, (name, names) in enumerate(halves.items())
    ]
    batches = [{"pixel_values": torch.rand(64, 1, 16, 16)}]
    config = load_config("default", {"labels": "separate"})
    fusionpl.fuse(runs, [batches] * 2, config, names=list(halves), output=tmp_path / "fused")
    own = {name: settings_in(run)["data"] for name, run in zip(halves, runs, strict=True)}
    settings = {"parents": runs, "data": own["low"], "own_data": own}
    (tmp_path / "fused/config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    words = [
        "--model",
        str(tmp_path / "fused"),
        *QUICK,
        "--trainer.max_epochs",
        "8",
        "--data.train_limit",
        "400",
        "--data.batch_size",
        "20",
    ]
    assert main(finetune.run, [*words, "--output", str(tmp_path / "tuned")]) == 0
    figures = json.loads((tmp_path / "tuned/heads.json").read_text())
    assert all(figures[name]["accuracy"] > 0.5 for name in halves)
    assert class_names(load_model(tmp_path / "tuned/model-high")) == halves["high"]
