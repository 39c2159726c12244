"""What parents are to each other, and what a minute is best spent on."""

import copy
from typing import Any

import pytest
import torch

from fusionpl.calibration.config import CalibrationConfig
from fusionpl.calibration.cursor import CalibrationSet
from fusionpl.calibration.kept import Kept
from fusionpl.fusion.advice import Advice, advise
from fusionpl.fusion.voting import Voting
from tests.models_for_tests import CLASSES, causal, images, timm_vit

EVEN = [Voting([0.5, 0.5])]


def cut(batch: Any) -> CalibrationSet:
    return CalibrationSet([batch], CalibrationConfig(samples=256), Kept(10**8))


def leaning(seed: int, classes: tuple[int, ...]) -> Any:
    """A model that all but never gives other classes than these."""
    model: Any = timm_vit(seed)
    with torch.no_grad():
        model.head.bias -= 8.0
        model.head.bias[list(classes)] += 8.0
    return model


def test_parents_of_other_classes_are_told_from_those_of_the_same_data() -> None:
    samples = cut(images(256))
    apart = advise([leaning(1, (0, 1)), leaning(2, (2, 3, 4))], ["a", "b"], EVEN, samples)
    assert apart.lines[0].startswith("parents: trained apart, on other classes (")
    assert CLASSES == 5


@pytest.mark.parametrize(("share", "after", "words"), [
    (0.01, 0.01, "keep a with its head fitted: --strategy head"),
    (0.01, 0.3, "--refine.minutes 1, or --width 1.5"),
    (0.5, 0.3, "fuse them as they are"),
    (None, 0.3, "fuse them as they are"),
])  # fmt: skip
def test_the_command_follows_from_what_is_left(share: float | None, after: float, words: str) -> None:
    assert Advice(share, "a", 0.4, after, base=False).lines[2].startswith(f"advice: {words}")


def test_one_parent_twice_is_kept_as_it_is() -> None:
    model = timm_vit()
    found = advise([model, copy.deepcopy(model)], ["a", "b"], EVEN, cut(images(64)))
    assert found.lines[2] == "advice: keep a as it is"


def test_a_shared_base_is_averaged() -> None:
    found = advise([timm_vit(1), timm_vit(2)], ["a", "b"], EVEN, cut(images(64)), base=True)
    assert found.lines[0] == "parents: they share one base"
    assert found.lines[2].startswith("advice: average them")


def test_language_models_have_no_share_of_classes() -> None:
    ids = torch.randint(3, 40, (32, 12), generator=torch.Generator().manual_seed(0))
    found = advise([causal("llama", seed) for seed in (1, 2)], ["a", "b"], EVEN, cut({"input_ids": ids}))
    assert found.share is None
    assert found.lines[0] == "parents: trained apart"
    assert found.after <= found.before


@pytest.mark.parametrize("name", ["a", "b"])
def test_what_is_left_to_gain_is_told_of_the_nearest_parent(name: str) -> None:
    models = [timm_vit(1), timm_vit(2)]
    found = advise(models if name == "a" else models[::-1], ["a", "b"], EVEN, cut(images(256)))
    assert f"the predictions of {found.parent} are" in found.lines[1]
    assert 0 < found.after < found.before
