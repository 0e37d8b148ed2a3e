"""Which snippets to sample: one row of the bank for each image to be made.

    uniform     any row, with replacement
    train       any row whose image training saw, with replacement (the default)
    held-out    any row whose image training never saw, with replacement
    label       any training row of one class, with replacement
    stratified  training rows without replacement, a new random order per pass: every row is drawn
                equally often, up to one

With replacement, draw j is row floor(n u_j) of the n eligible rows, where u_0, u_1, ... is one
counter-based stream. In all five policies draw j is a function of (seed, j) and the bank alone:
image j of a sampling run is the same however many are made. Stratified draws of one pass are not
independent of each other, all others are.

Snippets of training images invite memorisation; figures made with "train" belong beside "held-out".
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from stratagem.errors import InputError
from stratagem.memory.bank import MemoryBank
from stratagem.randomness import generator, permutation

__all__ = ["Policy", "draw"]

Policy = Literal["uniform", "train", "held-out", "label", "stratified"]


def draw(
    bank: MemoryBank, num: int, policy: Policy = "train", seed: int = 0, label: int | None = None
) -> Tensor:
    """Draws rows of a bank, shape (num,), int64.

    Args:
        bank: Where from.
        num: How many.
        policy: Which rows and how, see the module.
        seed: Seed of the draw.
        label: The class, for policy "label" and only for it.

    Raises:
        InputError: If no row is eligible, the policy is unknown, or policy and label do not fit.
    """
    if policy not in get_args(Policy):
        raise InputError(
            f"unknown draw policy {policy!r}: use one of {', '.join(get_args(Policy))}"
        )
    if (policy == "label") != (label is not None):
        raise InputError(
            f"draw policy {policy!r} with label {label}: give a label with 'label' only"
        )
    rows = _eligible(bank, policy, label)
    if policy == "stratified":
        passes = -(-num // len(rows))
        orders = [permutation(len(rows), seed, "draw", number) for number in range(passes)]
        picks = torch.cat([torch.empty(0, dtype=torch.int64), *orders])[:num]
    else:
        picks = torch.from_numpy((generator(seed, "draw").random(num) * len(rows)).astype("int64"))
    return rows[picks]


def _eligible(bank: MemoryBank, policy: Policy, label: int | None) -> Tensor:
    """Returns the rows that a policy may draw, increasing, int64."""
    if policy == "uniform":
        return torch.arange(bank.num)
    wanted = bank.held_out if policy == "held-out" else ~bank.held_out
    if label is not None:
        wanted = wanted & (bank.labels == label)
    rows = wanted.nonzero().flatten()
    if len(rows):
        return rows
    if label is not None:
        raise InputError(f"the bank has no training image of label {label}: see `bank info`")
    if policy == "held-out":
        raise InputError("the bank has no held-out rows: prepare the data with a holdout")
    raise InputError("the bank has no training rows: all are held out")
