"""Memorisation: do samples come closer to training images than new real images do?

    d(x) = min_j |x - train_j| / sqrt(C H W)         per-pixel RMS, pixel values in [0, 1]

A sample that repeats a training image has d near 0, but how near is near depends on the data. The
yardstick is therefore the same distance of *held-out real images*, which no model has seen: a model
that draws from the data's distribution has the same distribution of d. The copy rate is the share
of samples at or below the k-th smallest of H held-out distances, k = about H / 100. If samples and
held-out images are exchangeable, the number of such samples among M follows

    count ~ BetaBinomial(M, k, H + 1 - k)

whatever the distribution of d is, which gives an exact test of "copies more than chance would".

What the figures cannot tell: blurred or plain images are near to everything, training images
included, and count as copies. Look at the pairs before accusing.

Reference: AuthPct is the authenticity of Alaa et al. 2022, arXiv:2102.08921.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stratagem.errors import InputError

__all__ = ["Memorisation", "audit", "nearest"]

# An exact test at this level accuses one honest sampler in a thousand.
LEVEL = 1e-3


def nearest(
    queries: Tensor, data: Tensor, *, chunk: int = 4096, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Finds the nearest row of `data` to each query, by Euclidean distance, exactly.

    |q - d|^2 = |q|^2 - 2 <q, d> + |d|^2 cancels for near rows, so the search is in float64, about
    the mean of the queries, and the distance returned is that of the difference itself: the
    distance of a copy is 0 and not the square root of a rounding error.

    Args:
        queries: Shape (M, D), any real type.
        data: Shape (N, D).
        chunk: Rows of either side handled at once; memory is O(chunk (chunk + D)).
        exclude: For each query one row of `data` that does not count (itself), shape (M,), int64.

    Returns:
        Distances (M,) float64 and indices (M,) int64.

    Raises:
        InputError: If there is no data, or the lengths of the rows differ.

    Example:
        >>> nearest(torch.tensor([[0.0], [9.0]]), torch.tensor([[8.0], [1.0]]))
        (tensor([1., 1.], dtype=torch.float64), tensor([1, 0]))
    """
    if len(data) <= (exclude is not None):
        raise InputError("there are too few training images to search")
    if queries.shape[1] != data.shape[1]:
        raise InputError(
            f"images of {queries.shape[1]} and of {data.shape[1]} values cannot be compared: "
            "use samples and data of one size"
        )
    starts = range(0, len(queries), chunk)
    skips = [None if exclude is None else exclude[i : i + chunk] for i in starts]
    parts = [
        _nearest_rows(queries[i : i + chunk].double(), data, chunk, skip)
        for i, skip in zip(starts, skips, strict=True)
    ]
    if not parts:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    return torch.cat([d for d, _ in parts]), torch.cat([i for _, i in parts])


def _nearest_rows(
    queries: Tensor, data: Tensor, chunk: int, skip: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Searches for one chunk of float64 queries (M, D)."""
    centre = queries.mean(0)
    shifted = queries - centre
    best = queries.new_full((len(queries),), math.inf)
    index = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for start in range(0, len(data), chunk):
        rows = data[start : start + chunk].double() - centre
        score = rows.square().sum(1) - 2 * shifted @ rows.T  # |q - d|^2 - |q|^2
        if skip is not None:
            own = torch.arange(start, start + len(rows), device=queries.device)
            score.masked_fill_(skip[:, None] == own, math.inf)
        low, where = score.min(1)
        nearer = low < best
        best = torch.where(nearer, low, best)
        index = torch.where(nearer, where + start, index)
    return (queries - data[index].double()).norm(dim=1), index


@dataclass(frozen=True)
class Memorisation:
    """How close samples come to the training images; distances are per-pixel RMS in [0, 1].

    Attributes:
        distances: Of each sample to its nearest training image, shape (M,), float64.
        neighbours: Index of that training image, shape (M,), int64.
        held_out: Distance of each held-out image to its nearest training image, shape (H,).
        authentic: AuthPct in [0, 1]: share of samples that are farther from their nearest training
            image than that image is from its own nearest other training image.
    """

    distances: Tensor
    neighbours: Tensor
    held_out: Tensor
    authentic: float

    @property
    def rank(self) -> int:
        """Which held-out distance is the threshold: the k-th smallest, k = max(1, H / 100)."""
        return max(1, len(self.held_out) // 100)

    @property
    def threshold(self) -> float:
        """The distance at or below which a sample counts as a copy: the 1 % quantile."""
        return float(self.held_out.kthvalue(self.rank).values)

    @property
    def copy_rate(self) -> float:
        """Share of samples at or below the threshold; about 0.01 for an honest sampler."""
        return float((self.distances <= self.threshold).double().mean())

    @property
    def copy_rate_min(self) -> float:
        """Share of samples no farther than the nearest held-out image; about 1 / (H + 1)."""
        return float((self.distances <= self.held_out.min()).double().mean())

    @property
    def median(self) -> float:
        """Median distance of the samples."""
        return float(self.distances.quantile(0.5))

    @property
    def held_out_median(self) -> float:
        """Median distance of the held-out images."""
        return float(self.held_out.quantile(0.5))

    @property
    def ratio(self) -> float:
        """Median of the samples over that of the held-out images: 1 is honest, 0 is copying."""
        return self.median / self.held_out_median if self.held_out_median else math.nan

    @property
    def p_value(self) -> float:
        """Probability of at least this many copies if the samples were held-out real images."""
        num, held = len(self.distances), len(self.held_out)
        rank = int((self.held_out <= self.threshold).sum())  # more than `rank` if distances tie
        return _beta_binomial_tail(round(self.copy_rate * num), num, rank, held + 1 - rank)

    @property
    def copies(self) -> bool:
        """Whether the sampler copies: p_value below 0.001."""
        return self.p_value < LEVEL

    def nearest_pairs(self, num: int) -> Tensor:
        """Returns the samples nearest to a training image, nearest first, int64 (num,)."""
        return self.distances.argsort()[:num]


def audit(samples: Tensor, train: Tensor, held_out: Tensor) -> Memorisation:
    """Compares the distances of samples and of held-out images to the training images.

    Args:
        samples: uint8, shape (M, C, H, W).
        train: The images trained on, uint8, shape (N, C, H, W), N at least 2.
        held_out: Real images not trained on, uint8, shape (H, C, H, W); 100 or more make the
            1 % quantile mean something.

    Raises:
        InputError: If a set is empty or the sizes differ.
    """
    if not len(samples) or not len(held_out):
        raise InputError("a memorisation audit needs samples and held-out images: one set is empty")
    scale = 255 * math.sqrt(samples[0].numel())
    rows = train.flatten(1)
    distances, neighbours = nearest(samples.flatten(1), rows)
    real, _ = nearest(held_out.flatten(1), rows)
    own, _ = nearest(rows[neighbours], rows, exclude=neighbours)
    authentic = float((distances > own).double().mean())
    return Memorisation(distances / scale, neighbours, real / scale, authentic)


def _beta_binomial_tail(count: int, num: int, a: int, b: int) -> float:
    """Returns P(X >= count) of X ~ BetaBinomial(num, a, b), by the log-gamma function."""
    if b <= 0:  # every held-out image is at the threshold: nothing can be said
        return 1.0
    x = torch.arange(count, num + 1, dtype=torch.float64)
    choose = math.lgamma(num + 1) - torch.lgamma(x + 1) - torch.lgamma(num - x + 1)
    beta = torch.lgamma(x + a) + torch.lgamma(num - x + b) - math.lgamma(num + a + b)
    norm = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return min(1.0, float((choose + beta - norm).exp().sum()))
