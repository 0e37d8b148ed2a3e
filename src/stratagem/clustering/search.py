"""From what is known of the noise levels to stages: which of them belong together.

    optimal-denoiser   the two thresholds of arXiv 2312.09181, eq. 6-7, and their recursion
    dp                 most agreement inside the stages, exactly, each with its share of the draws
    gradient           most agreement of a network's gradients with the middle (a baseline)
    snr                least spread of log-SNR inside the stages (needs no data; a baseline)
    uniform            equal lengths in time (needs no data; a baseline)

The first two want the agreement of the optimal denoisers (`similarity`), the third the affinity of
a trained network (`affinity`). Times are the centres of `num_times` equal cells of (0, 1), so the
schedule is the measure in which a stage is long or short; the edges found are log-SNRs and carry
over to other schedules. The baselines' stages hold T / 2K to 3T / 2K cells (arXiv 2306.00354).

The paper's main text does not give alpha. With 0.9 and eta 2/255 in eps space, CIFAR-10 scaled to
[0, 1], as its code has it, is cut under VP at t = 0.435 and 0.635 (paper: 0.442, 0.631). On [-1, 1]
each noise level sits at twice the sigma.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from stratagem.clustering.partition import (
    affinity_cost,
    recursive_thresholds,
    split,
    spread_cost,
    within_cost,
)
from stratagem.clustering.similarity import Similarity
from stratagem.density import TimeDensity
from stratagem.errors import InputError
from stratagem.schedule import NoiseSchedule
from stratagem.stages import Stages

__all__ = ["Axis", "Method", "StageSearch", "check_search", "find_stages", "share_of_draws"]

Method = Literal["optimal-denoiser", "dp", "gradient", "snr", "uniform"]

# A stage with less than one training draw in a million is never trained.
_LEAST_SHARE = 1e-6


@dataclass(frozen=True)
class Axis:
    """The noise axis that is cut.

    Attributes:
        schedule: Turns time into noise levels, and is the measure of time.
        density: Where training draws its times.
        num_times: Number of equal cells of time, T.
    """

    schedule: NoiseSchedule
    density: TimeDensity
    num_times: int = 100

    @property
    def times(self) -> Tensor:
        """The centres of the cells, shape (T,), float64."""
        return (torch.arange(self.num_times, dtype=torch.float64) + 0.5) / self.num_times

    @property
    def cell_mass(self) -> Tensor:
        """The share of the training draws in each cell, shape (T,)."""
        bounds = torch.arange(self.num_times + 1, dtype=torch.float64) / self.num_times
        return self.density.cdf(bounds).diff()


@dataclass(frozen=True)
class StageSearch:
    """Stages and how they were found.

    Attributes:
        stages: The stages.
        method: How they were found.
        parameters: The settings that had an effect, JSON-able.
        evidence: What the method looked at: curves, affinity (T, T), or None.
    """

    stages: Stages
    method: Method
    parameters: dict[str, Any]
    evidence: Similarity | Tensor | None = None

    def record(self) -> dict[str, Any]:
        """Returns a JSON-able account of the search, as `Stages.save` takes it."""
        record: dict[str, Any] = {"method": self.method, "parameters": self.parameters}
        if isinstance(self.evidence, Similarity):
            record["curves"] = {k: _rounded(v) for k, v in vars(self.evidence).items()}
        elif self.evidence is not None:
            record["affinity"] = _rounded(self.evidence)
        return record


def find_stages(
    axis: Axis,
    num_stages: int = 3,
    method: Method = "optimal-denoiser",
    evidence: Similarity | Tensor | None = None,
    *,
    alpha: float = 0.9,
    min_mass: float = 0.05,
) -> StageSearch:
    """Cuts the noise axis into stages.

    Args:
        axis: The noise axis.
        num_stages: Number of stages.
        method: See the module's text.
        evidence: What the method looks at, over `axis.times`: the agreement of the optimal
            denoisers ("optimal-denoiser", "dp"), an affinity (T, T) ("gradient"), or None.
        alpha: Least mean agreement of an end stage with its end ("optimal-denoiser" only).
        min_mass: Least share of the training draws in a stage ("dp" only).

    Raises:
        InputError: If a setting is out of range, the evidence gives no such stages, or one of them
            gets no training draws.
    """
    check_search(axis, num_stages, method, alpha=alpha, min_mass=min_mass)
    parameters: dict[str, Any] = {
        "num_stages": num_stages,
        "schedule": repr(axis.schedule),
        "density": repr(axis.density),
    }
    if method != "uniform":
        parameters["num_times"] = axis.num_times
    if method == "optimal-denoiser":
        assert isinstance(evidence, Similarity)
        s = evidence
        edges, bars = recursive_thresholds(
            axis.times, s.to_clean, s.to_noise, s.matrix, alpha, num_stages
        )
        parameters["alphas"] = list(bars)
    else:
        edges = _cut(axis, num_stages, method, evidence, min_mass)
        parameters |= {"min_mass": min_mass} if method == "dp" else {}
    log_snr = axis.schedule.log_snr(torch.tensor(edges, dtype=torch.float64))
    stages = Stages(tuple(log_snr.tolist()))
    for k, share in enumerate(share_of_draws(stages, axis.density, axis.schedule)):
        if share < _LEAST_SHARE:
            low, high = stages.time_interval(k, axis.schedule)
            raise InputError(
                f"stage {k} (t = {low:.3f} to {high:.3f}) gets {share:.1g} of the training draws "
                f"under {axis.density}: choose another density, fewer stages or method 'dp'"
            )
    return StageSearch(stages, method, parameters, evidence)


def check_search(
    axis: Axis, num_stages: int, method: str, *, alpha: float = 0.9, min_mass: float = 0.05
) -> None:
    """Refuses what `find_stages` would refuse whatever the evidence, before it is looked for.

    Raises:
        InputError: If a setting is out of range.
    """
    if method not in get_args(Method):
        raise InputError(f"no method {method!r}: choose one of {', '.join(get_args(Method))}")
    if num_stages < 1:
        raise InputError(f"{num_stages} stages: ask for at least 1")
    if axis.num_times < num_stages:
        raise InputError(
            f"{axis.num_times} times for {num_stages} stages: ask for more, better 100"
        )
    if not 0 < alpha <= 1:
        raise InputError(f"alpha = {alpha}: give a number in (0, 1]")
    if method == "dp" and not 0 <= min_mass * num_stages <= 1:
        raise InputError(
            f"a least share of {min_mass:g} for each of {num_stages} stages: give one from 0 to "
            f"{1 / num_stages:.3g}"
        )


def share_of_draws(
    stages: Stages, density: TimeDensity, schedule: NoiseSchedule
) -> tuple[float, ...]:
    """Returns the share of training draws that falls into each stage, K numbers of sum 1.

    Example:
        >>> from stratagem.density import Uniform
        >>> from stratagem.schedule import Linear
        >>> share_of_draws(Stages((0.0,)), Uniform(), Linear())
        (0.5, 0.5)
    """
    intervals = (stages.time_interval(k, schedule) for k in range(stages.num))
    return tuple(density.mass(interval) for interval in intervals)


def _cut(
    axis: Axis,
    num_stages: int,
    method: Method,
    evidence: Similarity | Tensor | None,
    min_mass: float,
) -> tuple[float, ...]:
    """Returns the K-1 increasing times at which a method other than the thresholds cuts."""
    num_times = axis.num_times
    if method == "uniform":
        return tuple(k / num_stages for k in range(1, num_stages))
    if method == "dp":
        assert isinstance(evidence, Similarity)
        cost = within_cost(evidence.matrix)
        cuts = split(cost, num_stages, mass=axis.cell_mass, min_mass=min_mass)
    else:  # interval clustering, arXiv 2306.00354
        if method == "gradient":
            assert isinstance(evidence, Tensor)
            cost = affinity_cost(evidence)
        else:
            cost = spread_cost(axis.schedule.log_snr(axis.times))
        fewest, most = num_times // (2 * num_stages), -(-3 * num_times // (2 * num_stages))
        cuts = split(cost, num_stages, min_cells=max(1, fewest), max_cells=most)
    return tuple(cut / num_times for cut in cuts)


def _rounded(values: Tensor) -> Any:
    # Four digits: far below the sampling error, and the file stays small.
    return values.double().cpu().round(decimals=4).tolist()
