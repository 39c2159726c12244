"""Which blocks of two networks stand for each other: streams compared at the boundaries of blocks, matched in order."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

# A block that no other network's block stands beside is worth more than any likeness of streams.
_ALONE = 1e3
# What a path pays for uneven steps: streams of trained networks change little from block to block.
_UNEVEN = 1e-2


def likeness(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Linear CKA of every pair of streams: 1 where one is a rotation of the other, scaled.

    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019 (arXiv 1905.00414).

    Args:
        ours, theirs: the streams of two networks at their boundaries, [rows, n] and [rows, m], of the same tokens.

    Returns:
        [boundaries of ours, boundaries of theirs], float64.
    """
    first, second = ([_centred(stream) for stream in side] for side in (ours, theirs))
    norms = [[float((stream.T @ stream).norm()) for stream in side] for side in (first, second)]
    similarity = torch.zeros(len(first), len(second), dtype=torch.float64)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            similarity[i, j] = float((a.T @ b).square().sum()) / max(norms[0][i] * norms[1][j], 1e-300)
    return similarity


def spread(depth: int, count: int) -> list[int]:
    """`count` + 1 boundaries of a network of `depth` blocks, evenly spread, from the first to the last."""
    return [round(at * depth / count) for at in range(count + 1)]


def matched(alike: Tensor, alone: Sequence[bool], *, at_once: bool = False) -> list[int]:
    """The boundaries of a network that stand for those of another, in order, from the first to the last.

    Dynamic programming: the path along which the streams are most alike.

    Args:
        alike: of the other's boundaries and its own, [n + 1, depth + 1].
        alone: of each of the n steps, whether it is a block of no network so far: if there are blocks for it, one of
            this network's has to be.
        at_once: whether the first step has to be a block of this network's.

    Returns:
        n + 1 numbers that never fall.
    """
    steps, last = len(alike) - 1, alike.shape[1] - 1
    places = torch.arange(last + 1, dtype=torch.float64)
    forward = places[None, :] - places[:, None]  # from a row to a column
    score = torch.full((last + 1,), -torch.inf, dtype=torch.float64)
    score[0] = alike[0, 0]
    came: list[Tensor] = []
    for step in range(steps):
        gain = alike[step + 1] - _UNEVEN * (forward - last / steps).square() + _ALONE * (alone[step] & (forward > 0))
        backward = forward < (1 if at_once and not step else 0)
        best = torch.where(backward, -torch.inf, score[:, None] + gain).max(0)
        score, before = best.values, best.indices
        came.append(before)
    path = [last]
    for before in reversed(came):
        path.append(int(before[path[-1]]))
    return path[::-1]


def telling(streams: Sequence[Tensor]) -> int:
    """Which of several blocks in a row does most of what they do together.

    Args:
        streams: before the first of them and behind each, [rows, n].

    Returns:
        The number of the block without which least of the change of the stream is left unexplained.
    """
    whole = streams[-1] - streams[0]
    left = [float((whole - (after - before)).square().sum()) for before, after in pairwise(streams)]
    return left.index(min(left))


def _centred(rows: Tensor) -> Tensor:
    rows = rows.double()
    return rows - rows.mean(0)
