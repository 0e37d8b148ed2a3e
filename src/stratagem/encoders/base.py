"""What an encoder is, and how an image becomes what a network takes.

    u uint8 (B, 1 or 3, H, W)  ->  RGB  ->  S x S  ->  x = (u / 255 - mean) / std

`Preprocessing` is the only way of an image into a frozen network, whether it comes from a data set,
from a file given by hand, from an aligned batch, or from samples to be measured. It takes uint8
alone: floats may have been mapped to another range before, which nothing could tell later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Encoder", "Preprocessing", "TokenEncoder", "at_places"]


class Encoder(Protocol):
    """What a bank is built with.

    Attributes:
        name: Short name, as on the command line.
        dim: Length of the vectors.
    """

    name: str
    dim: int

    def description(self) -> dict[str, Any]:
        """Returns all that makes the vectors: name, size, preprocessing, sum of the weights."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Maps images, shape (B, C, H, W), uint8, to vectors, shape (B, dim), float32."""
        ...


class TokenEncoder(Protocol):
    """An encoder that also says what is where, for alignment.

    Attributes:
        token_dim: Length of the vector of one place.
    """

    token_dim: int

    def tokens(self, images: Tensor, grid: int) -> Tensor:
        """Maps images, (B, C, H, W), uint8, to those of grid x grid places, (B, grid^2, dim)."""
        ...


@dataclass(frozen=True)
class Preprocessing:
    """Images -> what a network takes; gray is repeated, small images are enlarged.

    Attributes:
        size: Side S to which images are scaled.
        mean: Of each channel, pixels counted from 0 to 1; ImageNet's by default.
        std: Likewise.
        mode: How they are scaled.
        antialias: Whether each new pixel sees all old ones that it covers, and stays within 0 to
            255, as Pillow does it; else torch's plain interpolation, which GMem's banks took.
    """

    size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    mode: Literal["bicubic", "bilinear"] = "bicubic"
    antialias: bool = True

    def __call__(self, images: Tensor) -> Tensor:
        """Maps images, shape (B, 1 or 3, H, W), uint8, to (B, 3, size, size), float32.

        Raises:
            ValueError: If they are not uint8, gray or RGB.
        """
        if images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be uint8, gray or RGB: {tuple(images.shape)}")
        x, size = images.float().expand(-1, 3, -1, -1), (self.size, self.size)
        if x.shape[-2:] != size:
            x = functional.interpolate(x, size, mode=self.mode, antialias=self.antialias)
        if self.antialias:
            x = x.clamp(0, 255)
        mean, std = (255 * x.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (x - mean) / std

    def __str__(self) -> str:
        """Says all of it but the size."""
        scaled = f"{self.mode}{' antialiased' if self.antialias else ''}"
        return f"gray to RGB by repetition, {scaled}, (u / 255 - {self.mean}) / {self.std}"


def at_places(maps: Tensor, grid: int) -> Tensor:
    """Resamples maps (B, D, h, w) bilinearly to grid x grid, row by row: (B, grid^2, D).

    Example:
        >>> at_places(torch.arange(4.0).view(1, 1, 2, 2), 2).flatten()
        tensor([0., 1., 2., 3.])
    """
    if maps.shape[-2:] != (grid, grid):
        maps = functional.interpolate(maps, size=(grid, grid), mode="bilinear", antialias=True)
    return maps.flatten(2).mT.contiguous()
