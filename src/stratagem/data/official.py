"""Latents as LightningDiT and GMem keep them, read where they are, and to and from our own.

    latents_rank00_shard000.safetensors ...   "latents", "latents_flip" (n, c, h, w) float32;
                                              "labels" (n,) int64; GMem: features besides
    latents_stats.pt                          "mean", "std" (1, c, 1, 1)

A latent there is one draw from its posterior, made once. The shards are mapped: only what is used
is read, GMem's patch tokens (2 TB of an ImageNet) never. Nothing says which autoencoder made them.

Ours of theirs is the draw in float16, without a standard deviation. Theirs of ours is one draw.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratagem import artifact
from stratagem.data.codecs import sums_of
from stratagem.data.latents import Moments, Statistics
from stratagem.data.shards import KIND, Columns, DataSet, Rows
from stratagem.data.writing import Sample, Source, write_dataset
from stratagem.errors import DamagedArtifact, InputError
from stratagem.memory.ids import Ids
from stratagem.randomness import normal

__all__ = [
    "convert_official",
    "is_official",
    "official_files",
    "open_data",
    "open_official",
    "read_statistics",
    "write_official",
]

_SIDES = ("latents", "latents_flip")
_SHARDS = "latents_*.safetensors"
_STATISTICS = "latents_stats.pt"


def open_data(path: Path, verify: bool = True) -> DataSet:
    """Opens a data set of ours, or a folder of official latents.

    Raises:
        InputError: If there is neither at `path`.
        DamagedArtifact: If a file is missing, truncated or altered.
    """
    return open_official(path) if is_official(Path(path)) else DataSet.open(path, verify)


def is_official(path: Path) -> bool:
    """Whether a folder holds official latents."""
    return path.is_dir() and any(path.glob(_SHARDS)) and artifact.kind_of(path) != KIND


def official_files(path: Path) -> list[Path]:
    """Returns the shards of a folder of official latents, in the order of their rows."""
    return sorted(path.glob(_SHARDS))


def open_official(path: Path, verify: bool = False) -> DataSet:  # noqa: ARG001
    """Opens a folder of official latents in place.

    Args:
        path: The folder.
        verify: Without effect: official files have no sums.

    Raises:
        InputError: If there are no such latents, or their statistics are missing.
        DamagedArtifact: If a file is truncated or altered.
    """
    files = official_files(Path(path))
    shards = [_shard(file) for file in files]
    if not shards:
        raise InputError(f"no latents in {path}: expected files like {_SHARDS}")
    labels = torch.cat([shard["labels"] for shard in shards])
    statistics = read_statistics(Path(path) / _STATISTICS)
    shape, counts = shards[0]["latents"].shape[1:], [len(shard["labels"]) for shard in shards]
    meta = {
        "num": len(labels),
        "kind": "latents",
        "shape": list(shape),
        "shards": counts,
        "autoencoder": {},
        "classes": [str(label) for label in range(int(labels.max()) + 1)],
        "flip": True,
        "source": Path(path).resolve().name,
        "mean": statistics.mean,
        "std": statistics.std,
    }
    # the sum of a few numbers of every file: reading all of them would take minutes
    ends = [[artifact.raw_bytes(shard[side][-1]) for side in _SIDES] for shard in shards]
    sums = [[hashlib.sha256(data).hexdigest() for data in pair] for pair in ends]
    identity = [meta, [file.name for file in files], sums, labels.tolist()]
    rows = Rows(labels, torch.zeros(len(labels), dtype=torch.bool), _numbers(files, counts))
    columns: list[Columns] = [{"mean": [shard[side] for side in _SIDES]} for shard in shards]
    return DataSet(
        Path(path), artifact.fingerprint(identity), meta, rows, columns.__getitem__, open_official
    )


class _Drawn:
    """The codec of latents that were drawn already, (n, 2, c, h, w), float32."""

    kind = "latents"
    batch_size = 64
    scale, shift = 1.0, 0.0

    def meta(self, shape: Sequence[int]) -> dict[str, Any]:
        return {"shape": list(shape[1:]), "posterior": ["mean"], "autoencoder": {}}

    def nbytes(self, shape: Sequence[int]) -> int:
        return torch.Size(shape).numel() * torch.float16.itemsize

    def columns(self, images: Tensor) -> dict[str, Tensor]:
        return {"mean": images.half()}

    def moments(self, columns: dict[str, Tensor]) -> Moments:
        return sums_of(columns)


def convert_official(
    path: Path,
    out: Path,
    *,
    announce: Callable[[int], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DataSet:
    """Makes a data set of ours of official latents, with statistics of all of them.

    Raises:
        InputError: If there are none, or `out` exists.
    """
    data = open_official(path)

    def items(first: int) -> Iterator[Sample]:
        for number in range(first, data.num):
            row = torch.tensor([number, number])
            pair = data.latents(row, torch.tensor([False, True]), _no_noise)
            yield Sample(pair, int(data.labels[number]), data.names[number])

    source = Source(data.source, data.classes, items, data.fingerprint, data.num)
    return write_dataset(
        out,
        source,
        flip=True,
        codec=_Drawn(),
        announce=announce,
        progress=progress and (lambda done: progress(done, data.num)),
    )


def write_official(
    data: DataSet,
    out: Path,
    *,
    seed: int = 0,
    shard_size: int = 10_000,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes latents of ours in LightningDiT's layout, one draw of each posterior.

    Its loader mirrors at random; data that may not be mirrored has the same draw twice. Held-out
    images, of which it knows nothing, are left out.

    Args:
        data: Latents.
        out: The folder to make.
        seed: Seed of the draws.
        shard_size: Images per file.
        progress: Called with (images done, all images).

    Raises:
        InputError: If the data set holds no latents, or `out` exists.
    """
    if data.kind != "latents":
        raise InputError(f"{data.path} holds images: make latents of them with --autoencoder")
    with artifact.write_folder(out, "official latents", {"data": data.fingerprint}) as folder:
        total = len(data.train_indices)
        for number, rows in enumerate(data.train_indices.split(shard_size)):
            tensors = {"labels": data.labels[rows]}
            for side, name in enumerate(_SIDES):
                counters = (seed, "official", number, side if data.flip else 0)
                noise = functools.partial(normal, (len(rows), *data.shape), *counters)
                flip = torch.full((len(rows),), bool(side) and data.flip)
                tensors[name] = data.latents(rows, flip, noise)
            file = folder / f"latents_rank00_shard{number:03d}.safetensors"
            artifact.write_tensor_file(file, tensors)
            if progress is not None:
                progress(min((number + 1) * shard_size, total), total)
        columns = {"mean": data.statistics.mean, "std": data.statistics.std}
        body = {name: torch.tensor(values).view(1, -1, 1, 1) for name, values in columns.items()}
        torch.save(body, folder / _STATISTICS)


