"""Images that are rows of arrays: idx files (MNIST), npz files, Hugging Face data sets.

    idx    bytes 0 0 8 d, d big-endian sizes, then numbers; images d = 3, labels d = 1; .gz or not
    npz    "images" or "arr_0" (N, H, W, C) or (N, H, W), uint8; "labels" or "arr_1" (N,)
    hf:    a name of the hub ("hf:NAME", "hf:NAME:SPLIT"), or a folder that `save_to_disk` wrote

Rows are read one after the other, so an array of 10 GB takes no more memory than one of its images.
"""

from __future__ import annotations

import functools
import gzip
import importlib
import io
import itertools
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from stratagem.data.decoding import cause_of
from stratagem.data.sources import Collection, Record, open_file
from stratagem.errors import InputError, MissingExtra

__all__ = ["hugging_face", "idx_collection", "idx_files", "npz_collection", "pixels"]


def pixels(content: bytes, shape: Sequence[int]) -> np.ndarray:
    """Returns bytes as an image of a shape (H, W) or (H, W, C); a single channel has no axis."""
    image = np.frombuffer(content, np.uint8).reshape(shape)
    return image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image


def idx_files(folder: Path) -> list[Path]:
    """Returns the idx files of images in a folder, those for training first."""
    found = [f for f in folder.glob("*-idx3-ubyte*") if f.name.endswith(("ubyte", "ubyte.gz"))]
    return sorted(found, key=lambda file: (not file.name.startswith("train"), file.name))


def idx_collection(files: Sequence[Path], name: str) -> Collection:
    """Makes one collection of idx files of images; labels lie beside them under their own name.

    Raises:
        InputError: If a file is none, or its labels are not as many.
    """
    shapes = {_idx_sizes(file, 3)[1:] for file in files}
    size = min(min(shape) for shape in shapes)
    labels = [place for file in files if (place := _idx_labels(file)) is not None]

    def records() -> Iterator[Record]:
        return itertools.chain.from_iterable(map(_idx_records, files))

    return Collection(name, records, files=[*files, *labels], size=size, gray=True)


def _idx_labels(file: Path) -> Path | None:
    name = file.name.replace("-images", "-labels").replace("idx3", "idx1")
    names = {name, name.removesuffix(".gz"), f"{name.removesuffix('.gz')}.gz"} - {file.name}
    return next((file.with_name(n) for n in sorted(names) if file.with_name(n).is_file()), None)


def _idx_records(file: Path) -> Iterator[Record]:
    num, *shape = _idx_sizes(file, 3)
    label_file, labels = _idx_labels(file), None
    if label_file is not None:
        (count,) = _idx_sizes(label_file, 1)
        labels = np.frombuffer(_idx_open(label_file).read()[8:], np.uint8)
        if not num == count == len(labels):
            raise InputError(f"{label_file} has {len(labels)} labels for {num} images of {file}")
    part = file.name.partition("-")[0]
    with _idx_open(file) as stream:
        stream.read(16)
        rows = _rows(stream, num, shape)
        for index, load in enumerate(rows):
            label = None if labels is None or isinstance(load, str) else int(labels[index])
            yield Record(f"{part}/{index:07d}", -1 if label is None else label, load)


def _idx_open(file: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file) if file.suffix == ".gz" else file.open("rb"))


def _idx_sizes(file: Path, axes: int) -> tuple[int, ...]:
    try:
        with _idx_open(file) as stream:
            head = stream.read(4 + 4 * axes)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file} cannot be read: {cause_of(error)}") from error
    if head[:4] != bytes((0, 0, 8, axes)) or len(head) < 4 + 4 * axes:
        raise InputError(f"{file} is no idx file of unsigned bytes with {axes} axes")
    return struct.unpack(f">{axes}I", head[4:])


def _rows(stream: BinaryIO, num: int, shape: Sequence[int]) -> Iterator[Any]:
    """Yields how to load each image that follows; where the file ends too early, the cause."""
    length = math.prod(shape)
    for index in range(num):
        try:
            content = stream.read(length)
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            content, cause = b"", cause_of(error)
        else:
            cause = "it ends too early"
        if len(content) < length:
            yield f"the file cannot be read from image {index} of {num} on: {cause}"
            return
        yield functools.partial(pixels, content, shape)


