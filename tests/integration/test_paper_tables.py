"""Every table of the paper at a size of seconds: the path that a GPU takes at full size."""

import csv
import dataclasses
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from benchmarks.paper import __main__ as command
from benchmarks.paper.cells import Cell, Table, known, measure, write
from benchmarks.paper.scales import SCALES
from benchmarks.paper.shards import disjoint, topics
from benchmarks.paper.tables import TABLES
from fusionpl.errors import FusionError
from tests.integration.runs import make_corpus, make_sentences

MODEL = {"img_size": 24, "embed_dim": 16, "depth": 2, "num_heads": 2}
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BERT_DATA = {"vocab_size": 90, "block_size": 12}


def options(section: str, values: dict[str, Any]) -> tuple[str, ...]:
    return tuple(word for key, value in values.items() for word in (f"--{section}.{key}", str(value)))


RESULTS = Path(__file__).parents[2] / "docs" / "results"


def origin_of(text: str) -> dict[str, Any]:
    found = re.search(r"^<!-- origin: (.*) -->$", text, re.MULTILINE)
    assert found is not None
    summary: dict[str, Any] = json.loads(found[1])
    return summary


TINY = dataclasses.replace(
    SCALES["digits"],
    options=(
        *options("model.args", MODEL), *options("trainer", {"max_epochs": 1}),
        *options("data", {"image_size": 24, "train_limit": 200, "batch_size": 50, "on_device": "true"}),
    ),
    narrow=("--model.args.embed_dim", "8"),
    depths={"wide": (), "shallow": ("--model.args.depth", "1")},
    text_depths={"bert": {"text": (), "text-shallow": ("--model.args.num_hidden_layers", "1")}},
    finetuning=(1,),
    short=1,
    pairs=((1, 2),),
    many=(2, 3),
    teams=(3,),
    text_teams=(3,),
    text_widths=(1, 2),
    text_family="bert",
    minutes=0.005,
    teaching=(1,),
    tasks=("5 and 5 classes", "films and questions"),
    widths=(1, 2),
    samples=(25,),
    text=(*options("model.args", BERT), *options("trainer", {"max_epochs": 1}), *options("data", BERT_DATA)),
    sentences=40,
    families=("bert",),
    accelerated=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def _tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, "digits", TINY)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(file: Path) -> dict[str, set[str]]:
    with file.open(newline="") as lines:
        found: dict[str, set[str]] = {}
        for line in csv.DictReader(lines):
            assert 0 <= float(line["value"]) <= 1 or line["metric"] != "accuracy"
            found.setdefault(line["row"], set()).add(line["column"])
        return found


ROWS = {
    "one-shot": {
        "parents, mean",
        "ensemble",
        "vanilla",
        "OT weights soft",
        "OT activations EMD",
        "transport + refit",
        "one stream",
    },
    "finetune": {"best parent", "OT activations soft", "one stream", "one stream, weights times 0.7"},
    "worth": {
        "best parent",
        "ensemble",
        "transport + refit",
        "one stream",
        "one stream, 2 times as wide",
        "one stream, units anchor",
        "one stream, units even",
        "one stream, refined",
        "best parent, distilled as long",
    },
    "worth-text": {"best parent", "ensemble", "one stream, 2 times as wide", "best parent, distilled as long"},
    "teach": {"best parent", "best parent, head fitted", "one stream", "taught for 1 s, start auto"},
    "tasks": {
        "each parent, on its own task",
        "all parents side by side",
        "best trunk, its head fitted by owner",
        "all trunks, one head fitted by owner",
        "one stream, taught for 1 s",
    },
    "parents": {"ensemble", "vanilla", "transport + refit"},
    "widths": {"wide parent", "narrow parent, taught by the wide one", "wide into narrow, transport + refit"},
    "depths": {"deep parent", "shallow into deep, one stream", "bert: deep into shallow, default"},
    "ablation": {"Heads: matched", "Calibration samples, transport + refit: 25"},
    "beyond": {"vanilla", "rotation", "transport + refit + refine"},
    "shards": {"IID: best parent", "80:20: transport + refit", "a parent of all the data"},
    "bert": {"ensemble", "permutations", "default", "sst2: parents, mean", "trec: vanilla"},
    "families": {"bert: parents, mean", "bert: vanilla", "bert: permutations + refit", "bert: default"},
}
COLUMNS = {
    "finetune": ("transport + refit", {"0", "1"}),
    "worth": ("one stream", {"same data", "80:20, 3 parents"}),
    "worth-text": ("one stream", {"same data", "80:20, 3 parents"}),
    "teach": ("one stream", {"same data", "80:20, 3 parents"}),
    "tasks": ("one stream", {"5 and 5 classes", "5 and 5 classes, own", "SST-2", "TREC"}),
    "parents": ("transport + refit", {"2 parents", "3 parents"}),
    "widths": ("wide parent", {"one-shot", "finetuned"}),
    "depths": ("deep into shallow, one stream", {"one-shot", "finetuned", "anchor alone, trained on as long"}),
    "beyond": ("paper, soft", {"average", "average, after 1 epoch", "refitted"}),
    "bert": ("vanilla", {"one-shot", "after 3 epochs"}),
    "families": ("bert: vanilla", {"one-shot", "after 3 epochs"}),
}


