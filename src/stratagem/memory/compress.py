"""Banks in fewer bytes, and what that costs.

    low rank    v ~ m + B c,   B: the d directions of largest variance of the rows about the mean m

The directions are eigenvectors of the D x D Gram matrix G = sum (v - m)(v - m)^T, which one pass
adds up in float64; its eigenvalues are the squares of the singular values of the centred bank. The
code of GMem (arXiv 2412.08781) decomposes the whole matrix instead, in three times the bank's own
memory; its factors are U sqrt(S) and V sqrt(S), ours are c = U S and B = V.

The rank is given, or is the least at which 19 rows of 20 have the wanted cosine to their original.
All ranks are tried in one pass: with c = B^T (v - m) for the full basis,

    <v, v_d> = <v, m> + sum_k^d c_k (c_k + b_k)      |v_d|^2 = |m|^2 + sum_k^d c_k (c_k + 2 b_k)

where b = B^T m and v_d is the row at rank d, so both are running sums over k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from stratagem.errors import InputError
from stratagem.memory.bank import MemoryBank
from stratagem.memory.search import nearest
from stratagem.memory.store import BLOCK, Codec, LowRank, Recoded, codec_of
from stratagem.randomness import permutation

__all__ = ["Axes", "Fidelity", "Format", "compress", "fidelity", "least_rank", "principal_axes"]

Format = Literal["float32", "float16", "int8", "low-rank"]

_SHARE = 0.95  # of the rows must have the wanted cosine
_QUERIES, _NEIGHBOURS = 256, 10
_TINY = 1e-12


class Axes(NamedTuple):
    """Directions of a set of vectors, by falling variance.

    Attributes:
        mean: m, shape (D,), float64.
        basis: Orthonormal columns, shape (D, D), float64.
        singular: Singular values of the centred set, shape (D,), float64.
    """

    mean: Tensor
    basis: Tensor
    singular: Tensor


class Fidelity(NamedTuple):
    """How well a bank stands for another one with the same rows.

    Attributes:
        energy: 1 - sum |v - v'|^2 / sum |v - m|^2, v' as stored: the share of variance kept.
        cosines: Quantiles of the cosine of a row to its original; 0 is the worst.
        recall: Share of the 10 nearest rows of a row that are among its 10 nearest here.
    """

    energy: float
    cosines: dict[float, float]
    recall: float | None


@dataclass
class _Moments:
    """Sums over vectors about a fixed point, float64: exact enough where the mean is not zero."""

    point: Tensor
    num: int
    total: Tensor
    gram: Tensor

    def add(self, rows: Tensor) -> None:
        shifted = rows.double() - self.point
        self.num += len(rows)
        self.total += shifted.sum(0)
        self.gram.addmm_(shifted.T, shifted)


def principal_axes(batches: Iterable[Tensor]) -> Axes:
    """Finds mean and directions of vectors in one pass; memory is O(D^2).

    Args:
        batches: Vectors, each of shape (B, D).

    Raises:
        InputError: If there are no vectors.

    Example:
        >>> axes = principal_axes([torch.tensor([[3.0, 0.0], [-3.0, 0.0]])] * 2)
        >>> [round(size, 6) for size in axes.singular.tolist()]
        [6.0, 0.0]
    """
    moments: _Moments | None = None
    for batch in batches:
        if moments is None:
            point, dim = batch.double().mean(0), batch.shape[1]
            zeros = torch.zeros(dim, dtype=torch.float64)
            moments = _Moments(point, 0, zeros, torch.zeros(dim, dim, dtype=torch.float64))
        moments.add(batch)
    if moments is None:
        raise InputError("there are no vectors to find directions of")
    mean = moments.total / moments.num
    gram = moments.gram - moments.num * torch.outer(mean, mean)
    values, basis = torch.linalg.eigh(gram)
    return Axes(moments.point + mean, basis.flip(1), values.flip(0).clamp(min=0).sqrt())


def least_rank(batches: Iterable[Tensor], axes: Axes, cosine: float) -> int:
    """Returns the least rank at which 19 of 20 unit vectors have this cosine to their original.

    Args:
        batches: The vectors, each of shape (B, D), float32, unit norm.
        axes: Their directions.
        cosine: The wanted cosine, below 1.

    Raises:
        InputError: If the cosine is impossible.
    """
    if not 0 < cosine < 1:
        raise InputError(f"cosine is {cosine}: it must be between 0 and 1, and less than 1")
    mean, basis = axes.mean.float(), axes.basis.float()
    offset = mean @ basis
    count, num = torch.zeros(len(mean), dtype=torch.int64), 0
    for rows in batches:
        codes = (rows - mean) @ basis
        dot = (rows @ mean)[:, None] + (codes * (codes + offset)).cumsum(1)
        square = mean @ mean + (codes * (codes + 2 * offset)).cumsum(1)
        count += (dot >= cosine * square.clamp(min=0).sqrt()).sum(0)
        num += len(rows)
    reached = (count >= _SHARE * num).nonzero().flatten()
    if not len(reached):
        raise InputError(f"no rank reaches cosine {cosine}: ask for less, or for format float16")
    return int(reached[0]) + 1


def compress(
    bank: MemoryBank,
    form: Format,
    *,
    rank: int | None = None,
    cosine: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MemoryBank:
    """Returns the bank in another format; rows are rewritten when they are asked for, or saved.

    Args:
        bank: Any bank.
        form: float32, float16, int8 (one scale per row), or low-rank.
        rank: Of low-rank: the number of directions d.
        cosine: Of low-rank, instead: what 19 rows of 20 shall reach.
        progress: Called as the rows are gone through, with the number of images done and of all.

    Raises:
        InputError: If the settings do not go together, or the rank exceeds the width.
    """
    _check(bank, form, rank, cosine)
    entry: dict[str, Any] = {"edit": "compress", "of": bank.fingerprint, "format": form}
    if form == "low-rank":
        axes = principal_axes(_unit_rows(bank, progress))
        if cosine is not None:
            rank = least_rank(_unit_rows(bank, progress), axes, cosine)
            entry["cosine"] = cosine
        entry["rank"] = rank
        basis = axes.basis[:, :rank].float().contiguous()
        codec: Codec = LowRank(basis, axes.mean.float())
    else:
        codec = codec_of(form, bank.dim)
    store = Recoded(bank.store, codec)
    return dataclasses.replace(bank, store=store, history=(*bank.history, entry))


def fidelity(
    full: MemoryBank,
    other: MemoryBank,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Fidelity:
    """Compares a bank with one made from it, over all rows; recall over 256 of them.

    Args:
        full: The original.
        other: With the same rows in the same order.
        seed: Of the choice of the 256.
        progress: Called after each block with the number of images done and of all.

    Raises:
        InputError: If the banks have different sizes.
    """
    if (full.num, full.dim, full.flips) != (other.num, other.dim, other.flips):
        raise InputError("the banks have different sizes: give a bank and one made from it")
    count = full.num * full.store.sides
    cosines, done = torch.empty(count), 0
    lost = square = 0.0
    total = torch.zeros(full.dim, dtype=torch.float64)
    for rows, stored in zip(_unit_rows(full, progress), _rows(other), strict=True):
        length = stored.norm(dim=1).clamp(min=_TINY)  # a row without what the rank keeps has none
        cosines[done : (done := done + len(rows))] = (rows * stored).sum(1) / length
        lost += float((rows - stored).square().sum(1).double().sum())
        square += float(rows.double().square().sum())
        total += rows.double().sum(0)
    variance = square - float(total @ total) / count
    order = cosines.sort().values
    quantiles = {q: float(order[int(q * (count - 1))]) for q in (0.0, 0.01, 0.05, 0.5)}
    energy = 1 - lost / variance if variance > _TINY * square else 1.0  # one row, or equal ones
    return Fidelity(energy, quantiles, _recall(full, other, seed))


def _recall(full: MemoryBank, other: MemoryBank, seed: int) -> float | None:
    """Asks both banks for the neighbours of original rows; None if there are too few rows."""
    if full.num <= _NEIGHBOURS:
        return None
    chosen = permutation(full.num, seed, "recall")[:_QUERIES]
    queries = full.lookup(chosen)
    _, there = nearest(full, queries, _NEIGHBOURS, exclude=chosen)
    _, here = nearest(other, queries, _NEIGHBOURS, exclude=chosen)
    return float((there[:, :, None] == here[:, None, :]).any(2).double().mean())


def _unit_rows(bank: MemoryBank, progress: Callable[[int, int], None] | None) -> Iterator[Tensor]:
    """Yields the snippets of all sides in order, shape (n F, D), float32, unit norm."""
    for block, rows in enumerate(_rows(bank)):
        yield functional.normalize(rows, dim=1)
        if progress is not None:
            progress(min((block + 1) * BLOCK, bank.num), bank.num)


def _rows(bank: MemoryBank) -> Iterator[Tensor]:
    """Yields the rows of all sides as stored, shape (n F, D), float32."""
    for _, columns in bank.store.blocks():
        yield bank.store.codec.decode({name: c.flatten(0, 1) for name, c in columns.items()})


def _check(bank: MemoryBank, form: str, rank: int | None, cosine: float | None) -> None:
    if form not in get_args(Format):
        raise InputError(f"unknown format {form!r}: use one of {', '.join(get_args(Format))}")
    if form != "low-rank":
        if rank is not None or cosine is not None:
            raise InputError(f"a rank or a cosine has no effect on format {form}: leave it out")
        if form == bank.format:
            raise InputError(f"the bank has format {form} already: choose another")
        return
    if (rank is None) == (cosine is None):
        raise InputError("low-rank needs a rank or a cosine to reach, and not both")
    if rank is not None and not 1 <= rank <= bank.dim:
        raise InputError(f"rank is {rank}: it must be between 1 and the width, {bank.dim}")
