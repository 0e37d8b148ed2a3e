"""Where the vectors of a bank are: how each is written down, and which rows there are.

A codec turns a unit vector v of length D into a few numbers and back:

    float32, float16   v itself
    int8               q = round(v / s), s = max|v| / 127:             v ~ s q
    low-rank           c = B^T (v - m), B (D, d) orthonormal columns:  v ~ m + B c

A store holds such numbers for N images and F sides each (F = 2: the image and its mirror image).
They lie in memory or, mapped, in a file; or they are those of other stores: some rows of one, the
rows of several one after another, or rows that are written down otherwise when they are asked for.
An edit therefore copies nothing, and a bank larger than the memory can be edited: the work is done
block by block when the new bank is saved.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from stratagem.artifact import Layout
from stratagem.errors import InputError

__all__ = [
    "Codec",
    "Columns",
    "Held",
    "Int8",
    "Joined",
    "LowRank",
    "Plain",
    "Recoded",
    "Selected",
    "Store",
    "blank",
    "codec_of",
    "hold",
    "same",
    "store_of",
    "unit",
]

Columns = dict[str, Tensor]
"""Stored numbers by name, one row per vector."""

BLOCK = 2048  # images handled at once by whatever walks over a bank


def unit(vectors: Tensor, what: str = "row", numbers: Tensor | None = None) -> Tensor:
    """Scales rows to length 1, in float32 on the CPU.

    Args:
        vectors: Shape (B, D), any real type.
        what: What a row is, for the message.
        numbers: Their numbers, for the message, shape (B,); by default they count from 0.

    Raises:
        InputError: If a row is zero or not finite.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
    vectors = vectors.detach().to("cpu", torch.float32)
    # divided by the largest entry first, for the square of a large or tiny one leaves float32
    vectors = vectors / vectors.abs().amax(1, keepdim=True)
    bad = (~torch.isfinite(vectors).all(1)).nonzero().flatten()
    if len(bad):
        number = int(bad[0] if numbers is None else numbers[bad[0]])
        raise InputError(
            f"{what} {number} has no usable vector: it is zero or not finite; leave that {what} "
            "out, or choose another encoder"
        )
    return functional.normalize(vectors, dim=1)


