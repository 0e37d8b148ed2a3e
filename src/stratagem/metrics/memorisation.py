"""Memorisation: do samples come closer to training images than new real images do?

    d(x) = min_j |x - train_j|                 pixels: over sqrt(C H W), values in [0, 1]
    r(x) = d(x) / min_j |x - held_out_j|       x itself left out

A sample that repeats a training image has d near 0, but how near is near depends on the data. The
yardstick is therefore the same distance of *held-out real images*, which no model has seen: a model
that draws from the data's distribution has the same distribution of d. The copy rate is the share
of samples at or below the k-th smallest of H held-out distances, k = about H / 100. If samples and
held-out images are exchangeable, the number of such samples among M follows

    count ~ BetaBinomial(M, k, H + 1 - k)

whatever the distribution of d is, which gives an exact test of "copies more than chance would".

Blurred or plain images are near to everything and have small d without copying anything. They are
as near to held-out images as to training images, so the same test of r, the relative distance,
passes them by and still finds copies. It errs towards passing: a held-out image has one other
held-out image less to be near to. C_T and AuthPct are of d and share its blindness.

References: C_T of Meehan, Chaudhuri & Dasgupta 2020, arXiv:2004.05675 (section 3; here d is to the
nearest of all training images, also of another cell). AuthPct is the authenticity of Alaa et al.
2022, arXiv:2102.08921.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stratagem.errors import InputError
from stratagem.metrics.nearest import Rows, nearest
from stratagem.randomness import permutation

__all__ = [
    "Excess",
    "Memorisation",
    "Vectors",
    "audit",
    "audit_vectors",
    "copying_score",
    "nearest",
]

# An exact test at this level accuses one honest sampler in a thousand. Several spaces share it
# out (Bonferroni): so does one of them at least.
LEVEL = 1e-3
LEAST = 20  # images of either kind in a cell of C_T, as in its paper
_CELL_IMAGES = 100  # held-out images per cell of C_T
_FITTED = 4096  # training rows that the cells are found with
_NONE = torch.empty(0, dtype=torch.float64)


# --- what an audit finds -----------------------------------------------------------------------


class Excess(NamedTuple):
    """How many samples have a value that few held-out images have.

    Attributes:
        threshold: The k-th smallest value of the held-out images; NaN without any.
        num: Samples at or below it.
        rate: Their share, about 0.01 for an honest sampler.
        p_value: Probability of at least so many if samples were held-out real images.
        limit: The least number whose p-value is below the level: fewer copies go unnoticed.
    """

    threshold: float
    num: int
    rate: float
    p_value: float
    limit: int

    @classmethod
    def of(cls, values: Tensor, held_out: Tensor, level: float = LEVEL) -> Excess:
        """Compares values of samples (M,) with those of held-out images (H,), tested at a level."""
        size, held = len(values), len(held_out)
        if not held:
            return cls(math.nan, 0, math.nan, math.nan, 0)
        threshold = float(held_out.kthvalue(max(1, held // 100)).values)
        found = int((values <= threshold).sum())
        rank = int((held_out <= threshold).sum())  # more than k if values tie
        tails = _beta_binomial_tails(size, rank, held + 1 - rank)
        limit = int((tails >= level).sum())
        return cls(threshold, found, found / size, float(tails[found]), limit)


@dataclass(frozen=True)
class Memorisation:
    """How close samples come to the training images.

    Attributes:
        distances: Of each sample to its nearest training image, shape (M,), float64.
        neighbours: Index of that training image, shape (M,), int64.
        held_out: Distance of each held-out image to its nearest training image, shape (H,).
        authentic: AuthPct in [0, 1]: share of samples that are farther from their nearest training
            image than that image is from its own nearest other training image.
        relative: r of each sample, shape (M,); empty if there are no two held-out images.
        held_out_relative: r of each held-out image, shape (H,).
        score: C_T: below -3 samples are closer to training images than held-out images are, above
            3 they are farther; NaN if there are too few images for it.
        level: Of the tests; all spaces of an audit share 0.001.
    """

    distances: Tensor
    neighbours: Tensor
    held_out: Tensor
    authentic: float
    relative: Tensor = _NONE
    held_out_relative: Tensor = _NONE
    score: float = math.nan
    level: float = LEVEL

    @property
    def near(self) -> Excess:
        """Samples with a small distance: copies, or plain images."""
        return Excess.of(self.distances, self.held_out, self.level)

    @property
    def copied(self) -> Excess:
        """Samples with a small relative distance: copies."""
        return Excess.of(self.relative, self.held_out_relative, self.level)

    @property
    def copy_rate(self) -> float:
        """Share of near samples, copies or plain images; about 0.01 for an honest sampler."""
        return self.near.rate

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
        """Median distance of the held-out images; NaN without any."""
        return float(self.held_out.quantile(0.5)) if len(self.held_out) else math.nan

    @property
    def ratio(self) -> float:
        """Median of the samples over that of the held-out images: 1 is honest, 0 is copying."""
        return self.median / self.held_out_median if self.held_out_median else math.nan

    @property
    def p_value(self) -> float:
        """Probability of at least this many copies if the samples were held-out real images."""
        return self.near.p_value

    @property
    def copies(self) -> bool:
        """Whether more samples are near than chance allows."""
        return self.p_value < self.level

    def nearest_pairs(self, num: int) -> Tensor:
        """Returns the samples nearest to a training image, nearest first, int64 (num,).

        Nearest is by relative distance, where there is one, then by distance.
        """
        order = self.distances.argsort(stable=True)
        if len(self.relative):
            order = order[self.relative[order].argsort(stable=True)]
        return order[:num]


def _beta_binomial_tails(num: int, a: int, b: int) -> Tensor:
    """Returns P(X >= x) for x = 0 to num, X ~ BetaBinomial(num, a, b), by log-gamma functions."""
    if b <= 0:  # every held-out image is at the threshold: nothing can be said
        return torch.ones(num + 1, dtype=torch.float64)
    x = torch.arange(num + 1, dtype=torch.float64)
    choose = math.lgamma(num + 1) - torch.lgamma(x + 1) - torch.lgamma(num - x + 1)
    beta = torch.lgamma(x + a) + torch.lgamma(num - x + b) - math.lgamma(num + a + b)
    norm = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return (choose + beta - norm).exp().flip(0).cumsum(0).flip(0).clamp(max=1)


# --- the audit ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vectors:
    """The images of an audit as vectors; S sides: the image alone, or with its mirror image.

    Attributes:
        samples: Shape (S, M, D).
        held_out: Shape (S, H, D); H may be 0.
        train: The training images, un-mirrored, shape (N, D).
        sides: Gives all sides of some training images, int64 (n,) -> (S, n, D).
        scale: Of distances.
    """

    samples: Tensor
    held_out: Tensor
    train: Tensor | Rows
    sides: Callable[[Tensor], Tensor]
    scale: float = 1.0


def audit(samples: Tensor, train: Tensor, held_out: Tensor, *, flip: bool = False) -> Memorisation:
    """Compares the distances of samples and of held-out images to the training images, in pixels.

    Distances are per-pixel RMS of pixels in [0, 1].

    Args:
        samples: uint8, shape (M, C, H, W).
        train: The images trained on, uint8, shape (N, C, H, W), N at least 2.
        held_out: Real images not trained on, uint8, shape (H, C, H, W); 100 or more make the
            1 % quantile mean something.
        flip: Whether a mirrored copy is a copy.

    Raises:
        InputError: If a set is empty or the sizes differ.
    """
    if not len(samples) or not len(held_out):
        raise InputError("a memorisation audit needs samples and held-out images: one set is empty")

    def sides(images: Tensor) -> Tensor:
        both = (images, images.flip(-1)) if flip else (images,)
        return torch.stack([side.flatten(1) for side in both])

    scale = 255 * math.sqrt(samples[0].numel())
    space = Vectors(
        sides(samples), sides(held_out), train.flatten(1), lambda i: sides(train[i]), scale
    )
    return audit_vectors(space)


def audit_vectors(space: Vectors, seed: int = 0, level: float = LEVEL) -> Memorisation:
    """Compares the distances of samples and of held-out images to the training images.

    With mirror images, the distance of an image is that of its nearer side.

    Args:
        space: The images as vectors.
        seed: Of the cells of C_T.
        level: Of the tests.

    Raises:
        InputError: If there are too few training images, or lengths of vectors differ.
    """
    num, held = space.samples.shape[1], space.held_out.shape[1]
    both = torch.cat([space.samples, space.held_out], 1)
    found, index = _nearest_side(both, space.train)  # in one pass over the training images
    distances, real, neighbours = found[:num], found[num:], index[:num]
    known, where = neighbours.unique(return_inverse=True)
    own, _ = _nearest_side(space.sides(known.cpu()).to(both.device), space.train, known)
    authentic = float((distances > own[where]).double().mean())
    relative, real_relative, score = _NONE, _NONE, math.nan
    if held > 1:
        itself = torch.cat([neighbours.new_full((num,), -1), torch.arange(held).to(neighbours)])
        to_held_out, _ = _nearest_side(both, space.held_out[0], itself)
        tiny = torch.finfo(torch.float64).tiny  # a copy of an image that is held out too: 0 / 0
        relative, real_relative = (found / to_held_out.clamp(min=tiny)).cpu().split([num, held])
        cells = _cells(both[0], space.train, held // _CELL_IMAGES, seed)
        score = copying_score(distances, real, cells[:num], cells[num:])
    return Memorisation(
        (distances / space.scale).cpu(),
        neighbours.cpu(),
        (real / space.scale).cpu(),
        authentic,
        relative,
        real_relative,
        score,
        level,
    )


def _nearest_side(
    sides: Tensor, data: Tensor | Rows, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Searches for images of several sides (S, M, D); the nearer side counts."""
    skip = None if exclude is None else exclude.repeat(len(sides))
    found = nearest(sides.flatten(0, 1), data, exclude=skip)
    distances, index = (part.view(len(sides), -1) for part in found)
    best, side = distances.min(0)
    return best, index.gather(0, side[None])[0]


