"""`stratagem bank build` and `stratagem bank info`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from stratagem.cli.console import progress_bar, say
from stratagem.memory.bank import MemoryBank
from stratagem.programs.bank import build_bank

__all__ = ["build", "info"]


def build(
    data: Positional[Path],
    /,
    out: Path,
    encoder: Literal["effnet", "pixels"] = "effnet",
    batch_size: int = 256,
) -> None:
    """Builds the memory bank of a data set.

    Example: stratagem bank build out/photos --out out/photos-bank.safetensors

    Args:
        data: The data set.
        out: The bank's file.
        encoder: The frozen encoder: effnet (EfficientNet-Lite0, for photographs) or pixels.
        batch_size: Images encoded at once.
    """
    with progress_bar("bank build", "images") as progress:
        bank = build_bank(data, out, encoder=encoder, batch_size=batch_size, progress=progress)
    say(f"{out}: {bank.num:,} images, {bank.dim} numbers each, encoder {encoder}")


def info(bank: Positional[Path], /, json: bool = False) -> None:
    """Tells what a memory bank holds.

    Example: stratagem bank info out/photos-bank.safetensors

    Args:
        bank: The bank's file.
        json: Print JSON.
    """
    facts = MemoryBank.load(bank).info()
    if json:
        say(json_module.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        say(f"{name:<12} {value}")
