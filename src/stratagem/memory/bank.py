"""The memory bank (GMem, arXiv 2412.08781, section 3): one feature vector per training image.

    bank[i, f] = v / |v|,   v = encode(image i, mirrored if f = 1)

The vector, called a snippet, tells the network what an image is about, so that its weights need not
hold that knowledge. The bank is made once, by a frozen encoder, and never changes: an edit returns
a new bank, which remembers what was done. As built, rows are in the order of the data set, so row i
belongs to image i, and the bank remembers the encoder and the data it was made from.

Vectors are normalised in float32 and stored in few bits (`store`); `lookup` normalises again, which
takes back the rounding of the length. The decision to mirror an image is made once by the caller
and passed to both the image and `lookup`, so that they never disagree.

A loaded bank is mapped from its file, and a saved one is written block by block: neither needs the
memory that its vectors would take. This room knows neither images nor encoders.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stratagem import artifact
from stratagem.errors import InputError
from stratagem.memory.ids import Ids
from stratagem.memory.store import LowRank, Store, store_of
from stratagem.randomness import generator

__all__ = ["KIND", "MemoryBank"]

KIND = "bank"


@dataclass(frozen=True, eq=False)
class MemoryBank:
    """Unit-norm vectors of images; immutable.

    Attributes:
        store: Where the vectors are, N images of F sides; F = 2 if mirrored ones are held.
        labels: Class of each image or -1, shape (N,), int64.
        held_out: True for rows whose images training never sees, shape (N,), bool.
        encoder: Description of what made the vectors, with its preprocessing.
        data: Fingerprint of the data set whose image i is row i; empty if there is none.
        ids: Name of each image; if none are given, the number of its row.
        frequency: Weight of each row in draws by frequency, shape (N,), float32, or None.
        shape: (C, H, W) of the images that were encoded, or None if it is not known.
        history: The edits that led here, oldest first, JSON-able.
    """

    store: Store
    labels: Tensor
    held_out: Tensor
    encoder: Mapping[str, Any]
    data: str
    ids: Ids = field(default_factory=lambda: Ids.of(()))
    frequency: Tensor | None = None
    shape: tuple[int, int, int] | None = None
    history: tuple[Mapping[str, Any], ...] = field(default=())

    def __post_init__(self) -> None:
        if not len(self.ids):
            object.__setattr__(self, "ids", Ids.of(str(row) for row in range(self.num)))
        columns = {"labels": self.labels, "held_out": self.held_out, "ids": self.ids.ends}
        if self.frequency is not None:
            columns["frequency"] = self.frequency
        for name, column in columns.items():
            if column.shape != (self.num,):
                raise InputError(
                    f"bank has {self.num} rows but {name} of shape {tuple(column.shape)}"
                )
        if self.frequency is not None:
            usable = torch.isfinite(self.frequency).all() and (self.frequency >= 0).all()
            if not usable or not self.frequency.sum() > 0:
                raise InputError("bank frequencies must be finite, not negative, and not all zero")
            object.__setattr__(self, "frequency", self.frequency.to(torch.float32, copy=True))
        # copies, so that nobody who holds the originals can change the bank; vectors may be large
        # and are taken over as they are
        object.__setattr__(self, "labels", self.labels.to(torch.int64, copy=True))
        object.__setattr__(self, "held_out", self.held_out.to(torch.bool, copy=True))
        object.__setattr__(self, "encoder", copy.deepcopy(dict(self.encoder)))
        object.__setattr__(self, "history", tuple(copy.deepcopy(dict(e)) for e in self.history))

    @property
    def num(self) -> int:
        """Number of images N."""
        return self.store.num

    @property
    def dim(self) -> int:
        """Length D of a snippet."""
        return self.store.codec.dim

    @property
    def flips(self) -> bool:
        """Whether mirrored images have their own snippets."""
        return self.store.sides == 2

    @property
    def format(self) -> str:
        """How vectors are stored: float32, float16, int8 or low-rank."""
        return self.store.codec.format

    @property
    def nbytes(self) -> int:
        """Bytes that the stored vectors take."""
        shared = sum(tensor.nbytes for tensor in self.store.codec.constants().values())
        own = self.store.layout().values()
        return shared + sum(dtype.itemsize * math.prod(shape) for dtype, shape in own)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content, equal to that of the saved file's manifest."""
        sums = {name: hashlib.sha256() for name in self.layout()}
        for name, _, rows in self._parts():
            sums[name].update(artifact.raw_bytes(rows))
        files = {
            name: {"sha256": sums[name].hexdigest(), "bytes": dtype.itemsize * math.prod(shape)}
            for name, (dtype, shape) in self.layout().items()
        }
        return artifact.Manifest(KIND, self.meta(), files).fingerprint

    def check_dim(self, dim: int) -> None:
        """Refuses a network that takes vectors of another length.

        Raises:
            InputError: If the lengths differ.
        """
        if self.dim != dim:
            raise InputError(
                f"the bank has snippets of {self.dim} numbers, the network takes {dim}: build it "
                "with the encoder that the network was trained with"
            )

    def lookup(self, index: Tensor, flip: Tensor | None = None) -> Tensor:
        """Returns fresh copies of snippets, shape (B, D), float32, unit norm.

        Args:
            index: Rows, shape (B,), integers.
            flip: True where the mirrored image's snippet is wanted, shape (B,), bool.

        Raises:
            InputError: If an index is negative or too large, or a mirrored snippet is wanted of a
                bank without them.

        Example:
            >>> from stratagem.memory.store import hold
            >>> store, none = hold(torch.tensor([[[3.0, 4.0]]])), torch.zeros(1)
            >>> MemoryBank(store, none, none, {}, "").lookup(torch.tensor([0]))
            tensor([[0.6000, 0.8000]])
        """
        index = self.checked(index)
        side = torch.zeros_like(index) if flip is None else flip.to("cpu", torch.int64)
        if side.shape != index.shape:
            raise InputError(f"{len(index)} rows but flip of shape {tuple(side.shape)}")
        if not self.flips and bool(side.any()):
            raise InputError("the bank has no snippets of mirrored images: build it with flips")
        return functional.normalize(self.store.rows(index, side), dim=1)

    def checked(self, index: Tensor) -> Tensor:
        """Returns rows as int64 on the CPU.

        Raises:
            InputError: If they are not a list of integers, or one is outside the bank.
        """
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise InputError(f"bank rows must be a list of integers, not {index.dtype} tensors")
        index = index.to("cpu", torch.int64)
        wrong = index[(index < 0) | (index >= self.num)]
        if len(wrong):
            raise InputError(f"no row {int(wrong[0])} in the bank: it has 0 to {self.num - 1}")
        return index

    def check(self, data_fingerprint: str) -> None:
        """Refuses a data set that the bank was not made from.

        Raises:
            InputError: If the fingerprints differ, or an edit has moved the rows.
        """
        if not self.data:
            edits = ", ".join(str(entry["edit"]) for entry in self.history) or "import"
            raise InputError(
                f"the rows of the bank are not the images of a data set ({edits}): train with a "
                "bank as built from it, and sample with this one"
            )
        if data_fingerprint != self.data:
            raise InputError(
                f"the bank was made from data set {self.data[:12]}, not from this one "
                f"({data_fingerprint[:12]}): give that data set, or build a bank from this one"
            )

    def info(self) -> dict[str, Any]:
        """Returns what a reader wants to know of the bank, JSON-able."""
        known, counts = self.labels.unique(return_counts=True)
        codec = self.store.codec
        rank = {"rank": codec.rank} if isinstance(codec, LowRank) else {}
        return {
            "num": self.num,
            "dim": self.dim,
            "flips": self.flips,
            "format": self.format,
            **rank,
            "bytes": self.nbytes,
            "held_out": int(self.held_out.sum()),
            "labels": dict(zip(known.tolist(), counts.tolist(), strict=True)),
            "frequencies": self.frequency is not None,
            "mean_cosine": self._mean_cosine(),
            **copy.deepcopy(self.meta()),
            "fingerprint": self.fingerprint,
        }

    def columns(self) -> dict[str, Tensor]:
        """Returns what is small: all that belongs to rows but the vectors, and what they share."""
        columns = {
            "labels": self.labels,
            "held_out": self.held_out,
            "ids": self.ids.block,
            "id_ends": self.ids.ends,
        }
        if self.frequency is not None:
            columns["frequency"] = self.frequency
        return columns | self.store.codec.constants()

    def layout(self) -> artifact.Layout:
        """Returns type and shape of all that its file holds."""
        small = {name: (t.dtype, tuple(t.shape)) for name, t in self.columns().items()}
        return small | self.store.layout()

    def meta(self) -> dict[str, Any]:
        """Returns what the head of its file says, JSON-able."""
        return {
            "encoder": dict(self.encoder),
            "data": self.data,
            "shape": list(self.shape) if self.shape is not None else None,
            "history": [dict(entry) for entry in self.history],
        }

    def save(
        self,
        path: Path,
        *,
        replace: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> artifact.Manifest:
        """Writes the bank to one safetensors file, block by block.

        Args:
            path: The file.
            replace: Whether an existing file gives way.
            progress: Called after each block with the number of images done and of all.

        Raises:
            InputError: If `path` exists and `replace` is false.
        """
        layout, meta = self.layout(), self.meta()
        with artifact.stream_tensors(Path(path), KIND, layout, meta, replace=replace) as draft:
            for name, start, rows in self._parts():
                draft.write(name, start, rows)
                if progress is not None and name in self.store.layout():
                    progress(start + len(rows), self.num)
        return draft.manifest

    @classmethod
    def load(cls, path: Path, *, verify: bool = True) -> MemoryBank:
        """Maps a bank; with `verify`, its file is read once and the sums are compared.

        Raises:
            InputError: If there is no bank at `path`.
            DamagedArtifact: If it is truncated or altered.
        """
        tensors, manifest = artifact.read_tensors(Path(path), KIND, verify=verify)
        meta = manifest.meta
        bank = cls(
            store_of(tensors),
            tensors["labels"],
            tensors["held_out"],
            encoder=meta["encoder"],
            data=meta["data"],
            ids=Ids(tensors["ids"], tensors["id_ends"]) if "ids" in tensors else Ids.of(()),
            frequency=tensors.get("frequency"),
            shape=tuple(meta["shape"]) if meta.get("shape") else None,
            history=tuple(meta.get("history", ())),
        )
        bank.__dict__["fingerprint"] = manifest.fingerprint  # known: the content need not be read
        return bank

    def _parts(self) -> Iterator[tuple[str, int, Tensor]]:
        """Yields (name, first row, rows) of all tensors, rows of a tensor in order."""
        for name, column in self.columns().items():
            yield name, 0, column
        for start, columns in self.store.blocks():
            for name, rows in columns.items():
                yield name, start, rows

    def _mean_cosine(self, pairs: int = 4096) -> float | None:
        """Mean cosine of random pairs of different rows: near 1, the encoder tells little apart."""
        if self.num < 2:
            return None
        draw = generator(0, "bank-info")
        first = draw.integers(self.num, size=pairs)
        second = (first + 1 + draw.integers(self.num - 1, size=pairs)) % self.num
        a, b = self.lookup(torch.from_numpy(first)), self.lookup(torch.from_numpy(second))
        return float((a * b).sum(1).mean())
