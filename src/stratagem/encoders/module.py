"""Any torch module as an encoder.

A network of your own takes four lines:

    class Mine(nn.Module):
        def forward(self, x):  # (B, 3, S, S), normalised
            return network(x)  # vectors (B, D), or tokens (B, p + g^2, D)
    encoder = ModuleEncoder(Mine(), "mine", Preprocessing(size=224))

Tokens are p of the whole image, the class token first, then those of g x g patches, row by row; a
pool makes one vector of them:

    cls  y_0      patch-mean  mean of y_p ... y_(p + g^2 - 1)      cls-patch-mean  both in a row
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stratagem.artifact import raw_bytes
from stratagem.encoders.base import Preprocessing, at_places
from stratagem.errors import InputError

__all__ = ["ModuleEncoder", "Pool"]

Pool = Literal["cls", "patch-mean", "cls-patch-mean"]


class ModuleEncoder:
    """A frozen module and how images enter it.

    Args:
        module: Maps images (B, 3, S, S), float32, to vectors (B, D) or to tokens (B, p + g^2, D).
        name: Short name of the encoder.
        preprocessing: Makes these images.
        pool: How tokens become one vector; None for a module that gives vectors.
        prefix: How many tokens p stand before those of the patches.
        facts: What else makes the vectors, for the description; its "weights" stands for the sum
            over the module's state, which is taken else.
        device: Where it runs; images are brought there and vectors stay there.

    Raises:
        InputError: If what the module gives has another shape, or does not go with `pool`.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        preprocessing: Preprocessing,
        *,
        pool: Pool | None = None,
        prefix: int = 1,
        facts: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name = name
        self._module = module.to(device).eval().requires_grad_(False)
        self._preprocessing, self._pool, self._prefix = preprocessing, pool, prefix
        self._device = torch.device(device)
        self._chunk = 32 if self._device.type == "cpu" else 256
        size = preprocessing.size
        made = self._call(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        if made.ndim != (2 if pool is None else 3):
            raise InputError(
                f"encoder {name} gives {tuple(made.shape)} for an image: vectors (B, D) need no "
                "pool, tokens (B, L, D) need one"
            )
        self._grid = isqrt(max(0, made.shape[1] - prefix)) if pool is not None else 0
        if pool is not None and self._grid**2 + prefix != made.shape[1]:
            raise InputError(
                f"encoder {name} gives {made.shape[1]} tokens: {prefix} and those of a square of "
                "patches were expected, give the right prefix"
            )
        if pool in {"cls", "cls-patch-mean"} and prefix < 1:
            raise InputError(f"encoder {name} has no class token for pool {pool}: use patch-mean")
        self.token_dim: int = made.shape[-1]
        self.dim: int = self._pooled(made).shape[-1]
        self._facts = dict(facts or {})
        if "weights" not in self._facts:
            self._facts["weights"] = _sum_of(module)

    def description(self) -> dict[str, Any]:
        """Returns all that makes the vectors."""
        return {
            "name": self.name,
            "dim": self.dim,
            "size": self._preprocessing.size,
            "pool": self._pool,
            "preprocessing": str(self._preprocessing),
            **self._facts,
        }

    def __call__(self, images: Tensor) -> Tensor:
        """Maps images, shape (B, 1 or 3, H, W), uint8, to vectors, shape (B, dim), float32."""
        parts = images.split(self._chunk)
        return torch.cat([self._pooled(self._call(part)) for part in parts])

    def tokens(self, images: Tensor, grid: int) -> Tensor:
        """Maps images to the tokens of a grid of places, row by row, (B, grid^2, D), float32.

        They are those of the patches, resampled bilinearly where the grid is another.

        Raises:
            InputError: If the module gives vectors.
        """
        if self._pool is None:
            raise InputError(f"encoder {self.name} has no tokens to align with")
        found = [self._call(part)[:, self._prefix :] for part in images.split(self._chunk)]
        return at_places(torch.cat(found).mT.unflatten(2, (self._grid, self._grid)), grid)

    @torch.no_grad()
    def _call(self, images: Tensor) -> Tensor:
        made: Tensor = self._module(self._preprocessing(images.to(self._device)))
        return made.float()

    def _pooled(self, made: Tensor) -> Tensor:
        if self._pool is None:
            return made
        first, mean = made[:, 0], made[:, self._prefix :].mean(1)
        parts = {"cls": [first], "patch-mean": [mean], "cls-patch-mean": [first, mean]}
        return torch.cat(parts[self._pool], dim=1)


def _sum_of(module: nn.Module) -> str:
    """Returns the SHA-256 over the names and numbers of a module's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + raw_bytes(tensor.cpu().float()))
    return digest.hexdigest()
