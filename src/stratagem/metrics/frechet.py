"""Frechet distance between two sets of feature vectors, each summed up as a Gaussian.

    FD(a, b) = |mu_a - mu_b|^2 + tr C_a + tr C_b - 2 tr (C_a^1/2 C_b C_a^1/2)^1/2

The square root of the product is never formed. With factors C = F^T F from a symmetric
eigendecomposition (F = diag(lambda)^1/2 U^T), the last trace is the sum of the singular values of
F_a F_b^T: real, non-negative, symmetric in a and b, and as exact for covariances that are nearly
singular as for others. `sqrtm` is none of these.

Statistics are a monoid: `merge` joins those of two disjoint sets exactly (Chan, Golub & LeVeque
1983), so neither the batches, nor their order, nor the number of processes changes the result. All
sums are float64.

Reference: Heusel et al. 2017, arXiv:1706.08500 (the distance, Eq. 6).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stratagem.errors import InputError
from stratagem.randomness import generator

__all__ = [
    "Interval",
    "Statistics",
    "bootstrap",
    "frechet_distance",
    "joined",
    "merge",
    "moments",
    "refuse_few",
    "statistics",
]


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a set of vectors.

    Attributes:
        mean: Shape (D,), float64.
        cov: Unbiased covariance, shape (D, D), float64; zero for a single vector.
        num: How many vectors; 0 if that is not known, as of published statistics.
    """

    mean: Tensor
    cov: Tensor
    num: int

    @property
    def dim(self) -> int:
        """Length D of the vectors."""
        return len(self.mean)


def moments(features: Tensor, counts: Tensor | None = None) -> Statistics:
    """Returns the statistics of one batch of feature vectors, on their device.

    Args:
        features: Shape (B, D), B at least 1.
        counts: How often each vector counts, shape (B,); once by default.

    Raises:
        InputError: If a feature is NaN or infinite.

    Example:
        >>> moments(torch.tensor([[0.0], [2.0]]))
        Statistics(mean=tensor([1.], dtype=torch.float64), cov=tensor([[2.]], \
dtype=torch.float64), num=2)
    """
    rows = features.detach().to(torch.float64)
    assert rows.ndim == 2, f"features must have shape (B, D), not {tuple(rows.shape)}"
    if not torch.isfinite(rows).all():
        raise InputError("features hold NaN or infinity: look at the images or the feature weights")
    weights = rows.new_ones(len(rows)) if counts is None else counts.to(rows)
    num = int(weights.sum())
    mean = weights @ rows / num
    centred = (rows - mean) * weights.sqrt()[:, None]
    return Statistics(mean, centred.T @ centred / max(num - 1, 1), num)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Returns the statistics of the union of two disjoint sets.

    With d = mu_b - mu_a and S = (n - 1) C:  S = S_a + S_b + d d^T n_a n_b / (n_a + n_b).

    Example:
        >>> left, right = moments(torch.tensor([[0.0]])), moments(torch.tensor([[2.0]]))
        >>> float(merge(left, right).cov)
        2.0
    """
    assert a.dim == b.dim, (a.dim, b.dim)
    num = a.num + b.num
    shift = b.mean - a.mean
    scatter = a.cov * (a.num - 1) + b.cov * (b.num - 1)
    scatter = scatter + torch.outer(shift, shift) * (a.num * b.num / num)
    return Statistics(a.mean + shift * (b.num / num), scatter / (num - 1), num)


def statistics(batches: Iterable[Tensor]) -> Statistics:
    """Sums up a stream of feature batches, each of shape (B, D); empty batches are passed over.

    Raises:
        InputError: If there is no vector at all, or a feature is not finite.
    """
    total: Statistics | None = None
    for batch in batches:
        if len(batch):
            total = joined(total, moments(batch))
    if total is None:
        raise InputError("there are no images to take statistics of")
    return total


def joined(total: Statistics | None, part: Statistics) -> Statistics:
    """Returns `merge` of both, or the part alone if there is nothing yet."""
    return part if total is None else merge(total, part)


def refuse_few(num: int, dim: int) -> None:
    """Refuses too few vectors for a distance of `dim` dimensions, see `frechet_distance`.

    Raises:
        InputError: If there are `dim` vectors or fewer.
    """
    if num <= dim:
        raise InputError(
            f"{num} images are too few for a Frechet distance of {dim} dimensions: "
            f"use at least {dim + 1}, or features of fewer dimensions"
        )


def frechet_distance(a: Statistics, b: Statistics, *, allow_few: bool = False) -> float:
    """Returns the Frechet distance of two sets, at least 0.

    A covariance of D dimensions estimated from D vectors or fewer is singular, and the distance is
    then dominated by the number of images rather than by what is in them; this is refused.

    Args:
        a: Statistics of one set.
        b: Statistics of the other, of the same features.
        allow_few: Compute it all the same.

    Raises:
        InputError: If the dimensions differ, or a set is too small and `allow_few` is not set.

    Example:
        >>> eye = torch.eye(2, dtype=torch.float64)
        >>> a = Statistics(torch.zeros(2).double(), eye, 9)
        >>> frechet_distance(a, Statistics(torch.ones(2).double(), 4 * eye, 9))
        4.0
    """
    if a.dim != b.dim:
        raise InputError(f"cannot compare features of {a.dim} and {b.dim} dimensions: use one net")
    for num in () if allow_few else (a.num, b.num):
        if num:
            refuse_few(num, a.dim)
    return _distance(a, b, _factor(b.cov))


def _distance(a: Statistics, b: Statistics, factor: Tensor) -> float:
    """Returns the distance, given the factor of b's covariance."""
    overlap = torch.linalg.svdvals(_factor(a.cov) @ factor.T).sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * overlap
    return max(float(distance), 0.0)


