"""The data set artifact: uint8 images in shards, mapped into memory, with all that belongs to them.

    manifest.json          kind "dataset"; shape, classes, flip policy, statistics; a sum per file
    images-00000.safetensors ...   "images" (n, C, H, W) uint8
    labels.safetensors     "labels" (N,) int64, -1 where unknown; "held_out" (N,) bool
    names.json             where each image came from
    rejected.json          [name, cause] of every image that could not be used

Writing holds one shard in memory, whatever the size of the data. Reading maps each shard once:
image i is then a slice of memory, and no file is opened or parsed per sample. The offset of the
pixels is read from the safetensors header: 8 bytes of length, JSON, then data.

Statistics are per channel, of pixels as networks see them: x = u / 127.5 - 1.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stratagem import artifact
from stratagem.errors import DamagedArtifact, InputError
from stratagem.randomness import permutation

__all__ = ["DataSet", "Sample", "write_dataset"]

KIND = "dataset"
_SHARD_BYTES = 1 << 26


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


class DataSet:
    """A finished data set, opened by `DataSet.open`.

    Attributes:
        path: The folder.
        num: Number of images N.
        shape: (C, H, W) of every image.
        labels: Class indices, shape (N,), int64, -1 where unknown.
        held_out: True for images that no training step may see, shape (N,), bool.
        names: Where each image came from.
        classes: Names of the classes.
        flip: Whether horizontal mirror images are as good as the images.
        mean: Per-channel mean of x in [-1, 1].
        std: Per-channel standard deviation of x in [-1, 1].
        rejected: (name, cause) of the images that could not be used.
        fingerprint: SHA-256 of the content.
    """

    def __init__(self, path: Path, manifest: artifact.Manifest) -> None:
        """Maps the files of a checked manifest; use `DataSet.open`."""
        meta = manifest.meta
        self.path = path
        self.fingerprint = manifest.fingerprint
        self.num: int = meta["num"]
        channels, height, width = meta["shape"]
        self.shape: tuple[int, int, int] = (channels, height, width)
        self.classes: list[str] = meta["classes"]
        self.flip: bool = meta["flip"]
        self.source: str = meta["source"]
        self.mean: list[float] = meta["mean"]
        self.std: list[float] = meta["std"]
        tensors = artifact.read_tensor_file(path / "labels.safetensors")
        self.labels, self.held_out = tensors["labels"], tensors["held_out"]
        self.names: list[str] = json.loads((path / "names.json").read_text())
        rejected = json.loads((path / "rejected.json").read_text())
        self.rejected: list[tuple[str, str]] = [(name, cause) for name, cause in rejected]
        self._starts = torch.tensor([0, *itertools.accumulate(meta["shards"])])
        self._shards = [
            _map_images(path / _shard_name(number), (count, *self.shape))
            for number, count in enumerate(meta["shards"])
        ]

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> DataSet:
        """Opens a data set; with `verify`, every file is read once and its sum compared.

        Raises:
            InputError: If there is no data set at `path`.
            DamagedArtifact: If a file is missing, truncated or altered.
        """
        path = Path(path)
        return cls(path, artifact.read_folder(path, KIND, verify=verify))

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to another process as its path: the pixels are mapped there, not copied."""
        return DataSet.open, (self.path, False)

    def images(self, indices: Tensor) -> Tensor:
        """Returns copies of images in the order asked for, shape (B, C, H, W), uint8.

        Args:
            indices: Any images, repeats allowed, shape (B,), int64.

        Raises:
            InputError: If an index is negative or not below `num`.
        """
        wrong = indices[(indices < 0) | (indices >= self.num)]
        if len(wrong):
            raise InputError(f"no image {int(wrong[0])} in {self.path}: it has 0 to {self.num - 1}")
        out = torch.empty((len(indices), *self.shape), dtype=torch.uint8)
        shards = torch.bucketize(indices, self._starts[1:], right=True)
        for shard in shards.unique().tolist():
            here = shards == shard
            out[here] = self._shards[shard][indices[here] - self._starts[shard]]
        return out

    def batches(self, size: int, first: int = 0) -> Iterator[Tensor]:
        """Yields the images from `first` on, in order, (size, C, H, W) each but the last, uint8."""
        for start in range(first, self.num, size):
            yield self.images(torch.arange(start, min(start + size, self.num)))

    @functools.cached_property  # asked for at every training step
    def train_indices(self) -> Tensor:
        """Indices of the images that training may see, increasing, int64."""
        return (~self.held_out).nonzero().flatten()

    @functools.cached_property
    def held_out_indices(self) -> Tensor:
        """Indices of the held-out images, increasing, int64; may be empty."""
        return self.held_out.nonzero().flatten()


