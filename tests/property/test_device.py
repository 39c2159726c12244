"""Parents on a device are fused there, to what they are fused to on the CPU."""

import gc
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusionpl
from benchmarks.common import EXACT
from fusionpl.calibration.forward import has_float64
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.cli.running import main
from fusionpl.errors import FusionError
from fusionpl.evaluation.metrics import evaluate, evaluate_ensemble
from fusionpl.presets import CONF
from tests.models_for_tests import CLASSES, VOCABULARY, hf_vit, images, outputs, sentences, text_model, timm_vit
from tests.pretend_device import DEVICE, PretendDevice

# model, preset, changes: between them every path that makes tensors
SETTINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "default": ("vit", "default", {}),
    "EMD": ("vit", "paper", {"calibration.tokens": "class", "align.solver": "emd", "align.normalize": "median"}),
    "weights": ("vit", "default", {"align.evidence": "weights"}),
    "joint Q and K": ("vit", "paper", {"calibration.tokens": "all", "align.qk": "joint"}),
    "rotation": ("vit", "default", {**EXACT, "align.stream": "rotation"}),
    "weighted residual": ("vit", "default", {"align.residual": "weighted_matrix", "align.metric": "correlation"}),
    "text": ("bert", "default", {}),
    "text, permutations": ("bert", "default", EXACT),
    "text, refinement": ("bert", "default", {"refine.start": "fused", "refine.steps": 2, "refine.lr": 1e-4}),
}


@pytest.fixture(autouse=True)
def _wrappable(monkeypatch: pytest.MonkeyPatch) -> None:
    # an inference tensor can't be wrapped
    monkeypatch.setattr(torch._C, "_InferenceMode", lambda mode: torch.set_grad_enabled(not mode))


def labelled(batch: dict[str, Tensor], classes: int) -> list[dict[str, Tensor]]:
    shape = batch["attention_mask"].shape if "attention_mask" in batch else (24,)
    labels = torch.randint(classes, shape, generator=torch.Generator().manual_seed(0))
    return [{key: value[rows] for key, value in {**batch, "labels": labels}.items()}
            for rows in torch.arange(24).split(8)]  # fmt: skip


def moved(model: nn.Module) -> nn.Module:
    model = model.to(DEVICE)
    if hasattr(model, "tie_weights"):  # nn.Module.to makes new parameters for tensors of another class
        model.tie_weights()
    return model


def test_the_pretended_device_refuses_a_mix_and_computes() -> None:
    with PretendDevice():
        there = torch.arange(3.0).to(DEVICE)
        with pytest.raises(RuntimeError, match="tensors on lazy and on the CPU"):
            there + torch.ones(3)
        assert (there + torch.ones(3, device=DEVICE)).cpu().tolist() == [1, 2, 3]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_fusion_stays_on_its_parents_device(setting: str) -> None:
    kind, preset, changes = SETTINGS[setting]
    if kind == "vit":
        parents = [timm_vit(seed, depth=1) for seed in range(2)]
        batches = labelled({"pixel_values": images()}, CLASSES)
    else:
        parents = [text_model("bert masked-lm", seed, depth=1) for seed in range(2)]
        batches = labelled(sentences(), VOCABULARY)
    config = fusionpl.load_config(CONF / "fuse" / f"{preset}.yaml", {"anchor": 0, **changes})
    expected = fusionpl.fuse(parents, batches, config).model
    with PretendDevice():
        parents = [moved(parent) for parent in parents]
        fused = fusionpl.fuse(parents, batches, config).model
        assert {tensor.device for tensor in fused.state_dict().values()} == {DEVICE}
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(fused.state_dict()[name].cpu(), tensor, rtol=1e-3, atol=1e-3)
        there = [{key: value.to(DEVICE) for key, value in batch.items()} for batch in batches]
        assert evaluate(fused, there)["loss"] == pytest.approx(evaluate(expected, batches)["loss"], rel=1e-3)
        assert evaluate_ensemble(parents, batches) == evaluate_ensemble(parents, there)


