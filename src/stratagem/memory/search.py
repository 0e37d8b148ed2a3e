"""Which rows of a bank are nearest to given vectors: exact, one pass over the bank.

    cos(q, v) = q . v,   both of length 1

Only the rows of un-mirrored images are searched. Memory does not grow with the bank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stratagem.errors import InputError
from stratagem.memory.bank import MemoryBank
from stratagem.memory.store import BLOCK, unit

__all__ = ["nearest", "rows_near"]

_ROUNDING = 1e-6  # of a cosine of float16 rows: equal images shall have cosine 1


def nearest(
    bank: MemoryBank,
    queries: Tensor,
    num: int,
    *,
    rows: Tensor | None = None,
    exclude: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Finds the rows of largest cosine to each query.

    Args:
        bank: Where to search.
        queries: Vectors of any length but 0, shape (Q, D).
        num: How many rows, k.
        rows: The rows that count, shape (M,), int64; by default all.
        exclude: For each query one row that does not count (itself), shape (Q,), int64.

    Returns:
        Cosines (Q, k), falling, and rows (Q, k), int64.

    Raises:
        InputError: If a query is unusable or of another width, or there are fewer than k rows.

    Example:
        >>> from stratagem.memory.store import hold
        >>> bank = MemoryBank(hold(torch.eye(3)[:, None]), torch.zeros(3), torch.zeros(3), {}, "")
        >>> nearest(bank, torch.tensor([[3.0, 4.0, 0.0]]), 2)
        (tensor([[0.8000, 0.6000]]), tensor([[1, 0]]))
    """
    queries = _queries(bank, queries)
    rows = torch.arange(bank.num) if rows is None else bank.checked(rows)
    there = len(rows) - (exclude is not None)
    if not 1 <= num <= there:
        raise InputError(f"{num} nearest rows are wanted, there are {there}: ask for 1 to {there}")
    best = torch.full((len(queries), num), -2.0)
    where = torch.zeros(len(queries), num, dtype=torch.int64)
    for part in rows.split(BLOCK):
        cosines = queries @ bank.lookup(part).T
        if exclude is not None:
            cosines.masked_fill_(exclude[:, None] == part, -2.0)
        candidates = torch.cat([where, part.expand(len(queries), -1)], 1)
        best, order = torch.cat([best, cosines], 1).topk(num, dim=1)
        where = candidates.gather(1, order)
    return best, where


def rows_near(bank: MemoryBank, queries: Tensor, cosine: float) -> Tensor:
    """Returns the rows whose cosine to any of the queries (Q, D) is at least this, int64.

    A millionth less will do, so that a cosine of 1 finds equal images whatever the rounding.

    Raises:
        InputError: If a query is unusable or of another width, or the cosine is impossible.
    """
    if not -1 <= cosine <= 1:
        raise InputError(f"cosine is {cosine}: it must be between -1 and 1")
    queries = _queries(bank, queries)
    parts = torch.arange(bank.num).split(BLOCK)
    near = [part[(queries @ bank.lookup(part).T).amax(0) >= cosine - _ROUNDING] for part in parts]
    return torch.cat(near)


def _queries(bank: MemoryBank, queries: Tensor) -> Tensor:
    if queries.ndim != 2 or len(queries) == 0 or queries.shape[1] != bank.dim:
        raise InputError(
            f"queries have shape {tuple(queries.shape)}, the bank has vectors of {bank.dim} "
            f"numbers: give (Q, {bank.dim})"
        )
    return unit(queries, "query")
