"""`stratagem bank ...`: a memory bank is built, compressed, edited and searched.

    data set -> encoder -> bank -> bank', which knows what was done to which bank

Images that are added or searched for go the way that the images of the build went, see
`bank_images`. Banks of DINOv2 and DINOv3 need the weights again for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stratagem.artifact import refuse_existing
from stratagem.data.datasets import reread
from stratagem.data.shards import DataSet
from stratagem.encoders import Encoder, Pool, build_encoder
from stratagem.errors import InputError
from stratagem.interop.banks import read_bank
from stratagem.memory import edit
from stratagem.memory.bank import MemoryBank
from stratagem.memory.build import build
from stratagem.memory.compress import Fidelity, Format, compress, fidelity
from stratagem.memory.interpolate import Way
from stratagem.memory.search import nearest, rows_near
from stratagem.memory.store import blank
from stratagem.programs import Device, Progress, device_of, part_of, silent
from stratagem.programs.bank_images import encode_files, encode_images, rows_of_file

__all__ = [
    "Added",
    "add_to_bank",
    "build_bank",
    "compress_bank",
    "import_bank",
    "interpolate_bank",
    "merge_banks",
    "nearest_in_bank",
    "remove_from_bank",
]

_TENSORS = {".pth", ".pt", ".safetensors"}


class Added(NamedTuple):
    """What `add_to_bank` did.

    Attributes:
        bank: The new bank.
        num: Rows added.
        residuals: Length lost of each new vector in the bank's format, shape (num, F).
        rejected: (name, cause) of the images that could not be used.
    """

    bank: MemoryBank
    num: int
    residuals: Tensor
    rejected: list[tuple[str, str]]


def build_bank(
    data: Path,
    out: Path,
    *,
    encoder: str | Encoder,
    weights: str | None = None,
    size: int | None = None,
    pool: Pool | None = None,
    images: str | None = None,
    form: Format = "float16",
    batch_size: int = 256,
    device: Device = "auto",
    progress: Progress = silent,
) -> MemoryBank:
    """Builds the bank of a data set, or the rest of one that was stopped.

    Mirrored images get their own snippets if the data set may be mirrored.

    Args:
        data: The data set artifact.
        out: The bank's file.
        encoder: The frozen encoder, or its name.
        weights: Of a named one, as are the next two and the device: see `build_encoder`.
        size: Side to which it scales images.
        pool: How its tokens become one vector.
        images: Of a data set of latents, the folder that they were prepared from.
        form: How vectors are stored; low-rank needs a bank first, see `compress_bank`.
        batch_size: Images encoded at once.
        device: Where it runs.
        progress: Called with the number of images done and of all.

    Raises:
        InputError: If the data is missing or holds no images, the encoder is unknown or lacks its
            weights, or `out` exists.
    """
    refuse_existing(out, replace=False)  # said before the work, not after it
    if form == "low-rank":
        raise InputError("low rank is found from a whole bank: build one, then  bank compress")
    rows = DataSet.open(data)
    batches = _images(rows, images, batch_size)
    if isinstance(encoder, str):
        encode = build_encoder(
            encoder,
            rows.image_shape,
            size=size,
            pool=pool,
            weights=weights,
            device=device_of(device),
        )
    elif (weights, size, pool) == (None, None, None):
        encode = encoder
    else:
        raise InputError("weights, size and pool have no effect on an encoder that is one already")
    frame = MemoryBank(
        blank(rows.num, 2 if rows.flip else 1, encode.dim, form),
        rows.labels,
        rows.held_out,
        encode.description(),
        rows.origin,
        rows.names,
        shape=rows.image_shape,
    )
    return build(out, frame, batches, lambda part: encode(part).cpu(), progress=progress)


def _images(data: DataSet, source: str | None, size: int) -> Callable[[int], Iterator[Tensor]]:
    """Returns what gives the images from one on, in batches."""
    if source is None:
        data.require_images()
        return lambda done: data.batches(size, done)
    if data.kind == "images":
        raise InputError(f"--images has no effect: {data.path} holds its images")
    return reread(data, source, size)


def import_bank(
    file: Path, out: Path, *, form: str | None = None, progress: Progress = silent
) -> MemoryBank:
    """Makes a bank of an official file, see `interop.banks`.

    Raises:
        InputError: If the file holds no bank or an unusable row, or `out` exists.
        DamagedArtifact: If the file is truncated or altered.
    """
    refuse_existing(out, replace=False)
    return _save(read_bank(file, form), out, progress)


def compress_bank(
    path: Path,
    out: Path,
    *,
    form: Format,
    rank: int | None = None,
    cosine: float | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[MemoryBank, Fidelity]:
    """Writes a bank in another format and compares the two.

    Args:
        path: The bank.
        out: The new bank.
        form: How vectors are stored.
        rank: Of low-rank: the number of directions.
        cosine: Of low-rank, instead: what 19 rows of 20 shall reach.
        seed: Of the choice of rows for the recall.
        progress: Called with how much is done and how much there is.

    Raises:
        InputError: If the settings are impossible, or `out` exists.
    """
    refuse_existing(out, replace=False)
    full = MemoryBank.load(path)
    passes = 3 if form == "low-rank" else 2
    found, written, compared = (part_of(progress, n, passes) for n in (0, passes - 2, passes - 1))
    small = _save(compress(full, form, rank=rank, cosine=cosine, progress=found), out, written)
    return small, fidelity(full, small, seed=seed, progress=compared)


def add_to_bank(
    path: Path,
    source: Path,
    out: Path,
    *,
    label: int = -1,
    weights: str | None = None,
    progress: Progress = silent,
) -> Added:
    """Adds images, or vectors that the bank's encoder made, to a bank.

    Args:
        path: The bank.
        source: A folder of images, an image, or a .pth, .pt or .safetensors file of one tensor.
        out: The new bank.
        label: Class of the new rows.
        weights: Of the bank's encoder, where it needs them, see `bank_images`.
        progress: Called with the number of images done and of all.

    Raises:
        InputError: If nothing can be used, the encoder is another than the bank's, or `out` exists.
    """
    refuse_existing(out, replace=False)
    bank = MemoryBank.load(path)
    if source.suffix in _TENSORS:
        _refuse_weights(weights, "vectors")
        new = rows_of_file(source)
    else:
        new = encode_files(bank, source, weights, progress)
    labels = torch.full((len(new.vectors),), label)
    lost = edit.residuals(bank, new.vectors)
    entry = {"source": source.name}
    added = edit.add(bank, new.vectors, new.names, labels=labels, entry=entry)
    return Added(_save(added, out), len(new.vectors), lost, new.rejected)


def remove_from_bank(
    path: Path,
    out: Path,
    *,
    ids: Sequence[str] = (),
    label: int | None = None,
    like: Path | None = None,
    cosine: float | None = None,
    weights: str | None = None,
    progress: Progress = silent,
) -> tuple[MemoryBank, int]:
    """Removes rows by names, by a label, or by nearness to images; exactly one of these.

    Args:
        path: The bank.
        out: The new bank.
        ids: Names of images.
        label: A class.
        like: An image or a folder of them: rows near to any of them go.
        cosine: How near, with `like`.
        weights: Of the bank's encoder, where it needs them, see `bank_images`.
        progress: Called with the number of images encoded and of all.

    Returns:
        The new bank and how many rows went.

    Raises:
        InputError: If no row fits, all rows do, or `out` exists.
    """
    refuse_existing(out, replace=False)
    bank = MemoryBank.load(path)
    rows = []
    entry: dict[str, Any] = {}
    if like is None:
        _refuse_weights(weights, "no --like IMAGES")
    if ids:
        rows, entry = [edit.rows_of_ids(bank, ids)], {"ids": sorted(ids)}
    if label is not None:
        rows.append(edit.rows_of_label(bank, label))
        entry["label"] = label
    if like is not None and cosine is not None:
        rows.append(rows_near(bank, encode_images(bank, like, weights, progress), cosine))
        entry |= {"like": like.name, "cosine": cosine}
    if len(rows) != 1 or (like is None) != (cosine is None):
        raise InputError("remove by one of: --ids NAMES; --label N; --like IMAGES --cosine C")
    return _save(edit.remove(bank, rows[0], entry=entry), out), len(rows[0])


def merge_banks(first: Path, second: Path, out: Path) -> MemoryBank:
    """Puts the rows of two banks of one encoder into one.

    Raises:
        InputError: If the banks do not go together, or `out` exists.
    """
    refuse_existing(out, replace=False)
    return _save(edit.merge(MemoryBank.load(first), MemoryBank.load(second)), out)


def interpolate_bank(
    path: Path,
    rows: tuple[int, int],
    out: Path,
    *,
    weights: Sequence[float],
    way: Way,
    seed: int = 0,
    label: int | None = None,
) -> MemoryBank:
    """Adds rows between two rows of a bank.

    Args:
        path: The bank.
        rows: The two.
        out: The new bank.
        weights: Of the second, for linear and spherical; empty otherwise.
        way: How.
        seed: Of the masked way.
        label: Class of the new rows; by default that of both, or -1.

    Raises:
        InputError: If a row is outside the bank, the weights do not go with the way, or `out`
            exists.
    """
    refuse_existing(out, replace=False)
    bank = MemoryBank.load(path)
    pairs = torch.tensor([rows])
    return _save(edit.interpolate(bank, pairs, list(weights) or None, way, seed, label), out)


def nearest_in_bank(
    path: Path,
    source: Path,
    num: int,
    *,
    weights: str | None = None,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Finds the rows nearest to images.

    Args:
        path: The bank.
        source: An image or a folder of them.
        num: Rows per image.
        weights: Of the bank's encoder, where it needs them, see `bank_images`.
        progress: Called with the number of images encoded and of all.

    Returns:
        For each image its name and its rows, the nearest first: {"image": ..., "rows": [{"row":
        ..., "cosine": ..., "id": ...}, ...]}.

    Raises:
        InputError: If no image can be used, or there are fewer rows than wanted.
    """
    bank = MemoryBank.load(path)
    found = encode_files(bank, source, weights, progress)
    cosines, rows = nearest(bank, found.vectors[:, 0], num)
    lines = zip(found.names, rows.tolist(), cosines.tolist(), strict=True)
    return [
        {
            "image": name,
            "rows": [
                {"row": row, "cosine": cosine, "id": bank.ids[row]}
                for row, cosine in zip(own, near, strict=True)
            ],
        }
        for name, own, near in lines
    ]


def _save(bank: MemoryBank, out: Path, progress: Progress = silent) -> MemoryBank:
    """Writes a bank and maps it from its file."""
    bank.save(out, progress=progress)
    return MemoryBank.load(out, verify=False)


def _refuse_weights(weights: str | None, why: str) -> None:
    if weights is not None:
        raise InputError(f"--encoder-weights has no effect with {why}: leave it out")