def copying_score(
    samples: Tensor, held_out: Tensor, sample_cells: Tensor, held_out_cells: Tensor
) -> float:
    """Returns C_T, the mean over cells of the z-value of the Mann-Whitney test of distances.

        U   = number of (held-out a, sample b) with b > a, ties one half
        Z_U = (U - n m / 2) / sqrt(n m (n + m + 1) / 12)
        C_T = sum of n Z_U / sum of n       over cells of n held-out images and m samples

    Cells with fewer than 20 of either are left out; NaN if all are. (arXiv:2004.05675, Eq. 3.)

    Args:
        samples: Distances of samples, shape (M,).
        held_out: Distances of held-out images, shape (H,).
        sample_cells: Cell of each sample, shape (M,), int64.
        held_out_cells: Cell of each held-out image, shape (H,), int64.

    Example:
        >>> far, near, cell = torch.arange(30.0) + 30, torch.arange(30.0), torch.zeros(30).long()
        >>> round(copying_score(near, far, cell, cell), 3)
        -6.653
    """
    total, weight = 0.0, 0
    for cell in held_out_cells.unique():
        a, b = held_out[held_out_cells == cell].sort().values, samples[sample_cells == cell]
        n, m = len(a), len(b)
        if min(n, m) >= LEAST:
            below = torch.searchsorted(a, b) + torch.searchsorted(a, b, right=True)
            u = float(below.sum()) / 2
            total += n * (u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)
            weight += n
    return total / weight if weight else math.nan


def _cells(rows: Tensor, train: Tensor | Rows, num: int, seed: int) -> Tensor:
    """Returns the cell of each row (B, D): the nearest centre of k-means of training rows."""
    places = torch.linspace(0, train.shape[0] - 1, min(train.shape[0], _FITTED)).long()
    fitted = train[places].to(rows.device).double()
    num = max(1, min(num, 50, len(fitted)))
    centres = fitted[permutation(len(fitted), seed, "cells")[:num].to(rows.device)]
    for _ in range(10):
        index = torch.cdist(fitted, centres).argmin(1)
        for cell in index.unique():
            centres[cell] = fitted[index == cell].mean(0)
    return torch.cat([torch.cdist(r.double(), centres).argmin(1) for r in rows.split(4096)])