@pytest.mark.parametrize("changes", [{}, {"strategy": "head"}, {"refine.steps": 2, "refine.lr": 1e-4}])
def test_heads_of_their_own_stay_on_their_parents_device(changes: dict[str, Any]) -> None:
    config = fusionpl.load_config("default", {"labels": "separate", **changes})
    batch = sentences(16, seed=99)

    def made(move: Callable[[Any], Any]) -> dict[str, Tensor]:
        parents = [move(text_model("bert classifier", seed, depth=1)) for seed in range(2)]
        parents[1].config.problem_type = "regression"
        models = fusionpl.fuse(parents, [[sentences(24, seed)] for seed in range(2)], config).models
        assert {tensor.device for model in models.values() for tensor in model.parameters()} == {
            next(parents[0].parameters()).device
        }
        return {name: one.cpu() for name, one in fusionpl.predict(models, batch).items()}

    expected = made(lambda model: model)
    with PretendDevice():
        found = made(moved)
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("preset", ["joint", "transport", "paper"])
def test_parents_in_half_precision_are_fused_in_float32(preset: str) -> None:
    half = [timm_vit(seed, depth=2).bfloat16() for seed in range(2)]
    changes = {"anchor": 0, "calibration.tokens": "class"} if preset == "paper" else {"anchor": 0}
    config = fusionpl.load_config(CONF / "fuse" / f"{preset}.yaml", changes)
    expected = fusionpl.fuse(half, [images()], config).model.float()
    with PretendDevice():
        fused = fusionpl.fuse([moved(parent) for parent in half], [images()], config).model
        assert {tensor.dtype for tensor in fused.parameters()} == {torch.bfloat16}
        found = {name: tensor.cpu().float() for name, tensor in fused.state_dict().items()}
    wanted = outputs(expected)
    expected.load_state_dict(found)
    assert float((outputs(expected) - wanted).norm() / wanted.norm()) < 0.1


# kind of parents, changes, size of shards
BY_PATH: dict[str, tuple[str, dict[str, Any], str]] = {
    "rotation and refit, streams on disk": (
        "vit",
        {**EXACT, "align.stream": "rotation", "calibration.memory": 0},
        "5GB",
    ),
    "text, tied decoder, shards, streams on disk": ("bert", {"calibration.memory": 0, "align.solver": "emd"}, "10KB"),
}


@pytest.mark.parametrize("setting", BY_PATH)
def test_parents_by_path_are_fused_on_the_device_that_is_named(setting: str, tmp_path: Path) -> None:
    kind, changes, shards = BY_PATH[setting]
    paths = [tmp_path / str(seed) for seed in range(2)]
    for seed, path in enumerate(paths):
        parent: Any = hf_vit(seed, depth=1) if kind == "vit" else text_model("bert masked-lm", seed, depth=1)
        parent.save_pretrained(path, max_shard_size=shards)
    batches = [{"pixel_values": images(12)} if kind == "vit" else sentences(12)]
    config = fusionpl.load_config(CONF / "fuse" / "default.yaml", changes)
    expected = fusionpl.fuse(paths, batches, config).model
    used: set[torch.device] = set()
    through = SectionedModel.through

    def watched(self: SectionedModel, section: str, state: Any, hidden: Tensor, *args: Any, **options: Any) -> Any:
        used.update([hidden.device, *(tensor.device for tensor in state.values())])
        return through(self, section, state, hidden, *args, **options)

    with PretendDevice(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(SectionedModel, "through", watched)
        result = fusionpl.fuse(paths, batches, config, device=DEVICE, output=tmp_path / "fused")
        assert {one.plan.device for one in result.maps.values()} == {DEVICE}
    assert used == {DEVICE}
    found = fusionpl.load_model(tmp_path / "fused")
    for name, tensor in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), tensor, rtol=1e-3, atol=1e-3)