class Codec(ABC):
    """How one vector is written down.

    Attributes:
        format: Its name, as on the command line.
        dim: Length D of a vector.
        dtype: Type of the stored numbers.
    """

    format: str
    dim: int
    dtype: torch.dtype

    @abstractmethod
    def encode(self, rows: Tensor) -> Columns:
        """Maps unit vectors, shape (B, D), float32, to numbers to be stored."""

    @abstractmethod
    def decode(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Maps stored numbers to vectors of about unit length, shape (B, D), float32."""

    def constants(self) -> Columns:
        """Returns what all rows share: nothing, unless a codec says otherwise."""
        return {}


class Plain(Codec):
    """The numbers themselves.

    Args:
        dim: Length D of a vector.
        dtype: float16 or float32.
    """

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        if dtype not in (torch.float16, torch.float32):
            raise InputError(f"bank vectors are {dtype}: use float16 or float32")
        self.dim, self.dtype = dim, dtype
        self.format = str(dtype).removeprefix("torch.")

    def encode(self, rows: Tensor) -> Columns:
        """Rounds; shape (B, D)."""
        return {"vectors": rows.to(self.dtype)}

    def decode(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Widens to float32, shape (B, D)."""
        return columns["vectors"].float()


class Int8(Codec):
    """One byte per number and one scale per vector.

    Args:
        dim: Length D of a vector.
    """

    format, dtype = "int8", torch.int8

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def encode(self, rows: Tensor) -> Columns:
        """Returns vectors (B, D) int8 and scales (B,) float32."""
        scales = rows.abs().amax(1) / 127
        return {"vectors": (rows / scales[:, None]).round().to(self.dtype), "scales": scales}

    def decode(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Returns vectors, shape (B, D)."""
        return columns["vectors"].float() * columns["scales"][:, None]


class LowRank(Codec):
    """Coordinates in d directions about a mean.

    Args:
        basis: B, shape (D, d), float32, orthonormal columns.
        mean: m, shape (D,), float32.
        dtype: Of the coordinates, float16 or float32.
    """

    format = "low-rank"

    def __init__(self, basis: Tensor, mean: Tensor, dtype: torch.dtype = torch.float16) -> None:
        self.basis, self.mean, self.dtype = basis, mean, dtype
        self.dim, self.rank = basis.shape

    def encode(self, rows: Tensor) -> Columns:
        """Projects: the nearest vector to each in m + span B; codes (B, d)."""
        return {"codes": ((rows - self.mean) @ self.basis).to(self.dtype)}

    def decode(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Returns vectors m + B c, shape (B, D)."""
        return self.mean + columns["codes"].float() @ self.basis.T

    def constants(self) -> Columns:
        """Returns the basis (D, d) and the mean (D,)."""
        return {"basis": self.basis, "mean": self.mean}


def codec_of(form: str, dim: int) -> Codec:
    """Returns the codec of a format that needs no pass over the rows.

    Raises:
        InputError: If it is another.
    """
    match form:
        case "float32" | "float16":
            return Plain(dim, getattr(torch, form))
        case "int8":
            return Int8(dim)
    raise InputError(f"unknown format {form!r}: use one of float32, float16, int8")


def same(first: Codec, second: Codec) -> bool:
    """Whether what one codec wrote can be read by the other.

    Example:
        >>> [same(codec_of("int8", 8), codec_of(form, 8)) for form in ("int8", "float16")]
        [True, False]
    """
    if (first.format, first.dim, first.dtype) != (second.format, second.dim, second.dtype):
        return False
    shared = second.constants()
    return all(torch.equal(value, shared[name]) for name, value in first.constants().items())


class Store(ABC):
    """Rows written down by one codec.

    Attributes:
        codec: How.
        num: Number of images N.
        sides: 2 if mirror images have their own rows, else 1.
    """

    codec: Codec
    num: int
    sides: int

    @abstractmethod
    def take(self, index: Tensor, side: Tensor) -> Columns:
        """Returns stored numbers of images `index` and sides `side`, both (B,), int64."""

    def rows(self, index: Tensor, side: Tensor) -> Tensor:
        """Returns vectors of about unit length, shape (B, D), float32."""
        return self.codec.decode(self.take(index, side))

    def layout(self) -> Layout:
        """Returns name -> (type, shape (N, F, ...)) of the stored numbers."""
        one = self.codec.encode(torch.ones(1, self.codec.dim))
        tails = {name: (t.dtype, tuple(t.shape[1:])) for name, t in one.items()}
        return {name: (dtype, (self.num, self.sides, *s)) for name, (dtype, s) in tails.items()}

    def blocks(self) -> Iterator[tuple[int, Columns]]:
        """Yields all stored numbers in order: first image, and columns of shape (n, F, ...)."""
        for start in range(0, self.num, BLOCK):
            images = torch.arange(start, min(start + BLOCK, self.num))
            index = images.repeat_interleave(self.sides)
            columns = self.take(index, torch.arange(self.sides).repeat(len(images)))
            shape = (len(images), self.sides)
            yield start, {name: t.unflatten(0, shape) for name, t in columns.items()}


class Held(Store):
    """Rows in memory, or mapped from a file.

    Args:
        codec: How they are written.
        columns: Stored numbers, each of shape (N, F, ...).
    """

    def __init__(self, codec: Codec, columns: Mapping[str, Tensor]) -> None:
        self.codec, self.columns = codec, dict(columns)
        self.num, self.sides = next(iter(columns.values())).shape[:2]

    def take(self, index: Tensor, side: Tensor) -> Columns:
        """Gathers."""
        return {name: column[index, side] for name, column in self.columns.items()}


class Selected(Store):
    """Some rows of another store, in any order.

    Args:
        store: The other one.
        index: Its rows, shape (N,), int64.
    """

    def __init__(self, store: Store, index: Tensor) -> None:
        self.codec, self.num, self.sides = store.codec, len(index), store.sides
        self._store, self._index = store, index

    def take(self, index: Tensor, side: Tensor) -> Columns:
        """Asks the other store."""
        return self._store.take(self._index[index], side)


class Joined(Store):
    """The rows of several stores, one after another.

    Args:
        stores: At least one, with the same codec and sides.
    """

    def __init__(self, stores: Sequence[Store]) -> None:
        assert all(same(s.codec, stores[0].codec) and s.sides == stores[0].sides for s in stores)
        self.codec, self.sides = stores[0].codec, stores[0].sides
        self.num = sum(store.num for store in stores)
        self._stores = list(stores)

    def take(self, index: Tensor, side: Tensor) -> Columns:
        """Asks each store for its own rows and puts them in order."""
        places, parts = [], []
        starts = itertools.accumulate((store.num for store in self._stores), initial=0)
        for start, store in zip(starts, self._stores, strict=False):
            place = ((index >= start) & (index < start + store.num)).nonzero().flatten()
            places.append(place)
            parts.append(store.take(index[place] - start, side[place]))
        order = torch.cat(places).argsort()
        return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}


class Recoded(Store):
    """The rows of another store, made unit vectors and written down otherwise.

    Args:
        store: The other one.
        codec: How its rows are to be written.
    """

    def __init__(self, store: Store, codec: Codec) -> None:
        self.codec, self.num, self.sides = codec, store.num, store.sides
        self._store = store

    def take(self, index: Tensor, side: Tensor) -> Columns:
        """Reads and writes the rows asked for."""
        return self.codec.encode(unit(self._store.rows(index, side), "row", index))


def hold(vectors: Tensor) -> Store:
    """Returns a store of vectors as they are, shape (N, F, D), float16 or float32.

    Raises:
        InputError: If the shape or the type is another.
    """
    if vectors.ndim != 3 or len(vectors) == 0 or vectors.shape[1] not in (1, 2):
        raise InputError(f"bank vectors have shape {tuple(vectors.shape)}, not (N, F, D)")
    return Held(Plain(vectors.shape[2], vectors.dtype), {"vectors": vectors})


def blank(num: int, sides: int, dim: int, form: str) -> Store:
    """Returns a store of a size and format with no content yet; it takes no memory.

    Raises:
        InputError: If the format is none that can be written row by row.
    """
    codec = codec_of(form, dim)
    one = codec.encode(torch.ones(1, dim))
    return Held(
        codec, {name: c[:, None].expand(num, sides, *c.shape[1:]) for name, c in one.items()}
    )


def store_of(tensors: Mapping[str, Tensor]) -> Store:
    """Returns the store of a bank's file; what it holds tells how rows are written."""
    if "codes" in tensors:
        codes = tensors["codes"]
        codec: Codec = LowRank(tensors["basis"], tensors["mean"], codes.dtype)
        return Held(codec, {"codes": codes})
    vectors = tensors["vectors"]
    if "scales" in tensors:
        return Held(Int8(vectors.shape[2]), {"vectors": vectors, "scales": tensors["scales"]})
    return hold(vectors)
