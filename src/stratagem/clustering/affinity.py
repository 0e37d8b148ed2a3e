"""How much a network's gradients agree between noise levels: the affinity of Go et al.

    g_a = gradient of the mean loss at time a,    affinity(a, b) = <g_a, g_b> / (|g_a| |g_b|)

(arXiv 2306.00354, task affinity score.) The mean is over many images, the same ones with the same
noise at every time, so that two times differ by their noise level alone.

T gradients of a large network do not fit into memory. Beyond `width` numbers a gradient is
therefore kept as a count sketch: number p is added to bucket h(p) with sign s(p), both random and
common to all times. Inner products of sketches are unbiased, and the standard error of a cosine is
about (1 - cosine^2) / sqrt(width): 0.004 at most for the default width. A smaller gradient is kept
as it is. Memory is one gradient, its buckets, and T x width numbers.

Reference: arXiv 2306.00354; Charikar, Chen and Farach-Colton 2002 (count sketch).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stratagem import randomness
from stratagem.errors import InputError

__all__ = ["gradient_affinity"]


def gradient_affinity(
    loss: Callable[[int, int], Tensor],
    parameters: Sequence[Tensor],
    num_times: int,
    num_batches: int,
    *,
    width: int = 1 << 16,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Returns the cosine of the gradients of each two times, shape (T, T), float64, symmetric.

    Args:
        loss: Maps (time k, batch b) to the mean loss of batch b at time k, a scalar with a graph;
            all batches have equally many images.
        parameters: What the gradient is with respect to.
        num_times: Number of times T.
        num_batches: Batches per time.
        width: Most numbers kept of a gradient.
        seed: Seed of the buckets and signs.
        progress: Called with (batches done, batches in all).

    Raises:
        InputError: If the gradient at a time is zero or not finite.
    """
    keep = _Sketch(parameters, width, seed)
    rows = []
    for k in range(num_times):
        total = [torch.zeros_like(p) for p in parameters]
        for b in range(num_batches):
            grads = torch.autograd.grad(loss(k, b), parameters, allow_unused=True)
            for into, grad in zip(total, grads, strict=True):
                if grad is not None:
                    into.add_(grad)
            if progress is not None:
                progress(k * num_batches + b + 1, num_times * num_batches)
        rows.append(keep(total))
    kept = torch.stack(rows)
    lengths = kept.norm(dim=1)
    wrong = (~(torch.isfinite(lengths) & (lengths > 0))).nonzero()
    if len(wrong):
        raise InputError(
            f"the gradient of time {int(wrong[0])} of {num_times} is {float(lengths[wrong[0]]):g}: "
            "train the network first, or take another checkpoint"
        )
    unit = kept / lengths[:, None]
    return (unit @ unit.T).cpu()


class _Sketch:
    """Keeps a gradient: as it is, or where that is longer than `width`, as a count sketch."""

    def __init__(self, parameters: Sequence[Tensor], width: int, seed: int) -> None:
        self.width = width
        self.maps: list[tuple[Tensor, Tensor]] = []
        if sum(p.numel() for p in parameters) > width:
            for number, p in enumerate(parameters):
                draws = randomness.generator(seed, "gradient sketch", number)
                place = torch.from_numpy(draws.integers(2 * width, size=p.numel(), dtype="int32"))
                place = place.to(p.device)
                self.maps.append((place % width, place >= width))

    def __call__(self, gradient: Sequence[Tensor]) -> Tensor:
        """Returns at most `width` numbers, float64."""
        if not self.maps:
            return torch.cat([g.double().flatten() for g in gradient])
        sums = torch.zeros(self.width, dtype=torch.float64, device=gradient[0].device)
        for g, (bucket, negative) in zip(gradient, self.maps, strict=True):
            flat = g.double().flatten()
            sums.index_add_(0, bucket, torch.where(negative, -flat, flat))
        return sums