def _factor(cov: Tensor) -> Tensor:
    """Returns F with F^T F = C, shape (D, D); rounding below zero is cut off."""
    values, vectors = torch.linalg.eigh(cov)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


class Interval(NamedTuple):
    """Where a distance would lie for other samples of the same source, as many of them.

    Attributes:
        low: Lower end of the 95 % interval.
        high: Upper end.
        error: Standard error.
        bias: By how much redrawn samples are farther than the samples themselves.
    """

    low: float
    high: float
    error: float
    bias: float


def bootstrap(rows: Tensor, real: Statistics, times: int, seed: int = 0) -> Interval:
    """Returns the bootstrap interval of the distance of samples to a fixed reference.

    Samples are redrawn with replacement, which is the same as counting each of them 0, 1, 2, ...
    times. Redrawn sets repeat images, and a Frechet distance grows as different images get fewer,
    so redrawn distances lie too high: the interval is that of their differences from their own
    mean, about the distance of the samples. It says nothing of the distance's own bias, which
    falls with the number of images: compare only distances of equal numbers.

    Args:
        rows: Features of the samples, shape (N, D).
        real: Statistics of the reference.
        times: How often samples are redrawn, at least 2.
        seed: Of the draws.

    Raises:
        InputError: If `times` is less than 2.
    """
    if times < 2:
        raise InputError("a bootstrap redraws at least 2 times")
    real = Statistics(real.mean.to(rows.device), real.cov.to(rows.device), real.num)
    factor = _factor(real.cov)
    found = _distance(moments(rows), real, factor)
    values = torch.empty(times, dtype=torch.float64)
    for n in range(times):
        drawn = generator(seed, "bootstrap", n).integers(len(rows), size=len(rows))
        counts = torch.bincount(torch.from_numpy(drawn), minlength=len(rows))
        values[n] = _distance(moments(rows, counts), real, factor)
    mean = values.mean()
    ends = values.quantile(values.new_tensor([0.025, 0.975])) - mean + found
    low, high = ends.clamp(min=0).tolist()
    return Interval(low, high, float(values.std()), float(mean) - found)
