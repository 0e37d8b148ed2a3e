"""Counter-based randomness: every draw is a pure function of (seed, purpose, counters).

    draw = Philox(key = hash128(seed, purpose, counter_1, counter_2, ...))

No generator is carried from one step to the next, so there is nothing to save, to restore or to
keep in step between processes: a resumed run, another batch split or another number of processes
sees the same numbers. The draws happen on the CPU, so an image does not depend on the device.

The rows of a batch have streams of their own, of one key, far apart on its 256-bit counter:

    row i = the draws from counter i * 2^128 on

so a process draws the rows that it has and no others, whatever they are, and rows that follow in a
larger batch change none. Moving the counter takes 2 microseconds, a new key 15.

Philox is numpy's. torch's CPU generator keeps only the low 32 bits of a seed, which makes equal
draws likely after some ten thousand keys (birthday bound); 128 bits of key do not collide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "generator",
    "normal",
    "normal_at",
    "normal_rows",
    "permutation",
    "uniform",
    "uniform_at",
]


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """Returns the generator that belongs to (seed, purpose, counters).

    Args:
        seed: The user's seed.
        purpose: What the numbers are for; equal counters of two purposes are independent.
        counters: Any integers, such as the step or the index of an image.

    Example:
        >>> a, b = generator(0, "order", 3), generator(0, "order", 3)
        >>> a.random() == b.random()
        True
    """
    text = "/".join([str(int(seed)), purpose, *(str(int(c)) for c in counters)])
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def normal(shape: Sequence[int], seed: int, purpose: str, *counters: int) -> Tensor:
    """Draws standard normal numbers, float32, of the given shape."""
    draw = generator(seed, purpose, *counters).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(draw)


def normal_rows(seeds: Sequence[int], shape: Sequence[int], purpose: str, *counters: int) -> Tensor:
    """Draws one standard normal tensor per seed, shape (len(seeds), *shape), float32.

    Row j depends on seeds[j] alone, so image j is the same whatever the batch it is made in.
    """
    rows = np.empty((len(seeds), *shape), dtype=np.float32)
    for row, seed in zip(rows, seeds, strict=True):
        generator(seed, purpose, *counters).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(rows)


def normal_at(
    rows: Sequence[int], shape: Sequence[int], seed: int, purpose: str, *counters: int
) -> Tensor:
    """Draws rows of a batch of standard normal numbers, shape (len(rows), *shape), float32.

    Args:
        rows: Which rows; none below 0.
        shape: Of a row.
        seed: As for `generator`, and so are the rest.
        purpose: What for.
        counters: Which batch.

    Example:
        >>> whole = normal_at(range(10), (2, 3), 0, "noise", 7)
        >>> bool((whole[1::4] == normal_at(range(1, 10, 4), (2, 3), 0, "noise", 7)).all())
        True
    """
    stream = generator(seed, purpose, *counters)
    return _at(rows, shape, stream, stream.standard_normal)


def uniform_at(
    rows: Sequence[int], shape: Sequence[int], seed: int, purpose: str, *counters: int
) -> Tensor:
    """Draws rows of a batch of uniform numbers in [0, 1), as `normal_at` does normal ones."""
    stream = generator(seed, purpose, *counters)
    return _at(rows, shape, stream, stream.random)


def _at(
    rows: Sequence[int],
    shape: Sequence[int],
    stream: np.random.Generator,
    draw: Callable[..., object],
) -> Tensor:
    """Lets `draw` fill each row from where it begins in the stream of the batch."""
    bits = stream.bit_generator
    start = bits.state  # a copy, at counter 0
    counter = start["state"]["counter"]  # four words, the lowest first
    drawn = np.empty((len(rows), *shape), dtype=np.float32)
    for number, row in zip(rows, drawn, strict=True):
        counter[2] = number
        bits.state = start
        draw(out=row, dtype=np.float32)
    return torch.from_numpy(drawn)


def uniform(shape: Sequence[int], seed: int, purpose: str, *counters: int) -> Tensor:
    """Draws uniform numbers in [0, 1), float32, of the given shape."""
    draw = generator(seed, purpose, *counters).random(tuple(shape), dtype=np.float32)
    return torch.from_numpy(draw)


def permutation(num: int, seed: int, purpose: str, *counters: int) -> Tensor:
    """Draws a random order of 0 .. num-1, shape (num,), int64."""
    return torch.from_numpy(generator(seed, purpose, *counters).permutation(num))
