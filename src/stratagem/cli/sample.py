"""`stratagem sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from stratagem.cli.console import progress_bar, say
from stratagem.cli.opening import Opened, Opening
from stratagem.distributed import apart
from stratagem.programs import Device
from stratagem.programs.sample import SampleConfig, sample_into
from stratagem.programs.sample_files import Form

__all__ = ["sample"]


def sample(
    run: Positional[Path],
    /,
    out: Path,
    config: Annotated[SampleConfig, tyro.conf.arg(name="")] = SampleConfig(),  # noqa: B008
    opening: Opened = Opening(),  # noqa: B008
    format: Form = "png",  # noqa: A002
    device: Device = "auto",
) -> None:
    """Samples images from a run.

    Killed, the same command goes on from the images that are there; a finished one is left as it
    is. Under torchrun the processes share the images; none waits for another, and the same command
    again makes what a process that died has left.

    Example: stratagem sample runs/digits --num 64 --out samples
    Example: stratagem sample runs/digits --sampler dpm-solver-3 --steps 20 --out samples

    Args:
        run: The run.
        out: The folder to make.
        config: How to sample.
        opening: How the run is opened.
        format: Numbered PNGs, or one npz in ADM's layout.
        device: Where the network runs; auto takes a GPU where there is one.
    """
    world = apart(device, setting="--device")
    model = opening.model(run, world.device)
    with progress_bar("sample", "images") as progress:
        there = sample_into(
            model,
            config,
            out,
            form=format,
            rank=world.rank,
            world=world.size,
            progress=progress,
        )
    if out.exists():
        say(f"{out}: {config.num} images of step {model.step:,}")
    else:
        say(
            f"process {world.rank} is done, {there:,} of {config.num:,} images are there; the last "
            "process puts them together, or the same command again does"
        )
