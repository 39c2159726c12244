"""Products of activations: a batch in float32, added up in float64 by whoever calls.

Float64 products take twice the time on a CPU and up to sixty times on a GPU. The rounding of one batch in float32 is
relative to the batch's own products, and does not grow with the number of batches.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

# Half of a symmetric product is its mirror image: it is computed in this many blocks a side, where they are large
# enough to be computed at full speed.
_BLOCKS, _BLOCK_WIDTH = 4, 96


@contextmanager
def full_float32() -> Iterator[None]:
    """Products and convolutions of float32 in float32, whatever shorter type the user lets PyTorch take for them.

    For convolutions on a GPU PyTorch takes a shorter one unless it is told otherwise.
    """
    gpu, cpu = cast(Any, torch.backends.cudnn), cast(Any, torch.backends.mkldnn)
    backends: list[Any] = [torch.backends.cuda.matmul, gpu.conv, cpu.matmul, cpu.conv]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def cross_product(x: Tensor, y: Tensor) -> Tensor:
    """x^T y of rows [rows, n] and [rows, m], in float32, or in float64 if x is."""
    kind = _kind(x)
    return x.to(kind).T @ y.to(kind)


def self_product(x: Tensor) -> Tensor:
    """x^T x of rows [rows, n], in float32, or in float64 if x is."""
    x, n = x.to(_kind(x)), x.shape[1]
    if n < _BLOCKS * _BLOCK_WIDTH:
        return x.T @ x
    product = x.new_empty(n, n)
    cuts = [round(index * n / _BLOCKS) for index in range(_BLOCKS + 1)]
    blocks = [slice(*pair) for pair in itertools.pairwise(cuts)]
    for index, rows in enumerate(blocks):
        product[rows, rows] = x[:, rows].T @ x[:, rows]
        for columns in blocks[:index]:
            product[rows, columns] = x[:, rows].T @ x[:, columns]
            product[columns, rows] = product[rows, columns].T
    return product


def _kind(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
