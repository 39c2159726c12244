"""Orthogonal alignment: one rotation for the residual stream, one a circuit of each matched pair of heads.

Sources: Theus et al., NeurIPS 2025 (arXiv 2506.22712); Zhang et al., ICML 2025. For networks in canonical form.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fusionpl.transport.costs import Gram
from fusionpl.transport.maps import TransportMap
from fusionpl.transport.solvers import procrustes, procrustes_batch


def rotate_stream(inner: Gram, *, centred: bool) -> TransportMap:
    """The rotation of a stream.

    Args:
        inner: products of the streams' units over all places where they are seen, [n_parent, n_anchor].
        centred: the mean over the units is zero and stays it: the ones vector is mapped onto the ones vector.

    Returns:
        An orthogonal map, semi-orthogonal between widths. A norm divides by the root mean square over the units, so
        a stream that moves to another width is scaled by the root of the widths' ratio, and what reads it by its
        inverse.
    """
    n, m = inner.cross.shape
    scale = (m / n) ** 0.5
    if not centred:
        return replace(procrustes(inner.cross), gain=scale, read_gain=1 / scale)
    cross = _centred(_centred(inner.cross, 0), 1)
    ones = torch.full((n, m), (n * m) ** -0.5, dtype=cross.dtype, device=cross.device)
    # Larger than what the streams' own directions can weigh: the ones vectors come first among the singular vectors.
    rotation = procrustes(cross + 2 * cross.norm().clamp_min(1.0) * ones)
    return replace(rotation, gain=scale, read_gain=1 / scale)


def dissimilarity(pairs: list[list[Gram]]) -> Tensor:
    """1 minus the cosine of two heads after the best rotation, for each pair: 0 where they are rotations of each
    other."""
    norms = torch.stack(
        [torch.stack([(gram.parent.sum() * gram.anchor.sum()).sqrt() for gram in row]) for row in pairs]
    )
    crosses = torch.stack([torch.stack([gram.cross for gram in row]) for row in pairs])
    alike: Tensor = torch.linalg.svdvals(crosses).sum(-1) / norms.clamp_min(1e-300)
    return 1 - alike


def rotate_units(pairs: list[Gram]) -> list[TransportMap]:
    """The rotation of each pair of heads' circuit."""
    return procrustes_batch(torch.stack([gram.cross for gram in pairs]))


def _centred(matrix: Tensor, dim: int) -> Tensor:
    return matrix - matrix.mean(dim, keepdim=True)
