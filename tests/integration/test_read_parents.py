"""fuse.py with parents that are brought to the anchor's shape, or are of one base, as they are read."""

from pathlib import Path

import pytest

from fusionpl.cli import finetune, fuse
from fusionpl.cli.common import main
from fusionpl.evaluation import Report
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
