"""`stratagem demo`."""

from __future__ import annotations

import time
from pathlib import Path

from stratagem.cli.console import progress_bar, say
from stratagem.programs.demo import DemoConfig
from stratagem.programs.demo import demo as run_demo

__all__ = ["demo"]


def demo(
    out: Path = Path("stratagem-demo"),
    data: str = "digits",
    seed: int = 0,
    steps: int = 1200,
    num: int = 1000,
) -> None:
    """Trains with and without both methods on real images and writes a report.

    Example: stratagem demo --out stratagem-demo

    Stopped, the same command goes on where it was.

    Args:
        out: The folder of everything it makes.
        data: digits (handwritten, they come with scikit-learn), or a folder of your own images.
        seed: Seed of everything.
        steps: Training steps of each network.
        num: Samples per evaluation.
    """
    start = time.monotonic()
    cfg = DemoConfig(data=data, seed=seed, steps=steps, num=num)
    report, sentence = run_demo(out, cfg, task=progress_bar)
    say(sentence)
    say(f"done in {time.monotonic() - start:.0f} s; the report is {report.resolve()}")
