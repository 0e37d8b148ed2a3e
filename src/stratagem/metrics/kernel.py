"""Kernel distance (KID): the unbiased squared maximum mean discrepancy of two sets of features.

    k(x, y) = (<x, y> / D + 1)^3
    KID     = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

Its expectation does not depend on the number of images, so it may be compared across numbers and is
of use where there are too few images for a Frechet distance. It can be a little below zero.

The figure is over all pairs, which depends on no order and no draw of subsets; its expectation is
that of the usual mean over random subsets, with less noise. The standard error is that of the mean
of disjoint blocks of at most 1000 images a side, which is not below that of the figure. All sums
are float64.

Reference: Binkowski et al. 2018, arXiv:1801.01401 (Eq. 3 and 4).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stratagem.errors import InputError

__all__ = ["Kid", "kid"]

_BLOCK, _LEAST_BLOCKS = 1000, 10


class Kid(NamedTuple):
    """The distance and its standard error, NaN for fewer than 20 images a side."""

    value: float
    error: float


def kid(a: Tensor, b: Tensor, *, chunk: int = 4096) -> Kid:
    """Returns the kernel distance of features (N, D) and (M, D), and its standard error.

    Args:
        a: One set, at least 2 rows.
        b: The other.
        chunk: Rows of either side handled at once; memory is O(chunk (chunk + D)).

    Raises:
        InputError: If a set has fewer than 2 rows.

    Example:
        >>> kid(torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [0.0]])).value
        7.0
    """
    if min(len(a), len(b)) < 2:
        raise InputError("a kernel distance needs at least 2 images a side")
    num = min(len(a), len(b))
    blocks = max(_LEAST_BLOCKS, math.ceil(num / _BLOCK))
    error = math.nan
    if num >= 2 * blocks:  # every n-th image is in block n, so sorted images do no harm
        values = [_distance(a[n::blocks], b[n::blocks], chunk) for n in range(blocks)]
        error = float(torch.tensor(values).std()) / math.sqrt(blocks)
    return Kid(_distance(a, b, chunk), error)


def _distance(a: Tensor, b: Tensor, chunk: int) -> float:
    within = sum((_total(x, x, chunk) - _diagonal(x)) / (len(x) * (len(x) - 1)) for x in (a, b))
    return within - 2 * _total(a, b, chunk) / (len(a) * len(b))


def _total(a: Tensor, b: Tensor, chunk: int) -> float:
    """Sums the kernel over all pairs."""
    parts = ((x.double(), y.double()) for x in a.split(chunk) for y in b.split(chunk))
    return sum(float((x @ y.T / x.shape[1] + 1).pow(3).sum()) for x, y in parts)


def _diagonal(x: Tensor) -> float:
    """Sums the kernel of each row with itself."""
    return float((x.double().square().mean(1) + 1).pow(3).sum())
