"""The data set artifact: images or their latents in shards, mapped into memory, with all of theirs.

    manifest.json          kind "dataset"; shape, classes, flip policy, statistics; a sum per file
    images-00000.safetensors ...    "images" (n, C, H, W) uint8; or
    latents-00000.safetensors ...   "mean", "std" (n, F, c, h, w) float16, F = 2 with mirrored ones
    labels.safetensors     "labels" (N,) int64, -1 where unknown; "held_out" (N,) bool
    names.safetensors      where each image came from: `memory.ids.Ids`
    rejected.json          [position, name, cause] of every image that could not be used

Reading maps each shard once, when it is first needed: image i is then a slice of memory, and no
file is opened or parsed per sample. Labels and names are mapped too: a million open in a moment.
Only whoever goes through all images in order, with `DataSet.batches`, reads the files.

`DataSet.sample` gives what a network learns from, whichever kind is stored: x = u / 127.5 - 1 of
pixels u, and x = (z - m) / s of latents z drawn from their posteriors.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stratagem import artifact
from stratagem.data.images import to_float
from stratagem.data.latents import Posterior, Statistics
from stratagem.errors import DamagedArtifact, InputError
from stratagem.memory.ids import Ids

__all__ = ["KIND", "Columns", "DataSet", "Rows", "shard_name"]

KIND = "dataset"
_SUMMED_BYTES = 1 << 30  # shards of more than this in all are not read through at every opening

Columns = Mapping[str, Sequence[Tensor]]
"""Name of a tensor of a shard -> one tensor (n, ...) per side, the mirrored one second."""


class Rows(NamedTuple):
    """What is known of each image.

    Attributes:
        labels: Class indices, shape (N,), int64, -1 where unknown.
        held_out: True for images that no training step may see, shape (N,), bool.
        names: Where each image came from.
    """

    labels: Tensor
    held_out: Tensor
    names: Ids


class DataSet:
    """A finished data set, opened by `DataSet.open`.

    Args:
        path: The folder.
        fingerprint: SHA-256 of the content.
        meta: What its manifest says.
        rows: What is known of each image.
        shards: Gives the tensors of a shard by its number.
        opener: Opens it again in another process.

    Attributes:
        num: Number of images N.
        kind: "images" or "latents".
        shape: (C, H, W) of what a network learns from: of every image, or latent.
        image_shape: (C, H, W) of every image.
        autoencoder: Description of what made the latents; None for images, empty if not known.
        origin: Fingerprint of the data set whose rows these are: its own, or of latents that of the
            images. A memory bank is bound to it.
        labels: See `Rows`.
        held_out: See `Rows`.
        names: See `Rows`.
        classes: Names of the classes.
        flip: Whether horizontal mirror images are as good as the images.
        statistics: Per-channel mean and standard deviation of x in [-1, 1], or of latents z.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: str,
        meta: Mapping[str, Any],
        rows: Rows,
        shards: Callable[[int], Columns],
        opener: Callable[[Path, bool], DataSet],
    ) -> None:
        """Takes over mapped files; use `DataSet.open`."""
        self.path = path
        self.fingerprint = fingerprint
        self.num: int = meta["num"]
        self.kind: str = meta["kind"]
        self.shape = _triple(meta["shape"])
        self.image_shape = _triple(meta.get("image_shape", meta["shape"]))
        self.autoencoder: dict[str, Any] | None = meta.get("autoencoder")
        self.origin: str = meta.get("images") or fingerprint
        self.classes: list[str] = meta["classes"]
        self.flip: bool = meta["flip"]
        self.source: str = meta["source"]
        self.statistics = Statistics(meta["mean"], meta["std"])
        self.labels, self.held_out, self.names = rows
        self._starts = torch.tensor([0, *itertools.accumulate(meta["shards"])])
        self._shard = shards
        self._opener = opener

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> DataSet:
        """Opens a data set; with `verify`, files are read once and their sums compared.

        Shards of more than 1 GiB in all are not: training would wait for minutes. Their sizes are
        compared, as always.

        Raises:
            InputError: If there is no data set at `path`.
            DamagedArtifact: If a file is missing, truncated or altered.
        """
        path = Path(path)
        if not (path / artifact.MANIFEST).is_file():
            found = "is not a finished dataset" if path.is_dir() else "does not exist"
            raise InputError(f"{path} {found}: make one by  stratagem prepare IMAGES --out DATA")
        manifest = artifact.read_folder(path, KIND, verify=False)
        small = sum(entry["bytes"] for entry in manifest.files.values()) <= _SUMMED_BYTES
        if verify:
            artifact.read_folder(path, KIND, verify=lambda name: small or not _is_shard(name))
        meta = manifest.meta
        columns = artifact.read_tensor_file(path / "labels.safetensors")
        names = artifact.read_tensor_file(path / "names.safetensors")
        rows = Rows(columns["labels"], columns["held_out"], Ids(names["block"], names["ends"]))
        shards = functools.cache(functools.partial(_map_shard, path, meta))
        shards(0)
        return cls(path, manifest.fingerprint, meta, rows, shards, cls.open)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to another process as its path: the pixels are mapped there, not copied."""
        return self._opener, (self.path, False)

    def images(self, indices: Tensor) -> Tensor:
        """Returns copies of images in the order asked for, shape (B, C, H, W), uint8.

        Args:
            indices: Any images, repeats allowed, shape (B,), int64.

        Raises:
            InputError: If an index is negative or not below `num`, or these are latents.
        """
        self.require_images()
        return self._take("images", indices)

    def require_images(self) -> None:
        """Raises InputError if the data set holds latents."""
        if self.kind != "images":
            raise InputError(
                f"{self.path} holds latents, not images: give the data set of images that they "
                f"were made of ({self.origin[:12]})"
                if self.origin != self.fingerprint
                else f"{self.path} holds latents, not images: give the folder that they were made "
                "from with --images, or a data set of images made of it"
            )

    def sample(self, indices: Tensor, flip: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        """Returns what a network learns from, shape (B, *shape), float32.

        Args:
            indices: Any images, shape (B,), int64.
            flip: Which of them to mirror, shape (B,), bool; none if `self.flip` is false.
            noise: Gives standard normal noise (B, *shape), float32, for the posteriors of latents;
                not called for pixels.

        Raises:
            InputError: If an index is negative or not below `num`.
        """
        if self.kind == "images":
            x = to_float(self.images(indices))
            return torch.where(flip[:, None, None, None], x.flip(-1), x)
        return self.statistics.standardise(self.latents(indices, flip, noise))

    def latents(self, indices: Tensor, flip: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        """Returns latents z as the autoencoder takes them, shape (B, *shape), float32.

        Args:
            indices: Any images, shape (B,), int64.
            flip: Which of them to mirror, shape (B,), bool; none if `self.flip` is false.
            noise: Gives standard normal noise like z, for posteriors with a standard deviation.
        """
        assert self.flip or not flip.any(), "this data set may not be mirrored"
        mean = self._take("mean", indices, flip)
        if "std" not in self._shard(0):
            return mean.float()
        return Posterior(mean, self._take("std", indices, flip)).draw(noise())

    def _take(self, name: str, indices: Tensor, flip: Tensor | None = None) -> Tensor:
        """Gathers rows of a tensor of the shards, of the mirrored side where flip (B,) is true."""
        wrong = indices[(indices < 0) | (indices >= self.num)]
        if len(wrong):
            raise InputError(f"no image {int(wrong[0])} in {self.path}: it has 0 to {self.num - 1}")
        like = self._shard(0)[name][0]
        out = torch.empty((len(indices), *like.shape[1:]), dtype=like.dtype)
        sides = torch.zeros_like(indices) if flip is None else flip.long()
        places = 2 * torch.bucketize(indices, self._starts[1:], right=True) + sides
        for place in places.unique().tolist():
            here, shard = (places == place).nonzero().flatten(), place // 2
            rows = indices[here] - self._starts[shard]
            side = self._shard(shard)[name][place % 2].numpy()  # gathers rows faster than torch
            out.numpy()[here.numpy()] = side[rows.numpy()]
        return out

    def batches(self, size: int, first: int = 0) -> Iterator[Tensor]:
        """Yields the images from `first` on, in order, (size, C, H, W) each but the last, uint8.

        They are read, not mapped: a row of images asks the disk ahead, and costs no page faults.
        """
        self.require_images()
        for start in range(first, self.num, size):
            images = torch.empty((min(size, self.num - start), *self.shape), dtype=torch.uint8)
            self._read_into(images, start)
            yield images

    def _read_into(self, images: Tensor, start: int) -> None:
        """Reads the images from `start` on, as many as there is room for."""
        starts, done = self._starts.tolist(), 0
        while done < len(images):
            number = bisect.bisect_right(starts, start + done) - 1
            left = starts[number + 1] - start - done  # in this shard, whose end is its file's
            part = images[done : done + left]
            file = self.path / shard_name(self.kind, number)
            with file.open("rb") as stream:  # buffered: the system may give less than asked for
                stream.seek(-left * images[0].nbytes, os.SEEK_END)
                stream.readinto(part.numpy().data)
            done += len(part)

    @functools.cached_property
    def rejected(self) -> list[tuple[str, str]]:
        """(name, cause) of the images that could not be used."""
        return [(name, cause) for _, name, cause in self._rejects]

    def position(self, index: int) -> int:
        """Returns how many items, usable or not, come before an image in the source."""
        for position, _, _ in self._rejects:
            index += position <= index
        return index

    @functools.cached_property
    def _rejects(self) -> list[tuple[int, str, str]]:
        file = self.path / "rejected.json"
        return artifact.load_json(file) if file.is_file() else []

    @functools.cached_property  # asked for at every training step
    def train_indices(self) -> Tensor:
        """Indices of the images that training may see, increasing, int64."""
        return (~self.held_out).nonzero().flatten()

    @functools.cached_property
    def held_out_indices(self) -> Tensor:
        """Indices of the held-out images, increasing, int64; may be empty."""
        return self.held_out.nonzero().flatten()


def shard_name(kind: str, number: int) -> str:
    """Returns the name of a shard's file; kind is that of the data set."""
    return f"{kind}-{number:05d}.safetensors"


def _is_shard(name: str) -> bool:
    return name.startswith(("images-", "latents-"))


def _triple(shape: Sequence[int]) -> tuple[int, int, int]:
    channels, height, width = shape
    return channels, height, width


def _map_shard(path: Path, meta: Mapping[str, Any], number: int) -> Columns:
    """Maps the tensors of a shard and splits those of latents into sides."""
    file, count = path / shard_name(meta["kind"], number), meta["shards"][number]
    found = artifact.read_tensor_file(file)
    shape, sides = tuple(meta["shape"]), 2 if meta["flip"] else 1
    pixels = meta["kind"] == "images"
    wanted = (count, *shape) if pixels else (count, sides, *shape)
    dtype = torch.uint8 if pixels else torch.float16
    for name in ["images"] if pixels else meta["posterior"]:
        tensor = found.get(name)
        if tensor is None or tuple(tensor.shape) != wanted or tensor.dtype != dtype:
            raise DamagedArtifact(
                f"{file} is damaged: it does not hold {name} {wanted} {dtype}: rebuild it"
            )
    return {name: (t,) if pixels else t.unbind(1) for name, t in found.items()}
