"""One stream for all parents: it holds as much of their streams, side by side, as fits into its width.

For networks in canonical form. Relatives: the rotation and deletion of Ashkboos et al., "SliceGPT", ICLR 2024 (arXiv
2401.15024), of one network; Stoica et al., "ZipIt!", ICLR 2024.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionpl.alignment.aligner import Aligner
from fusionpl.alignment.config import AlignConfig
from fusionpl.alignment.problem import Problem, Size, seen_at, sizes_in
from fusionpl.families import Binding
from fusionpl.transport import TransportMap


@dataclass(frozen=True)
class JointStream(Problem):
    """The maps of all parents' streams into one that holds them side by side.

    Attributes:
        joins: where the streams are seen.
    """

    joins: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """The stream goes through all sections."""
        return True

    def check(self, parent: Binding, anchor: Binding, config: AlignConfig) -> None:
        """Nothing: widths may differ."""

    def solve(self, work: Aligner) -> None:
        """The map was found with those of the other parents."""
        work.maps.give(self.axes, work.streams[self.axes[0]])

    def solves(self, parent: Binding, anchor: Binding) -> Iterable[Size]:
        """Its part of one decomposition of the streams side by side."""
        n, m = sizes_in(self.axes[:1], parent, anchor)
        yield Size("svd", n + m, n + m)

    def told(self, axis: str, binding: Binding) -> str:
        """One basis for all."""
        return "one stream for all parents"


@dataclass(frozen=True)
class AnchorUnits(Problem):
    """All units outside the stream: they are the anchor's, and nothing of the others."""

    @property
    def whole(self) -> bool:
        """No activations are compared."""
        return True

    def check(self, parent: Binding, anchor: Binding, config: AlignConfig) -> None:
        """Nothing: widths and heads may differ."""

    def solve(self, work: Aligner) -> None:
        """Axes of one size share one map."""
        sizes = {axis: sizes_in([axis], work.parent, work.anchor) for axis in self.axes}
        for n, m in dict.fromkeys(sizes.values()):
            plan = torch.zeros(n, m, dtype=torch.float64, device=work.device)
            if work.parent is work.anchor:
                plan.fill_diagonal_(1)
            # A mean over the parents must leave the anchor's units as they are.
            found = TransportMap(plan, "anchor", "orthogonal", gain=1 / work.weight)
            work.maps.give([axis for axis, size in sizes.items() if size == (n, m)], found)

    def solves(self, parent: Binding, anchor: Binding) -> Iterable[Size]:
        """None."""
        return ()

    def told(self, axis: str, binding: Binding) -> str:
        """Where the units are seen."""
        repeats = binding.axes[axis].repeats
        return f"the anchor's units, {seen_at(repeats or axis, binding, ((axis,),))}"


def joint_problems(binding: Binding) -> list[Problem]:
    """All problems of a fusion into one stream; each free axis is in one of them.

    Args:
        binding: the anchor's.
    """
    found: list[Problem] = []
    for members in binding.streams():
        seen = (axis for axis in members if binding.on_boundary(axis) or axis in binding.taps)
        found.append(JointStream(tuple(members), joins=tuple(axis for axis in seen if axis in binding.joins)))
    held = {axis for problem in found for axis in problem.axes}
    return [*found, AnchorUnits(tuple(axis for axis in binding.free if axis not in held))]


def joint_stream(
    products: Tensor, widths: Sequence[int], weights: Sequence[float], width: int, *, centred: bool
) -> list[TransportMap]:
    """The maps of streams into one: the directions in which they, side by side, have most energy.

    Args:
        products: of the streams' units side by side, [sum of widths, sum of widths].
        widths: of the streams.
        weights: one number above 0 a parent, summing to 1: the share of its stream's energy.
        width: of the one stream.
        centred: the means over the units are zero and stay it.

    Returns:
        A map [width of the parent, width] for each parent. With their weights they add up to a stream T = sum of
        w^1/2 A V, whose energy is the parents' mean where V, the rows of an orthonormal basis, holds all of it; and
        each parent's stream is read from it as w^-1/2 T V^T.
    """
    parts = list(zip(widths, weights, strict=True))
    scale = torch.cat([products.new_full((n,), w**0.5) for n, w in parts])
    vectors = torch.linalg.eigh(products * torch.outer(scale, scale)).eigenvectors.flip(1)
    if centred:
        ones = torch.eye(width, dtype=products.dtype, device=products.device)
        ones[:, 0] = 1
        inside = torch.linalg.qr(ones).Q[:, 1:]
        held = min(width - 1, len(vectors))
        basis = vectors[:, :held] @ inside[:, :held].T
        # No stream has a mean over the units, but the shift of a norm that no bias takes may.
        mean = torch.cat([products.new_full((n,), (w / n) ** 0.5) for n, w in parts])
        basis += torch.outer(mean, torch.full_like(basis[0], width**-0.5))
    else:
        basis = vectors.new_zeros(len(vectors), width)
        held = min(width, len(vectors))
        basis[:, :held] = vectors[:, :held]
    # A norm divides by the root mean square over the units, of which there may be more or fewer than a parent has.
    ratio = (sum(n * w for n, w in parts) / width) ** 0.5
    return [
        TransportMap(part, "joint", "orthogonal", gain=w**-0.5, read_gain=w**-0.5 * ratio)
        for part, w in zip(basis.split(list(widths)), weights, strict=True)
    ]
