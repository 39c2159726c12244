"""The commands with parents on the hub; a stand-in on 127.0.0.1 plays the hub."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from fusionpl import load_model
from fusionpl.cli import finetune, fuse, sweep
from fusionpl.cli.running import main
from fusionpl.evaluation.report import Report
from fusionpl.models.save import save_model
from fusionpl.models.tokenizers import train_wordpiece
from tests import hub
from tests.integration.runs import DATA, WORDS, make_run, make_sentences

QUICK = ["--trainer.accelerator", "cpu", "--logger", "none"]
DIGITS = [word for key, value in DATA.items() for word in (f"--data.{key}", str(value))]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., hub.Hub]]:
    """Serves models of other seeds as the revisions of org/vit; a name that starts with old- holds a pickle."""
    monkeypatch.chdir(tmp_path)
    with hub.serving({}, monkeypatch, tmp_path / "cache") as stand_in:

        def show(*revisions: str) -> hub.Hub:
            folders = {}
            for seed, name in enumerate(revisions):
                folders[name] = make_run(tmp_path / f"of-{seed}", seed) / "model"
                if name.startswith("old-"):
                    weights = folders[name] / "model.safetensors"
                    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
                    weights.unlink()
            stand_in.repos = {"org/vit": folders}
            return stand_in

        yield show


def test_two_revisions_of_one_repository_are_fused_and_finetuned(serve: Callable[..., hub.Hub]) -> None:
    serve("main", "refs/pr/1")
    parents = ["org/vit", "org/vit@refs/pr/1"]
    assert main(fuse.run, ["--parents", *parents, *DIGITS, *QUICK]) == 0
    rows = [row.name for row in Report.load("runs/fused/report").rows]
    assert rows[:2] == ["parent vit", "parent vit@refs-pr-1"]
    assert yaml.safe_load(Path("runs/fused/config.yaml").read_text())["parents"] == parents
    assert main(finetune.run, ["--model", "runs/fused", "--trainer.max_epochs", "1", *QUICK]) == 0
    baselines = {path.name for path in Path("runs/fused-finetuned/baselines").iterdir()}
    assert baselines <= {"vit", "vit@refs-pr-1", "vanilla"}
    assert len(baselines) == 2


def test_a_revision_is_finetuned_and_swept(serve: Callable[..., hub.Hub]) -> None:
    serve("main", "refs/pr/1")
    argv = ["--model", "org/vit@refs/pr/1", *DIGITS, "--trainer.max_epochs", "1", *QUICK]
    assert main(finetune.run, argv) == 0
    assert load_model("runs/vit@refs-pr-1-finetuned") is not None
    assert [row.name for row in Report.load("runs/vit@refs-pr-1-finetuned/report").rows] == ["vit@refs-pr-1"]
    argv = ["--parents", "org/vit", "org/vit@refs/pr/1", *DIGITS, "--sweep", "align.solver=emd", *QUICK]
    assert main(sweep.run, argv) == 0
    assert Path("runs/sweep/sweep.csv").is_file()


@pytest.mark.slow
def test_pickles_need_an_option_in_every_command(
    serve: Callable[..., hub.Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = serve("main", "old-1")
    commands = {
        fuse.run: ["--parents", "org/vit", "org/vit@old-1"],
        finetune.run: ["--model", "org/vit@old-1", "--trainer.max_epochs", "1"],
        sweep.run: ["--parents", "org/vit", "org/vit@old-1", "--sweep", "align.solver=emd"],
    }
    for command, argv in commands.items():
        assert main(command, [*argv, *DIGITS, *QUICK]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert "'org/vit' at revision old-1 holds pytorch_model.bin" in lines[0]
        assert "--allow-pickle" in lines[0]
        assert "revisions that hold safetensors: main" in lines[0]
    assert "pytorch_model.bin" not in stand_in.downloads
    assert not Path("runs").exists()
    for command, argv in commands.items():
        assert main(command, [*argv, *DIGITS, *QUICK, "--allow-pickle"]) == 0
    assert main(finetune.run, ["--model", "runs/fused", "--trainer.max_epochs", "1", *QUICK]) == 0
    assert main(fuse.run, ["--parents", "org/vit", "org/vit@old-1", *DIGITS, "--check", "--allow-pickle"]) == 0


def test_an_encoder_without_a_head_is_finetuned(serve: Callable[..., hub.Hub], tmp_path: Path) -> None:
    tokenizer = train_wordpiece([" ".join(WORDS)] * 3, 100)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **sizes))
    save_model(encoder, tmp_path / "encoder", tokenizer=tokenizer)
    serve().repos = {"org/bert": {"main": tmp_path / "encoder"}}
    make_sentences(tmp_path / "data")
    argv = ["--model", "org/bert", "--task", "text-classification", "--data.path", str(tmp_path / "data"), *QUICK]
    assert (
        main(finetune.run, [*argv, "--data.validation", "20", "--data.calibration", "20", "--trainer.max_epochs", "1"])
        == 0
    )
    assert type(load_model("runs/bert-finetuned")).__name__ == "BertForSequenceClassification"
