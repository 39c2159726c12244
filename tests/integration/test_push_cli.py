"""Pushing what was fused and finetuned to a stand-in for the hub on 127.0.0.1; what is pushed names no path."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from wandb.proto import wandb_internal_pb2

from fusionpl import load_model
from fusionpl.cli import finetune, fuse, push
from fusionpl.cli.running import main
from tests import hub
from tests.integration.runs import DATA, make_run

QUICK = ["--trainer.accelerator", "cpu", "--logger", "none"]
DIGITS = [word for key, value in DATA.items() for word in (f"--data.{key}", str(value))]
EPOCH = ["--trainer.max_epochs", "1"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The working directory, deep in a home directory of its own."""
    folder = tmp_path / "home" / "somebody" / "work"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, here: Path) -> Iterator[hub.Hub]:
    monkeypatch.setenv("HF_TOKEN", "hf_of-nobody")
    with hub.serving({}, monkeypatch, here.parent / "cache") as served:
        yield served


def records(file: Path) -> Iterator[Any]:
    """What wandb would upload of a run, but for artifacts, which stand there by where they lie: a LevelDB log, 7 bytes
    of header, then blocks of 32 KiB with pieces of records, each behind checksum, length and whether more follows."""
    log, at, data = file.read_bytes(), 7, b""
    while at + 7 <= len(log):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", log, at + 4)
        data, at = data + log[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record.FromString(data)
            data = b""
            if "artifact" not in str(record.WhichOneof("record_type")) and not record.HasField("request"):
                yield record


def test_a_fusion_of_the_hubs_models_is_pushed_and_so_is_its_finetuning(
    stand_in: hub.Hub, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {name: make_run(here / f"of-{name}", seed) / "model" for seed, name in enumerate(("a", "b"))}
    for name, folder in folders.items():
        card = huggingface_hub.ModelCard.load(folder / "README.md")
        card.data["license"] = {"a": "mit", "b": "apache-2.0"}[name]
        card.save(folder / "README.md")
    stand_in.repos = {"org/a": {"main": folders["a"]}, "org/b": {"step3": folders["b"]}}
    argv = ["--parents", "org/a", "org/b@step3", *DIGITS, *QUICK, "--push-to", "org/fused"]
    assert main(fuse.run, argv) == 0
    assert "pushed: http" in capsys.readouterr().out
    repo = stand_in.pushed["org/fused"]
    assert repo.private
    assert {"config.json", "model.safetensors", "README.md", "report/bars.png"} <= repo.files.keys()
    card = huggingface_hub.ModelCard(repo.files["README.md"].decode())
    data = card.data.to_dict()
    assert data["base_model"] == ["org/a", "org/b"]
    assert data["base_model_relation"] == "merge"
    assert (data["license"], data["license_name"]) == ("other", "mit-and-apache-2.0")
    assert data["pipeline_tag"] == "image-classification"
    assert data["tags"] == ["fusionpl", "merge"]
    assert "datasets" not in data  # digits are none of the hub's
    [index] = data["model-index"]
    assert index["name"] == "fused"
    measured = {metric["type"]: metric["value"] for metric in index["results"][0]["metrics"]}
    report = json.loads(Path("runs/fused/report/report.json").read_text())
    [row] = [row for row in report["rows"] if row["name"] == "fused"]
    assert measured == {"accuracy": row["accuracy"], "loss": row["loss"]}
    assert f"| `org/b` | `{hub.commit('org/b', 'step3')}` | apache-2.0 |" in card.text
    assert "fusionpl fuse --config default --parents org/a org/b@step3" in card.text
    assert f"**{report['verdict'][0]['words']}**" in card.text
    assert "](report/bars.png)" in card.text

    repo.files |= {"model-00001-of-00002.safetensors": b"", "notes.txt": b""}
    argv = ["--model", "runs/fused", *EPOCH, *QUICK, "--baselines", "false", "--push-to", "org/fused"]
    assert main(finetune.run, argv) == 0
    assert "model-00001-of-00002.safetensors" not in repo.files
    assert "notes.txt" in repo.files
    assert repo.commits == ["fused, by fusionpl", "fused-finetuned, by fusionpl"]
    tuned = huggingface_hub.ModelCard(repo.files["README.md"].decode())
    assert {key: tuned.data.get(key) for key in ("base_model", "license_name")} == {
        "base_model": ["org/a", "org/b"],
        "license_name": "mit-and-apache-2.0",
    }
    assert (
        tuned.data.eval_results[0].metric_value
        == json.loads(Path("runs/fused-finetuned/metrics.json").read_text())["accuracy"]
    )
    assert hub.commit("org/b", "step3") in tuned.text


def test_nothing_that_is_published_names_a_path(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "MODE"):  # without a key a run is kept offline
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    parents = [make_run(here.parent / "elsewhere" / f"seed-{seed}", seed) for seed in (1, 2)]
    for parent in parents:
        file = parent / "model" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"_name_or_path": str(parent)}))
    mine = here.parent / "presets" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text("anchor: 1\n")
    words = ["--config", str(mine), "--compare", str(mine), f"--output={here / 'out'}", "--trainer.accelerator", "cpu"]
    assert main(fuse.run, ["--parents", *map(str, parents), *words]) == 0
    argv = ["--model", str(here / "out"), *EPOCH, "--trainer.accelerator", "cpu", "--baselines", "false"]
    assert main(finetune.run, argv) == 0
    for run in ("out", "out-finetuned"):
        assert main(push.run, [run, "--dry-run", f"{run}-on-the-hub"]) == 0
        assert load_model(f"{run}-on-the-hub") is not None
    published = [
        file
        for place in ("out-on-the-hub", "out-finetuned-on-the-hub", "out/report", "out/model", "out-finetuned/model")
        for file in Path(place).rglob("*")
        if file.is_file()
    ]
    home = str(here.parent).encode()
    assert [file for file in published if home in file.read_bytes()] == []
    uploaded = [record for file in here.rglob("run-*.wandb") for record in records(file)]
    assert {"run", "history", "files"} <= {record.WhichOneof("record_type") for record in uploaded}
    assert [record for record in uploaded if home in record.SerializeToString()] == []
    text = Path("out-on-the-hub/README.md").read_text()
    assert "fusionpl fuse --parents seed-1 seed-2 --config mine.yaml --compare mine.yaml --output=out" in text
    assert "base_model" not in text
    assert "so this card names none" in text
    assert main(fuse.run, ["--config", "out/config.yaml", "--dry-run"]) == 0  # the run's own keeps the paths
