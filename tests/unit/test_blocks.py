"""Which blocks of networks of different depth stand for each other."""

import itertools

import pytest
import torch

from fusionpl.alignment.blocks import likeness, matched, spread, telling


def test_streams_that_are_rotated_and_scaled_are_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    other = torch.randn(200, 7, generator=generator)
    found = likeness([x, other], [3 * x @ turn + 1, other, torch.ones(200, 3)])
    assert found.shape == (2, 3)
    torch.testing.assert_close(found[0, 0], torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(found[1, 1], torch.tensor(1.0, dtype=torch.float64))
    assert found[0, 1] < 0.3
    assert found[0, 2] == 0  # a stream that never changes is like nothing


def test_likeness_is_that_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(50, n, generator=generator, dtype=torch.float64) for n in (6, 9))
    k, m = (one @ one.T for one in (x, y))
    h = torch.eye(50, dtype=torch.float64) - 1 / 50

    def hsic(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ h @ b @ h).trace()

    torch.testing.assert_close(likeness([x], [y])[0, 0], hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("steps", "depth"), [(3, 4), (4, 3), (3, 3), (5, 2), (1, 3)])
def test_the_path_is_the_best_of_all(steps: int, depth: int, seed: int) -> None:
    alike = torch.rand(steps + 1, depth + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def total(path: tuple[int, ...]) -> float:
        return sum(float(alike[row, column]) for row, column in enumerate(path))

    every = [(0, *inner, depth) for inner in itertools.combinations_with_replacement(range(depth + 1), steps - 1)]
    path = matched(alike, [False] * steps)
    assert len(path) == steps + 1
    assert total(tuple(path)) > max(map(total, every)) - 1e-3


def test_a_block_that_nobody_has_is_filled_first() -> None:
    alike = torch.zeros(5, 3, dtype=torch.float64)
    alike[:, 0], alike[-1, -1] = 1, 1
    assert matched(alike, [False] * 4) == [0, 0, 0, 0, 2]
    assert matched(alike, [False, True, False, True]) == [0, 0, 1, 1, 2]


def test_the_first_block_may_have_to_be_one_of_its_own() -> None:
    alike = torch.zeros(4, 3, dtype=torch.float64)
    alike[:3, 0] = 1
    assert matched(alike, [False] * 3) == [0, 0, 0, 2]
    assert matched(alike, [False] * 3, at_once=True)[1] == 1


def test_streams_without_a_difference_are_matched_evenly() -> None:
    assert matched(torch.zeros(4, 7), [False] * 3) == [0, 2, 4, 6] == spread(6, 3)
    assert spread(4, 6) == [0, 1, 1, 2, 3, 3, 4]
    assert spread(3, 3) == [0, 1, 2, 3]


def test_the_block_that_does_most_is_kept() -> None:
    start = torch.zeros(10, 4)
    step = torch.randn(10, 4, generator=torch.Generator().manual_seed(2))
    assert telling([start, start, start + step]) == 1
    assert telling([start, start + step, start + step]) == 0
    assert telling([start, start + 0.1 * step, start + 0.9 * step, start + step]) == 1
