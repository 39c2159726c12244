"""What a linear module writes may be described by what it reads: the same moments, the same refit."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusionpl
from fusionpl.calibration import observe
from fusionpl.calibration.batches import no_progress
from fusionpl.calibration.config import CalibrationConfig
from fusionpl.calibration.flow import CalibrationSet
from fusionpl.calibration.forward import logits
from fusionpl.calibration.inputs import InputMoments, sources
from fusionpl.calibration.kept import Kept
from fusionpl.calibration.moments import Moments
from fusionpl.calibration.network import Network
from fusionpl.families import bind
from fusionpl.fusion import plan
from fusionpl.fusion.survey import Survey
from fusionpl.fusion.sweep import Team, look
from tests.models_for_tests import (
    CAUSAL,
    ELECTRA,
    FAMILIES,
    TEXT_MODELS,
    VISION,
    causal,
    hf_vit,
    images,
    sentences,
    text_model,
    timm_vit,
)

MODELS: dict[str, Callable[[int], nn.Module]] = {
    **FAMILIES,
    **{name: lambda seed, name=name: text_model(name, seed) for name in TEXT_MODELS},
    **{name: lambda seed, name=name: causal(name, seed) for name in CAUSAL},
    **VISION,
    **ELECTRA,
}


def batch_of(model: nn.Module) -> dict[str, Tensor]:
    reads = getattr(model, "main_input_name", "pixel_values")
    return {"pixel_values": images(12)} if reads == "pixel_values" else sentences(12)


def moments(models: list[nn.Module]) -> dict[tuple[str, ...], Moments]:
    """Of the second with the first, of all axes that are seen and of Q and K together."""
    networks = [Network(model, bind(model)) for model in models]
    binding = networks[0].binding
    keys = [(axis,) for axis in binding.taps if axis in binding.free] + [tuple(pair) for pair in binding.circuits]
    kept = Kept(10**9)
    data = CalibrationSet([batch_of(models[0])], CalibrationConfig(batch_size=5), kept)
    team = Team(networks, 0, data, Survey(kept), no_progress)
    look(team, keys, (), "all", {})
    return dict(team.survey.of(1))


@pytest.mark.parametrize("name", MODELS)
def test_moments_of_outputs_follow_from_those_of_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[str, ...]] = []
    gather = InputMoments.moments

    def spy(self: InputMoments, *args: Any) -> Any:
        found = gather(self, *args)
        used.extend(found)
        return found

    models = [MODELS[name](seed) for seed in (0, 1)]
    monkeypatch.setattr(InputMoments, "moments", spy)
    derived = moments(models)
    assert any(key[0].endswith(".q") for key in used)
    monkeypatch.setattr(observe, "sources", lambda *_: [])
    direct = moments(models)
    for key in used:
        for scale in ("standardize", "none"):
            a, b = derived[key].gram(scale), direct[key].gram(scale)
            for found, wanted in zip((a.parent, a.anchor, a.cross), (b.parent, b.anchor, b.cross), strict=True):
                torch.testing.assert_close(
                    found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()), msg=str(key)
                )


@pytest.mark.parametrize(
    "name", ["vit_timm", "vit_hf", "bert masked-lm", "gpt2", "gpt_neox", "llama", "qwen3", "timm, packed gate"]
)
def test_a_refit_to_inputs_is_one_to_outputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parents = [MODELS[name](seed) for seed in range(3)]
    batch = batch_of(parents[0])
    config = fusionpl.load_config(None, {"refit.method": "ridge", "align.solver": "emd", "calibration.batch_size": 5})

    def fused() -> Tensor:
        model = fusionpl.fuse(parents, [batch], config).model
        with torch.inference_mode():
            return logits(model, batch)

    narrow = fused()
    real = plan.stages
    monkeypatch.setattr(
        plan, "stages", lambda *args: tuple(dataclasses.replace(one, narrow=False) for one in real(*args))
    )
    torch.testing.assert_close(narrow, fused(), rtol=0, atol=2e-3 * float(narrow.abs().max()))


def test_modules_behind_two_norms_are_two_sources() -> None:
    """In a parallel residual attention and MLP read one axis, normalised twice."""
    binding = bind(causal("gpt_neox"))
    block = binding.blocks[0]
    found = sources(binding, block, [(f"{block}.{axis}",) for axis in ("q", "k", "v", "ffn")])
    assert len(found[0].keys) == 3
    assert all(len({binding.taps[axis].target for key in one.keys for axis in key}) == 1 for one in found)


def test_what_is_no_wider_is_seen_itself() -> None:
    for model in (timm_vit(), hf_vit()):
        binding = bind(model)
        block = binding.blocks[0]
        assert not sources(binding, block, [(f"{block}.attn",), (f"{block}.mlp",)])
        assert not sources(binding, "stem", [("stem.patch",)])
