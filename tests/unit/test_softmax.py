"""Softmax regression to given probabilities: its minimum, its penalty, and what it costs in memory."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from fusionpl.transport.softmax import PENALTIES, _Problem, fit_softmax, log_mean


def drawn(
    count: int = 600, n: int = 6, classes: int = 4, noise: float = 0.3, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, n, generator=generator)
    matrix = torch.randn(n + 1, classes, generator=generator, dtype=torch.float64)
    outputs = x.double() @ matrix[:-1] + matrix[-1]
    return x, outputs + noise * torch.randn(outputs.shape, generator=generator), matrix


def cut(
    x: Tensor, p: Tensor, size: int = 64, weight: float = 1.0
) -> Callable[[], Iterator[tuple[Tensor, Tensor, float]]]:
    return lambda: ((a, b, weight) for a, b in zip(x.split(size), p.split(size), strict=True))


def test_the_minimum_is_that_of_scipy() -> None:
    x, outputs, _ = drawn()
    p = outputs.softmax(-1)
    prior = torch.zeros(7, 4, dtype=torch.float64)
    found = _Problem(cut(x, p), prior, "softmax", lambda sums: None).minimised(prior, prior, 0.01, 200)
    design, targets, energy = np.c_[x.double().numpy(), np.ones(len(x))], p.numpy(), float(x.square().mean())

    def loss(flat: np.ndarray) -> float:
        scores = design @ flat.reshape(7, 4)
        logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        return float(-(targets * logs).sum(1).mean() + 0.01 * energy / 2 * (flat**2).sum())

    wanted = minimize(loss, np.zeros(28), method="BFGS", options={"gtol": 1e-7}).x.reshape(7, 4)
    assert np.abs(found.numpy() - wanted).max() < 1e-3


def test_planted_probabilities_are_found_again() -> None:
    x, outputs, matrix = drawn(noise=0.0)
    p = outputs.softmax(-1)
    fit = fit_softmax(cut(x[:480], p[:480]), cut(x[480:], p[480:]), torch.zeros_like(matrix))
    assert fit.penalty == PENALTIES[-1]
    assert fit.after < 0.01 * fit.before
    found = (x.double() @ fit.matrix[:-1] + fit.matrix[-1]).softmax(-1)
    assert float((found - p).abs().max()) < 0.05


def test_where_no_fit_predicts_better_the_prior_stays() -> None:
    x, outputs, matrix = drawn(noise=0.0)
    p = outputs.softmax(-1)
    fit = fit_softmax(cut(x[:480], p[:480]), cut(x[480:], p[480:]), matrix)
    assert fit.penalty == float("inf")
    assert torch.equal(fit.matrix, matrix)
    assert fit.before == pytest.approx(0, abs=1e-6)


def test_noise_asks_for_a_penalty() -> None:
    x, _, matrix = drawn(count=60, n=40)
    noise = torch.randn(60, 4, generator=torch.Generator().manual_seed(1)).mul(3).softmax(-1)
    prior = torch.zeros(41, 4, dtype=torch.float64)
    fit = fit_softmax(cut(x[:48], noise[:48]), cut(x[48:], noise[48:]), prior)
    assert fit.penalty >= 0.1
    assert len(matrix) == 41


def test_batches_and_ranks_make_no_difference() -> None:
    x, outputs, matrix = drawn()
    p, prior = outputs.softmax(-1), torch.zeros_like(matrix)
    rows, held = (x[:480], p[:480]), (x[480:], p[480:])
    whole = fit_softmax(cut(*rows, 480), cut(*held, 120), prior)
    parts = fit_softmax(cut(*rows, 37), cut(*held, 11), prior)
    assert torch.allclose(whole.matrix, parts.matrix, atol=1e-4)

    def doubled(sums) -> None:  # type: ignore[no-untyped-def]  # as if another rank had the same rows
        for one in sums:
            one.mul_(2)

    assert torch.allclose(fit_softmax(cut(*rows), cut(*held), prior, reduce=doubled).matrix, whole.matrix, atol=2e-3)


def test_rows_that_are_many_are_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    x, outputs, matrix = drawn()
    p, prior = outputs.softmax(-1), torch.zeros_like(matrix)
    held = fit_softmax(cut(x[:480], p[:480]), cut(x[480:], p[480:]), prior).matrix
    monkeypatch.setattr("fusionpl.transport.softmax.HELD", 100)
    anew = fit_softmax(cut(x[:480], p[:480]), cut(x[480:], p[480:]), prior).matrix
    assert torch.allclose(held, anew, atol=2e-3)


def test_several_labels_are_a_regression_each() -> None:
    x, outputs, matrix = drawn(noise=0.0)
    p, prior = outputs.sigmoid(), torch.zeros_like(matrix)
    fit = fit_softmax(cut(x[:480], p[:480]), cut(x[480:], p[480:]), prior, link="sigmoid")
    alone = fit_softmax(cut(x[:480], p[:480, :1]), cut(x[480:], p[480:, :1]), prior[:, :1], link="sigmoid")
    assert fit.after < 0.01 * fit.before
    assert torch.allclose(fit.matrix[:, :1], alone.matrix, atol=0.05)


def test_the_log_of_the_mean_of_probabilities() -> None:
    a, b = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    wanted = 0.25 * a.softmax(-1) + 0.75 * b.softmax(-1)
    assert torch.allclose(log_mean([a, b], [0.25, 0.75]).exp(), wanted, atol=1e-6)
    assert torch.allclose(log_mean([a, b], [0.0, 1.0]).exp(), b.softmax(-1), atol=1e-6)
    assert torch.allclose(log_mean([a, b], [0.5, 0.5], "sigmoid").exp(), (a.sigmoid() + b.sigmoid()) / 2, atol=1e-6)
