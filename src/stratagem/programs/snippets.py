"""Which snippets a sampling run takes: rows of the bank, or mixtures of two.

Beside the policies of `memory.draw`:

    near     training rows near to given images, the nearest of each first
    pairs    a spherical mixture of two training rows per image
    noise    GMem v1's: the row follows from the noise that the image starts from
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from stratagem.errors import InputError
from stratagem.memory.bank import MemoryBank
from stratagem.memory.draw import draw, draw_nearest, draw_pairs, rows_of_noise
from stratagem.memory.interpolate import blend
from stratagem.programs.bank_images import encode_images

__all__ = ["Choice", "SnippetPolicy", "choose"]

SnippetPolicy = Literal[
    "train",
    "uniform",
    "held-out",
    "label",
    "frequency",
    "stratified",
    "near",
    "pairs",
    "noise",
]
_CHUNK = 1024


@dataclass(frozen=True)
class Choice:
    """The snippets of all images of a run.

    Attributes:
        rows: Row of the bank behind each image, (N,), int64.
        second: The row it is mixed with, (N,), or None.
        weight: How much of the second, (N,), or None.
    """

    rows: Tensor
    second: Tensor | None = None
    weight: Tensor | None = None

    def memory(self, bank: MemoryBank, part: slice) -> Tensor:
        """Returns the vectors of some images, (B, D), float32."""
        first = bank.lookup(self.rows[part])
        if self.second is None or self.weight is None:
            return first
        return blend(first, bank.lookup(self.second[part]), self.weight[part])

    def record(self) -> list[int] | list[tuple[int, int, float]]:
        """Says which snippet made which image: a row, or (row, row, weight of the second)."""
        if self.second is None or self.weight is None:
            return self.rows.tolist()
        columns = (c.tolist() for c in (self.rows, self.second, self.weight))
        return list(zip(*columns, strict=True))


def choose(
    bank: MemoryBank,
    num: int,
    policy: SnippetPolicy,
    *,
    seed: int,
    label: int | None,
    like: str | None,
    weights: str | None = None,
    noise: Callable[[slice], Tensor],
) -> Choice:
    """Chooses the snippets of a run.

    Args:
        bank: Where from.
        num: How many images.
        policy: How.
        seed: The run's seed.
        label: The class, where the policy takes one.
        like: An image or a folder of them, for "near" and only for it.
        weights: Those of the bank's encoder, for "near", see `programs.bank_images`.
        noise: The noise that some images start from, for "noise".

    Raises:
        InputError: If policy, label and like do not go together, or no row is eligible.
    """
    if (policy == "near") != (like is not None):
        raise InputError("--snippets near needs --like IMAGES, and nothing else takes it")
    if weights is not None and like is None:
        raise InputError("--like-weights has no effect without --like IMAGES: leave it out")
    match policy:
        case "near":
            _refuse_label(policy, label)
            assert like is not None
            queries = encode_images(bank, Path(like), weights)
            return Choice(draw_nearest(bank, queries, num))
        case "pairs":
            return Choice(*draw_pairs(bank, num, seed, label=label))
        case "noise":
            _refuse_label(policy, label)
            starts = range(0, num, _CHUNK)
            parts = [noise(slice(start, min(start + _CHUNK, num))) for start in starts]
            return Choice(torch.cat([rows_of_noise(bank, part) for part in parts]))
        case _:
            return Choice(draw(bank, num, policy, seed, label))


def _refuse_label(policy: str, label: int | None) -> None:
    if label is not None:
        raise InputError(f"--label has no effect on --snippets {policy}: leave it out")
