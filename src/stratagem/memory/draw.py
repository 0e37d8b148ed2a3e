"""Which snippets to sample: one row of the bank for each image to be made.

    uniform     any row, with replacement
    train       any row whose image training saw, with replacement (the default)
    held-out    any row whose image training never saw, with replacement
    label       any training row of one class, with replacement
    frequency   training rows in proportion to the bank's frequencies, with replacement
    stratified  training rows without replacement, a new random order per pass: every row is drawn
                equally often, up to one

With replacement, draw j is row floor(n u_j) of the n eligible rows, or F^-1(u_j) of their
frequencies, where u_0, u_1, ... is one counter-based stream. In all policies draw j is a function
of (seed, j) and the bank alone: image j of a sampling run is the same however many are made.
Stratified draws of one pass are not independent of each other, all others are.

Three more ways need more than a bank: the training rows nearest to given images, pairs of rows to
interpolate between, and GMem v1's map (arXiv 2412.08781), which takes the row from the noise z that
the image starts from: u = Phi(sqrt(numel z) mean(z)), uniform, and row F^-1(u).

Snippets of training images invite memorisation; figures made with "train" belong beside "held-out".
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from stratagem.errors import InputError
from stratagem.memory.bank import MemoryBank
from stratagem.memory.search import nearest
from stratagem.randomness import generator, permutation

__all__ = ["Pairs", "Policy", "draw", "draw_nearest", "draw_pairs", "rows_of_noise"]

Policy = Literal["uniform", "train", "held-out", "label", "frequency", "stratified"]


class Pairs(NamedTuple):
    """Pairs of rows and where between them, for `interpolate.blend`.

    Attributes:
        first: Rows, shape (num,), int64.
        second: Other rows, shape (num,), int64.
        weight: Of the second, in [0, 1), shape (num,), float32.
    """

    first: Tensor
    second: Tensor
    weight: Tensor


def draw(
    bank: MemoryBank, num: int, policy: Policy = "train", seed: int = 0, label: int | None = None
) -> Tensor:
    """Draws rows of a bank, shape (num,), int64.

    Args:
        bank: Where from.
        num: How many.
        policy: Which rows and how, see the module.
        seed: Seed of the draw.
        label: The class, for policy "label"; it may narrow "held-out" too.

    Raises:
        InputError: If no row is eligible, the policy is unknown, policy and label do not fit, or
            the bank has no frequencies to draw by.

    Example:
        >>> from stratagem.memory.store import hold
        >>> bank = MemoryBank(hold(torch.eye(4)[:, None]), torch.arange(4), torch.zeros(4), {}, "")
        >>> sorted(draw(bank, 4, "stratified").tolist()), draw(bank, 2, "label", label=3).tolist()
        ([0, 1, 2, 3], [3, 3])
    """
    if policy not in get_args(Policy):
        raise InputError(
            f"unknown draw policy {policy!r}: use one of {', '.join(get_args(Policy))}"
        )
    if (policy == "label" and label is None) or (
        label is not None and policy not in {"label", "held-out"}
    ):
        raise InputError(
            f"draw policy {policy!r} with label {label}: give a label with 'label' or 'held-out'"
        )
    rows = _eligible(bank, policy, label)
    if policy == "stratified":
        passes = -(-num // len(rows))
        orders = [permutation(len(rows), seed, "draw", number) for number in range(passes)]
        return rows[torch.cat([torch.empty(0, dtype=torch.int64), *orders])[:num]]
    u = torch.from_numpy(generator(seed, "draw").random(num))
    if policy != "frequency":
        return rows[(u * len(rows)).long()]
    if bank.frequency is None:
        raise InputError("the bank has no frequencies: draw by another policy")
    return rows[_quantile(bank.frequency[rows], u)]


def draw_nearest(bank: MemoryBank, queries: Tensor, num: int) -> Tensor:
    """Returns training rows near to given vectors, in turn: the nearest of each, the second, ...

    Args:
        bank: Where from.
        queries: Vectors by the bank's encoder, shape (Q, D).
        num: How many rows.

    Returns:
        Shape (num,), int64: draw j is the (1 + j // Q)-th nearest row of query j mod Q.

    Raises:
        InputError: If a query does not fit the bank, or there are too few training rows.
    """
    rounds = -(-num // len(queries))
    _, rows = nearest(bank, queries, rounds, rows=_eligible(bank, "train", None))
    return rows.T.flatten()[:num]


def draw_pairs(bank: MemoryBank, num: int, seed: int = 0, *, label: int | None = None) -> Pairs:
    """Draws pairs of different training rows and a place between them, each with replacement.

    Args:
        bank: Where from.
        num: How many.
        seed: Seed of the draw; pair j is a function of (seed, j) and the bank.
        label: Both rows of this class; by default of any.

    Raises:
        InputError: If there are fewer than two eligible rows.
    """
    rows = _eligible(bank, "train" if label is None else "label", label)
    if len(rows) < 2:
        raise InputError("there is one training row only to pair: interpolation needs two")
    u = torch.from_numpy(generator(seed, "draw-pairs").random((num, 3)))
    first = (u[:, 0] * len(rows)).long()
    second = (first + 1 + (u[:, 1] * (len(rows) - 1)).long()) % len(rows)
    return Pairs(rows[first], rows[second], u[:, 2].float())


def rows_of_noise(bank: MemoryBank, noise: Tensor) -> Tensor:
    """Maps starting noise to rows, as GMem v1 does; all rows are eligible.

        u = Phi(sqrt(numel z) mean(z)),   row = F^-1(u), F of the frequencies, or of equal ones

    Args:
        bank: Where from.
        noise: Standard normal, shape (B, ...).

    Returns:
        Shape (B,), int64.
    """
    flat = noise.flatten(1).double()
    u = torch.special.ndtr(flat.mean(1) * math.sqrt(flat.shape[1])).cpu()
    if bank.frequency is None:
        return (u * bank.num).long().clamp(max=bank.num - 1)
    return _quantile(bank.frequency, u)


def _quantile(frequency: Tensor, u: Tensor) -> Tensor:
    """Returns the first position whose cumulated share exceeds u, in [0, 1], int64."""
    total = frequency.double().cumsum(0)
    last = int(frequency.nonzero()[-1])  # rounding must not lead to a row of frequency 0
    return torch.searchsorted(total, u * total[-1], right=True).clamp(max=last)


def _eligible(bank: MemoryBank, policy: Policy, label: int | None) -> Tensor:
    """Returns the rows that a policy may draw, increasing, int64."""
    if policy == "uniform":
        return torch.arange(bank.num)
    wanted = bank.held_out if policy == "held-out" else ~bank.held_out
    if label is not None:
        wanted = wanted & (bank.labels == label)
    if policy == "frequency" and bank.frequency is not None:
        wanted = wanted & (bank.frequency > 0)
    rows = wanted.nonzero().flatten()
    if len(rows):
        return rows
    kind = "held-out" if policy == "held-out" else "training"
    if label is not None:
        raise InputError(f"the bank has no {kind} image of label {label}: see `bank info`")
    if policy == "held-out":
        raise InputError("the bank has no held-out rows: prepare the data with a holdout")
    raise InputError("the bank has no training rows: all are held out")
