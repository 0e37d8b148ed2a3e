"""Images where they lie: one stream of records, whatever holds them.

    folder, zip, tar, shards, arrays  ->  Record(name, label, load)  ->  `survey`, then decoding

A collection gives its records again and again, in the same order, and reads no image to do so: a
record says how to. It travels to the process that decodes. So memory does not grow with the number
of images, any number of processes gives the same data set, and one that was stopped goes on at a
record.

Labels are, in this order: what lies beside an image under the same name (`x.jpg` with `x.cls`, or
`x.json` with "label" or "cls", as webdataset has it), or its first sub-folder. Whole numbers label
themselves; names are numbered in sorted order. A file that is no image is a record too, with the
cause: what was read is what was kept and what was left out, and nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from stratagem.data.decoding import cause_of
from stratagem.errors import InputError

__all__ = [
    "NO_IMAGE",
    "SUFFIXES",
    "Collection",
    "File",
    "Loader",
    "Record",
    "Survey",
    "folder_files",
    "image_records",
    "open_file",
    "survey",
]

_PLAIN = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SUFFIXES = frozenset((*_PLAIN, ".avif", ".pbm", ".pgm", ".ppm"))
NO_IMAGE = f"its name does not end in {', '.join(sorted(SUFFIXES))}"
_BESIDE = frozenset((".cls", ".json", ".txt", ".xml"))  # may lie beside an image of the same name

Loader = Callable[[], BinaryIO | np.ndarray]
"""Opens an image file, or gives pixels (H, W) or (H, W, C), uint8; can be pickled."""


class File(NamedTuple):
    """A file of a folder or an archive.

    Attributes:
        name: Its path below the root, with slashes.
        load: How to read it, or the cause why that is impossible.
    """

    name: str
    load: Loader | str


class Record(NamedTuple):
    """An image, or what lies where one could be.

    Attributes:
        name: Where it is, unique as a rule.
        label: Number (negative: unknown) or name of its class; None: the first folder in its name.
        load: How to read it, or the cause why it cannot be used.
    """

    name: str
    label: int | str | None
    load: Loader | str


class Collection(NamedTuple):
    """Images that belong together.

    Attributes:
        name: What they are, for the metadata.
        records: Gives all of them; may be called again.
        classes: Names of the classes that numbers mean; by default the numbers.
        files: What holds them: changed files are another collection.
        strip: Whether a folder that holds all images is no part of their names.
        size: Side of all images, where it is known.
        gray: Whether they have one channel.
    """

    name: str
    records: Callable[[], Iterator[Record]]
    classes: Sequence[str] | None = None
    files: Sequence[Path] = ()
    strip: bool = False
    size: int | None = None
    gray: bool = False


class Survey(NamedTuple):
    """What is known of a collection before an image is read.

    Attributes:
        classes: Names of the classes.
        counts: Usable records of each class, by its number; of none, -1.
        total: Number of records.
        origin: Identifies the records.
        resolve: Gives name and class of a record.
    """

    classes: list[str]
    counts: dict[int, int]
    total: int
    origin: str
    resolve: Callable[[Record], tuple[str, int]]


def survey(collection: Collection) -> Survey:
    """Goes through all records once.

    Raises:
        InputError: If a class number has no name, or images have numbers and others names.
    """
    digest, total = hashlib.sha256(), 0
    for file in collection.files:
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    found: dict[tuple[str, int | str | None], int] = {}  # (folder, label) -> how many
    for record in collection.records():
        digest.update(f"{record.name}\n{record.label}\n".encode())
        total += 1
        if not isinstance(record.load, str):
            key = (record.name.rpartition("/")[0], record.label)
            found[key] = found.get(key, 0) + 1
    folders = {folder for folder, _ in found}
    common = os.path.commonpath(folders) if collection.strip and folders else ""
    cut = len(common) + 1 if common else 0
    labels = {label if label is not None else _first(folder[cut:]) for folder, label in found}
    classes = _classes(labels, collection)
    named = {name: number for number, name in enumerate(classes)}

    def number(folder: str, label: int | str | None) -> int:
        label = _first(folder[cut:]) if label is None else label
        return named.get(label, -1) if isinstance(label, str) else max(label, -1)

    def resolve(record: Record) -> tuple[str, int]:
        inside = record.name.startswith(f"{common}/")
        folder = record.name.rpartition("/")[0]
        return record.name[cut:] if inside else record.name, number(folder, record.label)

    counts: dict[int, int] = {}
    for (folder, label), num in found.items():
        counts[number(folder, label)] = counts.get(number(folder, label), 0) + num
    return Survey(classes, counts, total, digest.hexdigest(), resolve)


def _first(folder: str) -> str | int:
    return folder.partition("/")[0] or -1


def _classes(labels: set[str | int], collection: Collection) -> list[str]:
    numbers = [label for label in labels if isinstance(label, int)]
    names = sorted(label for label in labels if isinstance(label, str))
    most = max(numbers, default=-1)
    if collection.classes is not None:
        known = list(collection.classes)
    elif most >= 0 and names:
        raise InputError(
            f"{collection.name} labels images by number ({most}) and by name ({names[0]}): one way "
            "for all of them, please"
        )
    else:
        known = [str(number) for number in range(most + 1)] or names
    if most >= max(len(known), 1) or most > 1_000_000:
        raise InputError(f"{collection.name} has label {most}, but {len(known)} classes")
    return known


def folder_files(root: Path) -> Iterator[File]:
    """Yields what lies below a folder in the order of the names; hidden files are left out.

    Raises:
        InputError: If it is missing, not a folder, or cannot be listed.
    """
    if not root.exists():
        raise InputError(f"no images at {root}: there is no such file or folder")
    if not root.is_dir():
        raise InputError(f"{root} is a file: give the folder that holds the images")
    try:
        os.scandir(root).close()
    except OSError as error:
        raise InputError(f"cannot list {root}: {error.strerror}") from error
    return _walk(os.fspath(root), "", ())


def _walk(root: str, folder: str, above: tuple[str, ...]) -> Iterator[File]:
    """Yields the files below a folder; a link back to a folder above it is not followed."""
    place = os.path.join(root, folder)
    real, said = os.path.realpath(place), _unicode(folder.rstrip("/"))
    if real in above:
        yield File(said, "a link to a folder in which it lies")
        return
    try:
        entries = sorted(os.scandir(place), key=lambda entry: entry.name)
    except OSError as error:
        yield File(said, cause_of(error))
        return
    for entry in entries:
        name = f"{folder}{entry.name}"
        if entry.name.startswith("."):
            continue
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            yield from _walk(root, f"{name}/", (*above, real))
        elif os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():
            yield File(_unicode(name), functools.partial(open_file, entry.path))
        else:
            yield File(_unicode(name), _strange(entry.path))


def open_file(path: str) -> BinaryIO:
    """Opens a file for reading."""
    return open(path, "rb")


def _strange(path: str) -> str:
    """Returns why something is neither a file nor a folder: a link to nowhere, a pipe."""
    try:
        os.stat(path)
    except OSError as error:
        return cause_of(error)
    return "neither a file nor a folder"


def _unicode(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "replace")


def image_records(files: Iterable[File]) -> Iterator[Record]:
    """Makes records of files, of which those of one name but for the suffix lie together."""
    for _, group in itertools.groupby(files, key=lambda file: _stem(file.name)):
        members = list(group)
        images = {file.name for file in members if _suffix(file.name) in SUFFIXES}
        labels = (_label(file) for file in members if images)
        label = next((found for found in labels if found is not None), None)
        whole = {name for name in images if name.rpartition("/")[2].count(".") == 1}
        for name, load in members:
            if name in images and (label is None or not whole or name in whole):
                yield Record(name, label, load)
            elif name in images:
                yield Record(name, None, "a part of a labelled sample that has an image")
            elif not images or _suffix(name) not in _BESIDE:
                cause = load if isinstance(load, str) else NO_IMAGE
                yield Record(name, None, cause)


def _label(file: File) -> int | str | None:
    """Returns the label that a file beside an image gives it."""
    if _suffix(file.name) not in {".cls", ".json"} or isinstance(file.load, str):
        return None
    try:
        stream = file.load()
        assert not isinstance(stream, np.ndarray)
        with stream:
            text = stream.read(1 << 20).decode()
        if _suffix(file.name) == ".json":
            body = json.loads(text)
            text = str(body.get("label", body.get("cls", ""))) if isinstance(body, dict) else ""
    except (OSError, ValueError):
        return None
    text = text.strip()
    return int(text) if text.lstrip("-").isdecimal() else text or None


def _stem(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
