"""Which stages a batch holds: shares of the stages, quotas or one stage, and weights.

    p_k   mass of stage k under the density       q_k   its share of the rows, by a policy
    w_k   weight of its rows, such that           E mean_i w_i loss_i = sum_k target_k E_k[loss]

with target = q, or p where `unbiased` asks that only the variance may change. A mixed batch of n
rows has fixed quotas n_k ~ n q_k, sorted by stage, and w_k = target_k n / n_k, so that the rounding
to whole rows costs nothing. A single batch is all in one stage, drawn with q_k, w_k = target_k /
q_k. Both have the same expected gradient; within a stage t is drawn by inverse CDF.

Policies: q = p ("density"), 1/K ("uniform"), or "loss", the shares of least variance. One row of
stage k adds (p_k / q_k) g to an estimate of the density's gradient, whose second moment

    sum_k p_k^2 E_k|g|^2 / q_k    is least at    q_k ~ p_k sqrt(E_k|g|^2)     (Cauchy-Schwarz)

A squared error has g = 2 J^T r with |r|^2 ~ loss, so with a Jacobian alike in all stages q_k ~ p_k
sqrt(E_k[loss]): mass times the root-mean-square of the error. (The root-mean-square of the loss,
arXiv 2102.09672 eq. 18, would be best for the loss itself, not for its gradient.) A tenth of p is
mixed in, so that no row weighs more than 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stratagem.density import TimeDensity, stratified
from stratagem.errors import InputError
from stratagem.randomness import uniform

__all__ = ["WINDOW", "LossHistory", "Rows", "StageDraw", "least_variance", "quotas", "stage_sums"]

WINDOW = 100  # steps between changes of the shares, and how far ahead batches may be made
_FLOOR = 0.1  # share of p in the policy "loss"
_FORGET = 0.5  # of the loss of earlier windows
_GOLDEN = (5**0.5 - 1) / 2


class Rows(NamedTuple):
    """What a batch knows of its stages.

    Attributes:
        t: Times, (B,), float64, rows of stage 0 first.
        counts: Rows of each stage, known without asking a device.
        weight: Weight of each row's losses, (B,), float64.
    """

    t: Tensor
    counts: tuple[int, ...]
    weight: Tensor


def stage_sums(losses: Tensor, counts: Sequence[int]) -> Tensor:
    """Returns the sum of the losses (B,) of each stage, (K,), of rows sorted by stage.

    Example:
        >>> stage_sums(torch.tensor([1.0, 2.0, 4.0]), (2, 0, 1))
        tensor([3., 0., 4.])
    """
    return torch.stack([part.sum() for part in losses.detach().split(list(counts))])


class LossHistory:
    """The measured loss of each stage, and the shares that follow from it.

    Sums grow on the device and are read once per window of `WINDOW` steps. The shares of a window
    come from the windows before the last one, so a batch may be made up to `WINDOW` steps early.

    Args:
        masses: Mass of each stage; the shares until losses of all stages are known.
    """

    def __init__(self, masses: Sequence[float]) -> None:
        self._masses = tuple(masses)
        self._sums = torch.zeros(len(self._masses))
        self._rows = [0] * len(self._masses)
        self._mean: list[float | None] = [None] * len(self._masses)
        self._shares: dict[int, tuple[float, ...]] = {}

    def shares(self, step: int) -> tuple[float, ...]:
        """Returns the shares of optimizer step `step`."""
        window = step // WINDOW
        return self._masses if window < 2 else self._shares[window]

    def note(self, step: int, sums: Tensor, counts: Sequence[int]) -> None:
        """Takes the losses of a step; those of a window are read after its last step.

        Args:
            step: Optimizer step.
            sums: `stage_sums` of the whole batch, (K,).
            counts: Rows of each stage in the whole batch.
        """
        self._sums = self._sums.to(sums.device) + sums
        self._rows = [a + b for a, b in zip(self._rows, counts, strict=True)]
        if (step + 1) % WINDOW == 0:
            self._turn(step // WINDOW)

    def _turn(self, window: int) -> None:
        for k, (total, rows) in enumerate(zip(self._sums.tolist(), self._rows, strict=True)):
            old = self._mean[k]
            if rows:
                new = total / rows
                self._mean[k] = new if old is None else _FORGET * old + (1 - _FORGET) * new
        self._sums = torch.zeros_like(self._sums)
        self._rows = [0] * len(self._rows)
        known = [mean for mean in self._mean if mean is not None]
        shares = self._masses
        if len(known) == len(self._masses):
            shares = least_variance(self._masses, known)
        kept = {w: s for w, s in self._shares.items() if w > window}
        self._shares = {**kept, window + 2: shares}

    def state(self) -> tuple[Tensor, dict[str, Any]]:
        """Returns what a checkpoint holds: sums (K,), and the rest, JSON-able."""
        shares = {str(window): list(values) for window, values in self._shares.items()}
        return self._sums, {"rows": self._rows, "mean": self._mean, "shares": shares}

    def restore(self, sums: Tensor, state: dict[str, Any]) -> None:
        """Takes over `state`."""
        self._sums = sums.clone()
        self._rows, self._mean = list(state["rows"]), list(state["mean"])
        self._shares = {int(window): tuple(v) for window, v in state["shares"].items()}


@dataclass(frozen=True)
class StageDraw:
    """Draws the times of a batch, stage by stage; a pure function of (seed, step, shares).

    Attributes:
        density: Where times are drawn.
        intervals: The times (low, high) of each stage.
        policy: Whose shares: "density", "uniform" or "loss".
        batch: "mixed", or "single" for one stage per step.
        unbiased: Whether weights make the expected loss that of the density.
        warm_steps: For so many steps one decoder serves all stages.
        warm_decoder: Which.
        tie: How tightly the decoders' gradients are tied from then on, see `nets.warm_start`.
        masses: Mass of each stage under the density.
        history: The losses, for the policy "loss".

    Raises:
        InputError: If the density puts no mass on a stage.
    """

    density: TimeDensity
    intervals: tuple[tuple[float, float], ...]
    policy: Literal["density", "uniform", "loss"] = "density"
    batch: Literal["mixed", "single"] = "mixed"
    unbiased: bool = False
    warm_steps: int = 0
    warm_decoder: int = 0
    tie: float = 0.0
    masses: tuple[float, ...] = field(init=False)
    history: LossHistory | None = field(init=False)

    def __post_init__(self) -> None:
        masses = tuple(self.density.mass(interval) for interval in self.intervals)
        object.__setattr__(self, "masses", masses)
        history = LossHistory(masses) if self.policy == "loss" else None
        object.__setattr__(self, "history", history)
        for k, (mass, (low, high)) in enumerate(zip(masses, self.intervals, strict=True)):
            if not mass > 0:
                raise InputError(
                    f"stage {k} (t from {low:.4g} to {high:.4g}) has no mass under the density "
                    f"{self.density}: choose a wider density or other stages"
                )

    def shares(self, step: int) -> tuple[float, ...]:
        """Returns the share of each stage in the rows of step `step`."""
        if self.history is not None:
            return self.history.shares(step)
        num = len(self.intervals)
        return self.masses if self.policy == "density" else (1 / num,) * num

    def rows(self, num: int, seed: int, step: int) -> Rows:
        """Returns times, counts and weights of the `num` rows of step `step`."""
        shares = self.shares(step)
        if self.batch == "single":
            stage = _stage_of_step(shares, seed, step)
            counts = tuple(num if k == stage else 0 for k in range(len(shares)))
            drawn: Sequence[float] = shares  # the share that each stage has on average
        else:
            counts = quotas(shares, num)
            drawn = [count / num for count in counts]
        target = self.masses if self.unbiased else shares
        ratios = [a / b for a, b in zip(target, drawn, strict=True)]
        weights = torch.tensor(ratios, dtype=torch.float64)
        t = [
            self.density.sample(stratified(count, seed, "time", step, k), interval)
            for k, (count, interval) in enumerate(zip(counts, self.intervals, strict=True))
        ]
        return Rows(torch.cat(t), counts, weights.repeat_interleave(torch.tensor(counts)))

    def route(self, counts: tuple[int, ...], step: int) -> int | tuple[int, ...]:
        """Returns what `MultiDecoder` takes as stage: the one decoder of the warm start, or rows.

        Example:
            >>> from stratagem.density import Uniform
            >>> draw = StageDraw(Uniform(), ((0.0, 0.5), (0.5, 1.0)), warm_steps=10, warm_decoder=1)
            >>> draw.route((3, 3), 9), draw.route((3, 3), 10)
            (1, (3, 3))
        """
        return self.warm_decoder if step < self.warm_steps else counts


def quotas(shares: Sequence[float], num: int) -> tuple[int, ...]:
    """Returns whole numbers near num * shares that sum to num, each at least 1.

    Raises:
        InputError: If there are fewer rows than stages.

    Example:
        >>> quotas((0.96, 0.035, 0.005), 64)
        (61, 2, 1)
    """
    if num < len(shares):
        raise InputError(
            f"train.batch_size {num} cannot mix {len(shares)} stages: make it at least "
            f"{len(shares)}, or choose stages.batch single"
        )
    wanted = [num * share for share in shares]
    counts = [max(1, int(rows)) for rows in wanted]
    while (missing := num - sum(counts)) != 0:
        sign = 1 if missing > 0 else -1
        movable = [k for k, count in enumerate(counts) if count + sign >= 1]
        counts[max(movable, key=lambda k: sign * (wanted[k] - counts[k]))] += sign
    return tuple(counts)


def least_variance(masses: Sequence[float], losses: Sequence[float]) -> tuple[float, ...]:
    """Returns shares ~ mass sqrt(mean loss), with a tenth of the masses mixed in.

    Example:
        >>> [round(share, 3) for share in least_variance((0.5, 0.5), (4.0, 1.0))]
        [0.65, 0.35]
    """
    sizes = [mass * loss**0.5 for mass, loss in zip(masses, losses, strict=True)]
    total = sum(sizes) or 1.0
    rest = 1 - _FLOOR if sum(sizes) else 0.0
    mixed = [_FLOOR * p + rest * size / total for p, size in zip(masses, sizes, strict=True)]
    return tuple(share / sum(mixed) for share in mixed)


def _stage_of_step(shares: Sequence[float], seed: int, step: int) -> int:
    """Inverse CDF of u = u_0 + step * golden ratio (mod 1): of the shares, and evenly in time."""
    u = (float(uniform((1,), seed, "stage")) + step * _GOLDEN) % 1.0
    below = [edge <= u for edge in accumulate(shares)]
    return min(sum(below), len(shares) - 1)
