"""The nearest row of a data set to each of some vectors: exact, and in one pass over the data."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from stratagem.errors import InputError

__all__ = ["Rows", "nearest"]

_CHUNK_NUMBERS = 1 << 24


class Rows(Protocol):
    """Rows (N, D) that need not be in memory at once: a tensor, or whatever gives parts of one."""

    @property
    def shape(self) -> Any:
        """(N, D)."""

    def __getitem__(self, index: Any) -> Tensor:
        """Gives the rows of a slice, or of an int64 tensor of indices."""


def nearest(
    queries: Tensor, data: Tensor | Rows, *, chunk: int = 4096, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Finds the nearest row of `data` to each query, by Euclidean distance, exactly.

    |q - d|^2 = |q|^2 - 2 <q, d> + |d|^2 cancels for near rows, so the search is in float64, about
    the mean of the queries, and the distance returned is that of the difference itself: the
    distance of a copy is 0 and not the square root of a rounding error. The data are read once.

    Args:
        queries: Shape (M, D), any real type.
        data: Shape (N, D); it may lie on disk and on another device.
        chunk: Rows of either side handled at once, fewer if they are long; memory beside the
            queries is O(chunk (chunk + D)).
        exclude: For each query one row of `data` that does not count (itself), shape (M,), int64.

    Returns:
        Distances (M,) float64 and indices (M,) int64.

    Raises:
        InputError: If there is no data, or the lengths of the rows differ.

    Example:
        >>> nearest(torch.tensor([[0.0], [9.0]]), torch.tensor([[8.0], [1.0]]))
        (tensor([1., 1.], dtype=torch.float64), tensor([1, 0]))
    """
    num, width = data.shape
    if num <= (exclude is not None):
        raise InputError("there are too few training images to search")
    if queries.shape[1] != width:
        raise InputError(
            f"images of {queries.shape[1]} and of {width} values cannot be compared: "
            "use samples and data of one size"
        )
    chunk = max(1, min(chunk, _CHUNK_NUMBERS // width))
    device = queries.device
    centre = queries.mean(0, dtype=torch.float64) if len(queries) else queries.new_zeros(width)
    best = torch.full((len(queries),), math.inf, dtype=torch.float64, device=device)
    index = torch.zeros(len(queries), dtype=torch.int64, device=device)
    for start in range(0, num, chunk):
        rows = data[start : start + chunk].to(device).double() - centre
        squares, own = rows.square().sum(1), torch.arange(start, start + len(rows), device=device)
        for first in range(0, len(queries), chunk):
            part = slice(first, first + chunk)
            score = squares - 2 * (queries[part].double() - centre) @ rows.T  # |q - d|^2 - |q|^2
            if exclude is not None:
                score.masked_fill_(exclude[part, None] == own, math.inf)
            low, where = score.min(1)
            nearer = low < best[part]
            best[part] = torch.where(nearer, low, best[part])
            index[part] = torch.where(nearer, where + start, index[part])
    for first in range(0, len(queries), chunk):
        part = slice(first, first + chunk)
        found = data[index[part].cpu()].to(device).double()
        best[part] = (queries[part].double() - found).norm(dim=1)
    return best, index
