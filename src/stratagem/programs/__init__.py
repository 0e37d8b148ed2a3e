"""What each verb of the command line does, as a function that neither prints nor exits.

One module per verb. The command line parses, calls one of these, and prints what it returns; the
demonstration calls the same functions in a row; so can any Python program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from stratagem.errors import InputError

__all__ = ["Device", "Progress", "device_of", "part_of", "share_of", "silent"]

Device = Literal["auto", "cpu", "cuda"]

Progress = Callable[[int, int], None]
"""Called now and then with how much is done and how much there is."""


def silent(done: int, total: int) -> None:
    """Shows no progress."""


def part_of(progress: Progress, number: int, parts: int) -> Progress:
    """Returns the progress of one of several equal parts of a work.

    Example:
        >>> part_of(lambda done, total: print(done, "of", total), 1, 3)(5, 10)
        15 of 30
    """
    return lambda done, total: progress(number * total + done, parts * total)


def share_of(progress: Progress, parts: Sequence[int], number: int) -> Progress:
    """Returns the progress of one of several parts of a work, of known sizes.

    Example:
        >>> share_of(lambda done, total: print(done, "of", total), [10, 30], 1)(5, 30)
        15 of 40
    """
    return lambda done, _: progress(sum(parts[:number]) + done, sum(parts))


def device_of(name: Device) -> str:
    """Returns "cuda" or "cpu"; auto takes a GPU where there is one.

    Raises:
        InputError: If there is no GPU, and it was asked for.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here, give --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"
