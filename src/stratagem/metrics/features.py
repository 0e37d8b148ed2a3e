"""Feature nets: what turns images into the vectors that a Frechet distance compares.

    images uint8 (B, C, H, W)  ->  features float32 (B, dim)

`FeatureNet` is the protocol. Three things fulfil it: `EncoderFeatures` (a frozen encoder, such as
EfficientNet-Lite0 or DINOv2), `PixelComponents` (the first principal components of the pixels, for
images so small that no encoder is worth having), and `inception.Inception` (the net of FID).

Few images need few dimensions: `Components` is a projection on leading principal components, fitted
on the reference set,

    y = (x - mean) V,    V = the leading eigenvectors of the covariance

A distance bears the name of its features. Only Inception-v3 with the weights everybody uses may be
called FID (`metric_name`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from stratagem.data.images import to_float
from stratagem.encoders import Encoder
from stratagem.errors import InputError
from stratagem.metrics.frechet import Statistics, moments

__all__ = [
    "Components",
    "EncoderFeatures",
    "FeatureNet",
    "PixelComponents",
    "metric_name",
]

# Above this many dimensions and images the decomposition is of this many images, evenly spaced.
MOST = 4096


class FeatureNet(Protocol):
    """Turns images into feature vectors."""

    @property
    def name(self) -> str:
        """Short name; distances are called after it."""

    @property
    def dim(self) -> int:
        """Length of a vector."""

    def description(self) -> dict[str, Any]:
        """All that decides the numbers, JSON-able."""

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float32 (B, dim)."""


def metric_name(net: FeatureNet, metric: str = "fd") -> str:
    """Returns a metric's name, with that of the features unless they are those of FID.

    With the Inception-v3 of FID "fd" is "fid" and "sfd" is "sfid"; with any other features they are
    "fd_<name>" and "sfd_<name>".
    """
    if net.name != "inception":
        return f"{metric}_{net.name}"
    return {"fd": "fid", "sfd": "sfid"}.get(metric, metric)


@dataclass(frozen=True)
class Components:
    """A projection on leading principal components.

    Attributes:
        mean: Shape (D,), float32.
        basis: Orthonormal columns, leading first, shape (D, K), float32.
    """

    mean: Tensor
    basis: Tensor

    @property
    def num(self) -> int:
        """How many components K there are."""
        return self.basis.shape[1]

    def __call__(self, rows: Tensor) -> Tensor:
        """Projects rows (B, D) to (B, K), float32."""
        mean, basis = self.mean.to(rows.device), self.basis.to(rows.device)
        return (rows.float() - mean) @ basis

    def fingerprint(self) -> str:
        """SHA-256 of mean and basis."""
        body = torch.cat([self.mean[:, None], self.basis], 1).cpu().contiguous()
        return hashlib.sha256(body.numpy().tobytes()).hexdigest()

    @classmethod
    def fit(cls, rows: Tensor, num: int) -> Components:
        """Finds the first `num` principal components of rows (N, D).

        The eigenvectors are of the smaller Gram matrix, D x D or N x N, in float64. If both exceed
        4096, 4096 rows evenly spaced stand for all.

        Raises:
            InputError: If the rows do not span `num` directions.
        """
        if min(rows.shape) > MOST:
            rows = rows[torch.linspace(0, len(rows) - 1, MOST).long()]
        rows = rows.detach().to("cpu", torch.float64)
        if len(rows) >= rows.shape[1]:
            return cls.of(moments(rows), num)
        mean = rows.mean(0)
        centred = rows - mean
        values, vectors = _leading(centred @ centred.T, num)
        # right singular vectors from left ones: v = X^T u / s
        return cls._from(mean, centred.T @ vectors / values.clamp(min=1e-30).sqrt(), values, num)

    @classmethod
    def of(cls, found: Statistics, num: int) -> Components:
        """Finds the first `num` principal components of rows of known mean and covariance.

        Raises:
            InputError: If the rows do not span `num` directions.
        """
        values, vectors = _leading(found.cov, num)
        return cls._from(found.mean, vectors, values, num)

    @classmethod
    def _from(cls, mean: Tensor, basis: Tensor, values: Tensor, num: int) -> Components:
        """Fixes signs: the largest entry of each component is positive."""
        if len(values) < num or values[-1] <= 1e-10 * values[0]:
            raise InputError(f"the images do not span {num} components: ask for fewer components")
        largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        return cls(mean.float(), (basis * largest.sign()).float())


def _leading(gram: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Returns the largest eigenvalues (K,) and their vectors (N, K), largest first."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0)[:num], vectors.flip(1)[:, :num]


class PixelComponents:
    """The first principal components of the pixels in [-1, 1] as features, named "pixels<K>"."""

    def __init__(self, components: Components, shape: tuple[int, ...]) -> None:
        self.components = components
        self.shape = shape
        self.name = f"pixels{components.num}"
        self.dim = components.num

    @classmethod
    def fit(cls, images: Tensor, num: int = 32) -> PixelComponents:
        """Finds the components of a reference set, uint8 (N, C, H, W).

        Raises:
            InputError: If the images do not span `num` directions.
        """
        return cls(Components.fit(to_float(images).flatten(1), num), tuple(images.shape[1:]))

    def description(self) -> dict[str, Any]:
        """Name, image shape and the SHA-256 of the projection."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "components": self.components.fingerprint(),
        }

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float32 (B, K).

        Raises:
            InputError: If the images have another shape than those it was fitted on.
        """
        if tuple(images.shape[1:]) != self.shape:
            raise InputError(
                f"images of shape {tuple(images.shape[1:])} cannot be measured by {self.name} "
                f"fitted on {self.shape}: use images of one size"
            )
        return self.components(to_float(images).flatten(1))


class EncoderFeatures:
    """A frozen encoder as a feature net, if wanted followed by a projection fitted on its vectors.

    Args:
        encoder: The encoder; its name is the name of the features.
        components: Projection of the encoder's vectors; its K is appended to the name.
    """

    def __init__(self, encoder: Encoder, components: Components | None = None) -> None:
        self.encoder = encoder
        self.components = components
        self.name = f"{encoder.name}{components.num}" if components else encoder.name
        self.dim = components.num if components else encoder.dim

    def description(self) -> dict[str, Any]:
        """The encoder's description and the SHA-256 of the projection."""
        projection = self.components.fingerprint() if self.components else None
        return {"name": self.name, "encoder": self.encoder.description(), "components": projection}

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float32 (B, dim)."""
        vectors = self.encoder(images)
        return self.components(vectors) if self.components else vectors.float()
