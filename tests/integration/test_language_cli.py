"""Causal and encoder-decoder language models from train.py through finetune.py, on a corpus of a few sentences."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fusionpl.cli import evaluate, finetune, fuse, train
from fusionpl.cli.running import main
from fusionpl.evaluation.report import Report
from fusionpl.models.tokenizers import load_tokenizer
from tests.integration.runs import make_corpus, make_sentences
from tests.integration.test_text_cli import preset

DATA = {"vocab_size": 300, "block_size": 20}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("causal-language-modeling", "GPT2LMHeadModel",
             {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "n_positions": 24}),
    "t5": ("span-corruption", "T5ForConditionalGeneration",
           {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16}),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind."""
    folder = tmp_path_factory.mktemp("language")
    path = str(make_corpus(folder / "corpus"))
    for name, (task, architecture, args) in MODELS.items():
        model = {"library": "transformers", "architecture": architecture, "args": args}
        config = preset(folder, name, name=name, task=task, model=model, data={**DATA, "path": path})
        assert main(train.run, ["--config", config, "--seed", "1", "--output", str(folder / name)]) == 0
    return folder


def figures(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "metrics.json").read_text()))


def test_figures_of_the_test_part(home: Path) -> None:
    assert {"loss", "perplexity", "accuracy", "bits_per_byte", "unigram_loss"} <= set(figures(home / "gpt2"))
    assert {"loss", "perplexity", "accuracy", "unigram_loss"} <= set(figures(home / "t5"))
    assert "bits_per_byte" not in figures(home / "t5")  # most of the text is given
    assert "bits_per_byte" in (home / "gpt2" / "model" / "README.md").read_text()


@pytest.mark.parametrize("name", [pytest.param(one, marks=pytest.mark.slow) if one == "t5" else one for one in MODELS])
def test_a_model_is_finetuned_with_its_own_data_and_tokenizer(name: str, home: Path) -> None:
    config = preset(home, "again")
    words = ["--config", config, "--model", str(home / name), "--output", str(home / f"{name}-more")]
    assert main(finetune.run, words) == 0
    more = figures(home / f"{name}-more")
    assert more["loss"] < figures(home / name)["loss"]
    assert ("bits_per_byte" in more) == (name == "gpt2")
    first, second = (load_tokenizer(home / run) for run in (name, f"{name}-more"))
    assert first is not None
    assert second is not None
    assert first.get_vocab() == second.get_vocab()
    assert first.special_tokens_map == second.special_tokens_map
    parents = ["--parents", str(home / name), str(home / f"{name}-more")]
    assert main(fuse.run, [*parents, "--check"]) == 0
    fused = home / f"{name}-fused"
    assert main(fuse.run, [*parents, "--logger", "csv", "--report", "rows", "--output", str(fused)]) == 0
    rows = {row.name: row for row in Report.load(fused / "report").rows}
    assert (rows["fused"].loss or 9) < (rows["vanilla"].loss or 0) + 0.1  # a parent and what became of it
    words = [*parents, "--logger", "csv", "--report", "rows", "--refine.steps", "4", "--output", str(fused) + "-taught"]
    assert main(fuse.run, [*words, "--compare", "distilled"]) == 0
    report = Report.load(Path(f"{fused}-taught") / "report")
    assert [row.name for row in report.rows][-3:] == ["distilled", "refitted", "fused"]
    notes = report.notes
    assert any(re.search("^taught from .* held-out divergence from the parents' mean", note) for note in notes)


def test_a_classifier_is_put_on_a_causal_model(home: Path) -> None:
    data = {"path": str(make_sentences(home / "cats")), "max_length": 20, "validation": 30, "calibration": 20}
    config = preset(home, "cats", task="text-classification", data=data)
    words = ["--config", config, "--model", str(home / "gpt2"), "--output", str(home / "cats-gpt2")]
    assert main(finetune.run, words) == 0
    assert figures(home / "cats-gpt2")["accuracy"] > 0


def test_data_of_another_task_are_refused_in_one_line(home: Path, capsys: Any) -> None:
    path = str(home / "corpus")
    words = ["--config", preset(home, "never"), "--model", str(home / "gpt2"), "--output", str(home / "never")]
    assert main(finetune.run, [*words, "--task", "masked-lm", "--data.path", path, "--data.block_size", "20"]) == 2
    assert "the tokenizer has no cls_token, which this task needs" in capsys.readouterr().err
    words[3] = str(home / "t5")
    assert main(finetune.run, [*words, "--task", "causal-language-modeling", "--data.path", path]) == 2
    assert "can't read the data" in capsys.readouterr().err
    assert not (home / "never").exists()


@pytest.mark.parametrize(("sentences", "measured"), [(40, True), (2, False)])
def test_one_text_file_is_enough_to_fuse(
    sentences: int, measured: bool, home: Path, tmp_path: Path, capsys: Any
) -> None:
    parents = [str(shutil.copytree(home / "gpt2" / "model", tmp_path / name)) for name in ("a", "b")]
    file = tmp_path / "corpus.txt"
    file.write_text("the red cat sleeps under the green bridge " * sentences)
    words = ["--parents", *parents, "--task", "causal-language-modeling", "--data.path", str(file)]
    words += ["--data.block_size", "10", "--logger", "none", "--trainer.accelerator", "cpu"]
    assert main(fuse.run, [*words, "--output", str(tmp_path / "fused")]) == 0
    said = capsys.readouterr().out
    assert ("nothing was measured: the data are so few" in said) != measured
    report = Report.load(tmp_path / "fused" / "report")
    assert ("fused" in {row.name for row in report.rows}) == measured
    assert ("- nothing was measured" in (tmp_path / "fused" / "report" / "report.md").read_text()) != measured
    assert main(evaluate.run, ["--models", *words[1:9]]) == (0 if measured else 2)
    if not measured:
        assert "corpus.txt' has too few data to measure on" in capsys.readouterr().err
