"""Between two snippets: four ways to mix unit vectors a and b into a unit vector.

    linear        (1 - w) a + w b
    spherical     cos(w o) a + sin(w o) u,   o = angle(a, b),   u = (b - (a.b) a) / |b - (a.b) a|
    masked        half of the numbers of b, drawn at random, the others of a
    concatenated  the first half of a, the second half of b

The weight w belongs to the second vector, and every result is scaled to length 1. The spherical way
is the usual sin((1 - w) o) a + sin(w o) b over sin(o), in a form that holds at every angle. Equal
vectors give that vector. Opposite vectors have no single great circle; the path then goes through
the coordinate axis that is farthest from a, made orthogonal to it.

Reference: GMem, arXiv 2412.08781, and its code; there both degenerate cases give zero.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from stratagem.errors import InputError
from stratagem.randomness import permutation

__all__ = ["Way", "blend"]

Way = Literal["linear", "spherical", "masked", "concatenated"]

# below this sine of the angle, the direction from a to b is rounding
_DEGENERATE = 1e-6


def blend(
    first: Tensor,
    second: Tensor,
    weight: Tensor | float | None = None,
    way: Way = "spherical",
    seed: int = 0,
) -> Tensor:
    """Mixes pairs of unit vectors, shape (B, D), float32.

    Args:
        first: a, shape (B, D).
        second: b, shape (B, D).
        weight: w, one number or shape (B,); 0 gives a, 1 gives b. Only for the ways that weigh.
        way: How, see the module.
        seed: Of the masked way: which half, the same for all rows.

    Raises:
        InputError: If the shapes differ, the weight does not go with the way or is not finite, or
            a linear mix of opposite vectors is zero.

    Example:
        >>> blend(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 1 / 3)
        tensor([[0.8660, 0.5000]])
    """
    if first.shape != second.shape or first.ndim != 2:
        raise InputError(f"{tuple(first.shape)} and {tuple(second.shape)} cannot be interpolated")
    if way not in get_args(Way):
        raise InputError(f"unknown interpolation {way!r}: use one of {', '.join(get_args(Way))}")
    if (weight is None) != (way in {"masked", "concatenated"}):
        raise InputError(f"interpolation {way!r} with weight {weight}: linear and spherical take "
                         "one, masked and concatenated none")  # fmt: skip
    # float32 rows have length 1 to 1e-7, which nearly opposite ones would magnify
    a, b = (functional.normalize(end.double(), dim=1) for end in (first, second))
    if weight is None:
        mixed = torch.where(_from_second(first.shape[1], way, seed), b, a)
    else:
        w = torch.as_tensor(weight, dtype=torch.float64).reshape(-1, 1)
        if not torch.isfinite(w).all() or len(w) not in (1, len(a)):
            raise InputError("interpolation weights must be finite, one in all or one for each row")
        mixed = (1 - w) * a + w * b if way == "linear" else _spherical(a, b, w)
    if (mixed.norm(dim=1) < _DEGENERATE).any():
        raise InputError("these snippets cancel each other: use spherical interpolation")
    return functional.normalize(mixed, dim=1).float()


def _from_second(dim: int, way: Way, seed: int) -> Tensor:
    """Marks the numbers that come from the second vector, shape (D,), bool."""
    order = permutation(dim, seed, "mask") if way == "masked" else torch.arange(dim)
    chosen = torch.zeros(dim, dtype=torch.bool)
    chosen[order[dim // 2 :]] = True
    return chosen


def _spherical(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """Rotates a towards b by the share w of their angle, float64."""
    cosine = (a * b).sum(1, keepdim=True)
    across = b - cosine * a
    sine = across.norm(dim=1, keepdim=True)
    angle = torch.atan2(sine, cosine)
    toward = torch.where(sine > _DEGENERATE, across / sine.clamp(min=_DEGENERATE), _aside(a))
    return (w * angle).cos() * a + (w * angle).sin() * toward


def _aside(a: Tensor) -> Tensor:
    """Returns unit vectors orthogonal to a, shape (B, D): the farthest axis, projected."""
    axis = functional.one_hot(a.abs().argmin(1), a.shape[1]).double()
    return functional.normalize(axis - (a * axis).sum(1, keepdim=True) * a, dim=1)
