"""From images, wherever they lie, to a data set: the one way in.

    folder, archive, arrays, name -> records -> decoded in processes -> shards

With an autoencoder `prepare` stores latents instead of pixels, and then takes a data set of images
too. Files become RGB, whatever they are; `gray` asks for one channel instead. It is not guessed
from the files, for one colour image more would change them all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from stratagem import artifact
from stratagem.data.archives import archive_files, is_archive
from stratagem.data.arrays import hugging_face, idx_collection, idx_files, npz_collection
from stratagem.data.codecs import Codec, LatentCodec
from stratagem.data.latents import Autoencoder, PosteriorKind
from stratagem.data.named import NAMED, named_collection
from stratagem.data.official import convert_official, is_official
from stratagem.data.shards import KIND, DataSet
from stratagem.data.sources import (
    SUFFIXES,
    Collection,
    Record,
    Survey,
    folder_files,
    image_records,
    survey,
)
from stratagem.data.workers import Form, cores, decode_all
from stratagem.data.writing import Rejected, Sample, Source, items_of, write_dataset
from stratagem.errors import InputError

__all__ = ["Reading", "digits", "open_source", "prepare", "reread"]

_LEAST = 64  # images per process; with fewer, starting it takes longer than it saves


class Reading(NamedTuple):
    """How images are read.

    Attributes:
        place: Where a data set of a name is, if not where its package puts it.
        workers: Processes that decode; by default as many as there are cores.
        strict: Whether an image that cannot be used ends it.
    """

    place: Path | None = None
    workers: int | None = None
    strict: bool = False


_USUAL = Reading()


def prepare(
    source: str | Path,
    out: Path,
    *,
    size: int | None = None,
    gray: bool = False,
    flip: bool = False,
    holdout: float = 0.0,
    seed: int = 0,
    reading: Reading = _USUAL,
    autoencoder: Autoencoder | None = None,
    posterior: PosteriorKind = "mean+std",
    announce: Callable[[int], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DataSet:
    """Makes a data set of images from wherever they lie, or latents of a data set of images.

    Stopped or killed, the same call goes on.

    Args:
        source: A folder, a zip or tar, a folder of tar shards, an npz or idx file, a folder of idx
            files, "hf:NAME" or "hf:NAME:SPLIT", one of `NAMED` (write "./digits" for a folder of
            that name), or, with an autoencoder, a data set of images.
        out: The data set to make.
        size: Side of the square images; by default that of arrays and named data, and else 32.
        gray: One channel instead of RGB; gray arrays and named data are so anyway.
        flip: Whether training may use mirror images; refused for the digits.
        holdout: Fraction of the images that training never sees.
        seed: Seed of the choice of held-out images.
        reading: How the images are read, which changes nothing of a data set.
        autoencoder: What makes latents of the images, or None to store their pixels.
        posterior: What is kept of a latent, see `LatentCodec`.
        announce: Called once with the bytes about to be written.
        progress: Called after each image with (files done, all files).

    Raises:
        InputError: If the source is missing, holds no usable image, or a setting is impossible.
        MissingExtra: If what reads the source is not installed.
    """
    held_out = images = None
    chosen = (size, gray, flip, holdout, seed) != (None, False, False, 0.0, 0)
    chosen |= reading != _USUAL
    if is_official(Path(source)):
        if chosen or autoencoder is not None:
            raise InputError(f"{source} holds finished latents: nothing can be chosen, but --out")
        return convert_official(Path(source), Path(out), announce=announce, progress=progress)
    if artifact.kind_of(Path(source)) == KIND:
        if chosen:
            raise InputError(
                f"{source} is a data set: size, gray, flip, holdout and seed were chosen when it "
                "was made, leave them out, and --from, --workers and --strict"
            )
        data = DataSet.open(Path(source))
        if autoencoder is None:
            raise InputError(f"{source} is a data set already: give --autoencoder for its latents")
        data.require_images()
        found, flip, held_out, images = _of_dataset(data), data.flip, data.held_out, data.origin
    else:
        if source == "digits" and flip:
            raise InputError("digits cannot be mirrored: leave out flip")
        found = open_source(source, size, gray, reading)
    codec: Codec | None = None
    if autoencoder is not None:
        codec = LatentCodec(autoencoder, flip=flip, posterior=posterior, images=images)
        made_by = [found.origin, autoencoder.description(), posterior]
        found = found._replace(origin=artifact.fingerprint(made_by))
    return write_dataset(
        Path(out),
        found,
        flip=flip,
        holdout=holdout,
        seed=seed,
        held_out=held_out,
        codec=codec,
        announce=announce,
        progress=progress and (lambda done: progress(done, found.total or done)),
    )


def open_source(
    source: str | Path,
    size: int | None = None,
    gray: bool = False,
    reading: Reading = _USUAL,
) -> Source:
    """Returns the images of a source as `prepare` stores them; see there.

    Raises:
        InputError: If it is missing or holds no image, or a setting is impossible.
        MissingExtra: If what reads it is not installed.
    """
    for name, value in (("size", size), ("workers", reading.workers)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: it must be at least 1")
    if source in NAMED:
        collection, found = named_collection(str(source), reading.place)
    elif reading.place is not None:
        raise InputError(f"--from has no effect with {source}: it is for {', '.join(NAMED)}")
    else:
        collection = _collection(source)
        found = survey(collection)
        if not found.total:
            raise InputError(f"no images in {source}: give what holds some")
    channels: Literal[1, 3] = 1 if gray or collection.gray else 3
    form = Form(size or collection.size or 32, channels, Image.MAX_IMAGE_PIXELS)
    crew = min(reading.workers or cores(), found.total // _LEAST)
    read = functools.partial(_items, collection, found, form, crew, reading.strict)
    origin = artifact.fingerprint([found.origin, form.size, channels, reading.strict])
    return Source(collection.name, found.classes, read, origin, found.total)


def _collection(source: str | Path) -> Collection:
    """Finds out what a source is."""
    path, text = Path(source), str(source)
    if text.startswith("hf:"):
        name, _, split = text[3:].partition(":")
        return hugging_face(name, split)
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return hugging_face(text)
    if files := idx_files(path) or ([path] if "idx3" in path.name and path.is_file() else []):
        return idx_collection(files, path.name)
    if path.suffix == ".npz" and path.is_file():
        return npz_collection(path)
    archives = [path] if is_archive(path) else _shards(path)
    if not archives:
        name = path.resolve().name
        return Collection(name, lambda: image_records(folder_files(path)))

    def records() -> Iterator[Record]:
        return image_records(itertools.chain.from_iterable(map(archive_files, archives)))

    name = path.resolve().name.partition(".")[0]
    return Collection(name, records, files=archives, strip=True)


def _shards(folder: Path) -> list[Path]:
    """Returns the archives in a folder that has no images or folders besides."""
    archives = sorted(filter(is_archive, folder.glob("*.tar*")))
    if archives:
        beside = (path for path in folder.iterdir() if not path.name.startswith("."))
        if any(path.is_dir() or path.suffix.lower() in SUFFIXES for path in beside):
            return []
    return archives


def _items(
    collection: Collection, found: Survey, form: Form, workers: int, strict: bool, first: int
) -> Iterator[Sample | Rejected]:
    """Yields the images from one on, shape (channels, size, size), usable or not."""
    records = itertools.islice(collection.records(), first, None)
    for record, image in decode_all(records, form, workers):
        name, label = found.resolve(record)
        if not isinstance(image, str):
            yield Sample(torch.from_numpy(image), label, name)
        elif strict:
            raise InputError(f"{name}: {image}: mend it, remove it, or leave out --strict")
        else:
            yield Rejected(name, image)


def reread(data: DataSet, source: str | Path, size: int) -> Callable[[int], Iterator[Tensor]]:
    """Returns what gives the images of latents once more, from where they were prepared from.

    Args:
        data: The latents.
        source: The folder that they were made from.
        size: Images per batch.

    Returns:
        A function of the number of images to skip, which yields batches (B, C, H, W), uint8.

    Raises:
        InputError: On the way, if these are not the same images.
    """
    channels, side, _ = data.image_shape
    found = open_source(source, side, channels == 1)

    def batches(done: int) -> Iterator[Tensor]:
        assert callable(found.items)
        number, pending = done, list[Tensor]()
        for item in found.items(data.position(done)):
            if isinstance(item, Rejected):
                continue
            if number >= data.num or item.name != data.names[number]:
                raise InputError(f"{source} has {item.name} where {data.path} has other images")
            number += 1
            pending.append(item.image)
            if len(pending) == size or number == data.num:
                yield torch.stack(pending)
                pending = []

    return batches


def _of_dataset(data: DataSet) -> Source:
    items = functools.partial(items_of, data)
    return Source(data.source, data.classes, items, data.fingerprint, data.num)


def digits(size: int = 8) -> Iterator[Sample]:
    """Yields the 1,797 handwritten digits of scikit-learn, (1, size, size), labels 0 to 9.

    Raises:
        MissingExtra: If scikit-learn is not installed.
    """
    items = open_source("digits", size).items
    assert callable(items)
    return (item for item in items(0) if isinstance(item, Sample))
