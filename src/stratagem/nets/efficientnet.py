"""EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946, without squeeze-excitation), for inference.

    stem 3x3 / 2  ->  16 inverted residual blocks  ->  1x1 to 1280  ->  mean over places

Activations are ReLU6. Every batch norm is folded into the convolution before it,

    W' = W g / s,  b' = b - m g / s,  s = sqrt(v + eps)

which changes nothing and saves a pass over the activations. Padding is TensorFlow's "same".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Lite0", "fold"]

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


def fold(weight: Tensor, norm: Mapping[str, Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Folds a batch norm into the bias-free convolution before it.

    W' = W g / s,  b' = b - m g / s,  s = sqrt(v + eps)

    Args:
        weight: W, shape (O, I, K, K).
        norm: weight g, bias b, running_mean m, running_var v, each of shape (O,).
        eps: The batch norm's.

    Returns:
        Weight and bias in float64, shapes (O, I, K, K) and (O,).

    Example:
        >>> numbers = {"weight": 1.0, "bias": 0.5, "running_mean": 2.0, "running_var": 3.0}
        >>> norm = {name: torch.tensor([value]) for name, value in numbers.items()}
        >>> weight, bias = fold(torch.ones(1, 1, 1, 1), norm, eps=1.0)
        >>> weight.item(), bias.item()
        (0.5, -0.5)
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
        self.middle = sum(stage[0] for stage in _STAGES[:5])  # stride 16, 112 channels
        self.head = weights.conv("_conv_head", "_bn1", (1280, 320, 1))
        weights.finish()
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps pixels (u - 127) / 128, shape (B, 3, H, W), to the pooled features, (B, 1280)."""
        return self.head(self.blocks(self.stem(x))).mean((2, 3))

    def maps(self, x: Tensor) -> Tensor:
        """Maps the same pixels to the features of stage 5, (B, 112, H / 16, W / 16)."""
        return self.blocks[: self.middle](self.stem(x))


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
