"""Alignment: each map against its definition, computed from explicit activations and weights."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from fusionpl.alignment.config import AlignConfig
from fusionpl.calibration.config import CalibrationConfig
from fusionpl.calibration.forward import logits
from fusionpl.calibration.taps import recorded
from fusionpl.errors import FusionError
from fusionpl.families.binding import bind
from fusionpl.fusion.config import FuseConfig
from fusionpl.fusion.fuse import fuse
from fusionpl.fusion.result import FusionResult
from fusionpl.transport.maps import TransportMap
from tests.models_for_tests import FAMILIES, images, timm_vit

Maps = dict[str, TransportMap]


def fused(
    parents: list[nn.Module], *, anchor: int = 1, calibration: Any = None, tokens: str = "all", **options: Any
) -> FusionResult:
    config = FuseConfig(anchor=anchor, calibration=CalibrationConfig(tokens=tokens), align=AlignConfig(**options))
    return fuse(parents, [images()] if calibration is None else calibration, config)


def maps(**options: Any) -> Maps:
    return fused([timm_vit(0), timm_vit(1)], **options).maps


def activations(model: nn.Module, axis: str) -> Tensor:
    """[rows, units] in float64, all tokens of all calibration images."""
    binding = bind(model)
    with torch.inference_mode(), recorded(model, binding, [axis]) as seen:
        logits(model, images())
    found = seen[axis].double()
    return found.flatten(0, -2) if found.ndim == 3 else found.flatten(2).transpose(1, 2).flatten(0, 1)


def standardized(values: Tensor) -> Tensor:
    return (values - values.mean(0)) / values.std(0)


def assert_assignment(plan: TransportMap, cost: np.ndarray) -> None:
    wanted = torch.zeros(cost.shape, dtype=torch.float64)
    wanted[linear_sum_assignment(cost)] = 1
    torch.testing.assert_close(plan.to_output, wanted)


# what a unit is described by


@pytest.mark.parametrize(
    "axis", ["stem.patch", "blocks.0.q", "blocks.0.v", "blocks.1.ffn", "blocks.1.mlp", "blocks.0.attn"]
)
def test_activations_as_evidence(axis: str) -> None:
    a, b = (standardized(activations(timm_vit(seed), axis)) for seed in range(2))
    assert_assignment(maps(solver="emd")[axis], cdist(a.T, b.T))


def test_parameters_as_evidence_stay_raw() -> None:
    a, b = (timm_vit(seed).get_parameter("pos_embed").detach()[0].double() for seed in range(2))
    assert_assignment(maps(solver="emd")["stem.pos"], cdist(a.T, b.T))


@pytest.mark.parametrize("axis", ["q", "k"])
def test_shared_circuit_stacks_the_samples_of_q_and_k(axis: str) -> None:
    a, b = (
        torch.cat([standardized(activations(timm_vit(seed), f"blocks.0.{one}")) for one in "qk"]) for seed in range(2)
    )
    assert_assignment(maps(solver="emd", qk="shared")[f"blocks.0.{axis}"], cdist(a.T, b.T))


def test_joint_circuit_is_one_problem_over_the_units_of_both() -> None:
    a, b = (
        torch.cat([standardized(activations(timm_vit(seed), f"blocks.0.{one}")) for one in "qk"], dim=1)
        for seed in range(2)
    )
    result = fused([timm_vit(0), timm_vit(1)], solver="emd", qk="joint")
    (alignment,) = [one for one in result.alignments if one]
    assert_assignment(alignment.joint["blocks.0.q", "blocks.0.k"], cdist(a.T, b.T))


def test_separate_circuits_are_separate() -> None:
    found = maps(solver="emd")
    assert not torch.equal(found["blocks.0.q"].plan, found["blocks.0.k"].plan)


def unit(values: Tensor) -> Tensor:
    return torch.nn.functional.normalize(values.detach().double(), dim=1)


def test_weights_as_evidence_are_rows_whose_inputs_are_aligned() -> None:
    parents = [timm_vit(seed) for seed in range(2)]
    found = fused(parents, calibration=[], evidence="weights", solver="emd").maps
    a, b = (dict(parent.named_parameters()) for parent in parents)
    patch = "patch_embed.proj.weight"
    assert_assignment(found["stem.patch"], cdist(unit(a[patch].flatten(1)), unit(b[patch].flatten(1))))
    for name, axis, reads in (
        ("blocks.0.attn.proj.weight", "blocks.0.attn", "blocks.0.v"),
        ("blocks.0.mlp.fc1.weight", "blocks.0.ffn", "blocks.0.mid"),
        ("blocks.1.mlp.fc2.weight", "blocks.1.mlp", "blocks.1.ffn"),
    ):
        moved = a[name].detach().double() @ found[reads].to_input
        assert_assignment(found[axis], cdist(unit(moved), unit(b[name])))


def test_weights_of_q_and_k_shared_lie_side_by_side() -> None:
    parents = [timm_vit(seed) for seed in range(2)]
    found = fused(parents, calibration=[], evidence="weights", solver="emd", qk="shared").maps
    a, b = (dict(parent.named_parameters())["blocks.0.attn.qkv.weight"].detach().double() for parent in parents)
    q, k = (rows @ found["stem.out"].to_input for rows in a.chunk(3)[:2])
    theirs = torch.cat(b.chunk(3)[:2], dim=1)
    assert_assignment(found["blocks.0.q"], cdist(unit(torch.cat([q, k], dim=1)), unit(theirs)))


# residual policies


JOINS = {
    "stem.out": ("stem.pos", "stem.patch"),
    "blocks.0.mid": ("stem.out", "blocks.0.attn"),
    "blocks.0.out": ("blocks.0.mid", "blocks.0.mlp"),
    "blocks.1.out": ("blocks.1.mid", "blocks.1.mlp"),
}


@pytest.mark.parametrize("joined", JOINS)
@pytest.mark.parametrize("evidence", ["activations", "weights"])
def test_plain_policies(evidence: str, joined: str) -> None:
    skip, branch = JOINS[joined]
    for policy, share in {"average": 0.5, "branch": 0.0, "skip": 1.0}.items():
        found = maps(residual=policy, evidence=evidence)
        wanted = share * found[skip].plan + (1 - share) * found[branch].plan
        torch.testing.assert_close(found[joined].plan, wanted)
    same = maps(residual="identity", evidence=evidence)[joined]
    torch.testing.assert_close(same.to_input, torch.eye(16, dtype=torch.float64))


@pytest.mark.parametrize("joined", [axis for axis in JOINS if axis != "stem.out"])
@pytest.mark.parametrize("evidence", ["activations", "weights"])
def test_weighted_policies_weigh_by_the_anchors_activations(evidence: str, joined: str) -> None:
    skip, branch = JOINS[joined]
    s, b = (activations(timm_vit(1), axis).abs().mean(0) for axis in (skip, branch))
    for policy, share in {"weighted_matrix": s / (s + b), "weighted_scalar": s.mean() / (s.mean() + b.mean())}.items():
        found = maps(residual=policy, evidence=evidence)
        wanted = share * found[skip].plan + (1 - share) * found[branch].plan
        torch.testing.assert_close(found[joined].plan, wanted, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("evidence", ["activations", "weights"])
def test_tie_is_one_map_for_the_stream(evidence: str) -> None:
    found = maps(residual="tie", evidence=evidence)
    stream = ["stem.pos", "stem.patch", "stem.cls", "stem.out"]
    stream += [f"blocks.{block}.{axis}" for block in range(2) for axis in ("attn", "mid", "mlp", "out")]
    assert all(torch.equal(found[axis].plan, found["stem.out"].plan) for axis in stream)
    assert not torch.equal(found["blocks.0.q"].plan, found["stem.out"].plan)


def test_tie_listens_to_every_join() -> None:
    joins = ["stem.out", *(f"blocks.{block}.{axis}" for block in range(2) for axis in ("mid", "out"))]
    a, b = (torch.cat([standardized(activations(timm_vit(seed), axis)) for axis in joins]) for seed in range(2))
    assert_assignment(maps(residual="tie", solver="emd")["stem.out"], cdist(a.T, b.T))


# heads


@pytest.mark.parametrize("evidence", ["activations", "weights"])
def test_matched_heads_move_as_wholes(evidence: str) -> None:
    found = maps(heads="matched", solver="assignment", evidence=evidence)
    circuit, values = found["blocks.0.q"], found["blocks.0.v"]
    assert torch.equal(circuit.plan, found["blocks.0.k"].plan)

    def heads(one: TransportMap) -> Tensor:
        return one.to_output.view(4, 4, 4, 4).sum((1, 3))

    assert torch.equal(heads(circuit), heads(values))
    assert set(heads(circuit).flatten().tolist()) == {0.0, 4.0}
    for one in (circuit, values):
        assert torch.equal(one.to_output.sum(0), torch.ones(16, dtype=torch.float64))


def test_heads_are_matched_by_both_circuits_each_at_its_best_alignment() -> None:
    a, b = (
        {axis: standardized(activations(timm_vit(seed), f"blocks.0.{axis}")).T for axis in "qkv"} for seed in range(2)
    )
    total = np.zeros((4, 4))
    for circuit in ("qk", "v"):
        ours, theirs = (torch.cat([one[axis] for axis in circuit], dim=1).split(4) for one in (a, b))
        costs = np.array([[cdist(x, y)[linear_sum_assignment(cdist(x, y))].mean() for y in theirs] for x in ours])
        total += costs / costs.mean()
    wanted = torch.zeros(4, 4, dtype=torch.float64)
    wanted[linear_sum_assignment(total)] = 4
    for axis in "qkv":
        plan = maps(heads="matched", solver="assignment")[f"blocks.0.{axis}"]
        assert torch.equal(plan.to_output.view(4, 4, 4, 4).sum((1, 3)), wanted)


def test_matched_heads_soften_only_inside_a_pair() -> None:
    plan = maps(heads="matched", solver="sinkhorn")["blocks.1.v"].to_output.view(4, 4, 4, 4)
    assert ((plan > 0).all(1).all(2).sum(0) == 1).all()
    assert ((plan > 0).any(1).any(2).sum(0) == 1).all()


def test_flat_refuses_different_head_counts() -> None:
    with pytest.raises(FusionError, match=r"parents of different head count: 2 and 4 heads.*align.heads matched"):
        fused([timm_vit(0, heads=2), timm_vit(1)])
    assert fused([timm_vit(0, heads=2), timm_vit(1)], heads="matched", solver="emd").maps


# options that do not fit the widths


def test_identity_and_assignment_need_one_width() -> None:
    wide = timm_vit(0, width=32)
    with pytest.raises(
        FusionError, match=r"align.residual identity needs parents of one width; '.*' has 32 and 16 units"
    ):
        fused([wide, timm_vit(1)], residual="identity")
    with pytest.raises(FusionError, match="assignment needs parents of one width, here 32 and 16 units"):
        fused([wide, timm_vit(1)], solver="assignment")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("evidence", ["activations", "weights"])
@pytest.mark.parametrize("swap", [False, True])
def test_every_option_runs_between_widths(name: str, evidence: str, swap: bool) -> None:
    parents = [FAMILIES[name](0, width=24, mlp=40), FAMILIES[name](1)]
    parents = parents[::-1] if swap else parents
    variants: tuple[dict[str, Any], ...] = (
        *({"residual": one} for one in ("average", "branch", "skip", "weighted_scalar", "weighted_matrix", "tie")),
        *({"qk": one} for one in ("shared", "joint")),
        {"heads": "matched"},
        {"solver": "emd", "scaling": "source", "metric": "correlation"},
    )
    for options in variants:
        result = fused(parents, evidence=evidence, **options)
        assert all(torch.isfinite(tensor).all() for tensor in result.model.parameters()), options
        shapes = [
            (tensor.shape, other.shape)
            for tensor, other in zip(result.model.parameters(), parents[1].parameters(), strict=True)
        ]
        assert all(ours == theirs for ours, theirs in shapes)
