"""The tables of speed at a size of seconds, and that what the engine is compared with computes the same."""

import csv
import json
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from benchmarks.common import PAPER
from benchmarks.speed import __main__ as command
from benchmarks.speed import memory
from benchmarks.speed.cell import Request, in_fresh_process
from benchmarks.speed.pairs import Shape, write_folder
from benchmarks.speed.plain import plain_fusion
from benchmarks.speed.tables import FULL, REFIT, SETTINGS, TABLES
from fusionpl.errors import FusionError
from fusionpl.fusion.config import load_config
from fusionpl.fusion.fuse import fuse
from fusionpl.models.load import load_model
from tests.models_for_tests import largest_difference, redrawn

ROWS = {
    "ratio": {
        *(("ViT 32x2", name) for name in SETTINGS),
        *(("BERT 32x2", name) for name in SETTINGS if name != "rotation"),
    },
    "default": {("ViT 32x2", "default"), ("ViT 32x2", "paper")},
    "depth": {(f"ViT 32x{depth}", name) for depth in (1, 2) for name in SETTINGS},
    "samples": {("ViT 32x2", "paper"), ("ViT 32x2", REFIT)},
    "plain": {("ViT 32x2", "plain recipe"), ("ViT 32x2", "paper")},
    "large": {("ViT 32x2", REFIT), ("BERT 32x2, bfloat16 files", REFIT)},
}
COLUMNS = {
    **{name: {"forward", "seconds", "ratio", "extra"} for name in ("ratio", "default", "depth", "samples")},
    "plain": {"seconds", "extra", "faster", "share"},
    "large": {"forward", "seconds", "ratio", "most"},
}
TINY_BERT = Shape("bert", 16, 2, heads=2, mlp=24, vocabulary=40)


@pytest.mark.slow
def test_all_tables_are_measured_once_and_written(tmp_path: Path) -> None:
    output, runs = tmp_path / "out", tmp_path / "runs"
    words = ["--output", str(output), "--runs", str(runs), "--quick"]
    command.run(words)
    cells = {file: file.stat().st_mtime_ns for file in runs.glob("cells/*/*.json")}
    for name in TABLES:
        with (output / f"{name}.csv").open(newline="") as lines:
            found = list(csv.DictReader(lines))
        assert {(line["model"], line["setting"]) for line in found} == ROWS[name]
        assert COLUMNS[name] < set(found[0])
        for line in found:
            assert float(line["seconds"]) > 0
            assert line["machine"]
            assert line["date"]
            assert line["commit"]
        text = (output / f"{name}.md").read_text()
        assert "python -m benchmarks.speed" in text
        assert "missing" not in text
        assert "](speed.png)" in text
    assert (output / "speed.png").stat().st_size > 1000
    command.run([*words, "ratio"])
    assert cells == {file: file.stat().st_mtime_ns for file in runs.glob("cells/*/*.json")}


@pytest.mark.slow
def test_a_cell_in_a_process_of_its_own() -> None:
    preset, changes = SETTINGS[REFIT]
    found = in_fresh_process(Request(Shape("vit", 32, 1, 2, 32, channels=1), 4, 1, str(preset), changes))
    assert found.keys() == {"forward", "seconds", "ratio", "extra", "most"}
    assert found["most"] > found["extra"] > 0


def test_nothing_to_render_and_no_such_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FusionError, match=r"no cell of depth is in .*; leave out --render"):
        command.run(["depth", "--render", "--runs", str(tmp_path), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        command.run(["width"])
    assert "there is no table width; choose from ratio, default, depth" in capsys.readouterr().err


def test_full_tables_have_what_was_promised() -> None:
    tables = {name: make(FULL, Path("runs")) for name, make in TABLES.items()}
    asked = {(entry.model, entry.setting, entry.request.threads) for entry in tables["ratio"].entries}
    models = ("ViT 128x6", "ViT 384x12", "ViT 768x12", "ViT 1024x24", "BERT-base")
    assert asked == {(model, setting, threads) for model in models for setting in SETTINGS for threads in (1, 2)} - {
        ("BERT-base", "rotation", threads) for threads in (1, 2)
    }  # fmt: skip
    for table in tables.values():
        files = [entry.cell.kept_in(Path()) for entry in table.entries]
        assert len(set(files)) == len(files)


def vit(seed: int) -> nn.Module:
    model = VisionTransformer(img_size=32, patch_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=5)
    return redrawn(model, seed)


def test_the_plain_recipe_is_our_paper_setting() -> None:
    parents = [vit(1), vit(2)]
    batches = [torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    ours = fuse(parents, batches, load_config(PAPER)).model
    plain = plain_fusion(*parents, batches)
    assert largest_difference(ours, plain) < 1e-4
    assert largest_difference(ours, parents[1]) > 0.1


def test_a_written_folder_is_a_sharded_model(tmp_path: Path) -> None:
    write_folder(TINY_BERT, 1, tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    model = load_model(tmp_path / "model")
    assert len(set(index["weight_map"].values())) > TINY_BERT.depth
    assert {name for name, _ in model.named_parameters()} == set(index["weight_map"])
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "model" / file, framework="pt") as opened:
            tensor = opened.get_tensor(name)
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(model.get_parameter(name).detach().to(tensor), tensor)


def test_the_peak_of_memory_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    size = 128 * 2**20
    for reset in (memory._RESET, tmp_path / "none" / "clear_refs"):  # the kernel's mark, then samples
        monkeypatch.setattr(memory, "_RESET", reset)
        with memory.watched() as found:
            held = torch.ones(size, dtype=torch.uint8)
            time.sleep(0.05)
            del held
        assert 0.9 * size < found.extra < 1.5 * size
