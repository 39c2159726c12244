import copy
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

import fusionpl
from fusionpl.datamodules.config import DataConfig
from fusionpl.datamodules.images import ImageDataModule
from fusionpl.training.config import OptimConfig
from fusionpl.training.module import ClassificationModule
from tests.integration.runs import DATA, make_run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [make_run(tmp_path / f"seed-{seed}", seed) for seed in (1, 2)]


def trainer(*callbacks: L.Callback, **args) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), **args,
    )  # fmt: skip


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_the_callback_is_fuse(runs: list[Path], stage: str) -> None:
    parents = [fusionpl.load_model(run) for run in runs]
    data = ImageDataModule(DataConfig(**DATA))
    module = ClassificationModule(copy.deepcopy(parents[0]), OptimConfig(), 10)
    callback = fusionpl.OTFusion([str(run) for run in runs])
    getattr(trainer(callback, limit_train_batches=0, limit_val_batches=1, max_epochs=1), stage)(module, datamodule=data)
    expected = fusionpl.fuse(parents, data.calibration_dataloader()).model.state_dict()
    assert all(torch.equal(module.model.state_dict()[name], expected[name]) for name in expected)


def test_finetuning_starts_from_the_fused_model(runs: list[Path]) -> None:
    parents = [fusionpl.load_model(run) for run in runs]
    before = [copy.deepcopy(parent.state_dict()) for parent in parents]
    data = ImageDataModule(DataConfig(**DATA))
    module = ClassificationModule(copy.deepcopy(parents[0]), OptimConfig(lr=1e-3), 10)
    callback = fusionpl.OTFusion(parents)
    trainer(callback, max_epochs=1).fit(module, datamodule=data)
    assert callback.result is not None
    assert module.model is callback.result.model
    fused = fusionpl.fuse(parents, data.calibration_dataloader()).model.state_dict()
    assert any(not torch.equal(module.model.state_dict()[name], fused[name]) for name in fused)
    for parent, state in zip(parents, before, strict=True):
        assert all(torch.equal(parent.state_dict()[name], state[name]) for name in state)


def test_without_calibration_data_it_says_what_to_do(runs: list[Path]) -> None:
    class NoCalibration(L.LightningDataModule):
        def val_dataloader(self) -> list:
            return []

    module = ClassificationModule(fusionpl.load_model(runs[0]), OptimConfig(), 10)
    with pytest.raises(fusionpl.FusionError, match=r"calibration_dataloader\(\)"):
        trainer(fusionpl.OTFusion(runs)).validate(module, datamodule=NoCalibration())


REFINED = """
import time
import types

import lightning as L
import torch

import fusionpl
from fusionpl import schedule
from fusionpl.datamodules.config import DataConfig
from fusionpl.datamodules.images import ImageDataModule
from fusionpl.fusion.config import FuseConfig, RefineConfig
from fusionpl.training.config import OptimConfig
from fusionpl.training.module import ClassificationModule
from tests.integration.runs import DATA


class Kept(fusionpl.OTFusion):
    def setup(self, trainer, module, stage):
        if trainer.global_rank:  # whose clock is ten times as fast, and doesn't count
            schedule.time = types.SimpleNamespace(monotonic=lambda: 10 * time.monotonic())
        super().setup(trainer, module, stage)
        torch.save(module.model.state_dict(), f"{output}/rank-{{trainer.global_rank}}.pt")
        with open(f"{output}/rank-{{trainer.global_rank}}.txt", "w") as file:
            file.write(self.result.notes[-1])


callback = Kept({runs}, FuseConfig(refine=RefineConfig({options}, augment=True)))
trainer = L.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    callbacks=[callback], limit_test_batches=0,
)
module = ClassificationModule(fusionpl.load_model({runs}[0]), OptimConfig(), 10)
trainer.test(module, datamodule=ImageDataModule(DataConfig(**DATA, shift=2)), verbose=False)
if trainer.is_global_zero:
    torch.save(callback.result.refitted.state_dict(), "{output}/refitted.pt")
"""


def run_script(script: Path, text: str) -> None:
    script.write_text(text)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("options", ["minutes=0.1, start='fused', lr=1e-3", "steps=20", "steps=20, start='parent'"])
def test_two_processes_refine_one_model_and_choose_the_same(runs: list[Path], tmp_path: Path, options: str) -> None:
    words = REFINED.format(runs=[str(run) for run in runs], output=tmp_path, options=options)
    run_script(tmp_path / "refined.py", words)
    summary = [(tmp_path / f"rank-{rank}.txt").read_text() for rank in range(2)]
    assert summary[0] == summary[1]
    names = ("refitted", "rank-0", "rank-1")
    before, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in names)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], before[name]) for name in first)


SHARDED = """
import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule

import fusionpl
from fusionpl.datamodules.config import DataConfig
from fusionpl.datamodules.images import ImageDataModule
from fusionpl.training.config import OptimConfig
from fusionpl.training.module import ClassificationModule
from tests.integration.runs import DATA

callback = fusionpl.OTFusion({runs})
module = ClassificationModule(fusionpl.load_model({runs}[0]), OptimConfig(lr=1e-3), 10)
trainer = L.Trainer(
    accelerator="cpu", devices=2, strategy=ModelParallelStrategy(), logger=False, enable_checkpointing=False,
    enable_progress_bar=False, callbacks=[callback], max_epochs=1, limit_train_batches=0,
    use_distributed_sampler=False,
)
trainer.fit(module, datamodule=ImageDataModule(DataConfig(**DATA)))
blocks = [path for path, part in module.model.named_modules() if isinstance(part, FSDPModule)]
assert blocks == ["", "blocks.0", "blocks.1"], blocks
model = module.whole()
assert model is callback.result.model
if trainer.is_global_zero:
    torch.save(model.state_dict(), "{output}")
"""


@pytest.mark.slow
def test_it_fuses_before_fsdp_shards(runs: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "model.pt"
    run_script(tmp_path / "sharded.py", SHARDED.format(runs=[str(run) for run in runs], output=output))
    parents = [fusionpl.load_model(run) for run in runs]
    fused = fusionpl.fuse(parents, ImageDataModule(DataConfig(**DATA)).calibration_dataloader()).model.state_dict()
    found = torch.load(output, weights_only=True)
    assert all(torch.allclose(found[name], fused[name], atol=1e-5) for name in fused)
