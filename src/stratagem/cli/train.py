"""`stratagem train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, UseAppendAction

from stratagem.cli.console import progress_bar, say
from stratagem.config import load
from stratagem.programs.train import train as train_run

__all__ = ["train"]


def train(
    config: Positional[Path],
    /,
    out: Path,
    set: Annotated[UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = (),  # noqa: A002
) -> None:
    """Trains a run; the same command again goes on where it stopped.

    Example: stratagem train digits.yaml --out runs/digits --set train.steps=2000

    Args:
        config: The YAML file; `stratagem.config` lists its keys.
        out: The run's folder.
        set: Overrides of the file, section.key=value.
    """
    resolved = load(config, set)
    with progress_bar(f"train {out.name}", "steps") as progress:
        state = train_run(resolved, out, progress=progress)
    say(f"{out}: trained to step {state.step:,}")