def write_dataset(
    path: Path,
    samples: Iterable[Sample],
    *,
    classes: Sequence[str],
    source: str,
    flip: bool,
    holdout: float = 0.0,
    seed: int = 0,
    shard_size: int | None = None,
    rejected: Sequence[tuple[str, str]] = (),
    progress: Callable[[int], None] | None = None,
) -> DataSet:
    """Writes a data set while its samples stream by, and opens it.

    Args:
        path: The folder to make.
        samples: Images of one shape; read once.
        classes: Names of the classes, indexed by the labels.
        source: What the images are, for the metadata.
        flip: Whether training may mirror them; never so for digits or letters.
        holdout: Fraction of the images that training never sees, drawn at random by `seed`.
        seed: Seed of that draw.
        shard_size: Images per shard; by default as many as fill 64 MiB.
        rejected: (name, cause) of unusable images; read when `samples` is exhausted.
        progress: Called after each image with the number written so far.

    Raises:
        InputError: If there are no images, their shapes differ, a label has no class, `holdout`
            is outside [0, 1) or leaves nothing to train on, or `path` exists.
    """
    if not 0 <= holdout < 1:
        raise InputError(f"holdout is {holdout}: it must be at least 0 and less than 1")
    meta: dict[str, Any] = {
        "classes": list(classes),
        "source": source,
        "flip": bool(flip),
        "holdout": holdout,
        "seed": seed,
    }
    path = Path(path)
    with artifact.write_folder(path, KIND, meta) as folder:
        writer = _Writer(folder, len(classes), shard_size)
        for sample in samples:
            writer.add(sample)
            if progress is not None:
                progress(len(writer.names))
        writer.flush()
        if not writer.names:
            raise InputError(_why_empty(source, rejected))
        labels = torch.tensor(writer.labels, dtype=torch.int64)
        tensors = {"labels": labels, "held_out": _hold_out(len(labels), holdout, seed)}
        artifact.write_tensor_file(folder / "labels.safetensors", tensors)
        (folder / "names.json").write_text(json.dumps(writer.names, indent=0) + "\n")
        (folder / "rejected.json").write_text(json.dumps(list(rejected), indent=0) + "\n")
        meta.update(writer.summary(), num_rejected=len(rejected))
    return DataSet.open(path, verify=False)


class _Writer:
    """Collects samples into shards and sums their statistics in exact integers."""

    def __init__(self, folder: Path, num_classes: int, shard_size: int | None) -> None:
        self.names: list[str] = []
        self.labels: list[int] = []
        self._folder = folder
        self._num_classes = num_classes
        self._shard_size = shard_size
        self._pending: list[Tensor] = []
        self._counts: list[int] = []
        self._shape: tuple[int, ...] = ()

    def add(self, sample: Sample) -> None:
        """Takes one sample; writes a shard when enough are pending."""
        image = sample.image
        assert image.dtype == torch.uint8, image.dtype
        assert image.ndim == 3, image.shape
        if not self._shape:
            self._shape = tuple(image.shape)
            self._shard_size = self._shard_size or max(1, _SHARD_BYTES // image.nbytes)
            self._sums = torch.zeros(len(image), dtype=torch.int64)
            self._squares = torch.zeros(len(image), dtype=torch.int64)
        if tuple(image.shape) != self._shape:
            raise InputError(
                f"{sample.name} has shape {tuple(image.shape)}, the images before it "
                f"{self._shape}: all images of a data set have one shape"
            )
        if not -1 <= sample.label < self._num_classes:
            raise InputError(
                f"{sample.name} has label {sample.label}: there are {self._num_classes} classes"
            )
        self._pending.append(image)
        self.names.append(sample.name)
        self.labels.append(sample.label)
        if len(self._pending) == self._shard_size:
            self.flush()

    def flush(self) -> None:
        """Writes the pending images, if any, as a shard."""
        if not self._pending:
            return
        images = torch.stack(self._pending)
        self._pending = []
        for image in images:  # one at a time: int64 copies of a whole shard would be large
            wide = image.flatten(1).long()
            self._sums += wide.sum(1)
            self._squares += (wide * wide).sum(1)
        file = self._folder / _shard_name(len(self._counts))
        artifact.write_tensor_file(file, {"images": images})
        self._counts.append(len(images))

    def summary(self) -> dict[str, Any]:
        """Returns what the manifest says of the images."""
        area = len(self.names) * math.prod(self._shape[1:])
        means = [total / area for total in self._sums.tolist()]
        # N sum u^2 - (sum u)^2 in integers: no cancellation, constant images get exactly 0
        pairs = zip(self._sums.tolist(), self._squares.tolist(), strict=True)
        stds = [math.sqrt(area * square - total * total) / area for total, square in pairs]
        return {
            "num": len(self.names),
            "shape": list(self._shape),
            "shards": self._counts,
            "mean": [mean / 127.5 - 1 for mean in means],
            "std": [std / 127.5 for std in stds],
        }


def _hold_out(num: int, fraction: float, seed: int) -> Tensor:
    """Marks round(fraction * num) images, drawn without replacement, shape (num,), bool."""
    count = round(fraction * num)
    if count == num:
        raise InputError(f"holdout {fraction} of {num} images leaves none to train on")
    held_out = torch.zeros(num, dtype=torch.bool)
    held_out[permutation(num, seed, "holdout")[:count]] = True
    return held_out


def _shard_name(number: int) -> str:
    return f"images-{number:05d}.safetensors"


def _why_empty(source: str, rejected: Sequence[tuple[str, str]]) -> str:
    if not rejected:
        return f"no images in {source}: a data set needs at least one"
    name, cause = rejected[0]
    return f"none of the {len(rejected)} images in {source} can be used; {name}: {cause}"


def _map_images(file: Path, shape: tuple[int, ...]) -> Tensor:
    """Maps the tensor "images" of a shard, shape (n, C, H, W), uint8."""
    images = artifact.read_tensor_file(file).get("images")
    if images is None or tuple(images.shape) != shape or images.dtype != torch.uint8:
        raise DamagedArtifact(f"{file} is damaged: it does not hold {shape} uint8: rebuild it")
    return images
