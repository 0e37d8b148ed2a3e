"""Stages: the noise axis cut into intervals, each of which may have its own decoder.

    log-SNR    +inf ------ edges[0] ------ edges[1] ------ ... ------ -inf
    stage            0               1               2     ...   K-1
    (time)      0 = clean                                      1 = noise

Stage 0 is nearest the data. K stages have K-1 edges. The edges are log-SNRs and not times, so the
same stages serve every schedule; `times` and `time_interval` translate them for one schedule. A
log-SNR that is exactly an edge belongs to the stage below it (further from the data), so in time
every stage is a half-open interval [t_low, t_high).

The idea of stages is that of Zhang et al. 2024, arXiv:2312.09181.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratagem.artifact import read_record, write_record
from stratagem.errors import DamagedArtifact, InputError
from stratagem.schedule import NoiseSchedule

__all__ = ["Stages"]

_KIND = "stages"


@dataclass(frozen=True)
class Stages:
    """A partition of the noise axis.

    Args:
        edges: K-1 strictly decreasing finite log-SNRs; none for one stage.

    Raises:
        InputError: If an edge is not finite or the edges do not decrease.

    Example:
        >>> Stages((2.0, -2.0)).index(torch.tensor([5.0, 2.0, 0.0, -9.0])).tolist()
        [0, 1, 1, 2]
    """

    edges: tuple[float, ...]

    def __post_init__(self) -> None:
        edges = tuple(float(edge) for edge in self.edges)
        if not all(math.isfinite(edge) for edge in edges):
            raise InputError(f"stages: edges {edges} must be finite log-SNRs; leave out the ends")
        if any(low >= high for high, low in pairwise(edges)):
            raise InputError(
                f"stages: edges {edges} must decrease strictly; sort them, nearest data first"
            )
        object.__setattr__(self, "edges", edges)

    @property
    def num(self) -> int:
        """The number of stages, K."""
        return len(self.edges) + 1

    def index(self, log_snr: Tensor) -> Tensor:
        """Returns the stage of every log-SNR, int64, same shape and device."""
        ascending = torch.tensor(
            [-edge for edge in self.edges], dtype=torch.float64, device=log_snr.device
        )
        return torch.searchsorted(ascending, -log_snr.double(), right=True)

    def interval(self, k: int) -> tuple[float, float]:
        """Returns (low, high): stage k holds the log-SNRs with low < log_snr <= high.

        Raises:
            InputError: If there is no stage k.

        Example:
            >>> Stages((2.0,)).interval(0)
            (2.0, inf)
        """
        if not 0 <= k < self.num:
            raise InputError(f"stages: there is no stage {k}; the stages are 0 .. {self.num - 1}")
        bounds = (math.inf, *self.edges, -math.inf)
        return bounds[k + 1], bounds[k]

    def times(self, schedule: NoiseSchedule) -> tuple[float, ...]:
        """Returns the K-1 times of the edges, increasing, inside [0, 1]."""
        return tuple(schedule.time_of(torch.tensor(self.edges, dtype=torch.float64)).tolist())

    def time_interval(self, k: int, schedule: NoiseSchedule) -> tuple[float, float]:
        """Returns (t_low, t_high), the times of stage k inside [0, 1].

        The two are equal where the schedule never reaches the stage.

        Raises:
            InputError: If there is no stage k.
        """
        self.interval(k)
        bounds = (0.0, *self.times(schedule), 1.0)
        return bounds[k], bounds[k + 1]

    def save(self, path: Path, record: Mapping[str, Any], *, replace: bool = False) -> None:
        """Writes the edges and a JSON-able record of how they were found.

        Raises:
            InputError: If `path` exists and `replace` is false.
        """
        meta = {"edges": list(self.edges), "record": dict(record)}
        write_record(path, _KIND, meta, replace=replace)

    @classmethod
    def load(cls, path: Path) -> tuple[Stages, dict[str, Any]]:
        """Reads a file of `save`: the stages and their record.

        Raises:
            InputError: If there is no such file or it is something else.
            DamagedArtifact: If it is truncated or altered.
        """
        meta = read_record(path, _KIND).meta
        if not {"edges", "record"} <= set(meta):
            raise DamagedArtifact(
                f"{path} is damaged: it lacks edges or record; find the stages anew"
            )
        return cls(tuple(meta["edges"])), meta["record"]
