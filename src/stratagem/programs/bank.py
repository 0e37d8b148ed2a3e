"""`stratagem bank ...`: a memory bank is built, compressed, edited and searched.

    images -> the shape of the bank's own images -> the bank's own encoder -> rows

Images that are added or searched for go the way that the images of the build went: the bank says
which encoder made it and of what shape, and another version of that encoder is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stratagem.artifact import refuse_existing
from stratagem.data.images import BadImage, find_images, load_image
from stratagem.data.shards import DataSet
from stratagem.encoders import Encoder, build_encoder
from stratagem.errors import InputError
from stratagem.interop.banks import read_bank, read_vectors
from stratagem.memory import edit
from stratagem.memory.bank import MemoryBank
from stratagem.memory.build import build
from stratagem.memory.compress import Fidelity, Format, compress, fidelity
from stratagem.memory.ids import Ids
from stratagem.memory.interpolate import Way
from stratagem.memory.search import nearest, rows_near
from stratagem.memory.store import blank
from stratagem.programs import Progress, silent

__all__ = [
    "Added",
    "Neighbours",
    "add_to_bank",
    "build_bank",
    "compress_bank",
    "import_bank",
    "interpolate_bank",
    "merge_banks",
    "nearest_in_bank",
    "remove_from_bank",
]

_BATCH = 64  # images encoded at once
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


class Neighbours(NamedTuple):
    """Rows nearest to images.

    Attributes:
        names: Of the images that were searched for, Q of them.
        cosines: Falling, shape (Q, k).
        rows: Shape (Q, k), int64.
        ids: Names of these rows.
    """

    names: list[str]
    cosines: Tensor
    rows: Tensor
    ids: list[list[str]]


class _Encoded(NamedTuple):
    """Vectors (n, F, D) of images, their names, and (name, cause) of unusable files."""

    vectors: Tensor
    names: list[str]
    rejected: list[tuple[str, str]]


def build_bank(
    data: Path,
    out: Path,
    *,
    encoder: str,
    form: Format = "float16",
    batch_size: int = 256,
    progress: Progress = silent,
) -> MemoryBank:
    """Builds the bank of a data set, or the rest of one that was stopped.

    Mirrored images get their own snippets if the data set may be mirrored.

    Args:
        data: The data set artifact.
        out: The bank's file.
        encoder: Name of the frozen encoder.
        form: How vectors are stored; low-rank needs a bank first, see `compress_bank`.
        batch_size: Images encoded at once.
        progress: Called with the number of images done and of all.

    Raises:
        InputError: If the data is missing, the encoder unknown, or `out` exists.
    """
    refuse_existing(out, replace=False)  # said before the work, not after it
    if form == "low-rank":
        raise InputError("low rank is found from a whole bank: build one, then  bank compress")
    images = DataSet.open(data)
    encode = build_encoder(encoder, images.shape)
    frame = MemoryBank(
        blank(images.num, 2 if images.flip else 1, encode.dim, form),
        images.labels,
        images.held_out,
        encode.description(),
        images.fingerprint,
        Ids.of(images.names),
        shape=images.shape,
    )
    return build(
        out, frame, lambda done: images.batches(batch_size, done), encode, progress=progress
    )


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

    def part(number: int) -> Progress:
        return lambda done, total: progress(done + number * total, passes * total)

    small = compress(full, form, rank=rank, cosine=cosine, progress=part(0))
    small = _save(small, out, part(passes - 2))
    return small, fidelity(full, small, seed=seed, progress=part(passes - 1))


def add_to_bank(
    path: Path, source: Path, out: Path, *, label: int = -1, progress: Progress = silent
) -> Added:
    """Adds images, or vectors that the bank's encoder made, to a bank.

    Args:
        path: The bank.
        source: A folder of images, an image, or a .pth, .pt or .safetensors file of one tensor.
        out: The new bank.
        label: Class of the new rows.
        progress: Called with the number of images done and of all.

    Raises:
        InputError: If nothing can be used, the encoder is another than the bank's, or `out` exists.
    """
    refuse_existing(out, replace=False)
    bank = MemoryBank.load(path)
    new = _rows(source) if source.suffix in _TENSORS else _encode(bank, source, progress)
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
    if ids:
        rows, entry = [edit.rows_of_ids(bank, ids)], {"ids": sorted(ids)}
    if label is not None:
        rows.append(edit.rows_of_label(bank, label))
        entry["label"] = label
    if like is not None and cosine is not None:
        rows.append(rows_near(bank, _encode(bank, like, progress).vectors[:, 0], cosine))
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
    path: Path, source: Path, num: int, *, progress: Progress = silent
) -> Neighbours:
    """Finds the rows nearest to images.

    Args:
        path: The bank.
        source: An image or a folder of them.
        num: Rows per image.
        progress: Called with the number of images encoded and of all.

    Raises:
        InputError: If no image can be used, or there are fewer rows than wanted.
    """
    bank = MemoryBank.load(path)
    found = _encode(bank, source, progress)
    cosines, rows = nearest(bank, found.vectors[:, 0], num)
    ids = [[bank.ids[row] for row in line] for line in rows.tolist()]
    return Neighbours(found.names, cosines, rows, ids)


def _save(bank: MemoryBank, out: Path, progress: Progress = silent) -> MemoryBank:
    """Writes a bank and maps it from its file."""
    bank.save(out, progress=progress)
    return MemoryBank.load(out, verify=False)


def _rows(source: Path) -> _Encoded:
    vectors = read_vectors(source)
    names = [f"{source.stem}/{row}" for row in range(len(vectors))]
    return _Encoded(vectors if vectors.ndim == 3 else vectors[:, None], names, [])


def _encode(bank: MemoryBank, source: Path, progress: Progress) -> _Encoded:
    """Encodes images as those of the bank were; unusable files are left out and named."""
    encode, size, channels = _encoder(bank)
    if source.is_file():
        files = [(source, source.name)]
    else:
        listing = find_images(source)
        files = [(path, listing.name(number)) for number, path in enumerate(listing.paths)]
    vectors: list[Tensor] = []
    names: list[str] = []
    rejected: list[tuple[str, str]] = []
    for start in range(0, len(files), _BATCH):
        images = []
        for path, name in files[start : start + _BATCH]:
            try:
                images.append(load_image(path, size, channels))
                names.append(name)
            except BadImage as error:
                rejected.append((name, str(error)))
        if images:
            batch = torch.stack(images)
            sides = [batch, batch.flip(-1)][: bank.store.sides]
            vectors.append(torch.stack([encode(side).cpu() for side in sides], dim=1))
        progress(min(start + _BATCH, len(files)), len(files))
    if not vectors:
        name, cause = rejected[0]
        raise InputError(f"no image in {source} can be used; {name}: {cause}")
    return _Encoded(torch.cat(vectors), names, rejected)


def encode_images(bank: MemoryBank, source: Path, progress: Progress = silent) -> Tensor:
    """Returns the vectors of an image or a folder of them by the bank's encoder, (Q, D).

    Raises:
        InputError: If no image can be used, or the bank does not say how it was made.
    """
    return _encode(bank, source, progress).vectors[:, 0]


def _encoder(bank: MemoryBank) -> tuple[Encoder, int, Literal[1, 3]]:
    """Returns the encoder that made a bank, and side and channels of the images it saw."""
    if bank.shape is None:
        raise InputError(
            "the bank does not say of what images it was made (it was imported, or merged from "
            "two kinds): give vectors in a .pth or .safetensors file instead of images"
        )
    channels, height, width = bank.shape
    if height != width or channels not in (1, 3):
        raise InputError(f"the bank was made of {channels}x{height}x{width}, not of square images")
    name, size = str(bank.encoder.get("name")), bank.encoder.get("size")
    encode = build_encoder(name, bank.shape, size=size)
    if encode.description() != bank.encoder:
        raise InputError(
            f"the bank was made by another version of encoder {name} than is installed: build the "
            "bank again"
        )
    return encode, height, 1 if channels == 1 else 3
