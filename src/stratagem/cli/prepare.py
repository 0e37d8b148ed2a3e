"""`stratagem prepare`."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from stratagem.cli.console import progress_bar, say
from stratagem.data.datasets import prepare as prepare_data

__all__ = ["prepare"]


def prepare(
    images: Positional[str],
    /,
    out: Path,
    size: int | None = None,
    gray: bool = False,
    flip: bool = False,
    holdout: float = 0.0,
    seed: int = 0,
) -> None:
    """Makes a data set of a folder of images.

    Example: stratagem prepare photos/ --out out/photos --size 32 --flip --holdout 0.1

    Args:
        images: A folder (its sub-folders are the classes), or the word digits.
        out: The data set to make.
        size: Side of the square images in pixels; 32, and for the digits their own 8.
        gray: One channel instead of three.
        flip: Training may use mirror images.
        holdout: Fraction of the images that training never sees, to measure memorisation with.
        seed: Seed of the choice of held-out images.
    """
    with progress_bar("prepare", "images") as progress:
        data = prepare_data(
            images,
            out,
            size=size,
            gray=gray,
            flip=flip,
            holdout=holdout,
            seed=seed,
            progress=progress,
        )
    held = len(data.held_out_indices)
    say(f"{out}: {data.num:,} images of {'x'.join(map(str, data.shape))}, {held:,} held out")
    for name, cause in data.rejected[:10]:
        say(f"  left out {name}: {cause}")
    if num := len(data.rejected):
        say(f"  {num:,} file{'s' * (num > 1)} left out; all are listed in {out}/rejected.json")
