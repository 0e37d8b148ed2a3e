"""Writing a data set while its images stream by, whatever their number.

    items -> pending images -> codec -> shard and note -> ... -> labels, names, manifest

Memory holds two shards: one is filled while another thread sums the one before and writes it. What
a shard says of its images (labels, names, sums for the statistics, how many items it took) stands
in a note beside it, written after the shard is on the disk. A
writing that was stopped or killed goes on after the last note, with the same result, bit for bit,
for a codec sees the images in the same groups. Notes are gone at the end.

An item is an image, or one that cannot be used, in its place: so a position in the source is the
number of items before it.

A codec says what is stored: see `data.codecs`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stratagem import artifact
from stratagem.artifact.manifest import flush, sum_of
from stratagem.data.codecs import Codec, PixelCodec
from stratagem.data.disk import disk_bytes, require_room
from stratagem.data.latents import Moments
from stratagem.data.shards import KIND, DataSet, shard_name
from stratagem.errors import InputError
from stratagem.memory.ids import Ids
from stratagem.randomness import permutation

__all__ = [
    "Items",
    "Rejected",
    "Sample",
    "Source",
    "items_of",
    "write_dataset",
]

_SHARD_BYTES = 1 << 26  # of pixels
_NOTES = ".rows-*.json"

Items = Iterable["Sample | Rejected"]


class Sample(NamedTuple):
    """One image on its way into a data set.

    Attributes:
        image: Pixels, shape (C, H, W), uint8.
        label: Index of its class, or -1.
        name: Where it came from.
    """

    image: Tensor
    label: int
    name: str


class Rejected(NamedTuple):
    """An image that cannot be used, in its place among the samples.

    Attributes:
        name: Where it came from.
        cause: Why, in one line.
    """

    name: str
    cause: str


class Source(NamedTuple):
    """Where a data set comes from.

    Attributes:
        name: What the images are, for the metadata.
        classes: Names of the classes, indexed by the labels.
        items: The images, of one shape, and those that cannot be used; read once. Given as a
            function of the number of items to skip, a writing that was stopped can go on.
        origin: What identifies the items to one that goes on.
        total: Number of items, where it is known.
    """

    name: str
    classes: Sequence[str]
    items: Items | Callable[[int], Items]
    origin: str = ""
    total: int | None = None


def write_dataset(
    path: Path,
    source: Source,
    *,
    flip: bool,
    holdout: float = 0.0,
    seed: int = 0,
    held_out: Tensor | None = None,
    codec: Codec | None = None,
    shard_size: int | None = None,
    announce: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> DataSet:
    """Writes a data set while its images stream by, and opens it.

    Args:
        path: The folder to make.
        source: The images.
        flip: Whether training may mirror them; never so for digits or letters.
        holdout: Fraction of the images that training never sees, drawn at random by `seed`.
        seed: Seed of that draw.
        held_out: Instead of that draw, the images that training never sees, shape (N,), bool.
        codec: What is stored of the images; by default their pixels.
        shard_size: Images per shard; by default as many as have 64 MiB of pixels, of latents 512 at
            most, since those of an unfinished shard are made again.
        announce: Called before the first image with the bytes to be written, if the source has a
            total.
        progress: Called after each item with the number of items done; of those that were done
            before a stop, after each shard that has been read again.

    Raises:
        InputError: If there are no images, their shapes differ, a label has no class, `holdout`
            is outside [0, 1) or leaves nothing to train on, the disk is too small, `path` exists,
            or there is an unfinished data set of other images or settings.
    """
    if not 0 <= holdout < 1:
        raise InputError(f"holdout is {holdout}: it must be at least 0 and less than 1")
    meta: dict[str, Any] = {
        "classes": list(source.classes),
        "source": source.name,
        "flip": bool(flip),
        "holdout": holdout,
        "seed": seed,
    }
    path, codec = Path(path), PixelCodec() if codec is None else codec
    place = artifact.fingerprint([meta, codec.kind, source.origin, source.total, shard_size])
    resumable = callable(source.items)

    def begin(shape: Sequence[int]) -> None:
        if source.total is not None:
            needed = disk_bytes(source.total - skipped, codec, shape)
            if announce is not None:
                announce(needed)
            require_room(path, needed)

    origin, sums = place if resumable else None, dict[str, str]()
    with (
        artifact.write_folder(path, KIND, meta, origin=origin, sums=sums) as folder,
        ThreadPoolExecutor(1) as thread,
    ):
        told = progress or (lambda _: None)
        writer = _Writer(folder, codec, len(source.classes), shard_size, begin, thread)
        writer.resume(told)
        skipped = writer.done
        items = source.items(skipped) if callable(source.items) else source.items
        for item in items:
            writer.add(item)
            told(writer.done)
        meta.update(writer.finish(source.name))
        held = _hold_out(meta["num"], holdout, seed) if held_out is None else held_out
        sums.update(writer.sums())
        columns = {"labels": writer.labels(), "held_out": held}
        artifact.write_tensor_file(folder / "labels.safetensors", columns)
    for note in path.glob(_NOTES):
        note.unlink()
    return DataSet.open(path, verify=False)


def items_of(data: DataSet, first: int = 0) -> Iterator[Sample]:
    """Yields the images of a data set from `first` on, as samples for another one."""
    numbers = itertools.count(first)
    for batch in data.batches(64, first):
        for image, number in zip(batch, numbers, strict=False):
            yield Sample(image, int(data.labels[number]), data.names[number])


class _Writer:
    """Collects items into shards, each with a note of its images, and goes on after the last note.

    Notes begin with a dot, so that they are no part of the artifact.
    """

    def __init__(
        self,
        folder: Path,
        codec: Codec,
        num_classes: int,
        shard_size: int | None,
        begin: Callable[[Sequence[int]], None],
        thread: ThreadPoolExecutor,
    ) -> None:
        self._folder, self._codec, self._thread = folder, codec, thread
        self._num_classes = num_classes
        self._shard_size = shard_size
        self._begin = begin
        self._begun = False
        self._pending: list[Sample] = []  # not yet encoded
        self._shard: dict[str, Tensor] = {}  # room for the rows of a shard, used again and again
        self._spare: dict[str, Tensor] = {}
        self._filled = 0
        self._job: Future[dict[str, Any]] | None = None
        self._labels: list[int] = []
        self._names: list[str] = []
        self._rejected: list[tuple[int, str, str]] = []
        self._counts: list[int] = []
        self._noted = 0
        self._moments = Moments(0, [], [])
        self._shape: tuple[int, ...] = ()
        self.done = 0

    def resume(self, progress: Callable[[int], None]) -> None:
        """Takes over the notes before the first whose shard is not what was written."""
        files = sorted(self._folder.glob(_NOTES))
        for number, file in enumerate(files):
            note = artifact.load_json(file)
            shard = self._folder / shard_name(self._codec.kind, len(self._counts))
            if note["sum"] and not (shard.is_file() and sum_of(shard) == note["sum"]):
                for later in reversed(files[number:]):  # from the end, so that none is left over
                    later.unlink()
                return
            self._count(note)
            self.done, self._shape = note["done"], tuple(note["shape"])
            progress(self.done)

    def add(self, item: Sample | Rejected) -> None:
        """Takes one item; writes a shard when enough images are pending."""
        self.done += 1
        if isinstance(item, Rejected):
            self._rejected.append((self.done - 1, *item))
            return
        self._check(item)
        self._pending.append(item)
        self._labels.append(item.label)
        self._names.append(item.name)
        if len(self._pending) == self._codec.batch_size:
            self._encode()
        if len(self._names) == self._most(item.image):
            self._flush()

    def finish(self, source: str) -> dict[str, Any]:
        """Writes what is pending, names and rejects; returns what the manifest says of them."""
        if self._names or self._rejected:
            self._flush()
        self._settle()
        rejected = [entry for note in self._notes() for entry in note["rejected"]]
        if not self._counts:
            raise InputError(_why_empty(source, rejected))
        names = Ids.of(name for note in self._notes() for name in note["names"])
        columns = {"block": names.block, "ends": names.ends}
        artifact.write_tensor_file(self._folder / "names.safetensors", columns)
        (self._folder / "rejected.json").write_text(json.dumps(rejected, indent=0) + "\n")
        statistics = self._moments.statistics(self._codec.scale, self._codec.shift)
        return {
            **self._codec.meta(self._shape),
            "kind": self._codec.kind,
            "num": sum(self._counts),
            "num_rejected": len(rejected),
            "shards": self._counts,
            "mean": statistics.mean,
            "std": statistics.std,
        }

    def labels(self) -> Tensor:
        """Returns the labels of all images, shape (N,), int64."""
        return torch.cat([torch.tensor(note["labels"]).long() for note in self._notes()])

    def sums(self) -> dict[str, str]:
        """Returns the SHA-256 of each shard's file."""
        sums = [note["sum"] for note in self._notes() if note["sum"] is not None]
        return {shard_name(self._codec.kind, number): sum_ for number, sum_ in enumerate(sums)}

    def _check(self, sample: Sample) -> None:
        image = sample.image
        self._shape = self._shape or tuple(image.shape)
        if not self._begun:
            self._begun = True
            self._begin(self._shape)
        if tuple(image.shape) != self._shape:
            raise InputError(
                f"{sample.name} has shape {tuple(image.shape)}, the images before it "
                f"{self._shape}: all images of a data set have one shape"
            )
        if not -1 <= sample.label < self._num_classes:
            raise InputError(
                f"{sample.name} has label {sample.label}: there are {self._num_classes} classes"
            )

    def _flush(self) -> None:
        """Has the images taken in written as a shard, if there are any, and then the note of them.

        Waits for the shard before, so that there are never more than two.
        """
        self._encode()
        self._settle()
        columns = {name: rows[: self._filled] for name, rows in self._shard.items()}
        note = {
            "done": self.done,
            "shape": self._shape,
            "labels": self._labels,
            "names": self._names,
            "rejected": self._rejected,
        }
        self._job = self._thread.submit(self._write, columns, note)
        self._shard, self._spare, self._filled = self._spare, self._shard, 0
        self._labels, self._names, self._rejected = [], [], []

    def _write(self, columns: dict[str, Tensor], note: dict[str, Any]) -> dict[str, Any]:
        """Writes a shard, if it has images, and a note; returns the note."""
        note |= {"moments": Moments(0, [], []), "sum": None}
        if note["labels"]:
            file = self._folder / shard_name(self._codec.kind, len(self._counts))
            note |= {"moments": self._codec.moments(columns)}
            note |= {"sum": artifact.write_tensor_file(file, columns)}
            flush(file)
        place = self._folder / f".rows-{self._noted:05d}.json"
        artifact.write_bytes(place, json.dumps(note).encode())
        return note

    def _settle(self) -> None:
        """Waits for the shard that is being written, and counts it."""
        if self._job is not None:
            self._count(self._job.result())
            self._job = None

    def _encode(self) -> None:
        """Puts what is pending into the shard."""
        if not self._pending:
            return
        images, self._pending = self._pending, []
        columns = self._codec.columns(torch.stack([sample.image for sample in images]))
        for name, rows in columns.items():
            if name not in self._shard:
                self._shard[name] = rows.new_empty((self._most(images[0].image), *rows.shape[1:]))
            self._shard[name][self._filled : self._filled + len(rows)] = rows
        self._filled += len(images)

    def _most(self, image: Tensor) -> int:
        """Returns how many images make a shard."""
        if self._shard_size is not None:
            return self._shard_size
        fitting = max(1, _SHARD_BYTES // image.nbytes)
        return fitting if self._codec.kind == "images" else min(512, fitting)

    def _count(self, note: Mapping[str, Any]) -> None:
        self._noted += 1
        if note["labels"]:
            self._counts.append(len(note["labels"]))
            self._moments += Moments(*note["moments"])

    def _notes(self) -> Iterator[dict[str, Any]]:
        return (artifact.load_json(file) for file in sorted(self._folder.glob(_NOTES)))


def _hold_out(num: int, fraction: float, seed: int) -> Tensor:
    """Marks round(fraction * num) images, drawn without replacement, shape (num,), bool."""
    count = round(fraction * num)
    if count == num:
        raise InputError(f"holdout {fraction} of {num} images leaves none to train on")
    held_out = torch.zeros(num, dtype=torch.bool)
    held_out[permutation(num, seed, "holdout")[:count]] = True
    return held_out


def _why_empty(source: str, rejected: Sequence[Sequence[Any]]) -> str:
    if not rejected:
        return f"no images in {source}: a data set needs at least one"
    _, name, cause = rejected[0]
    return f"none of the {len(rejected)} images in {source} can be used; {name}: {cause}"
