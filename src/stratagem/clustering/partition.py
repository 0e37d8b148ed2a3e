"""Cutting the noise axis: the paper's two thresholds, and exact partitions of a time grid.

Thresholds (arXiv 2312.09181, eq. 6-7), with S0, S1 the agreement with the clean and the noise end:

    t1 = max { tau : mean of S0 over [0, tau] >= alpha }
    t2 = min { tau : mean of S1 over [tau, 1] >= alpha }

S0 need not fall monotonically (it may return to 1 near pure noise), so "max" is read as the first
crossing when one walks away from the end. The paper stops at three stages; `recursive_thresholds`
cuts the middle again, with its own ends t1, t2 as references and the bar that fits it.

Partitions: T cells in a row are cut into K contiguous stages of least total cost, a stage of cells
i..j-1 costing cost[i, j]. A dynamic programme finds the optimum in O(K T^2):

    best_k[j] = min_i best_{k-1}[i] + cost[i, j],    min_cells <= j - i <= max_cells,
                                                     mass of i..j-1 >= min_mass

What differs between criteria is the cost matrix alone: `within_cost` (agreement inside a stage),
`spread_cost` (log-SNR or time), `affinity_cost` (any affinity to the cell in the middle).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stratagem.errors import InputError

__all__ = [
    "affinity_cost",
    "recursive_thresholds",
    "split",
    "spread_cost",
    "thresholds",
    "within_cost",
]


def thresholds(
    times: Tensor, to_clean: Tensor, to_noise: Tensor, alpha: float
) -> tuple[float, float]:
    """Returns the paper's two cuts t1 < t2, which make three stages.

    Args:
        times: Increasing times, an even grid or sorted uniform draws, shape (T,).
        to_clean: Agreement S0 with the clean end, shape (T,).
        to_noise: Agreement S1 with the noise end, shape (T,).
        alpha: Least mean agreement of an end stage with its end, in (0, 1].

    Raises:
        InputError: If an end stage would hold no time or all times, or if the two overlap.

    Reference: arXiv 2312.09181, eq. 6-7 and Algorithm 1.

    Example:
        >>> curve = torch.tensor([1.0, 1.0, 0.4, 0.0, 0.0])
        >>> thresholds(torch.arange(5.0), curve, curve.flip(0), 0.9)
        (1.0, 3.0)
    """
    first, last = _ends(times, to_clean, to_noise, alpha)
    return float(times[first]), float(times[last])


def recursive_thresholds(
    times: Tensor, to_clean: Tensor, to_noise: Tensor, matrix: Tensor, alpha: float, num_stages: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Cuts by `thresholds`, then the middle [t1, t2] again, until there are enough stages.

    In the middle S(t, t1) and S(t, t2) take the place of S0 and S1. There agreement falls within
    few times, so that a bar as high as alpha leaves stages of no length: the bar is half way
    between full agreement and the middle's mean agreement with the end it agrees with more. For an
    even number of stages the innermost has one cut, where its times begin to agree more with its
    noise end than with its clean end (first crossing; no bar).

    Args:
        times: As in `thresholds`, shape (T,).
        to_clean: S0, shape (T,).
        to_noise: S1, shape (T,).
        matrix: S(a, b) of all pairs of times, shape (T, T).
        alpha: Bar of the outermost level.
        num_stages: Number of stages K, at least 1.

    Returns:
        The K-1 cuts, increasing, and the bar of each level, outermost first.

    Raises:
        InputError: If a level cannot be cut.

    Example:
        >>> curve = torch.tensor([1.0, 1.0, 0.4, 0.0, 0.0])
        >>> recursive_thresholds(torch.arange(5.0), curve, curve.flip(0), torch.eye(5), 0.9, 3)
        ((1.0, 3.0), (0.9,))
    """
    low, high, near, far = 0, len(times) - 1, to_clean, to_noise
    left: list[float] = []
    right: list[float] = []
    bars: list[float] = []
    while num_stages > 1:
        part = times[low : high + 1]
        single, inner = num_stages == 2, bool(bars)
        try:
            if single:
                left.append(_crossing(part, near, far))
                break
            bars.append(float(1 + max(near.mean(), far.mean())) / 2 if inner else alpha)
            first, last = _ends(part, near, far, bars[-1])
            if inner and (first == 0 or last == len(part) - 1):
                raise InputError("a stage would hold no time")
        except InputError as error:
            if not inner:
                raise
            raise InputError(
                f"the middle, t = {part[0]:.3f} to {part[-1]:.3f}, cannot be cut by thresholds "
                f"again ({error}): ask for fewer stages or use method 'dp'"
            ) from None
        low, high = low + first, low + last
        left.append(float(times[low]))
        right.append(float(times[high]))
        near, far = matrix[low : high + 1, low], matrix[low : high + 1, high]
        num_stages -= 2
    return (*left, *reversed(right)), tuple(bars)