def _shard(file: Path) -> dict[str, Tensor]:
    tensors = artifact.read_tensor_file(file)
    missing = [name for name in (*_SIDES, "labels") if name not in tensors]
    if missing:
        raise InputError(f"{file} holds no official latents: it lacks {', '.join(missing)}")
    shapes = {len(tensors["labels"]), *(len(tensors[side]) for side in _SIDES)}
    if len(shapes) > 1 or tensors["latents"].ndim != 4:
        raise InputError(f"{file} holds no official latents: its tensors do not go together")
    return tensors


def read_statistics(file: Path) -> Statistics:
    """Reads latents_stats.pt: mean and standard deviation of each channel.

    Raises:
        InputError: If it is missing, or holds no statistics.
        DamagedArtifact: If it is truncated or altered.
    """
    if not file.is_file():
        raise InputError(
            f"{file} is missing: put the statistics there that belong to the latents, or compute "
            "them with LightningDiT"
        )
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise DamagedArtifact(f"{file} is no file of tensors: fetch it again") from error
    if not isinstance(found, dict) or not {"mean", "std"} <= set(found):
        raise InputError(f"{file} holds no statistics of latents: expected mean and std")
    return Statistics(found["mean"].flatten().tolist(), found["std"].flatten().tolist())


def _no_noise() -> Tensor:
    raise AssertionError("official latents are draws")


def _numbers(files: Sequence[Path], counts: Sequence[int]) -> Ids:
    """Names rows: file and place in it."""
    return Ids.of(
        f"{f.stem}/{row}" for f, num in zip(files, counts, strict=True) for row in range(num)
    )
