"""The parts of a diffusion U-Net: one block, one way to change sides, one condition.

Four code bases (DDPM++, NCSN++, ADM, LDM) are one block with the options of `Style`. With R = halve
the sides, double them or leave them, and c the condition,

    h = conv_in(R silu(norm_in(x)))
    h = silu(norm_out(h + A c))                  "add"
    h = silu((1 + s) norm_out(h) + b)            "scale-shift", (s, b) = A c
    y = r (skip(R x) + conv_out(h))
    y = r (y + attention(norm_attention(y)))     where the block attends

skip is a 1x1 convolution where the width changes, and else nothing (DDPM++, NCSN++: also where the
sides change). r = sqrt(1/2) keeps the variance of a sum. LDM changes sides by a convolution alone.
The condition of a time and of what else is known is

    f = sinusoids(time) (+ label row),   c = W2 silu(W1 f) (+ label row) + memory

All images are (B, C, H, W), in either memory format; c is (B, K), and blocks receive silu(c).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from stratagem.errors import InputError
from stratagem.nets.layers import MAX_PERIOD, Attention, Condition
from stratagem.nets.unet_style import Style, TimeKind

__all__ = [
    "ConvResample",
    "Pyramid",
    "Resample",
    "TimeFeatures",
    "UNetBlock",
    "UNetCondition",
    "group_norm",
    "scaled_sum",
]

Way = Literal["down", "up"]

_TAPS = (1.0, 3.0, 3.0, 1.0)
_FOURIER_STD = 16.0


def group_norm(like: Style, width: int) -> nn.GroupNorm:
    """Returns the group norm of a width: min(norm_groups, width / norm_width) groups.

    Raises:
        InputError: If the groups do not divide the width.

    Example:
        >>> group_norm(Style(), 80).num_groups
        20
    """
    groups = min(like.norm_groups, max(1, width // like.norm_width))
    if width % groups:
        raise InputError(
            f"a group norm of {width} channels cannot have {groups} groups: choose widths of the "
            f"encoder and of the decoders whose sums are multiples of {like.norm_groups}"
        )
    return nn.GroupNorm(groups, width, eps=like.norm_eps)


# --- condition ---------------------------------------------------------------------------------


class TimeFeatures(nn.Module):
    """Sinusoids of a time, (B,) -> (B, num), as `Style.time` says.

    Args:
        kind: Which frequencies, and which of sine and cosine comes first.
        num: Number of sinusoids, even and at least 4.
        scale: Factor on the time.
    """

    frequencies: Tensor

    def __init__(self, kind: TimeKind, num: int, scale: float = 1.0) -> None:
        super().__init__()
        half = num // 2
        self.cos_first = kind == "cos-sin"
        self.scale = scale
        if kind == "fourier":  # sin(2 pi f t), f ~ N(0, 16^2): random, hence saved
            frequencies = 2 * math.pi * _FOURIER_STD * torch.randn(half)
        else:
            # In float32, as where the published weights were trained: near time 1000 it shows.
            last = half if self.cos_first else half - 1
            frequencies = (1 / MAX_PERIOD) ** (torch.arange(half, dtype=torch.float32) / last)
        self.register_buffer("frequencies", frequencies, persistent=kind == "fourier")

    def forward(self, time: Tensor) -> Tensor:
        """Returns the sinusoids of times (B,)."""
        angle = (self.scale * time.to(self.frequencies.dtype))[:, None] * self.frequencies
        parts = (angle.cos(), angle.sin()) if self.cos_first else (angle.sin(), angle.cos())
        return torch.cat(parts, dim=1)


class UNetCondition(nn.Module):
    """Joins time, label and memory into silu(c), (B, width); what is absent is null.

    Null values are those of `layers.Condition`: the class num_classes, and the zero vector.

    Args:
        like: The style.
        features: Number of sinusoids of the time.
        width: Width of c.
        num_classes: Number of classes, 0 for none.
        memory_dim: Length of a memory vector, 0 for none.
        time_scale: Factor on the time.
        memory_scale: Factor on the memory vector.
        null_memory: Whether the absence of memory has a learned embedding of its own.
    """

    def __init__(
        self,
        like: Style,
        features: int,
        width: int,
        num_classes: int = 0,
        memory_dim: int = 0,
        time_scale: float = 1.0,
        memory_scale: float = 1.0,
        null_memory: bool = False,
    ) -> None:
        super().__init__()
        early = like.label_at == "features" and num_classes > 0
        self.features = TimeFeatures(like.time, features, time_scale)
        self.label = nn.Embedding(num_classes + 1, features) if early else None
        # maps our features where a transformer would embed the time itself
        perceptron = (nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))
        self.join = Condition(
            width,
            num_classes=0 if early else num_classes,
            memory_dim=memory_dim,
            memory_scale=memory_scale,
            null_memory=null_memory,
            time=nn.Sequential(*perceptron),
        )

    def forward(self, time: Tensor, label: Tensor | None = None, **memory: Tensor | None) -> Tensor:
        """Returns silu(c) of times (B,); label (B,), memory (B, D), memory_keep (B, width).

        Raises:
            ValueError: If a condition is given for which the network has no input.
        """
        features = self.features(time)
        if self.label is not None:
            features = features + (self.label.weight[-1] if label is None else self.label(label))
            label = None
        return functional.silu(self.join(features, label=label, **memory))


# --- sides -------------------------------------------------------------------------------------


def _kernel() -> Tensor:
    """The outer product of [1 3 3 1] / 8 with itself, shape (1, 1, 4, 4)."""
    taps = torch.tensor(_TAPS) / sum(_TAPS)
    return torch.outer(taps, taps)[None, None]


class Resample(nn.Module):
    """Halves or doubles the sides of images, (B, C, H, W).

    Halving takes means of 2x2 pixels, doubling repeats a pixel; with `fir` the weights of the mean
    are [1 3 3 1] along each axis, and doubling is the transpose of halving, times 4.

    Args:
        way: "down" or "up".
        fir: Whether to use the filter.
    """

    kernel: Tensor | None

    def __init__(self, way: Way, fir: bool) -> None:
        super().__init__()
        self.way = way
        self.register_buffer("kernel", _kernel() if fir else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns images of half or double sides."""
        if self.kernel is None:
            if self.way == "down":
                return functional.avg_pool2d(x, 2)
            return functional.interpolate(x, scale_factor=2, mode="nearest")
        channels = x.shape[1]
        kernel = self.kernel.expand(channels, -1, -1, -1)
        if self.way == "down":
            return functional.conv2d(x, kernel, stride=2, padding=1, groups=channels)
        return functional.conv_transpose2d(x, 4 * kernel, stride=2, padding=1, groups=channels)


