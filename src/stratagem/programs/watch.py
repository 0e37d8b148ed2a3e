"""`stratagem watch`: how runs get on, read from their folders; nothing of them is touched.

    RUN/metrics.jsonl  ->  a smoothed curve, rate, time left      RUN/samples/  ->  the last picture

A curve is drawn in Braille characters, 2 x 4 dots each, over steps; the other axis is logarithmic
where all values are positive. A line that the training is just writing counts as not there yet.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from pathlib import Path

import numpy as np

from stratagem.config import load
from stratagem.errors import InputError
from stratagem.programs.train_log import read_log
from stratagem.report.charts import format_number

__all__ = ["Watched", "chart", "follow"]

_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
_RECENT = 10


@dataclass(frozen=True)
class Watched:
    """What a run's folder says of it.

    Attributes:
        name: The run's folder.
        metric: What is followed.
        steps: Of the lines of the log that have the metric.
        values: The metric there, smoothed: means over the lines before, a fortieth of all.
        step: The last one logged, 0 before the first line.
        total: Steps of the whole run.
        rate: Recent images per second, or None.
        seconds_left: At that rate, or None.
        memory: Peak memory in MiB, or None.
        age: Seconds since the last line, or None.
        picture: The last picture of samples, or None.
    """

    name: str
    metric: str
    steps: list[int]
    values: list[float]
    step: int
    total: int
    rate: float | None
    seconds_left: float | None
    memory: float | None
    age: float | None
    picture: Path | None

    @property
    def done(self) -> bool:
        """Whether the run has come to its end."""
        return self.step >= self.total

    def lines(self) -> list[str]:
        """Returns the state in words: one line, and one more for the picture."""
        if not self.step:
            return [f"{self.name}: no line in its log yet"]
        parts = [f"step {self.step:,} of {self.total:,} ({self.step / self.total:.0%})"]
        if self.values:
            parts.append(f"{self.metric} {format_number(self.values[-1])}")
        if self.rate is not None:
            parts.append(f"{self.rate:,.0f} images/s")
        if self.memory is not None:
            parts.append(f"{self.memory:,.0f} MiB")
        if self.done:
            parts.append("done")
        elif self.seconds_left is not None and self.age is not None:
            left, age = (timedelta(seconds=round(s)) for s in (self.seconds_left, self.age))
            parts.append(f"{left} left, last line {age} ago")
        text = [f"{self.name}: {', '.join(parts)}"]
        return text if self.picture is None else [*text, f"  samples {self.picture}"]


def follow(run: Path, metric: str = "loss") -> Watched:
    """Reads how a run gets on.

    Raises:
        InputError: If it is no run, or its log has no such metric.
    """
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run} is not a run: it has no config.yaml")
    total, log = load(run / "config.yaml").train.steps, run / "metrics.jsonl"
    lines = read_log(log)
    found = [(line["step"], line[metric]) for line in lines if metric in line]
    if lines and not found:
        raise InputError(f"{log} has no {metric!r}: choose one of {', '.join(sorted(lines[-1]))}")
    found = [(step, value) for step, value in found if math.isfinite(value)]
    last = lines[-1] if lines else {"step": 0}
    rates = [line["images_per_second"] for line in lines[-_RECENT:]]
    rate = statistics.median(rates) if rates else None
    left = (total - last["step"]) * last["images"] / last["step"] / rate if rate else None
    return Watched(
        str(run),
        metric,
        [step for step, _ in found],
        _smoothed([float(value) for _, value in found]),
        last["step"],
        max(total, last["step"]),
        rate,
        None if left is None else max(0.0, left),
        last.get("peak_memory_mib"),
        max(0.0, time.time() - log.stat().st_mtime) if lines else None,
        max((run / "samples").glob("step-*.png"), default=None),
    )


def _smoothed(values: Sequence[float]) -> list[float]:
    reach = len(values) // 40
    return [statistics.fmean(values[max(0, i - reach) : i + 1]) for i in range(len(values))]


def chart(
    runs: Sequence[Watched], width: int, height: int, *, plain: bool = False
) -> list[list[tuple[str, int | None]]]:
    """Draws the curves of runs over each other.

    Args:
        runs: What to draw.
        width: Characters of a line, axis included.
        height: Lines of the curves; two more hold the axis.
        plain: Whether to keep to ASCII.

    Returns:
        Lines of pieces, each with the number of its run, or None.
    """
    drawn = [(k, r.steps, r.values) for k, r in enumerate(runs) if r.values]
    if not drawn:
        return []
    every = [value for _, _, values in drawn for value in values]
    scale, undo = (np.log, np.exp) if min(every) > 0 else (np.asarray, np.asarray)
    low, high = scale(min(every)), scale(max(every))
    labels = [format_number(float(undo(v))) for v in (high, (low + high) / 2, low)]
    margin = max(map(len, labels))
    columns, last = width - margin - 2, max(steps[-1] for _, steps, _ in drawn)
    dots = np.zeros((height, columns), dtype=int)
    owner = np.zeros((height, columns), dtype=int)
    for k, steps, values in drawn:
        x = np.linspace(0, last, 2 * columns)
        level = (high - scale(np.interp(x, steps, values))) / max(high - low, 1e-12)
        rows = np.rint(level * (4 * height - 1)).astype(int)
        inside = np.flatnonzero((x >= steps[0] - x[1]) & (x <= steps[-1] + x[1]))
        for before, at in zip([inside[0], *inside], inside, strict=False):
            near, far = sorted((rows[before], rows[at]))
            for row in range(near, far + 1):
                dots[row // 4, at // 2] |= _DOTS[row % 4, at % 2]
                owner[row // 4, at // 2] = k
    marks = dict(zip((0, height // 2, height - 1), labels, strict=True))
    lines: list[list[tuple[str, int | None]]] = []
    for row in range(height):
        start = f"{marks.get(row, ''):>{margin}} {'|' if plain else '│'}"
        cells = groupby(zip(dots[row], owner[row], strict=True), key=lambda cell: int(cell[1]))
        pieces = [("".join(_character(bits, plain) for bits, _ in run), k) for k, run in cells]
        lines.append([(start, None), *pieces])
    lines.append([(" " * (margin + 1) + ("+" if plain else "└") + "─-"[plain] * columns, None)])
    lines.append([(" " * (margin + 2) + "0" + f"step {last:,}".rjust(columns - 1), None)])
    return lines


def _character(bits: int, plain: bool) -> str:
    if not bits:
        return " "
    return "*" if plain else chr(0x2800 + bits)
