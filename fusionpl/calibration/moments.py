"""First and second moments of the activations of two networks, streamed over batches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusionpl.calibration.config import Scale
from fusionpl.transport import Gram

STD_FLOOR = 1e-9


@dataclass
class Moments:
    """Sums over calibration rows of a parent's units (a) and the anchor's (b).

    All sums are additive: batches may be cut anywhere, and ranks combine by one all-reduce of `tensors()`.

    Attributes:
        count: number of rows, a scalar tensor.
        sum_a, square_a: [n_parent]; sum_b, square_b: [n_anchor]; sums and sums of squares.
        abs_b: [n_anchor], sums of magnitudes (the weighted residual policies).
        cross: [n_parent, n_anchor], the sum of a b^T.
    """

    count: Tensor
    sum_a: Tensor
    square_a: Tensor
    sum_b: Tensor
    square_b: Tensor
    abs_b: Tensor
    cross: Tensor

    @classmethod
    def zeros(
        cls, n: int, m: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64
    ) -> "Moments":
        """Empty moments of n units of a parent and m of the anchor."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        return cls(zeros(), zeros(n), zeros(n), zeros(m), zeros(m), zeros(m), zeros(n, m))

    def tensors(self) -> list[Tensor]:
        """All sums, in a fixed order."""
        return [self.count, self.sum_a, self.square_a, self.sum_b, self.square_b, self.abs_b, self.cross]

    def update(self, a: Tensor, b: Tensor) -> None:
        """Adds rows: a [rows, n_parent], b [rows, n_anchor], of the same samples and tokens."""
        a, b = a.to(self.cross), b.to(self.cross)
        self.count += len(a)
        self.sum_a += a.sum(0)
        self.square_a += a.square().sum(0)
        self.sum_b += b.sum(0)
        self.square_b += b.square().sum(0)
        self.abs_b += b.abs().sum(0)
        self.cross.addmm_(a.T, b)

    def magnitude(self) -> Tensor:
        """[n_anchor], the mean absolute activation of the anchor's units."""
        return self.abs_b / self.count

    def gram(self, scale: Scale) -> Gram:
        """The inner products of the units' activations after scaling each unit.

        A unit without variance becomes the zero vector under `standardize` and `center`.
        """
        a, b, cross = self.square_a, self.square_b, self.cross
        if float(self.count) == 1:
            return Gram(a, b, cross, scalar=True)
        if scale in ("standardize", "center"):
            a = self._centred(a, self.sum_a)
            b = self._centred(b, self.sum_b)
            cross = cross - torch.outer(self.sum_a, self.sum_b) / self.count
        if scale == "standardize":
            p, q = self._inverse_std(a), self._inverse_std(b)
            return Gram(a * p**2, b * q**2, cross * torch.outer(p, q))
        inner = Gram(a, b, cross)
        return inner.unit() if scale == "normalize" else inner

    def _centred(self, squares: Tensor, sums: Tensor) -> Tensor:
        centred = squares - sums.square() / self.count
        # What is left of a constant unit is rounding: not variance, and standardising would blow it up.
        noise = torch.finfo(squares.dtype).eps * self.count.sqrt() * squares
        return torch.where(centred > noise, centred, 0)

    def _inverse_std(self, centred: Tensor) -> Tensor:
        return 1 / ((centred / (self.count - 1).clamp_min(1)).sqrt() + STD_FLOOR)
