"""Precision, recall, density and coverage: do samples and real images lie among each other?

Each image has a ball that reaches to its k-th nearest image of its own set, without its surface:

    B(x) = { y : |x - y| < NND_k(x) }

    precision   share of samples in the ball of some real image           (are samples realistic?)
    recall      share of real images in the ball of some sample           (are all kinds sampled?)
    density     mean number of real balls that a sample is in, over k     (precision, by weight)
    coverage    share of real images whose ball holds a sample            (recall, by real balls)

A set compared with itself has precision, recall, density and coverage 1 (but for ties of
distances). One outlying real image has a large ball, which precision counts in full: density and
coverage are the robust ones. Precision and recall depend on the numbers of images.

Distances are exact, in float64 and in pieces: memory is O(chunk (chunk + D)).

References: Kynkaanniemi et al. 2019, arXiv:1904.06991 (improved precision and recall); Naeem et al.
2020, arXiv:2002.09797 (density and coverage, Eq. 4 and 5).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stratagem.errors import InputError

__all__ = ["Neighbours", "neighbour_scores"]


class Neighbours(NamedTuple):
    """The four figures; all but density are shares."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbour_scores(real: Tensor, fake: Tensor, k: int = 5, *, chunk: int = 4096) -> Neighbours:
    """Returns precision, recall, density and coverage of features (N, D) and (M, D).

    Args:
        real: Features of real images.
        fake: Features of samples.
        k: Which neighbour a ball reaches to.
        chunk: Rows of either side handled at once.

    Raises:
        InputError: If k is not at least 1 or a set has no k-th neighbour.

    Example:
        >>> rows = torch.arange(9.0).square()[:, None]
        >>> neighbour_scores(rows, rows, 2)
        Neighbours(precision=1.0, recall=1.0, density=1.0, coverage=1.0)
    """
    if not 1 <= k < min(len(real), len(fake)):
        raise InputError(
            f"{k} neighbours of {min(len(real), len(fake))} images: ask for 1 to one less than "
            "there are images"
        )
    centre = real.double().mean(0)  # |a|^2 - 2 <a, b> + |b|^2 cancels far from the origin
    real, fake = real.double() - centre, fake.double() - centre
    real_reach, fake_reach = _reach(real, k, chunk), _reach(fake, k, chunk)
    balls = fake.new_zeros(len(fake))  # how many real balls each sample is in
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    recalled = covered.clone()
    for i in range(0, len(real), chunk):
        rows = slice(i, i + chunk)
        for j in range(0, len(fake), chunk):
            columns = slice(j, j + chunk)
            squares = _squares(real[rows], fake[columns])
            inside = squares < real_reach[rows, None]
            balls[columns] += inside.sum(0)
            covered[rows] |= inside.any(1)
            recalled[rows] |= (squares < fake_reach[columns]).any(1)
    figures = [float(x.double().mean()) for x in (balls > 0, recalled, balls / k, covered)]
    return Neighbours(*figures)


def _reach(rows: Tensor, k: int, chunk: int) -> Tensor:
    """Returns the squared distance of each row to its k-th nearest other row, shape (N,)."""
    reach = []
    for i in range(0, len(rows), chunk):
        best = rows.new_full((len(rows[i : i + chunk]), k), torch.inf)
        for j in range(0, len(rows), chunk):
            squares = _squares(rows[i : i + chunk], rows[j : j + chunk])
            if i == j:
                squares.fill_diagonal_(torch.inf)
            best = torch.cat([best, squares], 1).topk(k, 1, largest=False).values
        reach.append(best[:, -1])
    return torch.cat(reach)


def _squares(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)).clamp_(min=0)
