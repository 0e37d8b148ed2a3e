"""The encoder without weights: area means of the pixels.

    v = mean of x over each of at most 16 x 16 cells,  x = u / 127.5 - 1

For digits and tiny images; of photographs it knows little but their colours.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from stratagem.data.images import to_float
from stratagem.errors import InputError

__all__ = ["PixelEncoder"]


class PixelEncoder:
    """The image itself, averaged over at most 16 x 16 cells; needs no weights.

    Args:
        shape: (C, H, W) of the images.
    """

    name = "pixels"

    def __init__(self, shape: tuple[int, int, int]) -> None:
        channels, height, width = shape
        self._shape = (channels, height, width)
        self._grid = (min(height, 16), min(width, 16))
        self.dim = channels * self._grid[0] * self._grid[1]

    def description(self) -> dict[str, Any]:
        """Returns all that makes the vectors."""
        return {
            "name": self.name,
            "dim": self.dim,
            "shape": list(self._shape),
            "preprocessing": f"u / 127.5 - 1, area mean to {self._grid[0]} x {self._grid[1]}",
        }

    def __call__(self, images: Tensor) -> Tensor:
        """Maps images, shape (B, C, H, W), uint8, to vectors, shape (B, dim), float32.

        Raises:
            InputError: If the images have another shape.
        """
        if tuple(images.shape[1:]) != self._shape:
            raise InputError(
                f"images have shape {tuple(images.shape[1:])}, this encoder takes {self._shape}"
            )
        return functional.adaptive_avg_pool2d(to_float(images), self._grid).flatten(1)
