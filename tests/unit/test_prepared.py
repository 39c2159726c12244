"""A fusion that is prepared: what it says, that it runs as `fuse` does, and that nothing in it is set from outside."""

import dataclasses

import pytest
import torch

import fusionpl
from fusionpl.alignment.maps import Maps, Plans
from fusionpl.alignment.problem import ordered
from fusionpl.calibration.kept import Kept
from fusionpl.errors import FusionError
from fusionpl.families.binding import bind
from fusionpl.fusion import prepare
from fusionpl.fusion.config import load_config
from fusionpl.fusion.methods import METHODS
from fusionpl.fusion.team import open_parents
from fusionpl.transport.maps import identity, permutation
from tests.models_for_tests import STACKS, causal, hf_vit, images, largest_difference, timm_vit

PRESETS = ("paper", "transport", "joint", "default")


@pytest.mark.parametrize("preset", PRESETS)
def test_it_runs_as_fuse_does_and_can_run_again(preset: str) -> None:
    parents = [timm_vit(seed) for seed in range(2)]
    config = load_config(preset, {"calibration.tokens": "all"})
    prepared = fusionpl.prepare(parents, config)
    wanted = fusionpl.fuse(parents, [images()], config).model
    for _ in range(2):
        assert largest_difference(prepared.run([images()]).model, wanted) == 0


def test_parents_are_opened_once_and_a_plan_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, planned = [], []
    real_open, real_plan = prepare.open_parents, fusionpl.fusion.fuse.make_plan
    monkeypatch.setattr(prepare, "open_parents", lambda *a, **k: opened.append(1) or real_open(*a, **k))
    monkeypatch.setattr(fusionpl.fusion.fuse, "make_plan", lambda *a: planned.append(1) or real_plan(*a))
    fusionpl.fuse([hf_vit(0), hf_vit(1, depth=3)], [images()], load_config("transport"))
    assert (len(opened), len(planned)) == (1, 1)


def test_what_is_known_is_frozen() -> None:
    prepared = fusionpl.prepare([timm_vit(0), timm_vit(1)])
    for part, name in ((prepared, "plan"), (prepared.team, "anchor"), (prepared.plan, "weights")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, None)


def test_maps_never_change_and_one_that_is_missing_is_an_error_that_names_its_axis() -> None:
    plans = Plans(Kept(10**9))
    first = Maps(plans).joined({"blocks.0.ffn": identity(4)})
    more = first.joined({"blocks.1.ffn": identity(4), "blocks.1.q": permutation(torch.tensor([1, 0, 3, 2]))})
    assert (list(first), list(more)) == (["blocks.0.ffn"], ["blocks.0.ffn", "blocks.1.ffn", "blocks.1.q"])
    with pytest.raises(FusionError, match=r"no map was found for axis 'blocks\.1\.q'"):
        first["blocks.1.q"]


def test_equal_plans_are_kept_once() -> None:
    kept = Kept(10**9)
    maps = Maps(Plans(kept))
    for block in range(5):
        maps = maps.joined({f"blocks.{block}.ffn": identity(64)})
    assert kept.used == 64 * 64 * 8
    assert torch.equal(maps["blocks.4.ffn"].plan, identity(64).plan)


@pytest.mark.parametrize("strategy", METHODS)
def test_each_free_axis_is_in_one_problem_and_each_problem_behind_what_it_needs(strategy: str) -> None:
    config = load_config("transport" if strategy == "transport" else "joint")
    for model in (timm_vit(), causal("llama"), STACKS["t5"](0)):
        if strategy == "joint" and METHODS["joint"].hindrance(bind(model), config):
            continue
        binding = bind(model)
        problems = METHODS[strategy].problems(binding, config)
        assert sorted(axis for problem in problems for axis in problem.axes) == sorted(binding.free)
        order = ordered(problems[::-1], None)
        place = {axis: at for at, problem in enumerate(order) for axis in problem.axes}
        assert all(place[axis] < at for at, one in enumerate(order) for axis in one.needs(None) if axis not in one.axes)


def test_a_team_says_how_its_parents_are_called() -> None:
    team = open_parents([timm_vit(0), timm_vit(1)], ["a", "b"], 1)
    assert (team.names, team.reference.name, len(team)) == (["a", "b"], "b", 2)
