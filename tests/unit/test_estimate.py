"""What a fusion is expected to take, before it is run."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fusionpl.fusion.estimate import Estimate, estimate
from torch import nn

from fusionpl.calibration.kept import GIB
from fusionpl.calibration.network import Network
from fusionpl.errors import FusionError
from fusionpl.families.binding import bind
from fusionpl.fusion.config import load_config
from fusionpl.fusion.plan import make_plan
from fusionpl.fusion.survey import TRIAL
from fusionpl.fusion.units import trial_of
from tests.models_for_tests import CAUSAL, ELECTRA, VISION, causal, images, sentences, text_model, timm_vit

CPU = torch.device("cpu")
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "refit": {"refit.method": "ridge"},
    "rotation": {"align.stream": "rotation", "align.residual": "tie", "align.heads": "matched"},
    "weights": {"align.evidence": "weights"},
}


def expected(parents: list[nn.Module], options: dict[str, Any], samples: int = 64, batch: Any = None) -> Estimate:
    networks = [Network(parent, bind(parent)) for parent in parents]
    config = load_config(None, {"calibration.memory": 1.0, **options})
    plan = make_plan([network.binding for network in networks], 0, config, [str(i) for i in range(len(parents))])
    batch = images(16) if batch is None else batch
    return estimate(plan, networks, 0, config, batch, samples, CPU)


@pytest.mark.parametrize("name", SETTINGS)
def test_work_grows_with_depth_and_time_is_positive(name: str) -> None:
    two, four = (expected([timm_vit(seed, depth=depth) for seed in (0, 1)], SETTINGS[name]) for depth in (2, 4))
    assert all(1 <= four.work[kind] / two.work[kind] <= 2 for kind in two.work if two.work[kind])
    assert four.seconds(CPU) > 0


def test_products_grow_with_the_samples_and_solving_does_not() -> None:
    few, many = (expected([timm_vit(0), timm_vit(1)], SETTINGS["refit"], samples) for samples in (64, 256))
    assert many.work["forward"] == 4 * few.work["forward"]
    assert many.work["solves"] == few.work["solves"]
    assert expected([timm_vit(0), timm_vit(1)], {"calibration.samples": 64}, 256).work["forward"] < many.work["forward"]


def test_a_third_parent_adds_work() -> None:
    two, three = (expected([timm_vit(seed) for seed in range(count)], SETTINGS["refit"]) for count in (2, 3))
    assert three.work["forward"] > two.work["forward"]
    assert three.memory > two.memory


def test_weights_as_evidence_run_nothing() -> None:
    found = expected([timm_vit(0), timm_vit(1)], SETTINGS["weights"])
    assert found.work["forward"] == 0
    assert found.work["transport"] > 0


def test_refinement_takes_its_steps_or_its_minutes() -> None:
    def refined(**options: Any) -> Estimate:
        more = {f"refine.{key}": value for key, value in options.items()}
        return expected([timm_vit(0), timm_vit(1)], SETTINGS["refit"] | more)

    off = refined()
    few, many, timed = (refined(method="gradient", **one) for one in ({"steps": 10}, {"steps": 20}, {"minutes": 2.0}))
    assert few.work["forward"] > off.work["forward"]
    assert many.work["forward"] - few.work["forward"] == few.work["forward"] - off.work["forward"]
    assert (timed.work, timed.given, off.given) == (off.work, 120, 0)
    assert timed.seconds(CPU) > 120


def test_parents_of_other_widths_and_text() -> None:
    wide = expected([timm_vit(0), timm_vit(1, width=32, mlp=48)], SETTINGS["refit"])
    assert wide.work["products"] > expected([timm_vit(0), timm_vit(1)], SETTINGS["refit"]).work["products"]
    text = expected([text_model("bert masked-lm", seed) for seed in (0, 1)], SETTINGS["refit"], batch=sentences(8))
    assert text.work["products"] > 0


@pytest.mark.parametrize("name", [*CAUSAL, *ELECTRA, *VISION])
def test_every_family_is_estimated(name: str) -> None:
    make = ELECTRA.get(name) or VISION.get(name) or partial(causal, name)
    batch = images(8) if name in VISION else sentences(8)
    found = expected([make(0), make(1)], SETTINGS["refit"] | {"align.residual": "auto"}, batch=batch)
    assert found.work["forward"] > 0
    assert found.memory > 0


def test_no_weight_is_read() -> None:
    def never(_: str) -> Any:
        raise AssertionError

    model = timm_vit()
    networks = [Network(model, bind(model), read=never) for _ in range(2)]
    config = load_config(None, SETTINGS["refit"])
    plan = make_plan([network.binding for network in networks], 0, config, ["a", "b"])
    estimate(plan, networks, 0, config, images(4), 4, CPU)


def test_what_does_not_fit_is_refused_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[Estimate.__module__], "free_memory", lambda _: 2 * GIB)
    fits = Estimate(GIB, 0, 0, {})
    fits.check(CPU, tmp_path / "run")
    words = "needs about 5.0 GiB of memory and 2.0 GiB are free: 3.0 GiB are missing; lower calibration.batch_size"
    with pytest.raises(FusionError, match=words):
        Estimate(5 * GIB, 0, 0, {}).check(CPU, tmp_path / "run")
    with pytest.raises(FusionError, match="too little for the 1048576\\.0 GiB of temporary files; set TMPDIR"):
        Estimate(0, 2**50, 0, {}).check(CPU, None)
    with pytest.raises(FusionError, match=f"{tmp_path} has .* of the fused model; choose another folder with --output"):
        Estimate(0, 0, 2**50, {}).check(CPU, tmp_path / "new" / "run")


def test_it_is_told_in_one_line() -> None:
    told = Estimate(3 * GIB, 0, 5 * 2**20, {"forward": 1e6}).told(CPU)
    assert told == "expected: 0 s on cpu, 3.0 GiB of memory, 0.0 GiB of temporary files, a model of 5 MiB"


def test_a_trial_is_told_of_where_there_may_be_one() -> None:
    config = load_config("joint", {"refine.method": "gradient", "refine.minutes": 5})
    trial = trial_of(config, classifies=True)
    assert trial is not None
    assert (trial.calibration.samples, trial.refine.method) == (TRIAL, "none")
    assert trial_of(config, classifies=False) is None
    assert trial_of(load_config("joint", {"units": "even"}), classifies=True) is None
    assert trial_of(load_config("transport"), classifies=True) is None
    told = Estimate(GIB, 0, GIB, {}, given=100.0).told(CPU, Estimate(0, 0, 0, {}, given=10.0))
    assert told.startswith(
        "expected: 100 s (20 s more if units: auto has to try both ways) on cpu, 1.0 GiB of memory, "
    )