class ConvResample(nn.Module):
    """Halves by a strided convolution, or doubles by repetition and a convolution (LDM).

    Args:
        way: "down" or "up".
        width: Number of channels, which stays.
    """

    def __init__(self, way: Way, width: int) -> None:
        super().__init__()
        self.up = Resample("up", fir=False) if way == "up" else nn.Identity()
        self.conv = nn.Conv2d(width, width, 3, stride=2 if way == "down" else 1, padding=1)

    def forward(self, x: Tensor, c_BK: Tensor) -> Tensor:  # noqa: ARG002
        """Maps images (B, C, H, W); the condition, which a block would want, is left alone."""
        return self.conv(self.up(x))


class Pyramid(nn.Module):
    """One step of the residual input pyramid: filter [1 3 3 1], then a strided convolution.

    Args:
        width_in: Channels of the step before, at first those of the image.
        width: Channels of the level it joins.
    """

    kernel: Tensor

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.register_buffer("kernel", _kernel(), persistent=False)
        self.conv = nn.Conv2d(width_in, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (B, C, H, W) to half their sides."""
        channels = x.shape[1]
        kernel = self.kernel.expand(channels, -1, -1, -1)
        # Both paddings at once: what the filter spreads over the border still counts.
        return self.conv(functional.conv2d(x, kernel, padding=2, groups=channels))


# --- block -------------------------------------------------------------------------------------


def scaled_sum(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Returns scale (a + b), without a pass over memory for a scale of 1."""
    return a + b if scale == 1 else scale * (a + b)


class UNetBlock(nn.Module):
    """The residual block, with attention where it attends.

    Args:
        like: The style.
        width_in: Channels of its input.
        width: Channels of its output.
        condition: Width K of the condition.
        attend: Whether it attends.
        way: Whether it halves ("down") or doubles ("up") the sides, or neither.
        dropout: Rate in training, before the last convolution; torch's generator draws it.

    Raises:
        InputError: If groups or heads do not divide a width.
    """

    def __init__(
        self,
        like: Style,
        width_in: int,
        width: int,
        condition: int,
        *,
        attend: bool = False,
        way: Way | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.scale, self.dropout = like.scale, dropout
        self.scale_shift = like.modulation == "scale-shift"
        self.resample = Resample(way, like.fir) if way else nn.Identity()
        self.norm_in = group_norm(like, width_in)
        self.conv_in = nn.Conv2d(width_in, width, 3, padding=1)
        self.modulation = nn.Linear(condition, (2 if self.scale_shift else 1) * width)
        self.norm_out = group_norm(like, width)
        self.conv_out = nn.Conv2d(width, width, 3, padding=1)
        mapped = width_in != width or (way is not None and like.skip_resampled)
        self.skip = nn.Conv2d(width_in, width, 1) if mapped else nn.Identity()
        self.norm_attention = group_norm(like, width) if attend else None
        self.attention = Attention(width, _heads(like, width)) if attend else None

    def forward(self, x: Tensor, c_BK: Tensor) -> Tensor:
        """Maps images (B, C, H, W); `c_BK` is silu(condition), computed once for all blocks."""
        h = self.conv_in(self.resample(functional.silu(self.norm_in(x))))
        modulation = self.modulation(c_BK)[:, :, None, None]
        if self.scale_shift:
            s, b = modulation.chunk(2, dim=1)
            h = torch.addcmul(b, self.norm_out(h), 1 + s)
        else:
            h = self.norm_out(h + modulation)
        h = functional.dropout(functional.silu(h), self.dropout, self.training)
        y = scaled_sum(self.skip(self.resample(x)), self.conv_out(h), self.scale)
        return y if self.attention is None else scaled_sum(y, self._attend(y), self.scale)

    def _attend(self, y: Tensor) -> Tensor:
        assert self.attention is not None
        assert self.norm_attention is not None
        tokens_BLW = self.norm_attention(y).flatten(2).transpose(1, 2)
        return self.attention(tokens_BLW).transpose(1, 2).unflatten(2, y.shape[2:])


def _heads(like: Style, width: int) -> int:
    if like.head_width is None:
        return 1
    if width % like.head_width:
        raise InputError(
            f"attention over {width} channels cannot have heads of {like.head_width}: "
            "choose a multiple, or another head_width"
        )
    return width // like.head_width
