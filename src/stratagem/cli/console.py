"""What the command line prints: progress, results, and one line for what went wrong.

On a terminal a bar with rate and time left; elsewhere a plain line now and then, fit for a log.
Progress goes to stderr and results to stdout, so that results can be piped.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

__all__ = ["progress_bar", "say", "say_json"]

_SECONDS_BETWEEN_LINES = 10.0


def say(text: str) -> None:
    """Prints a line of result."""
    print(text, flush=True)


def say_json(body: Any, file: Path | None = None) -> None:
    """Prints a result for programs, or writes it to a file, whose folder is made."""
    text = json.dumps(body, indent=1)
    if file is None:
        say(text)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")


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
        self.before: tuple[float, int] | None = None  # when a line was last printed, of how many
        self.first = 0
        self.ended = False

    def __call__(self, done: int, total: int) -> None:
        """Notes that `done` of `total` are done."""
        now = time.monotonic()
        if self.before is None:
            self.first = done if 1 < done < total else 0
        elif self.ended or (done < total and now - self.before[0] < _SECONDS_BETWEEN_LINES):
            return
        self.ended = done >= total
        print(self._line(done, total, now), file=sys.stderr, flush=True)
        self.before = now, done

    def _line(self, done: int, total: int, now: float) -> str:
        """Says the rate since the last line, or at the end that of the whole."""
        line = f"{self.label}: {done:,} of {total:,}"
        then, before = (
            (self.begun, 0) if self.ended and not self.first else self.before or (now, done)
        )
        if done <= before or now <= then:  # nothing to tell a rate by
            return line
        rate = (done - before) / (now - then)
        left = (
            f"in {_time(now - self.begun)}"
            if self.ended
            else f"{_time((total - done) / rate)} left"
        )
        return f"{line}, {_rate(rate)} {self.unit or 'items'}/s, {left}"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 9.5 else f"{rate:.2g}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
