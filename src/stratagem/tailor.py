"""Decoders tailored to their stages: as much compute as a stage is difficult, within a budget.

How far the best estimate is from one that knows only the data mean says how much there is to know
at a noise level; near the noise the two agree, and a thin decoder will do (arXiv 2312.09181,
section 4, which chose its decoders by hand). With the agreement curve of `clustering.similarity`:

    difficulty_k = mean over the times of stage k of 1 - to_noise(t)

    size_k(scale) = largest decoder with MACs <= scale * difficulty_k, or the smallest there is
    mean(scale)   = shared + sum_k share_k MACs(size_k),    share_k: how often stage k is met

The scale chosen is the largest whose mean is within the budget. Sizes are steps, so the search over
the finitely many scales at which one of them grows is exact. A more difficult stage never gets a
smaller decoder, equal ones get equal decoders, and no decoder shrinks when the budget grows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from stratagem.errors import InputError
from stratagem.stages import Stages

__all__ = ["Measure", "Setting", "Tailoring", "difficulty", "tailor"]

Measure = Literal["draws", "calls"]
Setting = Literal["depths", "widths"]


@dataclass(frozen=True)
class Tailoring:
    """The decoders chosen, and why; lists go from the data to the noise.

    Attributes:
        setting: What a size is: that of a decoder in stages.depths or in stages.widths.
        sizes: Size of each decoder.
        difficulty: Difficulty of each stage.
        measure: What the shares count: training draws, or calls of a sampler.
        shares: How often each stage is met; sum 1.
        relative: MACs of a call in each stage, over those of the unified network.
        budget: What the mean of `relative` must not exceed.
    """

    setting: Setting
    sizes: tuple[int, ...]
    difficulty: tuple[float, ...]
    measure: Measure
    shares: tuple[float, ...]
    relative: tuple[float, ...]
    budget: float

    @property
    def mean(self) -> float:
        """MACs of a call, mean over the shares, over those of the unified network."""
        return sum(s * r for s, r in zip(self.shares, self.relative, strict=True))

    def record(self) -> dict[str, Any]:
        """Returns all of it, JSON-able."""
        listed = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        return {**listed, "mean": self.mean}

    def lines(self) -> list[str]:
        """Says what was chosen and why, a line for all and one for each stage."""
        first = (
            f"stages.{self.setting}: {list(self.sizes)}, in proportion to difficulty: a call costs "
            f"{self.mean:.3f} of the unified network's MACs, mean over {self.measure} "
            f"(stages.budget {self.budget:g})"
        )
        rows = zip(self.sizes, self.difficulty, self.shares, self.relative, strict=True)
        return [first] + [
            f"  stage {k}: {self.setting[:-1]} {size}, for difficulty {hard:.3f}; "
            f"{share:.1%} of {self.measure}, each {cost:.3f} of the unified network's MACs"
            for k, (size, hard, share, cost) in enumerate(rows)
        ]


def difficulty(stages: Stages, curves: Mapping[str, Any]) -> tuple[float, ...]:
    """Returns the difficulty of each stage, K numbers in [0, 1].

    Args:
        stages: The stages.
        curves: The record of a search: lists log_snr and to_noise, one entry per time.

    Raises:
        InputError: If no time of the curves lies in a stage.

    Example:
        >>> difficulty(Stages((0.0,)), {"log_snr": [4, 2, -2], "to_noise": [0.25, 0.5, 1.0]})
        (0.625, 0.0)
    """
    stage = stages.index(torch.tensor(curves["log_snr"], dtype=torch.float64))
    unknown = 1 - torch.tensor(curves["to_noise"], dtype=torch.float64)
    for k in range(stages.num):
        if not (stage == k).any():
            raise InputError(
                f"stage {k} lies between two times of the similarity curves, so its difficulty is "
                "not known: find wider stages, or choose the decoders by hand"
            )
    return tuple(float(unknown[stage == k].mean()) for k in range(stages.num))


def tailor(
    difficulty: Sequence[float],
    shares: Sequence[float],
    shared: float,
    decoders: Iterable[tuple[int, float]],
    budget: float,
) -> tuple[tuple[int, float], ...]:
    """Chooses the decoders of K stages; all MACs are over those of the unified network.

    Args:
        difficulty: Of each stage, at least 0.
        shares: How often each stage is met, above 0, sum 1.
        shared: MACs of the part that all stages share.
        decoders: (size, MACs) of the decoders there are, from the smallest up; may be endless.
        budget: Most MACs of a call, mean over the shares.

    Returns:
        (size, MACs) of each stage's decoder.

    Raises:
        InputError: If even the smallest decoders exceed the budget.

    Example:
        >>> tailor([0.75, 0.25], [0.25, 0.75], 0.5, [(n, n / 4) for n in range(1, 9)], 1.0)
        ((5, 1.25), (1, 0.25))
    """
    ladder: list[tuple[int, float]] = []
    source = iter(decoders)

    def macs(rung: int) -> float:
        """MACs of a decoder of the ladder, which is climbed as far as it is asked for."""
        while len(ladder) <= rung:
            found = next(source, None)
            if found is None:
                return math.inf
            ladder.append(found)
        return ladder[rung][1]

    def mean(rungs: Sequence[int]) -> float:
        return shared + sum(s * macs(r) for s, r in zip(shares, rungs, strict=True))

    rungs = [0] * len(difficulty)
    if mean(rungs) > budget:
        raise InputError(
            f"stages.budget is {budget:g}, but with the smallest decoders a call already costs "
            f"{mean(rungs):.3f} of the unified network's MACs: raise it, or let stages share less"
        )
    while True:
        # The scales at which each decoder reaches its next size; those of the least grow at once.
        pairs = zip(rungs, difficulty, strict=True)
        scales = [macs(r + 1) / hard if hard > 0 else math.inf for r, hard in pairs]
        grown = [r + (s == min(scales)) for r, s in zip(rungs, scales, strict=True)]
        if math.isinf(min(scales)) or mean(grown) > budget:
            return tuple(ladder[r] for r in rungs)
        rungs = grown
