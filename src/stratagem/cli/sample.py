"""`stratagem sample`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from stratagem.assemble import open_run
from stratagem.cli.console import progress_bar, say
from stratagem.programs.sample import SampleConfig, sample_run, save_samples

__all__ = ["sample"]


def sample(
    run: Positional[Path],
    /,
    out: Path,
    config: Annotated[SampleConfig, tyro.conf.arg(name="")] = SampleConfig(),  # noqa: B008
    step: int | None = None,
    bank: Path | None = None,
    format: Literal["png", "npz"] = "png",  # noqa: A002
) -> None:
    """Samples images from a run.

    Example: stratagem sample runs/digits --num 64 --out samples

    Args:
        run: The run.
        out: The folder to make.
        config: How to sample.
        step: Which checkpoint; the newest by default.
        bank: The memory bank, if it has moved or was edited.
        format: Numbered PNGs, or one npz in ADM's layout.
    """
    model = open_run(run, step=step, bank=bank)
    with progress_bar("sample", "images") as progress:
        samples = sample_run(model, config, progress=progress)
    meta = {"run": str(run), "step": model.step, "sampling": dataclasses.asdict(config)}
    save_samples(samples, out, meta, form=format)
    say(f"{out}: {config.num} images of step {model.step:,}")
