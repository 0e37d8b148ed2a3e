"""`stratagem stages`: where to cut the noise axis of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from stratagem.assemble import make_schedule
from stratagem.clustering.search import StageSearch, find_stages
from stratagem.data.images import to_float
from stratagem.data.shards import DataSet
from stratagem.errors import InputError
from stratagem.programs import Progress, silent

__all__ = ["Method", "stages"]

Method = Literal["optimal-denoiser", "dp", "snr", "uniform"]


def stages(
    data: Path,
    out: Path,
    *,
    num: int = 3,
    method: Method = "optimal-denoiser",
    schedule: str = "linear",
    seed: int = 0,
    progress: Progress = silent,
) -> StageSearch:
    """Finds the stages of a data set's training images and saves them.

    Args:
        data: The data set artifact.
        out: The JSON file to write.
        num: How many stages.
        method: How to find them, see `clustering.search`.
        schedule: The noise schedule whose time axis is searched.
        seed: Seed of the samples.
        progress: Called with samples done and of all.

    Raises:
        InputError: If the data is missing, `out` exists, or the method cannot make so many stages.
    """
    if out.exists():
        raise InputError(f"{out} already exists: remove it or choose another name")
    images = DataSet.open(data)
    found = find_stages(
        to_float(images.images(images.train_indices)),
        make_schedule(schedule),
        num_stages=num,
        method=method,
        seed=seed,
        progress=progress,
    )
    record = {**found.record(), "schedule": schedule, "seed": seed, "data": images.fingerprint}
    found.stages.save(out, record)
    return found