def npz_collection(file: Path) -> Collection:
    """Makes a collection of an npz file.

    Raises:
        InputError: If it has no images of 8 bits, or labels that are not as many.
    """
    with _npz(file) as archive:
        names = {Path(name).stem for name in archive.namelist()}
        images = next((name for name in ("images", "arr_0") if name in names), None)
        if images is None:
            raise InputError(f"{file} holds {sorted(names)}: call its array images, or arr_0")
        with archive.open(f"{images}.npy") as stream:
            num, shape = _npy_head(file, stream)
    labels = _npz_labels(file, names, num)

    def records() -> Iterator[Record]:
        with _npz(file) as archive, archive.open(f"{images}.npy") as stream:
            _npy_head(file, stream)
            rows = _rows(cast(BinaryIO, stream), num, shape)
            for index, load in enumerate(rows):
                yield Record(f"{index:07d}", -1 if labels is None else int(labels[index]), load)

    gray = len(shape) == 2 or shape[2] == 1
    return Collection(file.stem, records, files=[file], size=min(shape[:2]), gray=gray)


def _npz(file: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{file} cannot be read: {cause_of(error)}; is it whole?") from error


def _npy_head(file: Path, stream: Any) -> tuple[int, tuple[int, ...]]:
    reader = {(1, 0): np.lib.format.read_array_header_1_0}
    version = np.lib.format.read_magic(stream)
    read = reader.get(version, np.lib.format.read_array_header_2_0)
    (num, *shape), columns, dtype = read(stream)
    if dtype != np.uint8 or columns or len(shape) not in (2, 3):
        raise InputError(f"{file} has images of {dtype} {(num, *shape)}: give uint8 (N, H, W, C)")
    if len(shape) == 3 and shape[2] not in (1, 3, 4):
        raise InputError(f"{file} has images {(num, *shape)}: the channels come last")
    return num, tuple(shape)


def _npz_labels(file: Path, names: set[str], num: int) -> np.ndarray | None:
    name = next((name for name in ("labels", "arr_1") if name in names), None)
    if name is None:
        return None
    with np.load(file) as archive:
        labels = archive[name]
    if labels.shape != (num,) or labels.dtype.kind not in "iu":
        raise InputError(f"{file} has {name} {labels.shape} {labels.dtype} for {num} images")
    return labels


def hugging_face(name: str, split: str = "") -> Collection:
    """Makes a collection of a data set of the Hugging Face hub, or of a folder it was saved to.

    Args:
        name: Of the hub, or a folder.
        split: Which part; by default "train", or all of a folder without parts.

    Raises:
        InputError: If it is not there, or has no images.
        MissingExtra: If `datasets` is not installed.
    """
    try:
        datasets = importlib.import_module("datasets")  # it has no types
    except ImportError as error:
        raise MissingExtra("datasets", "data") from error
    try:
        if Path(name).is_dir():
            data = datasets.load_from_disk(name)
            data = data[split or "train"] if isinstance(data, dict) else data
        else:
            data = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"hf:{name} cannot be opened: {cause_of(error)}") from error
    kinds = data.features
    column = next((key for key, kind in kinds.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise InputError(f"hf:{name} has no column of images: it has {', '.join(kinds)}")
    classes = [key for key, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    labels = classes[0] if classes else "label" if "label" in kinds else None
    rows = data.select_columns([column] if labels is None else [column, labels])
    rows = rows.cast_column(column, datasets.Image(decode=False))

    def records() -> Iterator[Record]:
        for index, row in enumerate(rows):
            label = None if labels is None else row[labels]
            yield Record(f"{index:08d}", -1 if label is None else label, _encoded(row[column]))

    named = kinds[classes[0]].names if classes else None
    return Collection(Path(name).name, records, named)


def _encoded(image: dict[str, Any] | None) -> Any:
    if image is None:
        return "no image in this row"
    if image["bytes"] is not None:
        return functools.partial(io.BytesIO, image["bytes"])
    return functools.partial(open_file, image["path"])