def _ends(times: Tensor, to_clean: Tensor, to_noise: Tensor, alpha: float) -> tuple[int, int]:
    """Returns the last index of the clean end's stage and the first of the noise end's."""
    first = _reach(to_clean, alpha, "clean") - 1
    last = len(times) - _reach(to_noise.flip(0), alpha, "noise")
    if first >= last:
        raise InputError(
            f"the clean and the noise stage overlap (up to t = {times[first]:.3f}, from "
            f"t = {times[last]:.3f}): raise alpha = {alpha:g} or lower eta"
        )
    return first, last


def _crossing(times: Tensor, to_clean: Tensor, to_noise: Tensor) -> float:
    """Returns the time half a step before the first that agrees more with the noise end."""
    later = (to_noise > to_clean).nonzero()
    if len(later) == 0 or int(later[0]) == 0:
        raise InputError(
            f"{'no' if len(later) == 0 else 'every'} time agrees more with the noise end than with "
            "the clean end: change eta, or use method 'dp'"
        )
    k = int(later[0])
    return float(times[k - 1] + times[k]) / 2


def _reach(agreement: Tensor, alpha: float, end: str) -> int:
    """Returns how many entries from the start have all their running means at alpha or above."""
    running = agreement.double().cumsum(0) / torch.arange(1, len(agreement) + 1)
    below = (running < alpha).nonzero()
    if len(below) == 0:
        raise InputError(
            f"agreement with the {end} end never falls under alpha = {alpha:g} "
            f"(its mean over all times is {running[-1]:.3f}): raise alpha or lower eta, "
            "or take method dp, which needs neither"
        )
    first = int(below[0])
    if first == 0:
        raise InputError(
            f"agreement next to the {end} end is {running[0]:.3f}, under alpha = {alpha:g}: "
            "lower alpha, raise eta, or use method 'dp'"
        )
    return first


