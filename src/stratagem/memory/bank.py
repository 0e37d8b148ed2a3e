"""The memory bank (GMem, arXiv 2412.08781, section 3): one feature vector per training image.

    bank[i, f] = v / |v|,   v = encode(image i, mirrored if f = 1)

The vector, called a snippet, tells the network what an image is about, so that its weights need not
hold that knowledge. The bank is made once, by a frozen encoder, and never changes: an edit returns
a new bank. Rows are in the order of the data set, so row i belongs to image i, and the bank
remembers the encoder and the data it was made from.

Vectors are normalised in float32 and stored in float16; `lookup` normalises again, which takes back
the rounding of the length. The decision to mirror an image is made once by the caller and passed to
both the image and `lookup`, so that they never disagree.

This room knows neither images nor encoders: it receives batches and a callable.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stratagem import artifact
from stratagem.errors import InputError
from stratagem.randomness import generator

__all__ = ["MemoryBank", "build"]

KIND = "bank"


@dataclass(frozen=True, eq=False)
class MemoryBank:
    """Unit-norm vectors of a data set; immutable.

    Attributes:
        vectors: Snippets, shape (N, F, D), float16 or float32; F = 2 if mirrored ones are held.
        labels: Class of each image or -1, shape (N,), int64.
        held_out: True for rows whose images training never sees, shape (N,), bool.
        encoder: Description of what made the vectors.
        data: Fingerprint of the data set they were made from.
    """

    vectors: Tensor
    labels: Tensor
    held_out: Tensor
    encoder: Mapping[str, Any]
    data: str

    def __post_init__(self) -> None:
        num = len(self.vectors)
        if self.vectors.ndim != 3 or num == 0 or self.vectors.shape[1] not in (1, 2):
            raise InputError(f"bank vectors have shape {tuple(self.vectors.shape)}, not (N, F, D)")
        if self.vectors.dtype not in (torch.float16, torch.float32):
            raise InputError(f"bank vectors are {self.vectors.dtype}: use float16 or float32")
        for name, column in (("labels", self.labels), ("held_out", self.held_out)):
            if column.shape != (num,):
                raise InputError(f"bank has {num} rows but {name} of shape {tuple(column.shape)}")
        # copies, so that nobody who holds the originals can change the bank; `vectors` may be large
        # and is taken over as it is
        object.__setattr__(self, "labels", self.labels.to(torch.int64, copy=True))
        object.__setattr__(self, "held_out", self.held_out.to(torch.bool, copy=True))
        object.__setattr__(self, "encoder", copy.deepcopy(dict(self.encoder)))

    @property
    def num(self) -> int:
        """Number of images N."""
        return self.vectors.shape[0]

    @property
    def dim(self) -> int:
        """Length D of a snippet."""
        return self.vectors.shape[2]

    @property
    def flips(self) -> bool:
        """Whether mirrored images have their own snippets."""
        return self.vectors.shape[1] == 2

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content, equal to that of the saved file's manifest."""
        files = {
            name: {
                "sha256": hashlib.sha256(tensor.numpy().data).hexdigest(),
                "bytes": tensor.nbytes,
            }
            for name, tensor in self._tensors().items()
        }
        return artifact.Manifest(KIND, self._meta(), files).fingerprint

    def lookup(self, index: Tensor, flip: Tensor | None = None) -> Tensor:
        """Returns fresh copies of snippets, shape (B, D), float32, unit norm.

        Args:
            index: Rows, shape (B,), integers.
            flip: True where the mirrored image's snippet is wanted, shape (B,), bool.

        Raises:
            InputError: If an index is negative or too large, or a mirrored snippet is wanted of a
                bank without them.
        """
        index = self._checked(index)
        side = torch.zeros_like(index) if flip is None else flip.to(index.device, torch.int64)
        if side.shape != index.shape:
            raise InputError(f"{len(index)} rows but flip of shape {tuple(side.shape)}")
        if not self.flips and bool(side.any()):
            raise InputError("the bank has no snippets of mirrored images: build it with flips")
        return functional.normalize(self.vectors[index, side].float(), dim=1)

    def check(self, data_fingerprint: str) -> None:
        """Refuses a data set that the bank was not made from.

        Raises:
            InputError: If the fingerprints differ.
        """
        if data_fingerprint != self.data:
            raise InputError(
                f"the bank was made from data set {self.data[:12]}, not from this one "
                f"({data_fingerprint[:12]}): give that data set, or build a bank from this one"
            )

    def info(self) -> dict[str, Any]:
        """Returns what a reader wants to know of the bank, JSON-able."""
        known, counts = self.labels.unique(return_counts=True)
        return {
            "num": self.num,
            "dim": self.dim,
            "flips": self.flips,
            "dtype": str(self.vectors.dtype).removeprefix("torch."),
            "bytes": self.vectors.nbytes,
            "held_out": int(self.held_out.sum()),
            "labels": dict(zip(known.tolist(), counts.tolist(), strict=True)),
            "mean_cosine": self._mean_cosine(),
            "encoder": copy.deepcopy(dict(self.encoder)),
            "data": self.data,
            "fingerprint": self.fingerprint,
        }

    def save(self, path: Path, *, replace: bool = False) -> artifact.Manifest:
        """Writes the bank to one safetensors file.

        Raises:
            InputError: If `path` exists and `replace` is false.
        """
        path = Path(path)
        return artifact.write_tensors(path, KIND, self._tensors(), self._meta(), replace=replace)

    @classmethod
    def load(cls, path: Path, *, verify: bool = True) -> MemoryBank:
        """Reads a bank; with `verify`, the sums of its tensors are compared.

        Raises:
            InputError: If there is no bank at `path`.
            DamagedArtifact: If it is truncated or altered.
        """
        tensors, manifest = artifact.read_tensors(Path(path), KIND, verify=verify)
        return cls(**tensors, encoder=manifest.meta["encoder"], data=manifest.meta["data"])

    def _tensors(self) -> dict[str, Tensor]:
        columns = {"vectors": self.vectors, "labels": self.labels, "held_out": self.held_out}
        return {name: tensor.cpu().contiguous() for name, tensor in columns.items()}

    def _meta(self) -> dict[str, Any]:
        return {"encoder": dict(self.encoder), "data": self.data}

    def _checked(self, index: Tensor) -> Tensor:
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise InputError(f"bank rows must be a list of integers, not {index.dtype} tensors")
        index = index.to(self.vectors.device, torch.int64)
        wrong = index[(index < 0) | (index >= self.num)]
        if len(wrong):
            raise InputError(f"no row {int(wrong[0])} in the bank: it has 0 to {self.num - 1}")
        return index

    def _mean_cosine(self, pairs: int = 4096) -> float | None:
        """Mean cosine of random pairs of different rows: near 1, the encoder tells little apart."""
        if self.num < 2:
            return None
        draw = generator(0, "bank-info")
        first = draw.integers(self.num, size=pairs)
        second = (first + 1 + draw.integers(self.num - 1, size=pairs)) % self.num
        a, b = self.lookup(torch.from_numpy(first)), self.lookup(torch.from_numpy(second))
        return float((a * b).sum(1).mean())


