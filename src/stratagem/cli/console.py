"""What the command line prints: progress, results, and one line for what went wrong.

On a terminal a bar with rate and time left; elsewhere a plain line now and then, fit for a log.
Progress goes to stderr and results to stdout, so that results can be piped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from stratagem.programs import Progress as ProgressCallback

__all__ = ["progress_bar", "say"]

_SECONDS_BETWEEN_LINES = 10.0


def say(text: str) -> None:
    """Prints a line of result."""
    print(text, flush=True)


@contextmanager
def progress_bar(label: str, unit: str = "") -> Iterator[ProgressCallback]:
    """Yields a callback (done, total) that shows how far the work is.

    Args:
        label: What is being done.
        unit: What is counted, for the rate.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        with _bar(console, unit) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield _Lines(label, unit)


def _bar(console: Console, unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )


class _Rate(ProgressColumn):
    """Units per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """Shows the recent rate."""
        speed = task.finished_speed or task.speed
        return Text(f"{_rate(speed)} {self.unit}/s" if speed else "", style="dim")


class _Lines:
    """Prints a line when work begins, every ten seconds, and when it ends."""

    def __init__(self, label: str, unit: str) -> None:
        self.label, self.unit = label, unit
        self.begun = time.monotonic()
        self.first: int | None = None
        self.printed = 0.0
        self.ended = False

    def __call__(self, done: int, total: int) -> None:
        """Notes that `done` of `total` are done."""
        now = time.monotonic()
        if self.first is None:
            self.first = done if done < total and done > 1 else 0
        if self.ended or (done < total and now - self.printed < _SECONDS_BETWEEN_LINES):
            return
        self.printed, self.ended = now, done >= total
        print(self._line(done, total, now), file=sys.stderr, flush=True)

    def _line(self, done: int, total: int, now: float) -> str:
        line = f"{self.label}: {done:,} of {total:,}"
        seconds, num = now - self.begun, done - (self.first or 0)
        if num <= 1 or seconds <= 0:  # the first one also waits for what is being started
            return line
        rate = num / seconds
        end = f"in {_time(seconds)}" if self.ended else f"{_time((total - done) / rate)} left"
        return f"{line}, {_rate(rate)} {self.unit or 'items'}/s, {end}"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 9.5 else f"{rate:.2g}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
