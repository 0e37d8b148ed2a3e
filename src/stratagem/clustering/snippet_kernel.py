"""How near two snippets are, for the optimal denoiser of a network that is told one of them.

    log kernel(i) = (<m_i, m> - 1) / temperature,    |m_i| = |m| = 1

Without a kernel, E[x | x_t, snippet] of a finite data set would be x itself at every noise level,
for no two snippets are equal. But a network cannot tell rows apart that differ by less than what
its training spoils: temperature is the difference of cosines from which on it can. In its limits
the snippet says nothing (infinity), or all (0).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from stratagem.errors import InputError

__all__ = ["SnippetKernel", "dropout_temperature"]

# Rows of a memory read at once.
_ROWS = 1 << 14
# Cosines have no more digits.
_LEAST = 1e-12


class SnippetKernel:
    """The log kernel between queries and the snippets of the data points.

    Args:
        memory: The snippet m_i of each point, shape (N, D), of any length but 0. Not copied; may be
            mapped from a file.
        temperature: At least 1e-12, infinity included; by default `dropout_temperature(memory)`.
        device: Where to compute.

    Raises:
        InputError: If a snippet is unusable or the temperature too small.
    """

    def __init__(self, memory: Tensor, temperature: float | None, device: torch.device) -> None:
        if memory.ndim != 2 or not memory.is_floating_point() or not memory.numel():
            raise InputError(
                f"memory is {tuple(memory.shape)} {memory.dtype}: give floats of shape (N, D)"
            )
        for rows in _blocks(memory):
            lengths = rows.double().norm(dim=1)
            if not ((lengths > 0) & (lengths < math.inf)).all():
                raise InputError("memory holds a row that is zero, NaN or infinite: mend the bank")
        self.memory, self.device = memory, device
        self.temperature = dropout_temperature(memory) if temperature is None else temperature
        if not self.temperature >= _LEAST:
            raise InputError(f"temperature = {temperature}: give at least {_LEAST:g}")

    def queries(self, memory: Tensor, num: int) -> Tensor:
        """Returns the snippets of `num` queries as unit rows, (num, D), float64, on the device.

        Raises:
            InputError: If there are not so many, or their width is not that of the memory.
        """
        if memory.shape != (num, self.memory.shape[1]):
            raise InputError(
                f"snippets of shape {tuple(memory.shape)} for {num} queries: "
                f"give ({num}, {self.memory.shape[1]})"
            )
        return normalize(memory.to(self.device, torch.float64), dim=1)

    def __call__(self, queries: Tensor, part: slice) -> Tensor:
        """Returns the log kernel of Q unit queries and the rows of a part, (Q, M), float64."""
        rows = normalize(self.memory[part].to(self.device, torch.float64), dim=1)
        return (queries @ rows.T - 1) / self.temperature


def dropout_temperature(memory: Tensor, rate: float = 0.4) -> float:
    """Returns the temperature at which snippets are told apart as well as under dropout.

    Training zeroes a share p = rate of a snippet's numbers and scales the others by 1 / (1 - p)
    (arXiv 2412.08781: 40 %). What the network gets has the snippet m as its mean and, in number d,
    the variance m_d^2 p / (1 - p). Along the difference m - m_i of two near rows that is a noise of

        v = p / (1 - p) sum_d <m_d^2> Var(m_d) / sum_d Var(m_d)

    on average, if near rows differ in each number in proportion to how all rows do. What a matched
    filter can then say for m against m_i is -|m - m_i|^2 / (2 v) = (<m_i, m> - 1) / v on average,
    hence temperature = v. For rows that point everywhere alike, v = p / ((1 - p) D). A network that
    compared single numbers exactly, and not weighted sums of them, could tell more.

    Args:
        memory: Snippets, shape (N, D), of any length but 0.
        rate: Share of the numbers that are zeroed, in (0, 1).

    Raises:
        InputError: If the rate is out of range.

    Example:
        >>> round(dropout_temperature(torch.eye(8), rate=0.5), 9)
        0.125
    """
    if not 0 < rate < 1:
        raise InputError(f"dropout rate = {rate}: give a number in (0, 1)")
    mean = torch.zeros(memory.shape[1], dtype=torch.float64, device=memory.device)
    square = torch.zeros_like(mean)
    for block in _blocks(memory):
        rows = normalize(block.double(), dim=1)
        mean += rows.sum(dim=0) / len(memory)
        square += rows.square().sum(dim=0) / len(memory)
    # A single row has no variance: then all numbers count alike.
    variance = (square - mean.square()).clamp(min=1e-15)
    return float(rate / (1 - rate) * (square @ variance) / variance.sum())


def _blocks(memory: Tensor) -> Iterator[Tensor]:
    return (memory[i : i + _ROWS] for i in range(0, len(memory), _ROWS))
