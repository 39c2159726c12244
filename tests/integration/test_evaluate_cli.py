"""`fusionpl evaluate`: figures of models without fusing them."""

import json
from pathlib import Path

import pytest

from fusionpl.cli import evaluate as command
from fusionpl.cli.running import main
from fusionpl.datamodules.config import DataConfig
from fusionpl.datamodules.images import ImageDataModule
from fusionpl.evaluation.metrics import evaluate, evaluate_ensemble
from fusionpl.fusion.average import vanilla
from fusionpl.models.load import load_model
from tests.integration.runs import DATA, make_run


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [str(make_run(tmp_path_factory.mktemp("runs") / f"seed-{seed}", seed)) for seed in range(3)]


def test_models_their_ensemble_and_average(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run(["--models", *models, "--output", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads((tmp_path / "out/report/report.json").read_text())["rows"]}
    assert list(rows) == ["model seed-0", "model seed-1", "model seed-2", "ensemble", "vanilla"]
    test = list(ImageDataModule(DataConfig(**DATA)).test_dataloader())  # type: ignore[arg-type]
    loaded = [load_model(path) for path in models]
    plain = vanilla(loaded, [1 / 3] * 3)
    assert plain is not None
    expected = [*(evaluate(one, test) for one in loaded), evaluate_ensemble(loaded, test), evaluate(plain, test)]
    for row, figures in zip(rows.values(), expected, strict=True):
        assert row["accuracy"] == pytest.approx(figures["accuracy"])
        assert row["loss"] == pytest.approx(figures["loss"], rel=1e-5)
    best = max(("model seed-0", "model seed-1", "model seed-2"), key=lambda name: rows[name]["validation"])
    assert f"{best} is the best, by validation" in shown
    assert f"beside {best}; ±" in shown
    assert "loss barrier: vanilla" in shown
    written = (tmp_path / "out/report/report.md").read_text()
    assert written.startswith("# Evaluation\n")
    assert f"**{best} is the best, by validation**" in written
    assert f"| {best} | itself |" in written
    assert (tmp_path / "out/report/interpolation.png").is_file()


def test_models_of_other_sizes_and_one_alone(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wide = str(make_run(tmp_path / "wide", 3, embed_dim=24, depth=3))
    command.run(["--models", models[0], wide])
    shown = capsys.readouterr().out
    assert "ensemble" in shown
    assert "vanilla" not in shown
    assert "barrier" not in shown
    command.run(["--models", wide])
    assert "ensemble" not in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wide"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to evaluate; give --models RUN_A RUN_B"),
        (["--models", "nowhere"], "nowhere"),
        (["--models", "{model}", "--device", "tpu9"], "there is no device tpu9; use cpu, cuda or mps"),
        (
            ["--models", "{model}", "--task", "causal-language-modeling"],
            "reads pixel_values, but 'pydoc' gives input_ids",
        ),
        (["--model", "{model}"], "unknown option --model; did you mean 'models'?"),
    ],
)
def test_mistakes(models: list[str], words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.run, [word.format(model=models[0]) for word in words]) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1


def test_an_empty_section_of_a_configuration_is_one_line(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("data:\n")
    assert main(command.run, ["--config", str(tmp_path / "mine.yaml"), "--models", models[0]]) == 2
    line = capsys.readouterr().err
    assert "mine.yaml: 'data' holds no options" in line
    assert line.count("\n") == 1
