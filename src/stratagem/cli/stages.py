"""`stratagem stages`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from stratagem.assemble import make_schedule
from stratagem.cli.console import progress_bar, say
from stratagem.programs.stages import Method
from stratagem.programs.stages import stages as find

__all__ = ["stages"]


def stages(
    data: Positional[Path],
    /,
    out: Path,
    num: int = 3,
    method: Method = "optimal-denoiser",
    schedule: Literal["linear", "cosine", "vp", "edm"] = "linear",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Finds the stages of the noise axis of a data set.

    Example: stratagem stages out/photos --out out/photos-stages.json --num 3

    Args:
        data: The data set.
        out: The JSON file to write.
        num: How many stages.
        method: optimal-denoiser (the paper's two thresholds), dp, snr or uniform.
        schedule: The noise schedule whose times are searched.
        seed: Seed of the samples.
        json: Print JSON.
    """
    with progress_bar("stages", "samples") as progress:
        found = find(
            data, out, num=num, method=method, schedule=schedule, seed=seed, progress=progress
        )
    noise = make_schedule(schedule)
    times = found.stages.times(noise)
    rows = [
        {"log_snr": edge, "sigma": 2.718281828459045 ** (-edge / 2), "t": t}
        for edge, t in zip(found.stages.edges, times, strict=True)
    ]
    if json:
        say(json_module.dumps({"edges": rows, "method": found.method}, indent=1))
        return
    say(f"{out}: {found.stages.num} stages by {found.method}")
    for row in rows:
        say("  edge at " + ", ".join(f"{name} {value:.4f}" for name, value in row.items()))
