"""Products in float32 against float64, and problems solved as a batch against one by one."""

import itertools
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fusionpl import fuse, load_config
from fusionpl.calibration.forward import logits
from fusionpl.errors import FusionError
from fusionpl.fusion.result import FusionResult
from fusionpl.presets import CONF
from fusionpl.transport.least_squares import COMBINATIONS, PENALTIES, NormalEquations, fit_ridge
from fusionpl.transport.products import cross_product, full_float32, self_product
from fusionpl.transport.solvers import procrustes, procrustes_batch
from tests.models_for_tests import images, sentences, text_model, timm_vit

BUILDERS: dict[str, Any] = {"vit_timm": timm_vit, "bert": lambda seed: text_model("bert masked-lm", seed)}


def batch_of(name: str, count: int, seed: int = 0) -> dict[str, Tensor]:
    return {"pixel_values": images(count, seed)} if name.startswith("vit") else sentences(count, seed)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# products


@pytest.mark.parametrize("n", [1, 2, 95, 383, 384, 385, 386, 387, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_symmetric_product_is_the_product(n: int, dtype: torch.dtype) -> None:
    """Its blocks are cut wherever the width falls."""
    x = drawn(37, n, dtype=torch.float32).to(dtype)
    found, exact = self_product(x), x.double().T @ x.double()
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found, found.T)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4 if dtype != torch.float64 else 1e-12)


@given(st.integers(0, 40), st.integers(1, 500), st.booleans())
@settings(max_examples=30, deadline=None)
def test_symmetric_products_of_any_size(rows: int, n: int, transposed: bool) -> None:
    x = drawn(n, rows).T if transposed else drawn(rows, n)
    torch.testing.assert_close(self_product(x), x.T @ x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
def test_short_types_are_multiplied_in_float32(first: torch.dtype, second: torch.dtype, expected: torch.dtype) -> None:
    x, y = drawn(50, 4).to(first), drawn(50, 7, seed=1).to(second)
    found = cross_product(x, y)
    assert found.dtype == expected
    torch.testing.assert_close(found.double(), x.double().T @ y.double(), rtol=1e-5, atol=1e-5)


GPU, CPU = cast(Any, torch.backends.cudnn), cast(Any, torch.backends.mkldnn)
BACKENDS: list[Any] = [torch.backends.cuda.matmul, GPU.conv, CPU.matmul]


@pytest.fixture
def _precision() -> Iterator[None]:
    before = [backend.fp32_precision for backend in BACKENDS]
    yield
    for backend, precision in zip(BACKENDS, before, strict=True):
        backend.fp32_precision = precision


@pytest.mark.usefixtures("_precision")
@pytest.mark.parametrize("way", ["of all products", "of each backend"])
def test_full_precision_inside_and_the_users_choice_afterwards(way: str) -> None:
    def fails() -> None:
        with full_float32():
            assert {backend.fp32_precision for backend in BACKENDS} == {"ieee"}
            raise KeyError

    if way == "of all products":
        torch.set_float32_matmul_precision("medium")
    else:  # after which PyTorch refuses to tell what it is of all
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    before = [backend.fp32_precision for backend in BACKENDS]
    assert before[:2] == ["tf32", "tf32"]
    with pytest.raises(KeyError):
        fails()
    assert [backend.fp32_precision for backend in BACKENDS] == before
    if way == "of all products":
        assert torch.get_float32_matmul_precision() == "medium"
        torch.set_float32_matmul_precision("highest")


# least squares


def parts(seed: int, n: int, m: int, noise: float, rows: int = 60) -> tuple[NormalEquations, NormalEquations, Tensor]:
    truth = drawn(n + 1, m, seed=seed)
    found = []
    for part, count in enumerate((rows, rows // 4 + 1)):
        x = drawn(count, n, seed=seed + 10 * part + 1) * torch.logspace(0, -2, n, dtype=torch.float64)
        y = torch.cat([x, torch.ones(count, 1, dtype=torch.float64)], dim=1) @ truth
        equations = NormalEquations.zeros(n, m)
        equations.update(x, y + noise * drawn(count, m, seed=seed + 10 * part + 2))
        found.append(equations)
    return found[0], found[1], truth + drawn(n + 1, m, seed=seed + 99)


def shrunk(equations: NormalEquations, prior: Tensor, penalty: float) -> Tensor:
    return prior + equations.less(prior).ridge(penalty)


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 3), st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0]))
@settings(max_examples=80, deadline=None)
def test_the_penalty_is_that_of_trying_all(seed: int, n: int, m: int, noise: float) -> None:
    rows, held_out, prior = parts(seed, n, m, noise)
    errors = [held_out.error(shrunk(rows, prior, penalty)) for penalty in PENALTIES]
    turns = [later > earlier for earlier, later in itertools.pairwise(errors)]
    unimodal = turns == sorted(turns)
    solution, penalty = fit_ridge(rows, held_out, prior)
    best = min(range(len(PENALTIES)), key=errors.__getitem__)
    if held_out.error(prior) <= min(errors):
        assert penalty == float("inf")
        assert solution is prior
    elif unimodal:
        assert penalty == PENALTIES[best]
        torch.testing.assert_close(solution, shrunk(rows + held_out, prior, PENALTIES[best]))
    else:  # a valley of its own, never a slope
        at = PENALTIES.index(penalty) if penalty in PENALTIES else None
        assert at is None or all(
            errors[at] <= errors[other] for other in (at - 1, at + 1) if 0 <= other < len(PENALTIES)
        )


