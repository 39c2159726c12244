"""Wrong options are refused before a weight is read or a batch is run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fusionpl import fuse, load_config
from fusionpl.alignment.config import AlignConfig
from fusionpl.calibration.config import CalibrationConfig
from fusionpl.cli import fuse as command
from fusionpl.cli import sweep
from fusionpl.cli.running import main
from fusionpl.errors import FusionError
from fusionpl.fusion.config import FuseConfig, RefineConfig
from fusionpl.fusion.fuse import Fusion
from fusionpl.models.tensors import Tensors
from tests.integration.runs import make_run
from tests.models_for_tests import hf_vit, images, text_model, timm_vit

ROTATION: dict[str, Any] = {"stream": "rotation", "residual": "tie", "heads": "matched", "solver": "assignment"}
Configured = Callable[[], FuseConfig]


class Untouched:
    """A calibration set that nobody may read."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("a batch was read")


def align(**options: Any) -> Configured:
    return lambda: FuseConfig(align=AlignConfig(**options))


def calibration(**options: Any) -> Configured:
    return lambda: FuseConfig(calibration=CalibrationConfig(**options))


OPTIONS: dict[str, tuple[Configured, str]] = {
    "reg below 0": (align(reg=-1), "align.reg must be above 0, not -1"),
    "reg 0": (align(reg=0.0), "align.reg must be above 0"),
    "reg NaN": (align(reg=float("nan")), "align.reg must be above 0, not nan"),
    "reg infinite": (align(reg=float("inf")), "align.reg must be above 0, not inf"),
    "no samples": (calibration(samples=0), "calibration.samples must be at least 1, not 0"),
    "no batch": (calibration(batch_size=0), "calibration.batch_size must be at least 1, not 0"),
    "tokens": (calibration(tokens="centre"), "calibration.tokens 'centre': use all, class, mean or window:N"),
    "memory below 0": (calibration(memory=-0.5), "calibration.memory must be a number of GiB, not -0.5"),
    "memory NaN": (calibration(memory=float("nan")), "calibration.memory must be a number of GiB, not nan"),
    "rotation, flat heads": (align(stream="rotation", residual="tie"), "it needs align.heads matched"),
    "rotation, two streams": (align(stream="rotation", heads="matched"), "it needs align.residual tie"),
    "rotation of weights": (align(**ROTATION, evidence="weights"), "it needs align.evidence activations"),
    "weights too many": (lambda: FuseConfig(weights=[0.5, 0.3, 0.2]), "weights: 3 numbers for 2 parents"),
    "weights above 1": (lambda: FuseConfig(weights=[0.9, 0.9]), "weights must sum to 1, [0.9, 0.9] sum to 1.8"),
    "weights NaN": (lambda: FuseConfig(weights=[float("nan"), 1.0]), "weights must sum to 1"),
    "anchor": (lambda: FuseConfig(anchor=2), "anchor 2 is not an index into 2 parents"),
    "anchor from the end": (lambda: FuseConfig(anchor=-3), "anchor -3 is not an index into 2 parents"),
    "steps without refinement": (
        lambda: FuseConfig(refine=RefineConfig("none", minutes=2)), "minutes has nothing to do while refine.method is"),
    "steps": (lambda: FuseConfig(refine=RefineConfig("gradient", steps=0)), "refine.steps must be at least 1"),
    "lr": (lambda: FuseConfig(refine=RefineConfig("gradient", lr=float("nan"))), "refine.lr must be above 0"),
    "a parent of another width": (
        lambda: FuseConfig(width=2, strategy="joint", refine=RefineConfig("gradient", start="parent")),
        "refine.start parent gives a parent's width; leave width out"),
    "steps and minutes": (lambda: FuseConfig(refine=RefineConfig("gradient", steps=5, minutes=1)), "leave one out"),
}  # fmt: skip


def refusal(attempt: Callable[[], Any]) -> str:
    with pytest.raises(FusionError) as caught:
        attempt()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_refused_before_any_model_is_opened(name: str, tmp_path: Path) -> None:
    configured, words = OPTIONS[name]
    nowhere = [tmp_path / "nowhere", tmp_path / "at-all"]
    assert words in refusal(lambda: fuse(nowhere, Untouched(), configured(), output=tmp_path / "fused"))
    assert list(tmp_path.iterdir()) == []


