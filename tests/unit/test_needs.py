"""What memory and disk a fusion needs, before it is run."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fusionpl.calibration.kept import GIB
from fusionpl.errors import FusionError
from fusionpl.fusion.config import load_config
from fusionpl.fusion.fuse import prepare
from fusionpl.fusion.needs import Needs
from tests.models_for_tests import CAUSAL, ELECTRA, VISION, causal, images, sentences, text_model, timm_vit

CPU = torch.device("cpu")
REFIT = {"refit.method": "ridge"}


def needed(parents: list[nn.Module], options: dict[str, Any], samples: int = 64, batch: Any = None) -> Needs:
    config = load_config(None, {"calibration.memory": 1e-4, **options})
    return prepare(parents, config).needs(images(16) if batch is None else batch, samples, CPU)


def test_what_is_kept_grows_with_the_samples_and_not_with_the_depth() -> None:
    parents = [timm_vit(0), timm_vit(1)]
    few, many = (needed(parents, REFIT, samples) for samples in (64, 256))
    assert many.disk > 2 * few.disk
    assert needed(parents, REFIT | {"calibration.samples": 64}, 256).disk == few.disk
    deep = needed([timm_vit(seed, depth=4) for seed in (0, 1)], REFIT | {"calibration.memory": 1.0}, 64)
    shallow = needed(parents, REFIT | {"calibration.memory": 1.0}, 64)
    assert deep.memory < 1.5 * shallow.memory
    assert deep.output > 1.5 * shallow.output


def test_a_third_parent_and_a_wider_one_need_more() -> None:
    two, three = (needed([timm_vit(seed) for seed in range(count)], REFIT) for count in (2, 3))
    assert three.memory > two.memory
    assert needed([timm_vit(0), timm_vit(1, width=32, mlp=48)], REFIT).memory > two.memory


def test_weights_as_evidence_keep_no_activations() -> None:
    parents = [timm_vit(0), timm_vit(1)]
    of_weights, of_activations = (needed(parents, {"align.evidence": one}) for one in ("weights", "activations"))
    assert of_weights.disk < of_activations.disk


@pytest.mark.parametrize("name", [*CAUSAL, *ELECTRA, *VISION])
def test_every_family_is_counted(name: str) -> None:
    make = ELECTRA.get(name) or VISION.get(name) or partial(causal, name)
    batch = images(8) if name in VISION else sentences(8)
    assert needed([make(0), make(1)], REFIT | {"align.residual": "auto"}, batch=batch).memory > 0


def test_no_weight_is_read() -> None:
    prepared = prepare([text_model("bert masked-lm", seed) for seed in (0, 1)], load_config(None, REFIT))

    def never(_: str) -> Any:
        raise AssertionError

    team = prepared.team.of(network.but(read=never) for network in prepared.team.networks)
    changed = type(prepared)(team, prepared.plan, (), None)
    assert changed.needs(sentences(4), 4, CPU).memory > 0


def test_what_does_not_fit_is_refused_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[Needs.__module__], "free_memory", lambda _: 2 * GIB)
    Needs(GIB, 0, 0).check(CPU, tmp_path / "run")
    words = "needs about 5.0 GiB of memory and 2.0 GiB are free: 3.0 GiB are missing; lower calibration.batch_size"
    with pytest.raises(FusionError, match=words):
        Needs(5 * GIB, 0, 0).check(CPU, tmp_path / "run")
    with pytest.raises(FusionError, match="too little for the 1048576\\.0 GiB of temporary files; set TMPDIR"):
        Needs(0, 2**50, 0).check(CPU, None)
    with pytest.raises(FusionError, match=f"{tmp_path} has .* of the fused model; choose another folder with --output"):
        Needs(0, 0, 2**50).check(CPU, tmp_path / "new" / "run")


def test_it_is_told_in_one_line() -> None:
    told = Needs(3 * GIB, 0, 5 * 2**20).told(CPU)
    assert told == "expected on cpu: 3.0 GiB of memory, 0.0 GiB of temporary files, a model of 5 MiB"