def split(
    cost: Tensor,
    num_stages: int,
    *,
    min_cells: int = 1,
    max_cells: int | None = None,
    mass: Tensor | None = None,
    min_mass: float = 0.0,
) -> list[int]:
    """Cuts a row of T cells into contiguous stages of least total cost.

    Exact dynamic programme, O(num_stages T^2). Of equal costs, the earliest last cut wins.

    Args:
        cost: cost[i, j] of one stage of cells i..j-1, shape (T+1, T+1); read for i < j only.
        num_stages: Number of stages K, at least 1.
        min_cells: Fewest cells of a stage, at least 1.
        max_cells: Most cells of a stage; T by default.
        mass: Share of the training draws in each cell, shape (T,); given with `min_mass`.
        min_mass: Least share of the training draws in a stage.

    Returns:
        The K-1 inner cuts, increasing: a stage ends before cell `cut`, the next begins with it.

    Raises:
        InputError: If no partition has these sizes and masses.

    Example:
        >>> split(spread_cost(torch.tensor([0.0, 0.1, 0.2, 5.0, 5.1])), 2)
        [3]
    """
    num_cells = len(cost) - 1
    max_cells = num_cells if max_cells is None else max_cells
    if num_stages < 1 or not num_stages * min_cells <= num_cells <= num_stages * max_cells:
        raise InputError(
            f"cannot cut {num_cells} cells into {num_stages} stages of {min_cells} to {max_cells} "
            "cells: ask for fewer stages or more times"
        )
    index = torch.arange(num_cells + 1)
    size = index[None, :] - index[:, None]
    allowed = (size >= max(1, min_cells)) & (size <= max_cells)
    if mass is not None:
        upto = torch.zeros(num_cells + 1, dtype=torch.float64)
        upto[1:] = mass.double().cumsum(0)
        # A hair lower, so that K equal stages may each have 1 / K.
        allowed &= upto[None, :] - upto[:, None] >= min_mass - 1e-9
    step = torch.where(allowed, cost.double(), torch.inf)
    best = torch.full((num_cells + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0.0
    origins = []
    for _ in range(num_stages):
        total = (best[:, None] + step).numpy()
        # numpy's argmin takes the first of equal values; torch's promises nothing.
        origins.append(total.argmin(axis=0))
        best = torch.from_numpy(total.min(axis=0))
    if torch.isinf(best[-1]):
        raise InputError(
            f"cannot cut {num_cells} cells into {num_stages} stages that each get {min_mass:g} of "
            "the training draws: ask for fewer stages or a smaller share"
        )
    cuts, j = [], num_cells
    for origin in reversed(origins):
        j = int(origin[j])
        cuts.append(j)
    return cuts[-2::-1]


def within_cost(similarity: Tensor, *, by_size: bool = True) -> Tensor:
    """Returns cost[i, j] = -w mean of similarity[i:j, i:j] with its diagonal, (T, T) -> (T+1, T+1).

    With `by_size`, w = (j - i) / T: the total is the mean over all cells of a cell's agreement with
    a random cell of its own stage, negated. Without, w = 1, the objective of the code released with
    arXiv 2312.09181: a single cell, which agrees with itself, then counts as much as a long stage,
    so `split` needs a least size, and its stages tend to have just that.

    Example:
        >>> within_cost(torch.ones(4, 4))[0].tolist()  # of the first 0 .. 4 cells
        [-0.0, -0.25, -0.5, -0.75, -1.0]
    """
    num_cells = len(similarity)
    corner = torch.zeros(num_cells + 1, num_cells + 1, dtype=torch.float64)
    corner[1:, 1:] = similarity.double().cumsum(0).cumsum(1)  # corner[i, j] = sum of [:i, :j]
    own = corner.diagonal()
    block = own[None, :] - corner - corner.T + own[:, None]
    index = torch.arange(num_cells + 1)
    size = (index[None, :] - index[:, None]).clamp(min=1)
    return -block / (size * num_cells if by_size else size.square())


def spread_cost(values: Tensor) -> Tensor:
    """Returns cost[i, j] = sum over cells c of |values[c] - values[middle]|, (T,) -> (T+1, T+1).

    `middle` is cell (i + j) // 2. With values = log-SNR this is the SNR clustering of
    arXiv 2306.00354; with values = t, the even one.

    Args:
        values: One number per cell, increasing or decreasing, finite, shape (T,).

    Example:
        >>> spread_cost(torch.tensor([0.0, 1.0, 3.0]))[0].tolist()  # of the first 0 .. 3 cells
        [0.0, 0.0, 1.0, 3.0]
    """
    num_cells = len(values)
    prefix = torch.zeros(num_cells + 1, dtype=torch.float64)
    prefix[1:] = values.double().cumsum(0)
    index = torch.arange(num_cells + 1)
    i, j = index[:, None], index[None, :]
    middle = ((i + j) // 2).clamp(max=num_cells - 1)
    # Monotone values: those before the middle lie on one side of it, those after on the other.
    centre = values.double()[middle]
    before = (middle - i) * centre - (prefix[middle] - prefix[i])
    after = (prefix[j] - prefix[middle]) - (j - middle) * centre
    return (before + after).abs()


def affinity_cost(affinity: Tensor) -> Tensor:
    """Returns cost[i, j] = -sum over cells c of affinity[middle, c], (T, T) -> (T+1, T+1).

    `middle` is cell (i + j) // 2: interval clustering of arXiv 2306.00354 for any task affinity,
    such as the cosine of gradients.

    Example:
        >>> affinity_cost(torch.ones(3, 3))[0].tolist()  # of the first 0 .. 3 cells
        [0.0, -1.0, -2.0, -3.0]
    """
    num_cells = len(affinity)
    prefix = torch.zeros(num_cells, num_cells + 1, dtype=torch.float64)
    prefix[:, 1:] = affinity.double().cumsum(1)
    index = torch.arange(num_cells + 1)
    i, j = index[:, None], index[None, :]
    middle = ((i + j) // 2).clamp(max=num_cells - 1)
    return prefix[middle, i] - prefix[middle, j]