# what only the parents' sizes can tell
WIDE: dict[str, Any] = {"width": 24, "mlp": 40}
PARENTS: dict[str, tuple[Callable[[], list[nn.Module]], dict[str, Any], str]] = {
    "assignment between widths": (
        lambda: [timm_vit(0), timm_vit(1, **WIDE)], {"solver": "assignment"}, "assignment needs parents of one width"),
    "identity between widths": (
        lambda: [timm_vit(0), timm_vit(1, **WIDE)], {"residual": "identity"}, "identity needs parents of one width"),
    "flat heads": (
        lambda: [timm_vit(0), timm_vit(1, heads=2)], {}, "different head count: 2 and 4 heads"),
    "rotation of a post-LN stream": (
        lambda: [text_model("bert classifier", seed) for seed in range(2)], ROTATION, "bert is post-LN"),
    "rotation through a norm in the stream": (
        lambda: [timm_vit(seed, pre_norm=True) for seed in range(2)], ROTATION, "'norm_pre' normalises inside"),
    "depths": (lambda: [timm_vit(0), timm_vit(1, depth=3)], {}, "made by create_model"),
    "families": (lambda: [timm_vit(0), hf_vit(1)], {}, "different families"),
    "one parent": (lambda: [timm_vit(0)], {}, "at least two parents, not 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARENTS)
def test_what_does_not_fit_the_parents_is_refused_before_a_batch_is_read(name: str) -> None:
    parents, options, words = PARENTS[name]
    assert words in refusal(lambda: fuse(parents(), Untouched(), FuseConfig(align=AlignConfig(**options))))


@pytest.mark.parametrize("options", [{"solver": "assignment"}, {"heads": "matched", "solver": "assignment"}])
def test_no_weight_is_read_of_parents_that_do_not_fit(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [make_run(tmp_path / "0", 0), make_run(tmp_path / "1", 1, embed_dim=24)]

    def read(*_: Any) -> Any:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Tensors, "__getitem__", read)
    config = FuseConfig(align=AlignConfig(**options))
    assert "needs parents of one width" in refusal(lambda: fuse(paths, Untouched(), config))


def test_nothing_is_read_of_a_calibration_set_that_is_not_needed() -> None:
    config = load_config(None, {"align.evidence": "weights"})
    fuse([timm_vit(seed) for seed in range(2)], Untouched(), config)


def test_a_calibration_set_that_fails_says_so_itself() -> None:
    def broken() -> Iterator[Any]:
        yield images(3)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        fuse([timm_vit(seed) for seed in range(2)], broken())


@pytest.mark.parametrize("runner", [command.run, sweep.run], ids=["fuse", "sweep"])
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--align.reg", "-1"], "align.reg must be above 0, not -1"),
        (["--align.solvr", "emd"], "did you mean 'align.solver'"),
        (["--calibration.samples", "0"], "calibration.samples must be at least 1"),
        (["--calibration.tokens", "middle"], "calibration.tokens 'middle'"),
        (["--calibration.memory", "-1"], "calibration.memory must be a number of GiB"),
        (["--align.stream", "rotation"], "align.stream rotation"),
        (["--weights", "[0.9, 0.9]"], "weights must sum to 1"),
        (["--anchor", "5"], "anchor 5 is not an index into 2 parents"),
        (["--refine.method", "gradient", "--refine.lr", "0"], "refine.lr must be above 0"),
    ],
)
def test_the_command_names_the_option_and_not_the_parent(
    runner: Any, argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = [str(tmp_path / "nonexistent"), str(tmp_path / "either")]
    more = ["--sweep", "align.residual=tie,average"] if runner is sweep.run else []
    assert main(runner, ["--parents", *nowhere, "--output", str(tmp_path / "out"), *more, *argv]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert "nonexistent" not in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ("anchor: 7", "anchor 7 is not an index into 2 parents"),
        ("weights: [1.0, 1.0]", "weights must sum to 1"),
        ("align: {solver: assignment}", "assignment needs parents of one width"),
        ("align: {reg: -1}", "align.reg must be above 0"),
    ],
)
def test_a_preset_to_compare_with_is_checked_before_anything_is_fused(
    preset: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(make_run(tmp_path / "0", 0)), str(make_run(tmp_path / "1", 1, embed_dim=24))]
    (tmp_path / "beside.yaml").write_text(preset)
    monkeypatch.setattr(Fusion, "run", None)
    assert main(command.run, ["--parents", *paths, "--compare", str(tmp_path / "beside.yaml"), "--logger", "none"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
