"""Building a bank: one pass over the images, written while it encodes, gone on with after a stop.

    images i .. i + B  ->  encode, and encode mirrored  ->  unit vectors  ->  rows i .. i + B of
    the draft .BANK.partial; how far it is stands in .BANK.partial.json

Memory holds one batch. The note is written after the rows that it counts are on the disk, so a
build that was stopped or killed goes on from there when the same is built again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from stratagem import artifact
from stratagem.errors import InputError
from stratagem.memory.bank import KIND, MemoryBank
from stratagem.memory.store import unit

__all__ = ["build"]

_SECONDS = 1.0  # between two notes


def build(
    path: Path,
    frame: MemoryBank,
    batches: Callable[[int], Iterable[Tensor]],
    encode: Callable[[Tensor], Tensor],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> MemoryBank:
    """Makes a bank in one pass over the images, or the rest of it.

    Args:
        path: The bank's file.
        frame: What it shall be, with a `store.blank` for the vectors; two sides only if the data
            may be mirrored.
        batches: Given i, yields the images of the data set from the i-th on, in order, each batch
            of shape (B, C, H, W), uint8.
        encode: Maps such a batch to vectors of any length but 0, shape (B, D).
        progress: Called after each batch with the number of images done and of all.

    Raises:
        InputError: If `path` exists, a vector is zero or not finite, or the number of images is
            another; then nothing is left behind. Or if there is a draft of other settings, or
            another process writes it.
    """
    artifact.refuse_existing(path, replace=False)
    codec = frame.store.codec
    partial = path.with_name(f".{path.name}.partial")
    note = _Note(partial, artifact.fingerprint([str(frame.layout()), frame.meta()]))
    draft = artifact.TensorDraft(partial, KIND, frame.layout(), frame.meta())
    try:
        for name, column in frame.columns().items():
            draft.write(name, 0, column)
        for rows in _encoded(batches(note.done), encode, frame, note.done):
            for name, column in codec.encode(rows.flatten(0, 1)).items():
                draft.write(name, note.done, column.unflatten(0, rows.shape[:2]))
            note.add(len(rows), draft)
            if progress is not None:
                progress(note.done, frame.num)
        if note.done != frame.num:
            raise InputError(f"the data set has {note.done} images, not {frame.num}")
        draft.seal(path)
        note.remove()
    except InputError:
        draft.close(remove=True)
        note.remove()
        raise
    except BaseException:
        note.write(draft)
        raise
    finally:
        draft.close(remove=False)
    return MemoryBank.load(path, verify=False)


class _Note:
    """How many images of a draft are done, beside the draft.

    Args:
        partial: The draft.
        origin: What identifies its content.
    """

    def __init__(self, partial: Path, origin: str) -> None:
        self._file, self._origin = partial.with_name(partial.name + ".json"), origin
        self._written = time.monotonic()
        self.done = 0
        if partial.exists() and self._file.exists():
            found = artifact.load_json(self._file)
            if found.get("origin") != origin:
                raise InputError(
                    f"{partial} is an unfinished bank of other data or settings: go on with those, "
                    "remove it, or choose another name"
                )
            self.done = found["done"]

    def add(self, num: int, draft: artifact.TensorDraft) -> None:
        """Counts images, and writes that down now and then."""
        self.done += num
        if time.monotonic() - self._written >= _SECONDS:
            self.write(draft)

    def write(self, draft: artifact.TensorDraft) -> None:
        """Writes the note, once the rows are on the disk."""
        draft.sync()
        body = {"origin": self._origin, "done": self.done}
        artifact.write_bytes(self._file, json.dumps(body).encode())
        self._written = time.monotonic()

    def remove(self) -> None:
        """Takes the note away."""
        self._file.unlink(missing_ok=True)


def _encoded(
    batches: Iterable[Tensor], encode: Callable[[Tensor], Tensor], frame: MemoryBank, start: int
) -> Iterator[Tensor]:
    """Yields unit vectors of batches from image `start` on, each of shape (B, F, D), float32."""
    for batch in batches:
        numbers = torch.arange(start, start := start + len(batch))
        if start > frame.num:
            raise InputError(f"the data set has more than {frame.num} images")
        sides = [batch, batch.flip(-1)] if frame.flips else [batch]
        yield torch.stack([unit(encode(side), "image", numbers) for side in sides], dim=1)
