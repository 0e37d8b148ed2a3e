"""What a data set stores of its images: their pixels, or what an autoencoder makes of them.

    images (n, C, H, W) -> tensors of n rows -> sums, of which the statistics are made

A codec takes images in small batches, so that writing a data set holds no more of them than that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stratagem.data.latents import Autoencoder, Moments, PosteriorKind
from stratagem.errors import InputError

__all__ = ["Codec", "LatentCodec", "PixelCodec", "sums_of"]


class Codec(Protocol):
    """What is stored of images.

    Attributes:
        kind: "images" or "latents": the beginning of the shards' names.
        batch_size: Images that `columns` takes at once.
        scale: Stored numbers u are x = scale u + shift in the data set's statistics.
        shift: See scale.
    """

    kind: str
    batch_size: int
    scale: float
    shift: float

    def meta(self, shape: Sequence[int]) -> dict[str, Any]:
        """Returns what the manifest says of data made from images of a shape (C, H, W)."""
        ...

    def nbytes(self, shape: Sequence[int]) -> int:
        """Returns how many bytes an image of a shape (C, H, W) takes."""
        ...

    def columns(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the tensors of a shard, made of images (n, C, H, W), uint8, as rows of it."""
        ...

    def moments(self, columns: dict[str, Tensor]) -> Moments:
        """Returns the sums of these tensors."""
        ...


class PixelCodec:
    """Stores the pixels themselves."""

    kind = "images"
    batch_size = 16
    scale, shift = 1 / 127.5, -1.0

    def meta(self, shape: Sequence[int]) -> dict[str, Any]:
        """Returns what the manifest says of data made from images of a shape (C, H, W)."""
        return {"shape": list(shape)}

    def nbytes(self, shape: Sequence[int]) -> int:
        """Returns how many bytes an image of a shape (C, H, W) takes."""
        return math.prod(shape)

    def columns(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the images."""
        assert images.dtype == torch.uint8, images.dtype
        return {"images": images}

    def moments(self, columns: dict[str, Tensor]) -> Moments:
        """Returns the sums of the pixels, exactly."""
        first = torch.zeros(columns["images"].shape[1], dtype=torch.int64)
        second = first.clone()
        for image in columns["images"]:  # one at a time: wide copies of a shard would be large
            wide = image.flatten(1).double()  # exact below 2^53, and twice as fast as integers
            first += wide.sum(1).long()
            second += wide.square_().sum(1).long()
        count = columns["images"][:, 0].numel()
        return Moments(count, first.tolist(), second.tolist())


class LatentCodec:
    """Stores of an image what an autoencoder makes of it, and of its mirror image.

    Args:
        autoencoder: What encodes.
        flip: Whether mirrored images are encoded too.
        posterior: What is kept: "mean+std", or "mean" alone in half the space.
        images: Fingerprint of the data set of pixels whose images these are, or None.
    """

    kind = "latents"
    batch_size = 16  # activations at full resolution are large
    scale, shift = 1.0, 0.0

    def __init__(
        self,
        autoencoder: Autoencoder,
        *,
        flip: bool,
        posterior: PosteriorKind = "mean+std",
        images: str | None = None,
    ) -> None:
        self._autoencoder = autoencoder
        self._sides = 2 if flip else 1
        self._names = posterior.split("+")
        self._images = images

    def meta(self, shape: Sequence[int]) -> dict[str, Any]:
        """Returns what the manifest says of data made from images of a shape (C, H, W).

        Raises:
            InputError: If the autoencoder does not take images of this shape.
        """
        channels, height, width = shape
        own = self._autoencoder
        if channels != 3 or height % own.factor or width % own.factor:
            raise InputError(
                f"{own.name} takes RGB images whose sides are multiples of {own.factor}, not "
                f"{channels}x{height}x{width}: choose another --size, and leave out --gray"
            )
        return {
            "shape": [own.channels, height // own.factor, width // own.factor],
            "image_shape": list(shape),
            "images": self._images,
            "autoencoder": own.description(),
            "posterior": self._names,
        }

    def nbytes(self, shape: Sequence[int]) -> int:
        """Returns how many bytes an image of a shape (C, H, W) takes."""
        numbers = math.prod(self.meta(shape)["shape"])
        return self._sides * len(self._names) * numbers * torch.float16.itemsize

    def columns(self, images: Tensor) -> dict[str, Tensor]:
        """Returns "mean" and, if kept, "std" of images (n, C, H, W), each (n, F, c, h, w)."""
        sides = [images, images.flip(-1)][: self._sides]
        encoded = [self._autoencoder.encode(side) for side in sides]
        mean = torch.stack([posterior.mean for posterior in encoded], dim=1)
        std = torch.stack([posterior.std for posterior in encoded], dim=1)
        bad = (~(mean.isfinite() & std.isfinite()).flatten(1).all(1)).nonzero().flatten()
        if len(bad):
            raise InputError(
                f"{self._autoencoder.name} gives NaN or infinity for {len(bad)} images: these are "
                "not its weights, or they need float32"
            )
        return {name: {"mean": mean, "std": std}[name] for name in self._names}

    def moments(self, columns: dict[str, Tensor]) -> Moments:
        """Returns the sums of z and, in expectation over the noise, of z^2."""
        return sums_of(columns)


def sums_of(columns: Mapping[str, Tensor]) -> Moments:
    """Returns the sums of mean + std noise and, in expectation, of its square.

    Args:
        columns: "mean" and, if kept, "std", each (n, F, c, h, w).
    """
    mean = columns["mean"].double().transpose(0, 2).flatten(1)
    second = (mean * mean).sum(1)
    if "std" in columns:
        second += columns["std"].double().square().transpose(0, 2).flatten(1).sum(1)
    return Moments(mean.shape[1], mean.sum(1).tolist(), second.tolist())
