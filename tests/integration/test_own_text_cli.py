"""fuse.py on language models and encoders that have corpora of their own: from their runs, or a path for each."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from fusionpl import load_model
from fusionpl.calibration.batches import unlabelled
from fusionpl.cli import evaluate, finetune, fuse, sweep
from fusionpl.cli.running import main
from fusionpl.datamodules.config import MaskedTextConfig, SpanTextConfig
from fusionpl.datamodules.joint import InputsOf
from fusionpl.datamodules.objectives import MaskedTokens, NextTokens, Spans
from fusionpl.datamodules.text import MaskedTextDataModule
from fusionpl.evaluation.metrics import evaluate as figures_of
from fusionpl.evaluation.report import Report
from fusionpl.models.save import save_model
from fusionpl.models.tokenizers import load_tokenizer
from tests.integration.runs import WORDS
from tests.integration.test_own_data_cli import QUICK, refused, rows

DATA: dict[str, Any] = {"block_size": 12, "batch_size": 16, "mask_probability": 0.4}
FEW = ["--calibration.samples", "64", *QUICK]
WIDER = {"causal-language-modeling": ("--width", "1.5")}  # a tied T5 is not made wider
SMALL = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = {**SMALL, "intermediate_size": 16, "max_position_embeddings": 24, "initializer_range": 0.2}
KINDS: dict[str, Any] = {
    "masked-lm": (BertForMaskedLM, BertConfig(**BERT), MaskedTokens, MaskedTextConfig),
    "causal-language-modeling": (
        GPT2LMHeadModel, GPT2Config(**SMALL, n_positions=64, initializer_range=0.2), NextTokens, MaskedTextConfig,
    ),
    "span-corruption": (
        T5ForConditionalGeneration,
        T5Config(vocab_size=300, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16, decoder_start_token_id=0),
        Spans, SpanTextConfig,
    ),
    "feature-extraction": (BertModel, BertConfig(**BERT), MaskedTokens, MaskedTextConfig),
}  # fmt: skip


def corpus(file: Path, words: Sequence[str], lines: int = 150) -> str:
    """Lines of some words in an order that repeats."""
    starts = torch.randint(len(words), (lines,), generator=torch.Generator().manual_seed(len(words))).tolist()
    text = [" ".join(words[(start + step * 2) % len(words)] for step in range(14)) for start in starts]
    file.write_text("\n".join(text))
    return str(file)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("corpora")
    return [corpus(folder / "a.txt", WORDS[:7], 180), corpus(folder / "b.txt", WORDS[5:])]


def models(folder: Path, task: str, corpora: Sequence[str]) -> list[str]:
    """Runs of a task, each on its corpus, with one tokenizer."""
    cls, config, objective, options = KINDS[task]
    texts = [line for path in corpora for line in Path(path).read_text().splitlines()]
    tokenizer = objective.train_tokenizer(texts, options(vocab_size=300, block_size=12))
    runs = []
    for seed, path in enumerate(corpora):
        torch.manual_seed(seed)
        run = folder / f"seed-{seed}"
        save_model(cls(config).eval(), run / "model", tokenizer=tokenizer)
        settings = {"name": "tiny", "task": task, "data": {**DATA, "path": path}, "trainer": {"max_epochs": 10}}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
        runs.append(str(run))
    return runs


@pytest.fixture(scope="module")
def parents(corpora: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return models(tmp_path_factory.mktemp("runs"), "masked-lm", corpora)


@pytest.fixture(scope="module")
def fused(parents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("fused") / "fused"
    words = ["--parents", *parents, "--refine.steps", "4", *FEW]
    assert main(fuse.run, [*words, "--output", str(output)]) == 0
    return output


def test_each_is_measured_on_each_corpus(fused: Path, parents: list[str], corpora: list[str]) -> None:
    found = rows(fused)
    assert {"parent seed-0", "parent seed-1", "ensemble", "vanilla", "all trunks, one head", "fused"} < {*found}
    tokenizer = load_tokenizer(fused)
    for name, path in (("fused", str(fused)), *((f"parent seed-{at}", run) for at, run in enumerate(parents))):
        losses = {}
        for task, text in zip(("seed-0", "seed-1"), corpora, strict=True):
            data = MaskedTextDataModule(MaskedTextConfig(path=text, **DATA), tokenizer=tokenizer)
            losses[task] = figures_of(load_model(path), data.test_dataloader())["loss"]
        assert found[name]["tasks"] == pytest.approx({task: math.exp(loss) for task, loss in losses.items()}, rel=1e-4)
        # Blocks of one corpus may have a few masks more than those of another.
        assert found[name]["loss"] == pytest.approx(sum(losses.values()) / 2, rel=0.02)
        assert found[name]["perplexity"] == pytest.approx(math.exp(found[name]["loss"]))
    report = json.loads((fused / "report/report.json").read_text())
    for kept in report["kept"]:
        own = found[f"parent {kept['task']}"]["tasks"][kept["task"]]
        assert kept["kept"] == pytest.approx(own / found["fused"]["tasks"][kept["task"]])
        assert f"of {kept['task']} on its own data (perplexity {kept['fused']:.2f} where that has" in kept["words"]
    assert [kept["task"] for kept in report["kept"]] == ["seed-0", "seed-1"]
    for file in ("report.md", "report.html"):
        assert "perplexity on seed-1" in (fused / "report" / file).read_text()
    assert [kept.words for kept in Report.load(fused / "report").kept] == [kept["words"] for kept in report["kept"]]
    assert "difference_to_all" in report["verdict"][0]


def test_its_settings_repeat_it(fused: Path, corpora: list[str], tmp_path: Path) -> None:
    settings = yaml.safe_load((fused / "config.yaml").read_text())
    assert [own["path"] for own in settings["own_data"]] == corpora
    again = fuse.Asked.of(["--config", str(fused / "config.yaml"), "--output", str(tmp_path / "again")])
    assert again.settings == settings


def test_it_is_finetuned_and_measured_on_all(fused: Path, parents: list[str], tmp_path: Path) -> None:
    run = Path(shutil.copytree(fused, tmp_path / "fused"))
    words = ["--model", str(run), "--output", str(tmp_path / "more"), *QUICK, "--trainer.max_epochs", "1"]
    assert main(finetune.run, words) == 0
    found = {row.name: row for row in Report.load(run / "report").rows if row.stage == "finetuned"}
    assert {"fused", "vanilla"} < {*found}
    assert found["fused"].tasks is not None
    assert found["fused"].tasks["seed-0"] < rows(fused)["fused"]["tasks"]["seed-0"]
    kept = Report.load(run / "report").kept
    assert [(one.stage, one.task) for one in kept[2:]] == [("finetuned", "seed-0"), ("finetuned", "seed-1")]
    words = ["--models", str(tmp_path / "fused"), parents[0], "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(evaluate.run, words) == 0
    assert rows(tmp_path / "out")["model fused"]["tasks"] == pytest.approx(rows(fused)["fused"]["tasks"])


@pytest.mark.parametrize("task", ["causal-language-modeling", "span-corruption", "feature-extraction"])
def test_foreign_folders_with_a_path_for_each(task: str, corpora: list[str], tmp_path: Path) -> None:
    folders = [str(Path(run) / "model") for run in models(tmp_path, task, corpora)]
    words = ["--parents", *folders, "--task", task, "--data.path", *corpora, "--report", "rows", *FEW]
    words += ["--data.max_length" if task == "feature-extraction" else "--data.block_size", "12"]
    assert main(fuse.run, [*words, *WIDER.get(task, ()), "--output", str(tmp_path / "fused")]) == 0
    found = rows(tmp_path / "fused")
    names = [name.removeprefix("parent ") for name in found if name.startswith("parent ")]
    assert [*found["fused"]["tasks"]] == [*found["ensemble"]["tasks"]] == names
    if task == "feature-extraction":
        assert found["fused"]["metrics"] == dict.fromkeys(names, "agreement")
        for name in names:  # its own neighbours are those that are looked for
            assert found[f"parent {name}"]["tasks"][name] == 1
        assert found["fused"]["agreement"] == pytest.approx(sum(found["fused"]["tasks"].values()) / 2)
        words = ["--models", str(tmp_path / "fused"), *folders, "--output", str(tmp_path / "out"), "--device", "cpu"]
        assert main(evaluate.run, words) == 0
        assert rows(tmp_path / "out")["ensemble"]["tasks"].keys() == {*names}
    assert len(json.loads((tmp_path / "fused/report/report.json").read_text())["kept"]) == 2


def test_one_corpus_for_all_changes_nothing(
    parents: list[str], corpora: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output", str(tmp_path / "out")]
    same = [str(shutil.copytree(parents[at], tmp_path / f"same-{at}")) for at in (0, 1)]
    shutil.copy(Path(same[0]) / "config.yaml", Path(same[1]) / "config.yaml")
    assert fuse.Asked.of(["--parents", *same, *out]).args.own_data is None
    asked = fuse.Asked.of(["--parents", *parents, "--data.path", corpora[1], *out])
    assert asked.args.own_data is None
    assert "own_data" not in asked.settings
    asked = fuse.Asked.of(["--parents", *parents, "--data.mask_probability", "0.3", *out])
    assert [own["mask_probability"] for own in asked.args.own_data] == [0.3, 0.3]
    words = ["--parents", *parents, "--sweep", "width=1,2", *out]
    assert "a sweep measures all cells on one set of data" in refused(capsys, words, sweep.run)


def test_what_is_drawn_to_calibrate_on_is_the_same_each_time(parents: list[str], corpora: list[str]) -> None:
    data = MaskedTextDataModule(MaskedTextConfig(path=corpora[0], **DATA), tokenizer=load_tokenizer(parents[0]))
    state = torch.get_rng_state()
    one, other = ([unlabelled(batch)["input_ids"] for batch in InputsOf(data, 8)] for _ in range(2))
    assert all(torch.equal(first, second) for first, second in zip(one, other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(map(len, one)) == len(InputsOf(data, 8)) > len(data.dataset("calibration"))
