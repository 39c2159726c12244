"""What a GPU computes is what the CPU computes. Runs where there is one: `pytest -m gpu`."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fusionpl
from benchmarks.common import EXACT
from fusionpl.calibration.config import CalibrationConfig
from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.calibration.forward import logits
from fusionpl.calibration.kept import Kept
from fusionpl.cli.jobs.alternative import trained_on
from fusionpl.datamodules.config import DataConfig
from fusionpl.datamodules.images import ImageDataModule
from fusionpl.fusion.config import RefineConfig
from fusionpl.fusion.methods.refinement import teach_parent
from fusionpl.fusion.voting import Voting
from fusionpl.models.build import build_model
from fusionpl.models.config import ModelConfig
from fusionpl.presets import CONF
from tests.models_for_tests import hf_vit, images, sentences, text_model, timm_vit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# model, preset, changes
SETTINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "one stream": ("vit", "joint", {"anchor": 0}),
    "one stream, wider": ("hf", "joint", {"anchor": 0, "width": 2}),
    "transport and refit": ("vit", "transport", {"anchor": 0}),
    "paper": ("vit", "paper", {"anchor": 0, "calibration.tokens": "class"}),
    "EMD": ("vit", "paper", {"anchor": 0, "calibration.tokens": "class", "align.solver": "emd"}),
    "rotation": ("vit", "transport", {"anchor": 0, **EXACT, "align.stream": "rotation"}),
    "text": ("text", "transport", {"anchor": 0}),
    "text, one stream": ("text", "joint", {"anchor": 0}),
    "streams on disk": ("vit", "joint", {"anchor": 0, "calibration.memory": 0}),
}


def pair(kind: str) -> tuple[list[nn.Module], list[Any]]:
    if kind != "text":
        return [(timm_vit if kind == "vit" else hf_vit)(seed, depth=2) for seed in range(2)], list(images().split(8))
    batch = sentences()
    batches = [{key: value[rows] for key, value in batch.items()} for rows in torch.arange(24).split(8)]
    return [text_model("bert masked-lm", seed, depth=2) for seed in range(2)], batches


def shown(model: nn.Module, batch: Any) -> torch.Tensor:
    with torch.inference_mode():
        return logits(model, batch).float().cpu()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_fusion_is_what_the_cpu_makes_of_it(setting: str) -> None:
    kind, preset, changes = SETTINGS[setting]
    parents, batches = pair(kind)
    config = fusionpl.load_config(CONF / "fuse" / f"{preset}.yaml", changes)
    expected = fusionpl.fuse(parents, batches, config).model
    fused = fusionpl.fuse([copy.deepcopy(parent).cuda() for parent in parents], batches, config).model
    assert {tensor.device.type for tensor in fused.state_dict().values()} == {"cuda"}
    for batch in batches:
        wanted = shown(expected, batch)
        assert float((shown(fused, batch) - wanted).norm() / wanted.norm()) < 2e-2


def test_a_model_and_a_folder_meet_on_the_gpu(tmp_path: Path) -> None:
    parents = [hf_vit(seed, depth=1) for seed in range(2)]
    parents[1].save_pretrained(tmp_path / "second")
    fused = fusionpl.fuse([parents[0].cuda(), tmp_path / "second"], [images(8)], device="cuda").model
    assert next(fused.parameters()).device.type == "cuda"


@pytest.mark.parametrize("preset", ["joint", "transport"])
def test_bfloat16_parents_are_fused_in_their_type(preset: str) -> None:
    parents, batches = pair("vit")
    half = [copy.deepcopy(parent).bfloat16().cuda() for parent in parents]
    rounded = [copy.deepcopy(parent).float().cpu() for parent in half]
    config = fusionpl.load_config(CONF / "fuse" / f"{preset}.yaml", {"anchor": 0})
    fused, wanted = (fusionpl.fuse(models, batches, config).model for models in (half, rounded))
    assert {parameter.dtype for parameter in fused.parameters()} == {torch.bfloat16}
    for batch in batches:
        expected = shown(wanted, batch)
        found = shown(fused.float(), batch)
        assert float((found - expected).norm() / expected.norm()) < 0.2


def test_refinement_draws_the_fused_model_to_its_parents() -> None:
    parents, batches = pair("vit")
    parents = [parent.cuda() for parent in parents]
    fused, refined = (
        fusionpl.fuse(parents, batches, fusionpl.load_config(CONF / "fuse" / "joint.yaml", changes)).model
        for changes in ({}, {"refine.method": "gradient", "refine.steps": 50, "refine.lr": 1e-3})
    )

    def far(model: nn.Module) -> float:
        found = 0.0
        for batch in batches:
            mean = torch.stack([shown(parent, batch).softmax(-1) for parent in parents]).mean(0)
            found += float((shown(model, batch).softmax(-1) - mean).norm())
        return found

    assert far(refined) < far(fused)


def test_what_else_could_be_done_comes_back_where_the_parents_are() -> None:
    data = ImageDataModule(DataConfig(image_size=8, batch_size=20, train_limit=100, calibration=100))
    options = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    parents = [
        build_model(ModelConfig("timm", "vit_tiny_patch16_224", options), num_classes=10).cuda() for _ in range(2)
    ]
    trained, cost = trained_on(data, 0.5, {}, parents[0])
    assert (cost.steps or 0) >= 1
    calibration = CalibrationSet(data.calibration_dataloader(), CalibrationConfig(), Kept(10**7))
    config, more = RefineConfig(minutes=0.05), data.unlabelled_dataloader()
    taught = teach_parent(0, parents, [Voting([0.5, 0.5])], calibration, config, more=more)
    assert taught.steps >= 1
    for model in (trained, taught.model):
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
