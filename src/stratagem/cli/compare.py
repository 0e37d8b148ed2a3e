"""`stratagem compare`."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from stratagem.cli.console import say
from stratagem.programs.compare import compare as compare_runs

__all__ = ["compare"]


def compare(runs: Positional[tuple[Path, ...]], /, out: Path) -> None:
    """Writes a report of evaluated runs; the first is the baseline.

    Example: stratagem compare runs/plain runs/memory --out report.html

    Args:
        runs: Evaluated runs.
        out: The HTML file.
    """
    say(compare_runs(runs, out))
    say(f"the report is {out.resolve()}")
