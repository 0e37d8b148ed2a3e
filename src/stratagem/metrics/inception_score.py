"""Inception Score: are the classes of single samples clear, and those of all samples varied?

    IS = exp mean_x KL( p(class | x) || p(class) ),   p(class) = mean_x p(class | x)
       = exp ( mean_x sum_c p log p  -  sum_c p(class) log p(class) )

It never sees real images. p is the softmax of the classifier's product without its bias, as in
every published figure. By custom it is the mean over splits of 5000 samples in their order; splits
lower it, so that it depends on their size. What is left over makes the splits larger, for a short
one would lower the mean for its size alone: 12,000 samples are two splits of 6000.

What is kept is one row of sums per split, which may be added in any order:

    [ sum_x p(class | x) (C),  sum_x sum_c p log p,  count ]

Reference: Salimans et al. 2016, arXiv:1606.03498 (section 4).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SPLIT", "InceptionScore", "class_sums", "inception_score"]

SPLIT = 5000


class InceptionScore(NamedTuple):
    """The mean over splits and the standard deviation between them, 0 of one split."""

    value: float
    std: float


def class_sums(probabilities: Tensor, first: int, num: int, split: int = SPLIT) -> Tensor:
    """Returns the sums of some samples by split, shape (max(1, num // split), C + 2), float64.

    Args:
        probabilities: p(class | x) of samples first, first + 1, ..., shape (B, C).
        first: Number of the first of them.
        num: How many samples there are in all.
        split: Least number of samples in a split.
    """
    p = probabilities.double()
    entropy = torch.special.xlogy(p, p).sum(1, keepdim=True)
    rows = torch.cat([p, entropy, torch.ones_like(entropy)], 1)
    splits = max(1, num // split)
    index = torch.arange(first, first + len(p), device=p.device) * splits // num
    return rows.new_zeros(splits, rows.shape[1]).index_add_(0, index, rows)


def inception_score(sums: Tensor) -> InceptionScore:
    """Returns the score of sums (S, C + 2).

    Example:
        >>> inception_score(class_sums(torch.eye(4), 0, 4))  # four clear classes, equally often
        InceptionScore(value=4.0, std=0.0)
    """
    count = sums[:, -1]
    marginal = sums[:, :-2] / count[:, None]
    mutual = sums[:, -2] / count - torch.special.xlogy(marginal, marginal).sum(1)
    scores = mutual.exp()
    return InceptionScore(float(scores.mean()), float(scores.std(unbiased=False)))
