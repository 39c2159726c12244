"""Ridge regression from normal equations, against explicit least squares."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fusionpl.transport.least_squares import NormalEquations, fit_ridge


def problem(rows: int = 200, noise: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    truth = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    y = x @ truth[:-1] + truth[-1] + noise * torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    return x, y, truth


def equations(x: Tensor, y: Tensor) -> NormalEquations:
    found = NormalEquations.zeros(x.shape[1], y.shape[1])
    found.update(x, y)
    return found


def test_a_small_penalty_is_least_squares_with_an_intercept() -> None:
    x, y, _ = problem()
    wanted = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y, rcond=None)[0]
    found = equations(x, y).ridge(1e-14)
    np.testing.assert_allclose(found, wanted, atol=1e-9)


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 50.0])
def test_the_penalty_pulls_towards_the_prior_as_extra_rows_would(penalty: float) -> None:
    x, y, _ = problem()
    prior = torch.randn(6, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    sums = equations(x, y)
    root = (penalty * sums.xx.diagonal().mean()).sqrt()
    rows = torch.cat([torch.cat([x, torch.ones(len(x), 1)], dim=1), root * torch.eye(6, dtype=torch.float64)])
    wanted = np.linalg.lstsq(rows, torch.cat([y, root * prior]), rcond=None)[0]
    np.testing.assert_allclose(prior + sums.less(prior).ridge(penalty), wanted, atol=1e-9)


def test_rows_may_be_cut_anywhere() -> None:
    x, y, _ = problem()
    pieces = NormalEquations.zeros(5, 3)
    for a, b in zip(x.split([3, 100, 97]), y.split([3, 100, 97]), strict=True):
        pieces.update(a, b)
    for found, wanted in zip((equations(x[:50], y[:50]) + equations(x[50:], y[50:])).tensors(),
                             pieces.tensors(), strict=True):  # fmt: skip
        torch.testing.assert_close(found, wanted)


def test_the_error_is_the_mean_squared_residual_but_for_that_of_zero() -> None:
    x, y, truth = problem()
    wanted = (x @ truth[:-1] + truth[-1] - y).square().sum(1).mean() - y.square().sum(1).mean()
    assert equations(x, y).error(truth) == pytest.approx(float(wanted))


def test_held_out_rows_choose_the_penalty() -> None:
    prior = torch.zeros(6, 3, dtype=torch.float64)
    x, y, _ = problem(noise=0.01)
    solution, penalty = fit_ridge(equations(x[:100], y[:100]), equations(x[100:], y[100:]), prior)
    assert penalty < 1e-2
    assert equations(x, y).error(solution) < 1e-3 - float(y.square().sum(1).mean())
    alone, same = fit_ridge(equations(x[:100], y[:100]), equations(x[100:], y[100:]), prior, both=False)
    assert same == penalty
    torch.testing.assert_close(alone, equations(x[:100], y[:100]).ridge(penalty))
    # Targets that the inputs say nothing about: the prior predicts best, and is kept.
    noise = torch.randn(200, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    solution, penalty = fit_ridge(equations(x[:8], noise[:8]), equations(x[100:], noise[100:]), prior)
    assert penalty >= 1
    assert solution.abs().max() < 0.2


def test_without_rows_to_choose_by_the_prior_stays() -> None:
    x, y, _ = problem()
    prior = torch.ones(6, 3, dtype=torch.float64)
    solution, penalty = fit_ridge(equations(x, y), NormalEquations.zeros(5, 3), prior)
    assert solution is prior
    assert penalty == float("inf")