def build(
    batches: Iterable[Tensor],
    encode: Callable[[Tensor], Tensor],
    *,
    num: int,
    flips: bool,
    labels: Tensor,
    held_out: Tensor,
    encoder: Mapping[str, Any],
    data: str,
    dtype: torch.dtype = torch.float16,
    progress: Callable[[int], None] | None = None,
) -> MemoryBank:
    """Makes a bank in one pass over the images.

    Args:
        batches: All images of the data set in order, each of shape (B, C, H, W), uint8.
        encode: Maps such a batch to vectors of any length, shape (B, D).
        num: Number of images N.
        flips: Whether mirrored images get their own snippets; only if the data may be mirrored.
        labels: Class of each image or -1, shape (N,).
        held_out: Which images training never sees, shape (N,).
        encoder: Description of the encoder.
        data: Fingerprint of the data set.
        dtype: How vectors are stored, float16 or float32.
        progress: Called after each batch with the number of images done.

    Raises:
        InputError: If a vector is zero or not finite, or the number of images is not `num`.
    """
    vectors: Tensor | None = None
    done = 0
    for batch in batches:
        sides = [batch, batch.flip(-1)] if flips else [batch]
        rows = torch.stack([_unit(encode(side), done) for side in sides], dim=1)
        if vectors is None:
            vectors = torch.empty((num, *rows.shape[1:]), dtype=dtype)
        if done + len(rows) > num:
            raise InputError(f"the data set has more images than the {num} it announced")
        vectors[done : done + len(rows)] = rows
        done += len(rows)
        if progress is not None:
            progress(done)
    if vectors is None or done != num:
        raise InputError(f"the data set has {done} images, not the {num} it announced")
    return MemoryBank(vectors, labels, held_out, encoder, data)


def _unit(vectors: Tensor, start: int) -> Tensor:
    """Scales rows to length 1 in float32, on the CPU; `start` is the bank row of the first."""
    vectors = vectors.detach().to("cpu", torch.float32)
    # divided by the largest entry first, for the square of a large or tiny one leaves float32
    vectors = vectors / vectors.abs().amax(1, keepdim=True)
    bad = (~torch.isfinite(vectors).all(1)).nonzero().flatten()
    if len(bad):
        row = start + int(bad[0])
        raise InputError(
            f"the encoder gives no usable vector for image {row}: it is zero or not finite; "
            "remove that image or choose another encoder"
        )
    return functional.normalize(vectors, dim=1)
