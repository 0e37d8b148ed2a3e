"""`stratagem bank build`: a data set through a frozen encoder into a memory bank."""

from __future__ import annotations

from pathlib import Path

from stratagem.data.shards import DataSet
from stratagem.encoders import build_encoder
from stratagem.errors import InputError
from stratagem.memory.bank import MemoryBank, build
from stratagem.programs import Progress, silent

__all__ = ["build_bank"]


def build_bank(
    data: Path, out: Path, *, encoder: str, batch_size: int = 256, progress: Progress = silent
) -> MemoryBank:
    """Builds and saves the bank of a data set, with mirrored snippets if it may be mirrored.

    Args:
        data: The data set artifact.
        out: The bank's file.
        encoder: Name of the frozen encoder.
        batch_size: Images encoded at once.
        progress: Called with the number of images done and of all.

    Raises:
        InputError: If the data is missing, the encoder unknown, or `out` exists.
    """
    if out.exists():  # said before the work, not after it
        raise InputError(f"{out} already exists: remove it or choose another name")
    images = DataSet.open(data)
    encode = build_encoder(encoder, images.shape)
    bank = build(
        images.batches(batch_size),
        encode,
        num=images.num,
        flips=images.flip,
        labels=images.labels,
        held_out=images.held_out,
        encoder=encode.description(),
        data=images.fingerprint,
        progress=lambda done: progress(done, images.num),
    )
    bank.save(out)
    return bank