# These measure in other combinations what the others measure, for minutes.
LONG = (
    "tasks",
    "bert",
    "worth-text",
    "families",
    "worth",
    "teach",
    "finetune",
    "parents",
    "beyond",
    "ablation",
    "widths",
    "depths",
    "shards",
)


@pytest.mark.parametrize("name", [pytest.param(one, marks=pytest.mark.slow) if one in LONG else one for one in TABLES])
def test_a_table_is_measured_and_written(runs: Path, tmp_path: Path, name: str) -> None:
    words = [name, "--scale", "digits", "--output", str(tmp_path), "--runs", str(runs)]
    if name in ("bert", "families", "depths", "worth-text", "tasks"):
        words += ["--corpus", str(make_corpus(tmp_path / "corpus"))]
    if name in ("bert", "tasks"):
        words += ["--sst2", str(make_sentences(tmp_path / "sst2", train=900))]
        words += ["--trec", str(make_sentences(tmp_path / "trec", text="text", train=900))]
    command.run(words)
    found = rows(tmp_path / f"{name}.csv")
    assert ROWS[name] <= set(found)
    row, columns = COLUMNS.get(name, (next(iter(found)), {"one-shot"}))
    assert found[row] == columns
    text = (tmp_path / f"{name}.md").read_text()
    assert f"python -m benchmarks.paper {name} --scale digits" in text
    assert "missing" not in text
    assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_a_cell_is_measured_once_and_what_is_missing_is_told(tmp_path: Path) -> None:
    asked: list[str] = []

    def figure(repeat: str) -> dict[str, float]:
        asked.append(repeat)
        return {"one-shot": 0.5 + 0.1 * len(asked)}

    cells = [Cell("vanilla", repeat, lambda repeat=repeat: figure(repeat)) for repeat in ("1-2", "2-3", "3-1")]
    for _ in range(2):
        for cell in cells[:2]:
            if not known(cell, tmp_path):
                measure(cell, tmp_path)
    assert asked == ["1-2", "2-3"]
    text = write("small", Table("A table.", cells), tmp_path, tmp_path / "out", "the command")
    assert "| vanilla | 65.0 ± 7.1 % |" in text
    assert "missing cells: 1" in text
    summary = origin_of(text)
    assert summary["command"] == "the command"
    assert summary["seeds"] == ["1-2", "2-3"]
    assert len(summary["machine"]) == len(summary["commit"]) == len(summary["date"]) == 1
    assert summary["versions"][0]["torch"] == version("torch")


@pytest.mark.parametrize("file", sorted(RESULTS.rglob("*.md")), ids=lambda file: str(file.relative_to(RESULTS)))
def test_a_committed_table_says_where_it_comes_from(file: Path) -> None:
    summary = origin_of(file.read_text())
    assert summary["command"].startswith("python -m benchmarks.")
    assert all(summary[what] for what in ("seeds", "machine", "date", "commit"))


def test_nothing_to_render(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(FusionError, match=r"no cell of one-shot is in .*; leave out --render"):
        command.run(["one-shot", "--render", "--output", str(output), "--runs", str(tmp_path / "runs")])
    assert not output.exists()


def test_parts_are_disjoint_and_skewed_as_asked() -> None:
    labels = torch.arange(10).repeat_interleave(60)
    for count, share, expected in (
        (2, None, [30] * 10),
        (2, 0.8, [48] * 5 + [12] * 5),
        (4, 0.8, [48] * 3 + [4] * 7),
        (4, 1.0, [60] * 3 + [0] * 7),
    ):
        first, *others = disjoint(labels, 10, count, share, seed=0)
        assert sorted(torch.cat([first, *others]).tolist()) == list(range(600))
        assert torch.bincount(labels[first], minlength=10).tolist() == expected
    assert not torch.equal(first, disjoint(labels, 10, 4, 0.8, seed=1)[0])


def test_texts_of_a_topic_are_together_and_topics_of_one_length() -> None:
    fruit, tools = (
        ("apple pear plum cherry", "plum fig apple melon"),
        ("saw hammer nail drill", "drill plane saw chisel"),
    )
    texts = [f"the {words}" for pair in zip(fruit, tools, strict=True) for words in pair for _ in range(3)]
    found = topics(texts, 2)
    assert found[:3] == found[6:9] != found[3:6] == found[9:]
    assert len(set(found[:3])) == 1
    lengths = [sum(len(text) for text, topic in zip(texts, found, strict=True) if topic == one) for one in (0, 1)]
    assert max(lengths) < 1.3 * min(lengths)
