"""Do snippets decide everything? Images of one snippet differ less than images of different ones.

    within    mean distance of two images that one snippet made, of different noise
    between   the same of two images of different snippets

A network that only paints its snippet has `within` near 0: noise then adds nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Diversity", "diversity"]


class Diversity(NamedTuple):
    """How much images of one snippet differ, beside images of different snippets.

    Attributes:
        within: Mean distance of two images of one snippet.
        error: Standard error of `within` over snippets.
        between: Mean distance of two images of different snippets.
        snippets: Snippets with two images or more.
    """

    within: float
    error: float
    between: float
    snippets: int


def diversity(vectors: Tensor, snippets: Tensor) -> Diversity | None:
    """Compares images of the same snippet with images of different ones.

    Args:
        vectors: Shape (B, D).
        snippets: Which snippet made each, shape (B,), int64.

    Returns:
        None if there are not two snippets with two images or more.

    Example:
        >>> diversity(torch.tensor([[0.0], [2.0], [9.0], [9.0]]), torch.tensor([0, 0, 1, 1]))
        Diversity(within=1.0, error=1.0, between=8.0, snippets=2)
    """
    _, counts = torch.unique(snippets, return_counts=True)
    if int((counts > 1).sum()) < 2:
        return None
    table = torch.cdist(vectors.double(), vectors.double())
    same = snippets[:, None] == snippets
    means = []
    for snippet in snippets.unique():
        rows = (snippets == snippet).nonzero().flatten()
        if len(rows) > 1:
            means.append(table[rows][:, rows].sum() / (len(rows) * (len(rows) - 1)))
    within = torch.stack(means)
    error = float(within.std()) / math.sqrt(len(within))
    return Diversity(float(within.mean()), error, float(table[~same].mean()), len(within))
