import copy
from pathlib import Path

import lightning as L
import pytest
import torch

import fusionpl
from fusionpl.datamodules import DataConfig, ImageDataModule
from fusionpl.training import ClassificationModule, OptimConfig
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