def test_named_parents_go_where_the_others_are(tmp_path: Path) -> None:
    parents: list[Any] = [hf_vit(seed, depth=1) for seed in range(2)]
    parents[1].save_pretrained(tmp_path)
    config = fusionpl.load_config(CONF / "fuse" / "paper.yaml", {"anchor": 0, "calibration.tokens": "class",
                                                                     "align.solver": "emd"})  # fmt: skip
    expected = fusionpl.fuse(parents, [images(8)], config).model
    with PretendDevice():
        fused = fusionpl.fuse([moved(parents[0]), tmp_path], [images(8)], config).model
        assert {tensor.device for tensor in fused.state_dict().values()} == {DEVICE}
        for name, tensor in expected.named_parameters():
            torch.testing.assert_close(fused.get_parameter(name).cpu(), tensor, rtol=1e-3, atol=1e-3)


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    parents: list[Any] = [hf_vit(seed, depth=1) for seed in range(2)]
    parents[1].save_pretrained(tmp_path)
    for device in ("tpu9", "cpu:x"):
        with pytest.raises(FusionError, match=f"there is no device {device}; use cpu, cuda or mps"):
            fusionpl.fuse([parents[0], tmp_path], [images(8)], device=device)


def test_parents_on_a_device_without_float64_are_refused() -> None:
    parents = [timm_vit(seed, depth=1) for seed in range(2)]
    with PretendDevice(float64=False), pytest.raises(FusionError, match=r"on lazy, which has no float64; fuse them on"):
        fusionpl.fuse([moved(parent) for parent in parents], [images()])


def test_the_callback_fuses_on_the_cpu_where_the_device_has_no_float64() -> None:
    parents, batches = [timm_vit(seed, depth=1) for seed in range(2)], [images()]
    expected = fusionpl.fuse(parents, batches).model.state_dict()
    data = SimpleNamespace(calibration_dataloader=lambda: batches)
    trainer: Any = SimpleNamespace(datamodule=data, strategy=SimpleNamespace(root_device=DEVICE), is_global_zero=True)
    module: Any = SimpleNamespace()
    with PretendDevice(float64=False):
        fusionpl.OTFusion(parents).setup(trainer, module, "fit")
    torch.testing.assert_close(module.model.state_dict(), expected, rtol=0, atol=0)


def test_a_device_out_of_memory_is_not_taken_for_one_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(torch.OutOfMemoryError):
        has_float64(torch.device("cpu"))


@pytest.mark.parametrize(
    ("preset", "changes"),
    [("default", {}), ("transport", {"align.solver": "emd"})],
)
@pytest.mark.slow
def test_a_device_that_is_full_is_one_line(
    preset: str, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it happens, nothing stays on the device, and with enough memory the same parents are fused."""
    config = fusionpl.load_config(CONF / "fuse" / f"{preset}.yaml", {"anchor": 0, **changes})
    with PretendDevice(memory=2**40) as device:
        parents = [moved(timm_vit(seed, depth=1)) for seed in range(2)]
        before = device.used

        def fuse(_: object) -> None:
            fusionpl.fuse(parents, [images()], config)

        assert main(fuse, []) == 0
        most = device.most
        for share in (0, 0.1, 0.4, 0.7, 0.99):
            device.memory, device.most = int(before + share * (most - before)), 0
            assert main(fuse, []) == 2
            assert re.fullmatch(
                r"error: out of memory: Tried to allocate [\d.]+ B; use smaller batches, samples or images\n",
                capsys.readouterr().err,
            )
            gc.collect()
            assert device.used <= before
        device.memory, device.most = most, 0
        assert main(fuse, []) == 0


def test_parents_on_two_devices_are_refused() -> None:
    near, far = timm_vit(0, depth=1), timm_vit(1, depth=1)
    with PretendDevice(), pytest.raises(FusionError, match=r"^a is on cpu, b on lazy; move them to one"):
        fusionpl.fuse([near, moved(far)], [images()], names=["a", "b"])
