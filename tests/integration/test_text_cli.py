"""Language models from train.py to a fused classifier, on a corpus of a few sentences."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from fusionpl.cli import finetune, fuse, sweep, train
from fusionpl.cli.running import main
from fusionpl.models.load import load_model
from fusionpl.models.save import save_model
from fusionpl.models.tokenizers import load_tokenizer
from tests.integration.runs import make_corpus, make_sentences
from tests.unit.test_vocabulary import order, shuffled, with_rows

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
QUICK = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False}


def preset(folder: Path, file_name: str, **settings: Any) -> str:
    file = folder / f"{file_name}.yaml"
    file.write_text(yaml.safe_dump({"optim": {"lr": 0.01}, "trainer": QUICK, "logger": ["csv"], **settings}))
    return str(file)


def language_model(folder: Path, **data: Any) -> str:
    model = {
        "library": "transformers", "architecture": "BertForMaskedLM", "initializer_range": 0.1,
        "args": {**SIZES, "max_position_embeddings": 24},
    }  # fmt: skip
    data = {"path": str(make_corpus(folder / "corpus")), "vocab_size": 90, "block_size": 12, **data}
    return preset(folder, "bert", name="bert", task="masked-lm", model=model, data=data)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parents and their fusion."""
    folder = tmp_path_factory.mktemp("text")
    config = language_model(folder)
    for seed in (1, 2):
        words = ["--config", config, "--seed", str(seed), "--output", str(folder / f"seed-{seed}")]
        assert main(train.run, words) == 0
    assert main(fuse.run, words_to_fuse(folder, "fused", "--refit.method", "ridge")) == 0
    return folder


def words_to_fuse(folder: Path, output: str, *more: str) -> list[str]:
    parents = [str(folder / f"seed-{seed}") for seed in (1, 2)]
    return ["--parents", *parents, "--output", str(folder / output), "--logger", "csv", *more]


