"""`stratagem watch`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text
from tyro.conf import Positional

from stratagem.cli.console import say
from stratagem.errors import InputError
from stratagem.programs.watch import Watched, chart, follow

__all__ = ["watch"]

_COLOURS = ("cyan", "yellow", "magenta", "green", "red", "blue")


def watch(
    runs: Positional[tuple[Path, ...]],
    /,
    metric: str = "loss",
    once: bool = False,
    every: float = 2.0,
) -> None:
    """Shows how runs get on, until they are done or you leave with Ctrl-C; training goes on.

    On a terminal a chart that is drawn again and again; elsewhere a line now and then.

    Example: stratagem watch runs/digits runs/plain
    Example: stratagem watch runs/digits --metric grad_norm --once

    Args:
        runs: Runs, in training or not.
        metric: Which number of their logs is drawn, smoothed.
        once: Print the chart once, and end.
        every: Seconds between two looks.
    """
    if not runs or every <= 0:
        raise InputError("name at least one run, and give --every above 0")
    console = Console()
    with contextlib.suppress(KeyboardInterrupt):
        if once:
            console.print(_view(_look(runs, metric), console), soft_wrap=True)
        elif console.is_terminal:
            _live(runs, metric, every, console)
        else:
            _lines(runs, metric, every)


def _look(runs: Sequence[Path], metric: str) -> list[Watched]:
    return [follow(run, metric) for run in runs]


def _live(runs: Sequence[Path], metric: str, every: float, console: Console) -> None:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            found = _look(runs, metric)
            live.update(_view(found, console), refresh=True)
            if all(one.done for one in found):
                return
            time.sleep(every)


def _lines(runs: Sequence[Path], metric: str, every: float) -> None:
    told: dict[str, int] = {}
    while True:
        found = _look(runs, metric)
        for one in found:
            if told.get(one.name) != one.step:
                say("\n".join(one.lines()))
                told[one.name] = one.step
        if all(one.done for one in found):
            return
        time.sleep(every)


def _view(found: Sequence[Watched], console: Console) -> Text:
    """The chart, and below it what each run's colour means."""
    height = min(20, max(6, console.height - 5 * len(found) - 3))
    plain = console.options.ascii_only
    view = Text()
    for line in chart(found, min(console.width, 120), height, plain=plain):
        for piece, number in line:
            view.append(piece, None if number is None else _COLOURS[number % len(_COLOURS)])
        view.append("\n")
    for number, one in enumerate(found):
        view.append("\n".join(one.lines()) + "\n", _COLOURS[number % len(_COLOURS)])
    return view
