import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from fusionpl import load_model
from fusionpl.cli import evaluate, finetune, fuse, sweep, train
from fusionpl.cli.jobs import fuse as job
from fusionpl.cli.running import main
from fusionpl.datamodules.config import DataConfig
from fusionpl.datamodules.images import ImageDataModule
from fusionpl.evaluation.metrics import evaluate_samples
from fusionpl.evaluation.report import Report
from fusionpl.families.binding import bind
from tests.integration.runs import hears_ctrl_c, make_run

ROOT = Path(__file__).parents[2]
QUICK = ["--trainer.accelerator", "cpu", "--logger", "csv"]


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    return [str(make_run(folder / f"seed-{seed}", seed)) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def fused(parents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("fused") / "fused"
    assert main(fuse.run, ["--parents", *parents[:2], "--output", str(output), *QUICK]) == 0
    return output


def refused(capsys: pytest.CaptureFixture[str], command, argv: list[str]) -> str:
    """Runs a command that must fail with exit code 2 and exactly one line on stderr; returns the line."""
    assert main(command, argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_fused_folder_is_complete(fused: Path, parents: list[str]) -> None:
    report = json.loads((fused / "report/report.json").read_text())
    assert [row["name"] for row in report["rows"]] == [
        "parent seed-1",
        "parent seed-2",
        "ensemble",
        "head-fitted parent seed-2",
        "vanilla",
        "fused",
    ]
    assert all(0 <= row["accuracy"] <= 1 and row["loss"] > 0 for row in report["rows"])
    assert set(report["barrier"]) == {"vanilla"}
    assert {path.name for path in (fused / "report").glob("*.png")} == {"bars.png", "interpolation.png"}
    assert (fused / "metrics.csv").is_file()
    assert "Fitted by fusionpl to one residual stream" in (fused / "model/README.md").read_text()
    with safe_open(fused / "maps.safetensors", "pt") as maps:
        assert maps.get_tensor("parent1/blocks.0.ffn").shape == (32, 32)
    assert yaml.safe_load((fused / "config.yaml").read_text())["parents"] == parents[:2]
    assert not [path for path in fused.parent.iterdir() if path != fused]


def test_the_same_command_gives_the_same_numbers_and_config_repeats_it(fused: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(fuse.run, ["--config", str(fused / "config.yaml"), "--output", str(again), "--logger", "none"]) == 0
    reports = [Report.load(run / "report") for run in (fused, again)]
    first, second = ([replace(row, seconds=None) for row in report.rows] for report in reports)  # but for wall time
    assert first == second
    assert reports[0].verdicts == reports[1].verdicts
    first, second = (safetensors.torch.load_file(run / "model/model.safetensors") for run in (fused, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_three_parents_with_weights(parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--parents", *parents, "--weights", "[0.5, 0.25, 0.25]", "--align.solver", "emd"]
    assert main(fuse.run, [*argv, "--output", str(tmp_path / "three"), *QUICK]) == 0
    out = capsys.readouterr().out
    assert "parent seed-3" in out
    report = Report.load(tmp_path / "three" / "report")
    assert [row.name for row in report.rows][3:] == [
        "ensemble",
        "head-fitted parent seed-2",
        "vanilla",
        "aligned average",
        "fused",
    ]
    assert set(report.barrier) == {"vanilla", "aligned"}
    assert (tmp_path / "three/report/transport-maps.png").is_file()
    assert "arxiv.org/abs/2310.05719" in (tmp_path / "three/model/README.md").read_text()


def test_rotation_refinement_and_another_preset_beside_it(parents: list[str], tmp_path: Path) -> None:
    (tmp_path / "beside.yaml").write_text(yaml.safe_dump({"align": {"solver": "emd"}}))
    words = ["--parents", *parents[:2], *QUICK, "--align.stream", "rotation", "--align.residual", "tie"]
    words += ["--align.heads", "matched", "--align.solver", "assignment"]
    more = ["--refine.method", "gradient", "--refine.minutes", "0.1", "--refine.start", "fused"]
    more += ["--compare", str(tmp_path / "beside.yaml")]
    assert main(fuse.run, [*words, *more, "--output", str(tmp_path / "refined")]) == 0
    assert main(fuse.run, [*words, "--output", str(tmp_path / "refitted")]) == 0
    refined, refitted = (
        {row.name: row for row in Report.load(tmp_path / name / "report").rows} for name in ("refined", "refitted")
    )
    assert list(refined)[4:] == ["vanilla", "fused (beside)", "aligned average", "refitted", "fused"]
    assert refined["refitted"].loss == refitted["fused"].loss
    assert refined["aligned average"].loss == refitted["aligned average"].loss
    assert refined["fused"].loss != refined["refitted"].loss
    assert (refined["fused"].seconds or 0) >= 60 * 0.05


def test_minutes_are_enough_to_have_the_better_start_taught(
    parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = str(make_run(tmp_path / "wide", 4, embed_dim=32))
    output = tmp_path / "fused"
    # Untrained parents look as if they knew other classes, and one stream of such is taught itself.
    words = ["--parents", parents[0], wide, *QUICK, "--weights", "[0.02, 0.98]", "--report", "rows"]
    words += ["--strategy", "transport"]
    assert main(fuse.run, [*words, "--refine.minutes", "0.05", "--output", str(output)]) == 0
    (line,) = (one for one in capsys.readouterr().out.splitlines() if one.startswith("taught from "))
    assert line.startswith("taught from wide with its head fitted, learning rate ")
    assert line in Report.load(output / "report").notes
    assert load_model(output).get_parameter("pos_embed").shape[-1] == 32
    with safe_open(str(output / "model" / "model.safetensors"), "pt") as file:
        assert file.get_slice("head.weight").get_shape() == [10, 32]


def test_what_its_owner_could_do_instead_stands_beside_it(
    parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "fused"
    words = ["--parents", *parents[:2], *QUICK, "--report", "rows", "--output", str(output)]
    assert main(fuse.run, [*words, "--compare", "distilled", "trained-on"]) == 0
    printed = capsys.readouterr().out
    rows = {row.name: row for row in Report.load(output / "report").rows}
    assert rows["distilled"].needs == rows["fused"].needs == "unlabelled data"
    assert rows["trained-on"].needs == "labels"
    assert all((rows[name].steps or 0) >= 1 for name in ("distilled", "trained-on"))
    assert "distilled: taught from the parent with its head fitted, learning rate " in printed
    (verdict,) = Report.load(output / "report").verdicts
    assert verdict.words in printed
    assert verdict.words in (output / "model" / "README.md").read_text()
    assert json.loads((output / "report" / "report.json").read_text())["verdict"][0]["words"] == verdict.words


def test_one_stream_for_all_parents(parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joint = ["--config", str(ROOT / "conf/fuse/joint.yaml"), "--parents", *parents]
    assert main(fuse.run, [*joint, "--dry-run"]) == 0
    assert "one stream for all parents" in capsys.readouterr().out
    assert main(fuse.run, [*joint, *QUICK, "--output", str(tmp_path / "fused")]) == 0
    names = [row.name for row in Report.load(tmp_path / "fused" / "report").rows]
    assert names[-2:] == ["vanilla", "fused"]
    assert "one residual stream" in (tmp_path / "fused" / "model" / "README.md").read_text()
    line = refused(capsys, fuse.run, [*joint, *QUICK, "--align.solver", "emd", "--output", str(tmp_path / "other")])
    assert "align.solver has nothing to do" in line
    assert not (tmp_path / "other").exists()


def test_nothing_to_compare_with(parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--parents", *parents[:2], *QUICK, "--output", str(tmp_path / "fused"), "--compare", "distiled"]
    line = refused(capsys, fuse.run, words)
    assert "there is no 'distiled'; did you mean distilled" in line or "distilled, trained-on" in line
    assert not (tmp_path / "fused").exists()


def test_check_and_dry_run_write_nothing(parents: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path(parents[0]).parent.rglob("*"))
    assert main(fuse.run, ["--parents", *parents[:2], "--check"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(": ok; renumbering all units") == 2
    assert "the stream    permutation, one for all; rotation" in shown
    assert "x permutation or rotation of" in shown
    assert main(fuse.run, ["--parents", *parents[:2], "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "one stream for all parents; whose units, the calibration set decides; refit: ridge" in shown
    assert re.search(r"^expected on cpu: .* of memory, .* of temporary files, a model of ", shown, re.M)
    assert main(fuse.run, ["--parents", *parents[:2], "--dry-run", "--width", "1.5"]) == 0
    assert re.search(r"blocks\.0\.q +16 -> 24 +2 -> 3 +units of the parents", capsys.readouterr().out)
    assert main(fuse.run, ["--parents", *parents[:2], "--dry-run", "--strategy", "transport"]) == 0
    plan = capsys.readouterr().out
    assert "join (average) of stem.pos + stem.patch" in plan
    assert "sinkhorn 0.02" in plan
    assert "refit: ridge" in plan
    assert "more if" not in plan
    rotation = ["--align.stream", "rotation", "--align.residual", "tie", "--align.heads", "matched"]
    assert main(fuse.run, ["--parents", *parents[:2], "--dry-run", *rotation]) == 0
    assert "rotation of the stream" in capsys.readouterr().out
    assert sorted(Path(parents[0]).parent.rglob("*")) == before


def test_finetune_adds_its_rows(fused: Path, tmp_path: Path) -> None:
    copy = tmp_path / "fused"
    shutil.copytree(fused, copy)
    argv = ["--model", str(copy), "--trainer.max_epochs", "1", *QUICK]
    assert main(finetune.run, argv) == 0
    rows = Report.load(copy / "report").rows
    assert [row.name for row in rows if row.stage == "finetuned"][::2] == ["fused", "vanilla"]
    assert len([row for row in rows if row.stage == "finetuned"]) == 3
    output = tmp_path / "fused-finetuned"
    assert load_model(output) is not None
    assert load_model(output / "baselines/vanilla") is not None
    assert (output / "metrics.csv").is_file()
    # every candidate is finished: resuming trains nothing and gives the same rows
    assert main(finetune.run, [*argv, "--resume"]) == 0
    assert Report.load(copy / "report").rows == rows


def test_finetune_any_model_by_itself(parents: list[str], tmp_path: Path) -> None:
    output = tmp_path / "tuned"
    argv = ["--model", parents[0], "--output", str(output), "--trainer.max_epochs", "1", *QUICK]
    assert main(finetune.run, argv) == 0
    assert [row.name for row in Report.load(output / "report").rows] == ["seed-1"]


def test_finetuning_starts_from_shrunk_weights(parents: list[str], tmp_path: Path) -> None:
    output = tmp_path / "tuned"
    argv = ["--model", parents[0], "--output", str(output), "--trainer.max_epochs", "1", *QUICK]
    assert main(finetune.run, [*argv, "--shrink", "0"]) == 2
    assert not output.exists()
    assert main(finetune.run, [*argv, "--shrink", "0.5", "--optim.lr", "1e-12"]) == 0
    before, after = (dict(load_model(path).named_parameters()) for path in (parents[0], output))
    for name, one in before.items():
        torch.testing.assert_close(after[name], one if one.ndim == 1 else 0.5 * one, rtol=1e-4, atol=1e-6)


def finetuned(model: Path, strategy: str, *more: str) -> str:
    """Finetunes in two processes and returns what was said."""
    command = [sys.executable, "finetune.py", "--model", str(model), "--trainer.max_epochs", "2", *QUICK, *more]
    two = ["--trainer.devices", "2", "--trainer.strategy", strategy]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *two], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_alike(fused: Path, folder: Path, tolerance: float, *more: str) -> None:
    """Shared out by FSDP or copied by DDP: the same figures, and ordinary models with the same weights."""
    reports = []
    for strategy in ("ddp", "fsdp"):
        shutil.copytree(fused, folder / strategy)
        said = finetuned(folder / strategy, strategy, *more)
        assert said.count("loss barrier") == 1
        reports.append([row for row in Report.load(folder / strategy / "report").rows if row.stage == "finetuned"])
    assert [row.name for row in reports[1]] == [row.name for row in reports[0]]
    assert len(reports[1]) == 3
    settings = yaml.safe_load((fused / "config.yaml").read_text())["data"]
    batches = list(ImageDataModule(DataConfig(**settings)).test_dataloader())
    for strategy in ("ddp", "fsdp"):  # what both processes saw, in the data's order
        _, wanted = evaluate_samples([load_model(folder / f"{strategy}-finetuned")], batches)
        gathered = Report.load(folder / strategy / "report").outcomes["fused", "finetuned"]
        assert torch.equal(gathered.values[:, 1:], wanted.values[:, 1:])
        torch.testing.assert_close(gathered.values, wanted.values, atol=1e-4, rtol=1e-3)
    for copied, sharded in zip(*reports, strict=True):
        assert (sharded.parameters, sharded.flops, sharded.epochs) == (copied.parameters, copied.flops, 2)
        assert sharded.loss == pytest.approx(copied.loss, rel=tolerance)
    ddp, fsdp = folder / "ddp-finetuned", folder / "fsdp-finetuned"
    for path in ("", *(f"baselines/{place.name}" for place in (ddp / "baselines").iterdir())):
        copied, sharded = (load_model(run / path) for run in (ddp, fsdp))
        for (name, tensor), other in zip(copied.state_dict().items(), sharded.state_dict().values(), strict=True):
            assert torch.allclose(tensor, other, atol=10 * tolerance), name
        assert (fsdp / path / "model/config.json").is_file()
    for file in ("best.ckpt", "last.ckpt"):
        weights = torch.load(fsdp / "checkpoints" / file, weights_only=True)["state_dict"]
        assert {name: tensor.shape for name, tensor in weights.items()} == {
            f"model.{name}": tensor.shape for name, tensor in load_model(fsdp).state_dict().items()
        }


@pytest.mark.slow
def test_finetune_on_two_processes(fused: Path, tmp_path: Path) -> None:
    check_alike(fused, tmp_path, 1e-4, "--trainer.gradient_clip_val", "0.5")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_finetune_on_two_gpus(fused: Path, tmp_path: Path) -> None:
    check_alike(fused, tmp_path, 1e-2, "--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed")


def test_a_finetuning_goes_on_with_the_sharding_it_started_with(
    fused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("trainer: {strategy: ddp}")
    argv = ["--model", str(fused), "--output", str(tmp_path), "--resume", "--trainer.strategy", "fsdp", *QUICK]
    assert "was started with trainer.strategy ddp, not fsdp" in refused(capsys, finetune.run, argv)


def test_fuse_on_two_processes_gives_the_same_model(fused: Path, parents: list[str], tmp_path: Path) -> None:
    output = tmp_path / "ddp"
    command = [sys.executable, "fuse.py", "--parents", *parents[:2], "--output", str(output), *QUICK]
    extra = ["--calibration.batch_size", "16", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *extra], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    one, two = (safetensors.torch.load_file(run / "maps.safetensors") for run in (fused, output))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    # Batches are multiplied in float32: where a refit's inputs hardly vary, weights differ more than the function.
    images = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        first, second = (load_model(run)(images) for run in (fused, output))
    assert float((first - second).abs().max()) < 1e-3 * float(first.abs().max())


def test_sweep_shares_calibration_and_writes_a_table(parents: list[str], tmp_path: Path) -> None:
    output = tmp_path / "sweep"
    argv = ["--parents", *parents[:2], "--output", str(output), "--logger", "none"]
    swept = ["--sweep", "align.residual=average,tie", "align.solver=emd,sinkhorn"]
    assert main(sweep.run, [*argv, *swept]) == 0
    lines = (output / "sweep.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 + 4
    assert any(line.startswith("residual=tie solver=emd,") for line in lines)
    assert (output / "report/bars.png").is_file()
    # a cell of the sweep is the fusion with its options
    single = tmp_path / "single"
    options = ["--align.residual", "tie", "--align.solver", "emd"]
    assert main(fuse.run, ["--parents", *parents[:2], "--output", str(single), *options, "--logger", "none"]) == 0
    cell = next(row for row in Report.load(output / "report").rows if row.name == "residual=tie solver=emd")
    alone = next(row for row in Report.load(single / "report").rows if row.name == "fused")
    assert (cell.accuracy, cell.loss) == (alone.accuracy, pytest.approx(alone.loss))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--align.solvr", "emd"], "did you mean 'align.solver'"),
        (["--align.solver", "magic"], "align.solver"),
        (["--calibration.tokens", "window:9"], "window:9"),
        (["--calibration.tokens", "centre"], "window:N"),
        (["--align.reg", "0"], "align.reg must be above 0"),
        (["--anchor", "2"], "anchor 2"),
        (["--weights", "[0.9, 0.9]"], "weights must sum to 1"),
        (["--calibration.samples", "0"], "calibration"),
        (["--data.calibration", "0"], "there are no calibration data; give some samples"),
        (["--data.path", "nowhere/at-all/x"], "nowhere/at-all/x"),
    ],
)
def test_a_wrong_option_is_one_line(
    parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    output = tmp_path / "out"
    assert words in refused(capsys, fuse.run, ["--parents", *parents[:2], "--output", str(output), *argv, *QUICK])
    assert list(tmp_path.iterdir()) == []


def test_a_preset_to_compare_with_is_refused_before_anything_is_fused(
    parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "staged", lambda *_: pytest.fail("it began"))
    (tmp_path / "wide.yaml").write_text("calibration:\n  tokens: window:9\n")
    words = ["--parents", *parents[:2], "--output", str(tmp_path / "out"), "--compare", str(tmp_path / "wide.yaml")]
    assert "window:9 needs a class token and a square grid of at least 9 x 9" in refused(capsys, fuse.run, words)


def test_unknown_key_in_a_config_file(parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("align:\n  residul: skip\n")
    line = refused(capsys, fuse.run, ["--config", str(file), "--parents", *parents[:2]])
    assert "align.residul; did you mean 'align.residual'?" in line


def test_one_parent_is_not_enough(parents: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "at least two parents" in refused(capsys, fuse.run, ["--parents", parents[0]])


def test_missing_and_truncated_parents(parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(Path(parents[0]).parent / "seed-9")
    assert "seed-1" in refused(capsys, fuse.run, ["--parents", parents[0], missing])
    cut = make_run(tmp_path / "cut", 4) / "model/model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    line = refused(capsys, fuse.run, ["--parents", parents[0], str(tmp_path / "cut")])
    assert "truncated" in line
    assert "model.safetensors" in line


@pytest.mark.parametrize(("change", "words"), [
    ({"patch_size": 8}, "patches"),
    ({"names": tuple("abcdefghij")}, "other knows none of the classes of 'digits' (its own are a, b, c, d, "),
])  # fmt: skip
def test_parents_that_do_not_fit(
    parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, words: str
) -> None:
    other = str(make_run(tmp_path / "other", 4, **change))
    assert words in refused(capsys, fuse.run, ["--parents", parents[0], other, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_parents_of_another_depth(parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep = str(make_run(tmp_path / "deep", 4, depth=3))
    words = ["--parents", parents[0], deep, "--output", str(tmp_path / "out")]
    fuse.run([*words, "--dry-run"])
    summary = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("deep: blocks"))
    assert "for the fused model's 1 to 2; streams alike by" in summary
    fuse.run([*words, "--logger", "none"])
    report = json.loads((tmp_path / "out/report/report.json").read_text())
    assert summary in report["notes"]
    assert "deep in 2 blocks" in [row["name"] for row in report["rows"]]
    assert "![blocks](blocks.png)" in (tmp_path / "out/report/report.md").read_text()
    assert bind(load_model(tmp_path / "out")).depth == 2
    line = refused(capsys, fuse.run, [*words, "--overwrite", "--depth", "0"])
    assert "depth must be at least 1" in line
    fuse.run(["--parents", deep, parents[0], "--output", str(tmp_path / "deeper"), "--depth", "5", "--logger", "none"])
    assert bind(load_model(tmp_path / "deeper")).depth == 5


def test_data_of_another_task_are_refused_before_anything_is_run(
    parents: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--parents", *parents[:2], "--task", "causal-language-modeling", "--dry-run"]
    assert "reads pixel_values, but 'pydoc' gives input_ids" in refused(capsys, fuse.run, words)


def test_heads_of_other_numbers_need_one_stream(
    parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--parents", parents[0], str(make_run(tmp_path / "other", 4, num_heads=4)), *QUICK]
    words += ["--output", str(tmp_path / "out")]
    assert "different head count: 4 and 2 heads" in refused(capsys, fuse.run, [*words, "--strategy", "transport"])
    assert not (tmp_path / "out").exists()
    assert main(fuse.run, words) == 0


def test_nan_weights_are_named(parents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = make_run(tmp_path / "broken", 5)
    file = broken / "model/model.safetensors"
    state = safetensors.torch.load_file(file)
    state["blocks.1.mlp.fc2.bias"][3] = float("nan")
    safetensors.torch.save_file(state, file)
    line = refused(capsys, fuse.run, ["--parents", parents[0], str(broken)])
    assert "broken: tensor 'blocks.1.mlp.fc2.bias'" in line


def test_existing_output_stays(fused: Path, parents: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = (fused / "config.yaml").read_text()
    line = refused(capsys, fuse.run, ["--parents", *parents[:2], "--output", str(fused)])
    assert "--overwrite" in line
    assert (fused / "config.yaml").read_text() == before


def test_a_dead_unit_gives_a_working_model(parents: list[str], tmp_path: Path) -> None:
    dead = make_run(tmp_path / "dead", 6)
    file = dead / "model/model.safetensors"
    state = safetensors.torch.load_file(file)
    state["blocks.0.mlp.fc1.weight"][3] = 0
    safetensors.torch.save_file(state, file)
    for index, solver in enumerate(("sinkhorn", "emd")):
        output = tmp_path / f"out{index}"
        argv = ["--parents", parents[0], str(dead), "--output", str(output), "--align.solver", solver]
        assert main(fuse.run, [*argv, *QUICK]) == 0
        assert all(tensor.isfinite().all() for tensor in load_model(output).state_dict().values())


def test_widths_may_differ(parents: list[str], tmp_path: Path) -> None:
    wide = str(make_run(tmp_path / "wide", 7, embed_dim=24))
    for index, pair in enumerate(([parents[0], wide], [wide, parents[0]])):
        output = tmp_path / f"out{index}"
        assert main(fuse.run, ["--parents", *pair, "--output", str(output), *QUICK]) == 0
        assert [row.name for row in Report.load(output / "report").rows][2::2] == ["ensemble", "fused"]
        assert load_model(output).embed_dim == load_model(pair[0]).embed_dim


def test_finetune_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert "give --model" in refused(capsys, finetune.run, [])


@pytest.mark.slow
def test_ctrl_c_while_finetuning_can_be_resumed(fused: Path, tmp_path: Path) -> None:
    copy = tmp_path / "fused"
    shutil.copytree(fused, copy)
    argv = ["--model", str(copy), "--trainer.max_epochs", "400", "--baselines", "false", *QUICK]
    process = subprocess.Popen(
        [sys.executable, "finetune.py", *argv],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears_ctrl_c,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "--resume" in error
    assert (tmp_path / "fused-finetuned/checkpoints/last.ckpt").is_file()


def images(folder: Path, count: int, mode: str = "RGB") -> Path:
    """Pictures of ten classes, a folder each."""
    for label in range(10):
        place = folder / str(label)
        place.mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (20, 20), (25 * label, 5 * index, 90)).convert(mode).save(place / f"{index}.png")
    return folder


def test_models_of_other_channels_read_a_folder_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [make_run(tmp_path / f"m{seed}", seed, in_chans=3, img_size=24) / "model" for seed in (1, 2)]
    words = ["--parents", *map(str, models), "--data.path", str(images(tmp_path / "images", 6, "RGBA")), *QUICK]
    assert main(fuse.run, [*words, "--output", str(tmp_path / "fused")]) == 0
    said = capsys.readouterr().out
    assert "images: 48 training samples, too few for data.calibration 197 and data.validation 200: 10 for" in said
    assert {"fused", "ensemble"} <= {row.name for row in Report.load(tmp_path / "fused/report").rows}
    assert main(evaluate.run, ["--models", *map(str, models), *words[3:5]]) == 0
    line = refused(capsys, fuse.run, [*words, "--data.channels", "1", "--output", str(tmp_path / "other")])
    assert "the VisionTransformer reads images of 3 channels, but data.channels is 1; leave data.channels out" in line


def test_colour_images_under_the_grey_preset(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny = {"embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 2, "img_size": 32, "patch_size": 8}
    words = [word for key, value in tiny.items() for word in (f"--model.args.{key}", str(value))]
    words += ["--data.path", str(images(tmp_path / "images", 6)), "--trainer.max_epochs", "1"]
    assert main(train.run, [*words, "--output", str(run), *QUICK]) == 0
    model: Any = load_model(run)
    assert model.patch_embed.proj.in_channels == 3
    assert main(evaluate.run, ["--models", str(run)]) == 0