def rows(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    found = json.loads((folder / "report.json").read_text())["rows"]
    return {(row["name"], row.get("stage", "one-shot")): row for row in found}


def test_a_language_model_is_trained_with_its_tokenizer(home: Path) -> None:
    figures = json.loads((home / "seed-1" / "metrics.json").read_text())
    assert {"loss", "perplexity", "accuracy", "unigram_loss"} <= set(figures)
    first, second = (load_tokenizer(home / f"seed-{seed}") for seed in (1, 2))
    assert first is not None
    assert second is not None
    assert first.get_vocab() == second.get_vocab()
    model: Any = load_model(home / "seed-1")
    assert model.config.vocab_size == len(first)
    assert "val/perplexity" in (home / "seed-1" / "metrics.csv").read_text()


def test_fusing_language_models_reports_loss_and_perplexity(home: Path) -> None:
    report = rows(home / "fused" / "report")
    wanted = {"parent seed-1", "parent seed-2", "ensemble", "vanilla", "fused"}
    assert {name for name, _ in report} >= wanted
    assert not yaml.safe_load((home / "fused/model/config.json").read_text())["tie_word_embeddings"]
    for row in report.values():
        assert {"loss", "perplexity", "accuracy"} <= set(row)
    tokenizer, parent = load_tokenizer(home / "fused"), load_tokenizer(home / "seed-1")
    assert tokenizer is not None
    assert parent is not None
    assert tokenizer.get_vocab() == parent.get_vocab()


def test_a_fused_language_model_is_finetuned_as_one(home: Path) -> None:
    config = preset(home, "more")
    words = ["--config", config, "--model", str(home / "fused"), "--output", str(home / "more")]
    assert main(finetune.run, words) == 0
    report = rows(home / "fused" / "report")
    assert ("fused", "finetuned") in report
    assert ("vanilla", "finetuned") in report
    assert "perplexity" in report["fused", "finetuned"]
    assert load_tokenizer(home / "more") is not None


def test_a_classifier_is_put_on_it_and_two_classifiers_are_fused(home: Path) -> None:
    data = {"path": str(make_sentences(home / "cats")), "max_length": 10, "validation": 30, "calibration": 20}
    config = preset(home, "cats", task="text-classification", data=data)
    words = ["--config", config, "--model", str(home / "fused"), "--output", str(home / "cats-fused")]
    assert main(finetune.run, words) == 0
    report = rows(home / "cats-fused" / "report")
    assert {name for name, _ in report} == {"fused", "parent seed-1", "parent seed-2", "vanilla"}
    assert all("accuracy" in row for row in report.values())
    assert not any(stage == "finetuned" and "perplexity" not in row
                   for (_, stage), row in rows(home / "fused" / "report").items())  # fmt: skip
    parents = [str(home / "cats-fused" / "baselines" / f"seed-{seed}") for seed in (1, 2)]
    for parent in parents:  # a run folder says what it was trained on; a bare model folder leaves that to the user
        assert load_tokenizer(parent) is not None
    more = ["--config", preset(home, "fuse-cats", task="text-classification", data=data, trainer={"accelerator": "cpu"},
                               optim=None)]  # fmt: skip
    settings = yaml.safe_load(Path(more[1]).read_text())
    settings.pop("optim")
    Path(more[1]).write_text(yaml.safe_dump(settings))
    words = ["--parents", *parents, "--output", str(home / "cats-both"), *more]
    assert main(fuse.run, words) == 0
    assert ("fused", "one-shot") in rows(home / "cats-both" / "report")


def test_parents_with_other_tokenizers_are_refused(home: Path, tmp_path: Path, capsys: Any) -> None:
    config = language_model(tmp_path, vocab_size=80)
    assert main(train.run, ["--config", config, "--output", str(tmp_path / "other")]) == 0
    words = ["--parents", str(home / "seed-1"), str(tmp_path / "other"), "--output", str(tmp_path / "fused")]
    assert main(fuse.run, words) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert "vocabulary" in message or "different tokenizers" in message
    assert not (tmp_path / "fused").exists()


def test_a_parent_that_numbers_its_tokens_differently_gives_the_same_numbers(
    home: Path, tmp_path: Path, capsys: Any
) -> None:
    tokenizer = load_tokenizer(home / "seed-2")
    assert tokenizer is not None
    other = tmp_path / "seed-2"
    save_model(with_rows(load_model(home / "seed-2"), order(tokenizer)), other / "model", tokenizer=shuffled(tokenizer))
    parents = ["--parents", str(home / "seed-1"), str(other)]
    words = [*parents, "--output", str(tmp_path / "fused"), "--logger", "none"]
    assert main(fuse.run, [*words, "--refit.method", "ridge"]) == 0
    note = f"seed-2: {len(tokenizer)} rows of the vocabulary are matched by token"
    assert f"warning: {note}" in capsys.readouterr().out
    assert f"- {note}" in (tmp_path / "fused/report/report.md").read_text()
    wanted, found = rows(home / "fused/report"), rows(tmp_path / "fused/report")
    for (name, stage), row in found.items():
        assert row["loss"] == pytest.approx(wanted[name, stage]["loss"], rel=1e-5), name
    # the plain average that is finetuned beside it, and another parent, speak the fused model's language
    config = preset(tmp_path, "more", optim={"lr": 0.0})
    words = ["--config", config, "--model", str(tmp_path / "fused"), "--output", str(tmp_path / "more")]
    assert main(finetune.run, words) == 0
    tuned = rows(tmp_path / "fused/report")
    for name in (name for name, stage in tuned if stage == "finetuned"):
        assert tuned[name, "finetuned"]["loss"] == pytest.approx(wanted[name, "one-shot"]["loss"], rel=1e-4), name
    assert main(sweep.run, [*parents, "--sweep", "align.solver=emd", "--output", str(tmp_path / "sweep")]) == 2
    assert "different tokenizers" in capsys.readouterr().err


def test_blocks_longer_than_positions_and_unknown_tasks_are_one_line(tmp_path: Path, capsys: Any) -> None:
    config = language_model(tmp_path)
    assert main(train.run, ["--config", config, "--data.block_size", "40", "--output", str(tmp_path / "run")]) == 2
    assert "data.block_size is 40, but the model has 24 positions" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(train.run, ["--task", "masked-ml"]) == 2
    assert "there is no 'masked-ml'" in capsys.readouterr().err


def test_streamed_text_trains_for_a_number_of_steps(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("fusionpl.datamodules.corpora.STREAMED_DOCUMENTS", 20)
    config = language_model(tmp_path, streaming=True, batch_size=4)
    words = ["--config", config, "--output", str(tmp_path / "run")]
    assert main(train.run, words) == 2
    assert "--trainer.limit_train_batches" in capsys.readouterr().err
    assert main(train.run, [*words, "--trainer.limit_train_batches", "3"]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["loss"] > 0


def test_a_regression_is_finetuned_and_fused(home: Path) -> None:
    folder = home / "scores"
    for split in ("train", "test"):
        rows_of = datasets.load_dataset(str(make_sentences(home / "labelled")))[split]
        scores = [len(row.split()[0]) / 5 for row in rows_of["sentence"]]
        datasets.Dataset.from_dict({"text": rows_of["sentence"], "label": scores}).to_parquet(
            folder / f"{split}.parquet"
        )
    data = {"path": str(folder), "max_length": 10, "validation": 30, "calibration": 20}
    config = preset(home, "scores", task="text-classification", data=data)
    runs = [home / f"scores-{seed}" for seed in (1, 2)]
    for seed, run in zip((1, 2), runs, strict=True):
        words = ["--config", config, "--model", str(home / f"seed-{seed}"), "--output", str(run)]
        assert main(finetune.run, words) == 0
        assert {"pearson", "spearman", "loss"} <= set(json.loads((run / "metrics.json").read_text()))
    words = ["--parents", *map(str, runs), "--output", str(home / "scores-fused"), "--logger", "csv"]
    assert main(fuse.run, [*words, "--compare", "distilled"]) == 0
    found = rows(home / "scores-fused" / "report")
    assert all("pearson" in found[name, "one-shot"] for name in ("distilled", "fused"))


def test_data_of_another_task_are_refused_in_one_line(home: Path, tmp_path: Path, capsys: Any) -> None:
    words = words_to_fuse(home, "never", "--task", "image-classification")
    assert main(fuse.run, words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "a BertForMaskedLM reads input_ids, but 'digits' gives pixel_values" in lines[-1]
    sentences = str(make_sentences(tmp_path / "cats"))
    words = words_to_fuse(home, "never", "--task", "text-classification", "--data.path", sentences)
    more = ["--data.validation", "30", "--data.calibration", "20", "--data.max_length", "10"]
    assert main(fuse.run, [*words, *more]) == 2
    assert "numbers a sample, which does not fit the 2 classes" in capsys.readouterr().err
    assert not (home / "never").exists()