@pytest.mark.parametrize(("noise", "expected"), [(0.0, min(PENALTIES)), (1e4, float("inf"))])
def test_every_end_of_the_penalties_is_reached(noise: float, expected: float) -> None:
    rows, held_out, prior = parts(3, 6, 2, noise)
    assert fit_ridge(rows, held_out, prior)[1] == expected


def test_the_largest_penalty_all_but_keeps_the_prior() -> None:
    rows, _, prior = parts(0, 6, 2, 1.0)
    far, near = (shrunk(rows, prior, penalty) - prior for penalty in (min(PENALTIES), max(PENALTIES)))
    assert near.norm() < 0.1 * far.norm()


@pytest.mark.parametrize("noise", [0.1, 3.0])
def test_combinations_of_many_targets_choose_as_all_do(noise: float) -> None:
    rows, held_out, prior = parts(1, 8, 3 * COMBINATIONS, noise)
    errors = [held_out.error(shrunk(rows, prior, penalty)) for penalty in PENALTIES]
    assert fit_ridge(rows, held_out, prior)[1] == PENALTIES[errors.index(min(errors))]


@pytest.mark.parametrize("guess", [*PENALTIES, None, float("inf")])
def test_a_guess_changes_the_way_not_the_end(guess: float | None) -> None:
    rows, held_out, prior = parts(1, 8, 3, 1.0)
    assert fit_ridge(rows, held_out, prior, guess)[1] == fit_ridge(rows, held_out, prior)[1]


def test_without_a_search_the_guess_is_taken_unless_nothing_predicts_better() -> None:
    rows, held_out, prior = parts(1, 8, 3, 1.0)
    other = next(penalty for penalty in PENALTIES if penalty != fit_ridge(rows, held_out, prior)[1])
    solution, penalty = fit_ridge(rows, held_out, prior, other, search=False)
    assert penalty == other
    torch.testing.assert_close(solution, shrunk(rows + held_out, prior, other))
    assert fit_ridge(rows, held_out, prior, float("inf"), search=False)[1] == fit_ridge(rows, held_out, prior)[1]
    rows, held_out, prior = parts(3, 6, 2, 1e4)
    assert fit_ridge(rows, held_out, prior, min(PENALTIES), search=False) == (prior, float("inf"))


# Procrustes


