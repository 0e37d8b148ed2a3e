"""Small banks for the tests, made of random images by a transparent encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stratagem.memory.bank import MemoryBank
from stratagem.memory.ids import Ids
from stratagem.memory.store import hold
from stratagem.randomness import normal

ENCODER = {"name": "weighted", "parts": [1, 2]}


def pixels(num: int = 12) -> Tensor:
    """Random images, shape (num, 1, 4, 4), uint8."""
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 1, 4, 4), dtype=torch.uint8, generator=random)


def encode(images: Tensor) -> Tensor:
    """Weighs pixels, shape (B, 16): no row is that of its mirror image."""
    return images.float().flatten(1) * torch.arange(1.0, 17.0) - 300.0


def exact(num: int = 12) -> Tensor:
    """The unit vectors of the images and their mirror images, shape (num, 2, 16), float64."""
    sides = [encode(images).double() for images in (pixels(num), pixels(num).flip(-1))]
    return functional.normalize(torch.stack(sides, dim=1), dim=2)


def make(num: int = 12, *, flips: bool = True, dtype: torch.dtype = torch.float16,
         **changes: Any) -> MemoryBank:  # fmt: skip
    """The bank of the images, labels -1, 0, 1, ..., every fourth row held out."""
    fields: dict[str, Any] = {
        "store": hold(exact(num)[:, : 2 if flips else 1].to(dtype)),
        "labels": torch.arange(num) % 3 - 1,
        "held_out": torch.arange(num) % 4 == 3,
        "encoder": ENCODER,
        "data": "f" * 64,
        "ids": Ids.of(f"img/{row}.png" for row in range(num)),
        "shape": (1, 4, 4),
    }
    return MemoryBank(**{**fields, **changes})


def flat(num: int = 200, dim: int = 24, rank: int = 5, noise: float = 0.0) -> MemoryBank:
    """A bank whose rows lie near a plane of some rank, without mirror images."""
    rows = normal((num, rank), 1, "codes") @ normal((rank, dim), 2, "plane")
    rows = functional.normalize(rows + noise * normal((num, dim), 3, "noise"), dim=1)
    return make(num, store=hold(rows[:, None]))
