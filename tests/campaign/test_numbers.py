"""Numbers at the ends of their types: a fused model that is finite, or one line."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusionpl
from fusionpl.errors import FusionError
from fusionpl.presets import CONF
from tests.models_for_tests import hf_vit, images, outputs, timm_vit

Parents = list[nn.Module]


def two() -> Parents:
    return [timm_vit(seed, depth=1) for seed in range(2)]


def scaled(factor: float, *names: str) -> Parents:
    """Parents with some parameters multiplied."""
    parents = two()
    with torch.no_grad():
        for parent in parents:
            for name, tensor in parent.named_parameters():
                if any(one in name for one in names):
                    tensor.mul_(factor)
    return parents


def same() -> Parents:
    return [timm_vit(0, depth=1) for _ in range(2)]


def a_scaled_copy() -> Parents:
    """The first, with every hidden unit's output larger and its use smaller by as much."""
    first = timm_vit(0, depth=1, act_layer=nn.ReLU)
    second = copy.deepcopy(first)
    with torch.no_grad():
        mlp = second.blocks[0].mlp
        mlp.fc1.weight.mul_(1e3), mlp.fc1.bias.mul_(1e3), mlp.fc2.weight.mul_(1e-3)
    return [first, second]


def half(factor: float = 1.0) -> Parents:
    return [parent.half() for parent in scaled(factor, "fc1.weight")]


# parents, calibration images
CASES: dict[str, tuple[Callable[[], Parents], Callable[[], Tensor]]] = {
    "black images": (two, lambda: torch.zeros_like(images())),
    "one image many times": (two, lambda: images(1).expand(24, -1, -1, -1)),
    "one sample": (two, lambda: images(1)),
    "huge images": (two, lambda: 1e18 * images()),
    "denormal images": (two, lambda: 1e-42 * images()),
    "huge activations": (lambda: scaled(1e12, "fc1", "qkv"), images),
    "activations beyond float32": (lambda: scaled(1e38, "fc1"), images),
    "tiny activations": (lambda: scaled(1e-18, "fc1", "qkv"), images),
    "denormal activations": (lambda: scaled(1e-41, "fc1", "qkv", "patch_embed"), images),
    "no activation": (lambda: scaled(0.0, "fc1", "qkv", "patch_embed"), images),
    "the same parents": (same, images),
    "a scaled copy": (a_scaled_copy, images),
    "float16 overflows": (lambda: half(3e4), images),
    "float16": (half, images),
    "transformers, black images": (lambda: [hf_vit(seed, depth=1) for seed in range(2)],
                                   lambda: torch.zeros_like(images())),
}  # fmt: skip


def configured(preset: str) -> fusionpl.FuseConfig:
    return fusionpl.load_config(CONF / "fuse" / f"{preset}.yaml", {"anchor": 0, "calibration.tokens": "all"})


BEYOND = ("huge images", "activations beyond float32")


@pytest.mark.parametrize("preset", ["default", "transport", "paper"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_finite_or_one_line(case: str, preset: str) -> None:
    make, calibration = CASES[case]
    parents = make()
    if case in BEYOND:
        with pytest.raises(FusionError, match=r"NaN or infinite values; check calibration data and parents$"):
            fusionpl.fuse(parents, [calibration()], configured(preset))
        return
    fused = fusionpl.fuse(parents, [calibration()], configured(preset)).model
    for name, tensor in fused.named_parameters():
        assert tensor.isfinite().all(), name
    assert torch.isfinite(outputs(fused.float())).all()


@pytest.mark.parametrize("case", ["the same parents", "a scaled copy"])
def test_parents_of_one_function_are_that_function(case: str) -> None:
    parents = CASES[case][0]()
    wanted = outputs(parents[0])
    found = outputs(fusionpl.fuse(parents, [images()], configured("default")).model)
    assert float((found - wanted).norm()) < 1e-3 * float(wanted.norm())
