"""Real data sets by name, read from where their package or the user put them.

    digits          1,797 scans of 8 x 8 pixels, 17 gray levels: u = round(255 v / 16); scikit-learn
    fashion-mnist  70,000 gray images of 28 x 28, 10 classes; Debian's dataset-fashion-mnist
    emoji          10,945 colour images of 64 x 64 in three styles, 10 groups; three npm packages
    cifar10        60,000 colour images of 32 x 32, 10 classes; its batches, or folders train, test

Their numbers, and the sum of Fashion-MNIST's pixels and labels, are checked before anything is
written: what carries the name is the whole data set.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from stratagem.data.archives import archive_files, is_archive
from stratagem.data.arrays import idx_collection, idx_files, pixels
from stratagem.data.sources import (
    Collection,
    File,
    Record,
    Survey,
    folder_files,
    image_records,
    survey,
)
from stratagem.errors import InputError, MissingExtra

__all__ = ["NAMED", "named_collection"]


class _Named(NamedTuple):
    """A data set: how to open it at a place, what it must count, and how to get it."""

    open: Callable[[Path], Collection]
    usable: int
    most: int  # images of the largest class
    place: Path
    get: str


def named_collection(name: str, place: Path | None = None) -> tuple[Collection, Survey]:
    """Returns a data set by its name, surveyed and found whole.

    Args:
        name: One of `NAMED`.
        place: Where it is; by default where its package puts it.

    Raises:
        InputError: If it is not there or not whole; the message says how to get it.
        MissingExtra: If its package is not installed.
    """
    named = NAMED[name]
    if place is not None and name == "digits":
        raise InputError("digits come with scikit-learn: leave out --from")
    place = named.place if place is None else place
    if not place.exists():
        raise InputError(f"no {name} at {place}: {named.get}")
    collection = named.open(place)
    found = survey(collection)
    usable, most = sum(found.counts.values()), max(found.counts.values(), default=0)
    if (usable, most) != (named.usable, named.most):
        raise InputError(
            f"{place} has {usable:,} images of {name}, {most:,} in the largest class, instead of "
            f"{named.usable:,} and {named.most:,}: {named.get}"
        )
    return collection, found


def _digits(_: Path) -> Collection:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("scikit-learn", "demo") from error
    data = load_digits()
    scans = (data.images * 255 / 16).round().astype(np.uint8)

    def records() -> Iterator[Record]:
        for index, (scan, label) in enumerate(zip(scans, data.target, strict=True)):
            load = functools.partial(pixels, scan.tobytes(), scan.shape)
            yield Record(f"digits/{index:04d}", int(label), load)

    return Collection("digits", records, size=8, gray=True)


_CLOTHES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]
_FASHION_SUM = "4bcbf809dd6d8785649442b623926d45bfe02ed1d14f75e0e3c0ec8680deda00"  # unpacked


def _fashion(place: Path) -> Collection:
    files = idx_files(place)
    if not files:
        raise InputError(f"no fashion-mnist in {place}: {NAMED['fashion-mnist'].get}")
    collection = idx_collection(files, "fashion-mnist")
    digest = hashlib.sha256()
    for file in collection.files:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    if digest.hexdigest() != _FASHION_SUM:
        raise InputError(f"{place} is not fashion-mnist, its sum differs: get it anew")
    return collection._replace(classes=_CLOTHES)


_STYLES = {
    "emoji-datasource-google": "google",
    "emoji-datasource-twitter": "twitter",
    "fluent-emoji-3d": "fluent",
}


def _emoji(place: Path) -> Collection:
    packages = {style: _package(place, name) for name, style in _STYLES.items()}
    listed = json.loads(_member(packages["google"], "emoji.json"))
    known = {}
    for entry in listed:
        for one in (entry, *entry.get("skin_variations", {}).values()):
            code = PurePosixPath(one["image"]).stem
            known[code] = (entry["category"], f"{entry['short_name']}/{code}")
    groups = sorted({group for group, _ in known.values()})

    def records() -> Iterator[Record]:
        for style, package in packages.items():
            for name, load in _files(package):
                path = PurePosixPath(name)
                if path.parent.name not in {"64", "assets"} or path.suffix not in {".png", ".webp"}:
                    continue  # sheets of all, which such packages have besides
                group, said = known.get(path.stem) or known.get(f"{path.stem}-fe0f") or ("", "")
                if group:
                    yield Record(f"{style}/{group}/{said}", groups.index(group), load)
                else:
                    yield Record(f"{style}/{path.stem}", -1, "emoji.json has no such code")

    return Collection("emoji", records, groups, size=64)


def _package(place: Path, name: str) -> Path:
    """Returns the folder of an npm package, or the .tgz that `npm pack` gives."""
    for root in (place, place / "node_modules", place / "node_modules" / "@lobehub"):
        if (root / name).is_dir():
            return root / name
        if packed := sorted(root.glob(f"*{name}*.tgz")):
            return packed[-1]
    raise InputError(f"no {name} in {place}: {NAMED['emoji'].get}")


def _files(place: Path) -> Iterator[File]:
    return archive_files(place) if is_archive(place) else folder_files(place)


def _content(load: Any) -> bytes:
    if isinstance(load, str):
        raise InputError(f"a file cannot be read: {load}")
    with load() as stream:
        return stream.read()


def _member(place: Path, name: str) -> bytes:
    for found, load in _files(place):
        if PurePosixPath(found).name == name:
            return _content(load)
    raise InputError(f"{place} has no {name}: get the package anew")


_THINGS = [
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
]
_BATCH = re.compile(r"(data_batch_\d|test_batch)(\.bin)?")


def _cifar10(place: Path) -> Collection:
    batches = any(_BATCH.fullmatch(PurePosixPath(name).name) for name, _ in _files(place))
    records = functools.partial(_cifar10_batches if batches else _cifar10_images, place)
    return Collection("cifar10", records, _THINGS, strip=True, size=32)


def _cifar10_images(place: Path) -> Iterator[Record]:
    for record in image_records(_files(place)):
        folder = PurePosixPath(record.name).parent.name
        yield record._replace(label=_THINGS.index(folder) if folder in _THINGS else None)


def _cifar10_batches(place: Path) -> Iterator[Record]:
    """Rows of 1 byte of label and 3,072 of pixels, channel by channel; or pickles of both."""
    for name, load in _files(place):
        match = _BATCH.fullmatch(PurePosixPath(name).name)
        if match is None:
            continue
        try:
            labels, images = _batch(_content(load), pickled=not match[2])
            planes = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        except (pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
            raise InputError(f"{name} is no batch of cifar10, or damaged: {error}") from error
        for index, (label, image) in enumerate(zip(labels, planes, strict=True)):
            read = functools.partial(pixels, image.tobytes(), image.shape)
            yield Record(f"{match[1]}/{index:05d}", int(label), read)


def _batch(content: bytes, *, pickled: bool) -> tuple[Any, np.ndarray]:
    if pickled:
        batch = _Arrays(io.BytesIO(content), encoding="bytes").load()
        return batch[b"labels"], batch[b"data"]
    rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return rows[:, 0], rows[:, 1:]


class _Arrays(pickle.Unpickler):
    """Reads pickles of plain values and arrays, and refuses all that could run."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns what rebuilds an array."""
        rebuild = np.empty(0).__reduce__()[0]
        parts = {"_reconstruct": rebuild, "ndarray": np.ndarray, "dtype": np.dtype}
        if name not in parts:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return parts[name]


_NPM = "npm install emoji-datasource-google emoji-datasource-twitter @lobehub/fluent-emoji-3d"
NAMED = {
    "digits": _Named(_digits, 1797, 183, Path(), "pip install 'stratagem[demo]'"),
    "fashion-mnist": _Named(
        *(_fashion, 70_000, 7_000, Path("/usr/share/datasets/fashion-mnist")),
        "apt-get install dataset-fashion-mnist, or give the folder of its four files with --from",
    ),
    "emoji": _Named(
        *(_emoji, 10_945, 6_403, Path("node_modules")),
        f"run  {_NPM}  here, or give the folder that holds them with --from",
    ),
    "cifar10": _Named(
        *(_cifar10, 60_000, 6_000, Path("cifar10")),
        "get cifar-10-binary.tar.gz from www.cs.toronto.edu/~kriz/cifar.html, and give it, or the "
        "folder it unpacks to, with --from",
    ),
}
"""Every data set with a name: what `prepare` takes instead of a folder."""
