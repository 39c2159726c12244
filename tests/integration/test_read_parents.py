"""fuse.py with parents that are brought to the anchor's shape, or are of one base, as they are read."""

from pathlib import Path

import pytest
import torch

from fusionpl import load_model
from fusionpl.cli import finetune, fuse
from fusionpl.cli.running import main
from fusionpl.evaluation.report import Report
from fusionpl.models.save import save_model
from tests.integration.runs import DATA, make_run

QUICK = ["--trainer.accelerator", "cpu", "--logger", "none"]
DIGITS = [word for key, value in DATA.items() for word in (f"--data.{key}", str(value))]


def test_parents_for_images_of_two_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parents = [str(make_run(tmp_path / "a", 1)), str(make_run(tmp_path / "b", 2, img_size=24))]
    output = str(tmp_path / "fused")
    assert main(fuse.run, ["--parents", *parents, "--output", output, *DIGITS, *QUICK]) == 0
    line = "b: trained on images of 24x24, its position embeddings are interpolated to a's 16x16, and it is measured so"
    assert f"warning: {line}" in capsys.readouterr().out.splitlines()
    report = Report.load(f"{output}/report")
    assert line in report.notes
    assert {"parent a", "parent b", "ensemble", "vanilla", "fused"} <= {row.name for row in report.rows}
    assert len({row.flops for row in report.rows if row.name.startswith("parent ")}) == 1
    finetuned = ["--model", output, "--output", str(tmp_path / "finetuned"), "--trainer.max_epochs", "1"]
    assert main(finetune.run, [*finetuned, *QUICK]) == 0


def test_parents_of_one_base_are_told_beside_their_plain_average(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_run(tmp_path / "a", 1)
    model = load_model(first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    second = make_run(tmp_path / "b", 2)
    save_model(model, second / "model")
    argv = ["--parents", str(first), str(second), "--output", str(tmp_path / "fused"), "--report", "rows"]
    assert main(fuse.run, [*argv, *DIGITS, *QUICK]) == 0
    report = Report.load(tmp_path / "fused/report")
    assert {"vanilla", "fused"} <= {row.name for row in report.rows}
    (line,) = [note for note in report.notes if "share one base" in note]
    assert line in (tmp_path / "fused/report/report.md").read_text()
    assert f"warning: {line}" in capsys.readouterr().out.splitlines()