@pytest.mark.parametrize(("n", "m"), [(5, 5), (7, 4), (4, 7), (1, 1)])
def test_a_batch_is_solved_like_its_problems_one_by_one(n: int, m: int) -> None:
    crosses = drawn(6, n, m)
    for cross, found in zip(crosses, procrustes_batch(crosses), strict=True):
        alone = procrustes(cross)
        torch.testing.assert_close(found.plan, alone.plan, rtol=1e-12, atol=1e-12)
        assert found.cost == pytest.approx(alone.cost)
        assert (found.solver, found.scaling) == (alone.solver, alone.scaling)
        inner = found.plan.T @ found.plan if n >= m else found.plan @ found.plan.T
        torch.testing.assert_close(inner, torch.eye(min(n, m), dtype=torch.float64))
        assert float((found.plan * cross).sum()) == pytest.approx(-float(found.cost or 0))


def test_one_bad_problem_in_a_batch_is_refused() -> None:
    crosses = drawn(3, 4, 4)
    crosses[1, 2, 2] = float("nan")
    with pytest.raises(FusionError, match="the cross-covariance holds NaN"):
        procrustes_batch(crosses)


# whole fusions


def fused(name: str, parents: list[nn.Module], **changes: Any) -> FusionResult:
    config = load_config(CONF / "fuse" / "default.yaml", changes)
    return fuse(parents, [batch_of(name, 64)], config)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("changes", [{}, {"align.residual": "tie", "align.reg": 0.08}], ids=["default", "tied"])
@pytest.mark.parametrize("name", ["vit_timm", "bert"])
def test_float32_parents_are_fused_as_in_float64(name: str, changes: dict[str, Any]) -> None:
    parents = [BUILDERS[name](seed) for seed in range(2)]
    single = fused(name, parents, **changes)
    double = fused(name, [BUILDERS[name](seed).double() for seed in range(2)], **changes)
    assert {tensor.dtype for tensor in double.model.parameters()} == {torch.float64}
    for axis, one in double.maps.items():
        for view in ("to_output", "to_input"):
            ours, theirs = (getattr(found, view) for found in (single.maps[axis], one))
            assert float((ours - theirs).abs().max()) < 1e-4, axis
    test = batch_of(name, 16, seed=99)
    with torch.no_grad():
        assert relative(logits(single.model, test), logits(double.model, test)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "setting"), [("vit_timm", "soft"), ("vit_timm", "rotation"), ("bert", "soft"), ("bert", "hard")]
)
def test_parents_in_half_precision(name: str, setting: str, dtype: torch.dtype) -> None:
    changes: dict[str, dict[str, Any]] = {
        "soft": {"align.reg": 0.08}, "hard": {"refit.method": "none", "align.solver": "emd"},
        "rotation": {"align.stream": "rotation", "align.residual": "tie", "align.heads": "matched",
                     "align.solver": "assignment"},
    }  # fmt: skip
    options = changes[setting]
    parents = [BUILDERS[name](seed).to(dtype) for seed in range(2)]
    half = fused(name, parents, **options).model
    full = fused(name, [BUILDERS[name](seed).to(dtype).float() for seed in range(2)], **options).model
    assert {tensor.dtype for tensor in half.parameters()} == {dtype}
    assert {tensor.dtype for parent in parents for tensor in parent.parameters()} == {dtype}
    assert all(bool(tensor.isfinite().all()) for tensor in half.state_dict().values())
    test = batch_of(name, 16, seed=99)
    with torch.no_grad():
        assert relative(logits(half.float(), test), logits(full, test)) < (0.15 if setting == "soft" else 0.5)


@pytest.mark.parametrize("anchor", [0, 1])
def test_the_result_has_the_anchors_type(anchor: int) -> None:
    parents = [timm_vit(0).to(torch.bfloat16), timm_vit(1)]
    for changes in ({"align.reg": 0.08}, {"align.evidence": "weights", "refit.method": "none"}):
        model = fused("vit_timm", parents, anchor=anchor, **changes).model
        assert {tensor.dtype for tensor in model.parameters()} == {(torch.bfloat16, torch.float32)[anchor]}
        assert all(bool(tensor.isfinite().all()) for tensor in model.parameters())


def test_layer_scale_in_half_precision() -> None:
    """It is folded in float32: a block then runs in another type than the stem."""
    parents = [timm_vit(seed, init_values=0.5).to(torch.bfloat16) for seed in range(2)]
    model = fused("vit_timm", parents).model
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    assert bool(logits(model, images(3)).isfinite().all())
