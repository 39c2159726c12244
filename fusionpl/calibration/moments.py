"""First and second moments of the activations of two networks, streamed over batches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusionpl.calibration.config import Scale
from fusionpl.transport.costs import Gram
from fusionpl.transport.products import cross_product

STD_FLOOR = 1e-9

Key = tuple[str, ...]  # axes whose units stand side by side


@dataclass
class Moments:
    """Sums over calibration rows of a parent's units (a) and the anchor's (b).

    A batch is multiplied in float32 (in float64 if it is that) and added up in float64. What is multiplied is the
    distance from the first batch's mean: variances and covariances come out to float32's precision however far from
    zero the units are.

    Attributes:
        count: number of rows, a scalar tensor.
        shift_a, shift_b: [n_parent] and [n_anchor], what is subtracted from the rows; chosen when it has `started`.
        sum_a, square_a: [n_parent]; sum_b, square_b: [n_anchor]; sums and sums of squares.
        cross: [n_parent, n_anchor], the sum of a b^T.
    """

    count: Tensor
    shift_a: Tensor
    shift_b: Tensor
    sum_a: Tensor
    square_a: Tensor
    sum_b: Tensor
    square_b: Tensor
    cross: Tensor
    started: bool = False

    @classmethod
    def zeros(cls, n: int, m: int, *, device: torch.device | str = "cpu") -> "Moments":
        """Empty moments of n units of a parent and m of the anchor."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device, dtype=torch.float64)

        return cls(zeros(), zeros(n), zeros(m), zeros(n), zeros(n), zeros(m), zeros(m), zeros(n, m))

    def tensors(self) -> list[Tensor]:
        """All sums, in a fixed order; those of `unshifted` moments are additive."""
        return [self.count, self.sum_a, self.square_a, self.sum_b, self.square_b, self.cross]

    def update(self, a: Tensor, b: Tensor, weight: float = 1.0) -> None:
        """Adds rows: a [rows, n_parent], b [rows, n_anchor], of the same samples and tokens; each counts `weight`
        times."""
        if not len(a):
            return
        a, b = (rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in (a, b))
        if not self.started:
            self.shift_a, self.shift_b = a.mean(0).double(), b.mean(0).double()
            self.started = True
        a, b = a - self.shift_a.to(a.dtype), b - self.shift_b.to(b.dtype)
        self.count += weight * len(a)
        self.sum_a += weight * a.sum(0)
        self.square_a += weight * a.square().sum(0)
        self.sum_b += weight * b.sum(0)
        self.square_b += weight * b.square().sum(0)
        self.cross.add_(cross_product(a, b), alpha=weight)

    def unshifted(self) -> "Moments":
        """The same moments about zero: batches may be cut anywhere, and ranks combine by one all-reduce."""
        p, q = self.shift_a, self.shift_b
        sum_a, sum_b = self.sum_a + self.count * p, self.sum_b + self.count * q
        return Moments(
            self.count,
            torch.zeros_like(p),
            torch.zeros_like(q),
            sum_a,
            self.square_a + p * (self.sum_a + sum_a),
            sum_b,
            self.square_b + q * (self.sum_b + sum_b),
            self.cross + torch.outer(p, self.sum_b) + torch.outer(sum_a, q),
            started=True,
        )

    def gram(self, scale: Scale) -> Gram:
        """The inner products of the units' activations after scaling each unit.

        A unit without variance becomes the zero vector under `standardize` and `center`.
        """
        if float(self.count) == 1 or scale in ("none", "normalize"):
            raw = self.unshifted()
            inner = Gram(raw.square_a, raw.square_b, raw.cross, scalar=float(self.count) == 1)
            return inner.unit() if scale == "normalize" and not inner.scalar else inner
        a = self._centred(self.square_a, self.sum_a, self.shift_a)
        b = self._centred(self.square_b, self.sum_b, self.shift_b)
        cross = self.cross - torch.outer(self.sum_a, self.sum_b) / self.count
        if scale == "center":
            return Gram(a, b, cross)
        p, q = self._inverse_std(a), self._inverse_std(b)
        return Gram(a * p**2, b * q**2, cross * torch.outer(p, q))

    def _centred(self, squares: Tensor, sums: Tensor, shift: Tensor) -> Tensor:
        centred = squares - sums.square() / self.count
        # What is left of a constant unit is rounding: not variance, and standardising would blow it up.
        about_zero = squares + 2 * shift * sums + self.count * shift.square()
        noise = torch.finfo(squares.dtype).eps * self.count.sqrt() * about_zero
        return torch.where(centred > noise, centred, 0)

    def _inverse_std(self, centred: Tensor) -> Tensor:
        return 1 / ((centred / (self.count - 1).clamp_min(1)).sqrt() + STD_FLOOR)
