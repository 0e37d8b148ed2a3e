"""Latents: what an autoencoder makes of images, kept so that training need not run it.

    encode(image) -> mean, std     z = mean + std noise     x = (z - m) / s

Per number the posterior's mean and standard deviation are kept in float16, and the autoencoder's
answer is rounded to float16 before anything else is made of it: a cached latent is then, bit for
bit, what encoding afresh gives with the same noise. A mirrored image is encoded itself, since an
autoencoder does not commute with mirroring.

m and s are mean and standard deviation of z per channel, over all images and sides:

    m = E[mean]     s^2 = E[mean^2 + std^2] - m^2

They travel inside the data set and inside every run made from it, for a sample is worth nothing
without them.

An ImageNet of latents of 32 x 16 x 16, mean and std of both sides, takes 84 GB. Half of it is
enough without mirrored images, or with `posterior="mean"`, which gives up the noise of the
posterior; of the autoencoders meant here it is small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "Autoencoder",
    "Moments",
    "Posterior",
    "PosteriorKind",
    "Statistics",
]

PosteriorKind = Literal["mean+std", "mean"]


class Posterior(NamedTuple):
    """The Gaussian that an encoder gives for each image.

    Attributes:
        mean: Shape (B, c, h, w), float16.
        std: Like the mean.
    """

    mean: Tensor
    std: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """Returns mean + std noise, like the noise, float32."""
        return self.mean.float() + self.std.float() * noise


class Autoencoder(Protocol):
    """What makes latents of images, and images of latents.

    Attributes:
        name: Short name, as on the command line.
        factor: Pixels per latent along one side.
        channels: Of a latent.
    """

    name: str
    factor: int
    channels: int

    def description(self) -> dict[str, Any]:
        """Returns all that makes the latents: name, sizes, preprocessing, sum of the weights."""
        ...

    def encode(self, images: Tensor) -> Posterior:
        """Maps images, shape (B, 3, H, W), uint8, to posteriors of (B, c, H / f, W / f)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Maps latents z, shape (B, c, h, w), float32, to images (B, 3, f h, f w), uint8."""
        ...


class Moments(NamedTuple):
    """Sums over the numbers of each channel; exact integers for pixels.

    Attributes:
        num: Numbers per channel.
        first: Sum of them, per channel.
        second: Sum of their squares, per channel.
    """

    num: int
    first: list[float]
    second: list[float]

    def __add__(self, other: Moments) -> Moments:  # type: ignore[override]
        """Returns the sums over both; those of nothing have no channels."""
        pairs = [
            [a + b for a, b in zip(mine, theirs, strict=True)] if mine else list(theirs)
            for mine, theirs in ((self.first, other.first), (self.second, other.second))
        ]
        return Moments(self.num + other.num, *pairs)

    def statistics(self, scale: float = 1.0, shift: float = 0.0) -> Statistics:
        """Returns mean and standard deviation of scale u + shift, from the sums of u.

        Example:
            >>> Moments(2, [4], [10]).statistics()
            Statistics(mean=[2.0], std=[1.0])
        """
        num, pairs = self.num, list(zip(self.first, self.second, strict=True))
        # N sum u^2 - (sum u)^2: in integers without cancellation, constant images get exactly 0
        spreads = [math.sqrt(max(0, num * second - first * first)) / num for first, second in pairs]
        means = [first / num for first, _ in pairs]
        return Statistics([scale * m + shift for m in means], [scale * s for s in spreads])


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation per channel.

    Attributes:
        mean: One number per channel.
        std: One number per channel; a constant channel, 0, is not scaled.
    """

    mean: list[float]
    std: list[float]

    def standardise(self, z: Tensor) -> Tensor:
        """Returns x = (z - m) / s, shape (B, c, h, w)."""
        mean, std = self._columns(z)
        return (z - mean) / std

    def undo(self, x: Tensor) -> Tensor:
        """Returns z = s x + m, the inverse of `standardise`, shape (B, c, h, w)."""
        mean, std = self._columns(x)
        return std * x + mean

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        std = [value or 1.0 for value in self.std]
        both = torch.tensor([self.mean, std], dtype=like.dtype, device=like.device)
        mean, spread = both[:, :, None, None]
        return mean, spread
