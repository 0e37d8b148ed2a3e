"""`stratagem import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from stratagem.cli.console import say
from stratagem.interop.dit import Project
from stratagem.programs.import_run import import_run

__all__ = ["import_"]


def import_(
    file: Positional[Path],
    /,
    from_: Annotated[Project, tyro.conf.arg(name="from")],
    out: Path,
    heads: int | None = None,
    image_size: int | None = None,
    rope: Literal["yes", "no"] | None = None,
    bank: Path | None = None,
) -> None:
    """Makes a run of an official checkpoint, to be sampled like any other.

    Example: stratagem import sit-xl.pt --from sit --out runs/sit-xl

    Args:
        file: The .pt, .pth or .safetensors file.
        from_: Whose checkpoint it is; GMem's versions are told apart by their weights.
        out: The run's folder.
        heads: Attention heads, where neither the weights nor a published width tell.
        image_size: Side of the images or latents, where the file has no table of positions.
        rope: Whether attention rotates by position, where the weights leave it open.
        bank: The memory bank of a network with memory.
    """
    rotates = None if rope is None else rope == "yes"
    made = import_run(file, from_, out, heads=heads, image_size=image_size, rope=rotates, bank=bank)
    cfg = made.official.cfg
    say(
        f"{out}: {made.official.family.title}, {made.parameters:,} parameters, width {cfg.width}, "
        f"depth {made.official.depth}, {cfg.heads} heads, images "
        f"{cfg.channels}x{cfg.image_size}x{cfg.image_size} in patches of {cfg.patch}"
    )
    if made.left_out:
        say(f"  left out of the run: {', '.join(made.left_out)}")
    if made.bank is not None and bank is None:
        say(f"  to sample, put its memory bank at {made.bank} or give --bank")
