"""The names of a bank's images: one block of UTF-8 bytes, and where each name ends.

    name of row i = block[ends[i - 1] : ends[i]]

A million Python strings would take a hundred megabytes; this takes their bytes, mapped from the
file of the bank. Names need not differ: two data sets may both have a 0001.png.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Ids"]

_ROWS = 1 << 16  # rows gathered at once: eight bytes of index per byte of name are needed


@dataclass(frozen=True, eq=False)
class Ids:
    """Names of N images.

    Attributes:
        block: All names, one after another, shape (T,), uint8.
        ends: Where each ends, shape (N,), int64.
    """

    block: Tensor
    ends: Tensor

    @classmethod
    def of(cls, names: Iterable[str]) -> Ids:
        """Packs names.

        Example:
            >>> ids = Ids.of(["a.png", "b.png"])
            >>> len(ids), ids[1]
            (2, 'b.png')
        """
        block, lengths = bytearray(), []
        for name in names:
            data = name.encode("utf-8", "replace")
            block += data
            lengths.append(len(data))
        ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
        return cls(torch.frombuffer(block or bytearray(1), dtype=torch.uint8)[: len(block)], ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> str:
        """Returns the name of one row."""
        start = int(self.ends[row - 1]) if row else 0
        return bytes(self.block[start : int(self.ends[row])].numpy()).decode("utf-8", "replace")

    def find(self, names: Collection[str]) -> Tensor:
        """Returns the rows that have one of these names, increasing, int64."""
        wanted = {name.encode("utf-8", "replace") for name in names}
        block = self.block.numpy().data
        found, start = [], 0
        for row, end in enumerate(self.ends.tolist()):
            if bytes(block[start:end]) in wanted:
                found.append(row)
            start = end
        return torch.tensor(found, dtype=torch.int64)

    def take(self, index: Tensor) -> Ids:
        """Returns the names of some rows in the order asked for, shape (M,), int64."""
        ends = self.ends[index]
        starts = torch.where(index > 0, self.ends[(index - 1).clamp(min=0)], 0)
        lengths = ends - starts
        parts = [
            self.block[_spans(begin, length)]
            for begin, length in zip(starts.split(_ROWS), lengths.split(_ROWS), strict=True)
        ]
        return Ids(torch.cat(parts), lengths.cumsum(0))

    def join(self, other: Ids) -> Ids:
        """Returns these names and then the other ones."""
        ends = torch.cat([self.ends, other.ends + len(self.block)])
        return Ids(torch.cat([self.block, other.block]), ends)


def _spans(starts: Tensor, lengths: Tensor) -> Tensor:
    """Returns start, start + 1, ... start + length - 1 of each pair, one after another."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - before).repeat_interleave(lengths)
