"""What is advised after a fusion, by its verdict, and what a report shows of it and of its configuration."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from fusionpl.cli.fusing import PRESET, fusing_parser
from fusionpl.cli.jobs.next_steps import after_fusion, after_sweep
from fusionpl.cli.jobs.summary import spoken
from fusionpl.cli.parsing import changed_settings, parse, settings_of
from fusionpl.evaluation.outcomes import Outcomes
from fusionpl.evaluation.report import Report
from fusionpl.evaluation.rows import HEAD_FITTED, Row
from fusionpl.evaluation.steps import Step
from fusionpl.evaluation.text import GLOSSARY
from fusionpl.fusion.config import load_config
from fusionpl.presets import CONF

ROOT = Path(__file__).parents[2]
SAMPLES = 400
WIN, TIE, LOSS = 360, 302, 240  # right ones of the fused model; a parent has 300


def row(report: Report, name: str, right: int) -> None:
    hits = (torch.arange(SAMPLES) < right).float()
    outcomes = Outcomes(torch.stack([1 - hits, torch.ones(SAMPLES), hits], 1))
    report.add(Row(name, **outcomes.figures), outcomes)


def a_report(right: int | None, *, fitted: int = 0) -> Report:
    report = Report()
    if right is not None:
        row(report, "parent a", 300)
        row(report, "parent b", 200)
        row(report, "ensemble", 310)
        if fitted:
            row(report, f"{HEAD_FITTED}parent a", fitted)
        row(report, "fused", right)
    return report


def advised(report: Report, *, task: str = "image-classification", own: Any = None, **settings: Any) -> list[str]:
    """The commands that are advised, a line each."""
    args = SimpleNamespace(task=task, parents=["runs/a", "runs/b"], own_data=own)
    given = {"strategy": "auto", "parents": args.parents, **settings}
    asked = SimpleNamespace(
        args=args, output=Path("runs/fused"), settings=given, alternatives=settings.get("compare", ()),
        parents={"a": "runs/a", "b": "runs/b"},
    )  # fmt: skip
    made = load_config(None, {"strategy": settings.get("made", "joint"), "refit.method": "ridge"})
    report.steps = after_fusion(report, asked, made)  # type: ignore[arg-type]
    return [shlex.join(step.words) if step.words else step.why for step in report.steps]


def test_a_win_is_finetuned() -> None:
    assert advised(a_report(WIN)) == ["finetune --model runs/fused"]
    assert advised(a_report(None)) == ["finetune --model runs/fused"]  # nothing was measured
    assert advised(a_report(WIN), task="feature-extraction") == ["evaluate --models runs/fused runs/a runs/b"]


def test_a_tie_says_what_may_help() -> None:
    again = "fuse --config runs/fused/config.yaml"
    wider, distilled, other = advised(a_report(TIE))
    assert wider == f"{again} --width 1.5 --output runs/fused-width-1.5"
    assert distilled == f"{again} --compare distilled --output runs/fused-distilled"
    assert "other data" in other
    assert advised(a_report(TIE), own=[{}, {}], compare=["distilled"], width=1.5) == [
        f"{again} --width 2 --output runs/fused-width-2"
    ]
    # what the family or the options leave
    assert advised(a_report(TIE), made="transport")[0] == distilled
    assert advised(a_report(TIE), made="transport", strategy="transport")[0] == (
        "fuse --parents runs/a runs/b --output runs/fused-default"
    )


def test_a_loss_keeps_the_parent() -> None:
    keep, wider, _ = advised(a_report(LOSS))
    assert keep == "evaluate --models runs/a"
    assert "--width 1.5" in wider
    head = advised(a_report(LOSS, fitted=330))[0]
    assert head == "fuse --config runs/fused/config.yaml --strategy head --output runs/fused-head"
    head = advised(a_report(LOSS, fitted=330), width=1.5)[0]  # which a head keeps out
    assert head == "fuse --config runs/fused/config.yaml --strategy head --width null --output runs/fused-head"


@pytest.mark.parametrize("right", [WIN, TIE, LOSS])
def test_the_advice_stands_below_the_verdict_and_not_on_a_card(right: int, tmp_path: Path) -> None:
    report = a_report(right)
    (first, *_) = advised(report)
    command, *words = first.split()
    shown = f"python {command}.py" if command in ("fuse", "finetune") else f"python -m fusionpl.cli.{command}"
    text = report.markdown()
    assert f"{shown} {' '.join(words)}\n" in text
    assert text.index("## Verdict") < text.index("## Next") < text.index("## Models")
    assert "## Next" not in report.markdown(steps=False)
    assert f"<code>{shown} {' '.join(words)}</code>" in report.html()
    report.save(tmp_path)
    assert [step.words for step in Report.load(tmp_path).steps] == [tuple(step.words) for step in report.steps]


def test_the_best_cell_of_a_sweep_is_the_next_fusion() -> None:
    report = Report([Row("parent a", accuracy=0.9), Row("reg=1", accuracy=0.5), Row("reg=2", accuracy=0.6)])
    commands = {"reg=1": ["fuse", "--align.reg=1"], "reg=2": ["fuse", "--align.reg=2"]}
    assert [step.words for step in after_sweep(report, commands)] == [("fuse", "--align.reg=2")]


def test_a_command_is_said_as_the_process_was_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("train.py", "fuse.py"):
        (tmp_path / name).touch()
    monkeypatch.setattr("sys.executable", "/opt/venv/bin/python")
    monkeypatch.setattr("sys.argv", [f"{tmp_path}/train.py"])
    assert spoken(["fuse", "--parents", "a b"]) == f"/opt/venv/bin/python {tmp_path}/fuse.py --parents 'a b'"
    assert spoken(["evaluate", "--models"]) == "/opt/venv/bin/python -m fusionpl.cli.main evaluate --models"
    monkeypatch.setattr("shutil.which", lambda name: "/opt/venv/bin/python")
    assert spoken(["fuse"]) == f"python {tmp_path}/fuse.py"
    monkeypatch.setattr("sys.argv", ["/usr/bin/fusionpl", "fuse"])
    assert spoken(["finetune", "--model", "x"]) == "fusionpl finetune --model x"
    monkeypatch.setattr("sys.argv", ["-m"])
    monkeypatch.chdir(tmp_path.parent)
    assert spoken(["fuse", "--parents"]) == "python -m fusionpl.cli.main fuse --parents"


def changed(*argv: str) -> dict[str, Any]:
    parser = fusing_parser("image-classification")
    parser.add_argument("--own-data", type=list[dict[str, Any]] | None)
    settings = settings_of(parser, parse(parser, argv, PRESET))
    return changed_settings(settings, argv, parser, PRESET)


def test_the_visible_configuration_is_what_differs_from_the_preset(tmp_path: Path) -> None:
    parents = ("--parents", "runs/a", "runs/b")
    assert changed(*parents) == {"parents": ["runs/a", "runs/b"]}
    assert changed(*parents, "--config", str(CONF / "fuse" / "paper.yaml")) == {"parents": ["runs/a", "runs/b"]}
    assert changed(*parents, "--align.solver", "emd", "--width", "1.5") == {
        "parents": ["runs/a", "runs/b"], "align": {"solver": "emd"}, "width": 1.5,
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text("anchor: 1\n")
    assert changed(*parents, "--config", str(tmp_path / "mine.yaml"))["anchor"] == 1
    own = "[{path: digits, classes: [1, 2], batch_size: 16}, {path: digits, classes: null, batch_size: 16}]"
    assert changed(*parents, "--own-data", own)["own_data"] == {
        "runs/a": {"path": "digits", "classes": [1, 2]}, "runs/b": {"path": "digits"},
    }  # fmt: skip


def test_the_whole_configuration_is_folded_away() -> None:
    report = Report(config={"parents": ["a"], "seed": 0, "width": 2}, changed={"width": 2})
    shown, _, folded = report.markdown().partition("<details>")
    assert yaml.safe_load(shown.split("```yaml")[1].split("```")[0]) == {"width": 2}
    assert yaml.safe_load(folded.split("```yaml")[1].split("```")[0]) == report.config
    shown, _, folded = report.html().partition("<details>")
    assert ("width: 2" in shown, "seed" in shown, "seed: 0" in folded) == (True, False, True)


def test_words_that_a_report_uses_are_explained_and_no_others() -> None:
    report = a_report(TIE)
    report.notes = ["one stream for all parents, in units of the anchor"]
    assert {"one stream", "anchor", "ensemble", "verdict", "share of the gain"} <= {word for word, _ in report.words}
    assert not {"family", "refit", "vanilla"} & {word for word, _ in report.words}
    assert all(f"- **{word}**: {meaning}" in report.markdown() for word, meaning in report.words)
    assert all(f"<dt>{word}</dt>" in report.html() for word, _ in report.words)


def test_the_glossary_has_the_words_of_the_readme() -> None:
    table = (ROOT / "README.md").read_text().split("| word | meaning |")[1].split("\n\n")[0]
    assert {*re.findall(r"(?m)^\| ([a-z ]+) \|", table)} <= GLOSSARY.keys()


def test_a_step_names_no_folder_outside_the_working_directory() -> None:
    step = Step("x", ("fuse", "--config", "/somewhere/else/config.yaml"))
    assert step.command == "python fuse.py --config config.yaml"
    assert step.as_dict() == {"why": "x", "words": ["fuse", "--config", "config.yaml"]}
