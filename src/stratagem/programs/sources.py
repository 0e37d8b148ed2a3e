"""Images to be measured, wherever they are: a stream of uint8 batches of one size.

    data set                its training images
    samples, any folder     image files, all of one square size; or the npz in it
    npz                     arr_0, uint8 (N, H, W, 3): ADM's layout, read piece by piece

A published npz of statistics (`mu`, `sigma`, and ADM's `mu_s`, `sigma_s` of spatial features) may
stand for the images, or be in the same file with some of them.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stratagem import artifact
from stratagem.artifact.manifest import sum_of
from stratagem.data.images import BadImage, find_images, load_image
from stratagem.data.shards import KIND as DATASET
from stratagem.data.shards import DataSet
from stratagem.distributed import World
from stratagem.errors import InputError
from stratagem.metrics.frechet import Statistics
from stratagem.metrics.summary import Summary
from stratagem.programs import Progress, silent
from stratagem.programs.sample_files import KIND as SAMPLES

__all__ = [
    "Source",
    "held",
    "holds_images",
    "of_dataset",
    "open_source",
    "read_statistics",
]

_BATCH = 128
_ONE_SIZE = "use square images of one size, as  stratagem prepare  makes them"


@dataclass(frozen=True)
class Source:
    """Images of one size.

    Attributes:
        name: Where they are.
        num: How many.
        shape: (C, H, W).
        fingerprint: Gives a text that only the same images have, of a SHA-256.
        read: Gives images first to last - 1, uint8 (last - first, C, H, W).
    """

    name: str
    num: int
    shape: tuple[int, int, int]
    fingerprint: Callable[[], str]
    read: Callable[[int, int], Tensor]

    def share(self, world: World) -> range:
        """Returns the numbers of the images that one of several processes has, whole batches."""
        num = math.ceil(self.num / _BATCH)
        first, last = (num * rank // world.size * _BATCH for rank in (world.rank, world.rank + 1))
        return range(first, min(last, self.num))

    def batches(self, rows: range | None = None, progress: Progress = silent) -> Iterator[Tensor]:
        """Yields images in order; all of them by default."""
        rows = range(self.num) if rows is None else rows
        for start in range(rows.start, rows.stop, _BATCH):
            last = min(start + _BATCH, rows.stop)
            yield self.read(start, last)
            progress(last - rows.start, len(rows))

    def all(self) -> Tensor:
        """Returns all images, held in memory."""
        return torch.cat(list(self.batches()))


def held(images: Tensor, name: str = "") -> Source:
    """Returns images in memory, uint8 (N, C, H, W), as a source."""
    channels, height, width = images.shape[1:]
    return Source(
        name,
        len(images),
        (channels, height, width),
        lambda: hashlib.sha256(artifact.raw_bytes(images)).hexdigest(),
        lambda first, last: images[first:last],
    )


def of_dataset(data: DataSet, held_out: bool = False) -> Source:
    """Returns the training images of a data set, or those held out of training."""
    data.require_images()
    rows = data.held_out_indices if held_out else data.train_indices
    part = "held out" if held_out else "train"
    return Source(
        str(data.path),
        len(rows),
        data.shape,
        lambda: f"{data.fingerprint} {part}",
        lambda first, last: data.images(rows[first:last]),
    )


def open_source(path: Path, channels: int | None = None) -> Source:
    """Opens images wherever they are.

    Args:
        path: A data set, samples, a folder of images, or an npz with arr_0.
        channels: 1 or 3, those of the images to compare with; by default the images' own.

    Raises:
        InputError: If there are no images, or of several sizes.
        DamagedArtifact: If it is an artifact of ours that was altered.
    """
    kind = artifact.kind_of(path)
    if kind == DATASET:
        return of_dataset(DataSet.open(path))
    if kind is not None:
        artifact.read_folder(path, SAMPLES)
    if (path / "config.yaml").is_file():
        raise InputError(f"{path} is a run: sample it, and give the folder of its samples")
    files = [path] if path.suffix == ".npz" and path.is_file() else sorted(path.glob("*.npz"))
    return _of_npz(files[0], channels) if files else _of_folder(path, channels)


def holds_images(npz: Path) -> bool:
    """Says whether an npz, of statistics, has images as well."""
    with zipfile.ZipFile(npz) as archive:
        return "arr_0.npy" in archive.namelist()


def read_statistics(path: Path) -> Summary | None:
    """Reads published statistics, or returns None if a file is no npz with `mu`.

    Raises:
        InputError: If mean and covariance do not fit.
    """
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return None
    try:
        with np.load(path) as file:
            names = [name for name in ("mu", "sigma", "mu_s", "sigma_s") if name in file]
            told = {name: torch.from_numpy(file[name]).double() for name in names}
    except (ValueError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} holds no statistics that can be read: {error}") from error
    if "mu" not in told:
        return None
    pooled, spatial = (
        Statistics(told[mu], told[c], 0) if mu in told and c in told else None
        for mu, c in (("mu", "sigma"), ("mu_s", "sigma_s"))
    )
    for found in (pooled, spatial):
        if found is not None and found.cov.shape != (found.dim, found.dim):
            raise InputError(f"{path}: a mean of {found.dim}, a covariance {found.cov.shape}")
    if pooled is None:
        raise InputError(f"{path} has mu, and no sigma: give a file of both")
    return Summary(pooled, spatial)


def _of_folder(path: Path, channels: int | None) -> Source:
    paths = find_images(path).paths
    with Image.open(paths[0]) as opened:
        width, height = opened.size
        channels = channels or (1 if opened.mode == "L" else 3)
    if width != height:
        raise InputError(f"{paths[0]} is {width} x {height}: {_ONE_SIZE}")

    def one(file: Path) -> Tensor:
        try:
            with Image.open(file) as opened:
                size = opened.size
            if size != (width, width):
                raise InputError(
                    f"{file} is {size[0]} x {size[1]}, {paths[0].name} is {width} x {width}: "
                    f"{_ONE_SIZE}"
                )
            return load_image(file, width, 1 if channels == 1 else 3)
        except (BadImage, OSError) as error:
            raise InputError(f"{file}: {error}: remove it or make it again") from error

    def fingerprint() -> str:
        digest = hashlib.sha256()
        for file in paths:
            digest.update(f"{file.relative_to(path)} {sum_of(file)}".encode())
        return digest.hexdigest()

    return Source(
        str(path),
        len(paths),
        (channels, width, width),
        fingerprint,
        lambda first, last: torch.stack([one(file) for file in paths[first:last]]),
    )


def _of_npz(path: Path, channels: int | None) -> Source:
    try:
        stream = zipfile.ZipFile(path).open("arr_0.npy")  # noqa: SIM115 - as long as the source
        np.lib.format.read_magic(stream)
        found, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no npz of images with arr_0: {error}") from error
    if len(found) != 4 or dtype != np.uint8 or found[-1] != 3 or by_columns or not found[0]:
        raise InputError(f"{path}: arr_0 is {dtype} {found}, not uint8 N,H,W,3 by rows")
    num, height, width, _ = found
    begin, size, channels = stream.tell(), height * width * 3, channels or 3

    def read(first: int, last: int) -> Tensor:
        stream.seek(begin + first * size)
        block = bytearray(stream.read((last - first) * size))
        pictures = torch.frombuffer(block, dtype=torch.uint8).view(-1, height, width, 3)
        return pictures.permute(0, 3, 1, 2)[:, :channels].contiguous()

    return Source(str(path), num, (channels, height, width), lambda: sum_of(path), read)
