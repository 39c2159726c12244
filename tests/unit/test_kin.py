"""Parents of one base are noticed, by their weights or by their cards."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fusionpl import fuse, load_config
from fusionpl.calibration.sectioned import SectionedModel
from fusionpl.families.binding import bind
from fusionpl.fusion.kin import ALIKE, weights_alike
from fusionpl.models.lineage import base_models
from fusionpl.models.save import save_model
from tests.models_for_tests import FAMILIES, images, logits, sentences, text_model, timm_vit

QUICK = {"align.solver": "emd", "refit.method": "none"}


def trained(model: nn.Module, seed: int, steps: int = 60, rate: float = 3e-3) -> nn.Module:
    """A copy after some steps on labels drawn at random."""
    found = copy.deepcopy(model).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(found.parameters(), lr=rate)
    for _ in range(steps):
        batch = torch.randn(8, 3, 16, 16, generator=generator)
        labels = torch.randint(5, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(found, batch), labels).backward()
        optimizer.step()
    return found.eval()


def network(model: nn.Module) -> SectionedModel:
    return SectionedModel(model, bind(model))


@pytest.mark.parametrize("kind", FAMILIES)
def test_finetuned_from_one_base_and_independent_seeds(kind: str) -> None:
    base = trained(FAMILIES[kind](1), 1)
    kin = weights_alike(network(trained(base, 2)), network(trained(base, 3)))
    strangers = weights_alike(network(base), network(trained(FAMILIES[kind](2), 2)))
    assert kin is not None
    assert strangers is not None
    assert kin > 0.9 > ALIKE
    assert abs(strangers) < 0.2 < ALIKE


def test_other_widths_are_not_compared() -> None:
    assert weights_alike(network(timm_vit(1)), network(timm_vit(2, width=24))) is None


def test_the_result_tells_and_advises() -> None:
    base = trained(timm_vit(1), 1)
    parents = [trained(base, 2), trained(base, 3), timm_vit(4)]
    config = load_config(None, QUICK)
    result = fuse(parents, [images()], config, names=["a", "b", "c"])
    (line,) = result.warnings
    assert line.startswith("a and b share one base (their weights are alike before any alignment, with a cosine of 0.9")
    assert line.endswith("often as good as a fusion; compare the rows vanilla and fused")
    assert not fuse(parents[1:], [images()], config).warnings


def test_cards_tell_of_the_base(tmp_path: Path) -> None:
    bases: dict[str, Any] = {"a": "org/base", "b": ["org/base", "org/other"], "c": "org/third", "d": None}
    for seed, (name, base) in enumerate(bases.items()):
        metadata = {"base_model": base} if base else {}
        save_model(text_model("bert masked-lm", seed), tmp_path / name, metadata=metadata)
    assert base_models(str(tmp_path / "b")) == {"org/base", "org/other"}
    assert not base_models(str(tmp_path / "d"))
    (tmp_path / "c/README.md").write_bytes(b"\xff---\nbase_model: [")
    assert not base_models(str(tmp_path / "c"))
    paths = [tmp_path / name for name in bases]
    result = fuse(paths, [sentences()], load_config(None, QUICK), names=list(bases))
    (line,) = result.warnings
    assert line.startswith("a and b share one base (their cards name org/base): ")
