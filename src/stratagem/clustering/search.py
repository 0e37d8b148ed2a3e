"""From a data set to stages: which noise levels belong together.

    optimal-denoiser   the two thresholds of arXiv 2312.09181, eq. 6-7: always three stages
    dp                 most agreement inside the stages, exactly, for any number of them
    snr                least spread of log-SNR inside the stages (needs no data; a baseline)
    uniform            equal lengths in time (needs no data; a baseline)

The first two look at the data through the optimal denoiser. Times are the centres of `num_times`
equal cells of (0, 1), so the schedule is the measure in which a stage is long or short; the edges
found are log-SNRs and carry over to other schedules.

Defaults. eta = 2/255 is that of the paper's code; noise estimates have unit variance, so it does
not depend on the range of the data. The paper's main text does not give alpha. With 0.9, CIFAR-10
scaled to [0, 1], as that code has it, is cut under VP at t = 0.435 and 0.635 (paper: 0.442, 0.631).
On [-1, 1] each noise level sits at twice the sigma.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from stratagem.clustering.optimal_denoiser import OptimalDenoiser
from stratagem.clustering.partition import split, spread_cost, thresholds, within_cost
from stratagem.clustering.similarity import Similarity, similarity
from stratagem.density import TimeDensity
from stratagem.errors import InputError
from stratagem.schedule import NoiseSchedule
from stratagem.stages import Stages

__all__ = ["Method", "StageSearch", "find_stages", "share_of_draws"]

Method = Literal["optimal-denoiser", "dp", "snr", "uniform"]


@dataclass(frozen=True)
class StageSearch:
    """Stages and how they were found.

    Attributes:
        stages: The stages.
        method: How they were found.
        parameters: The settings that had an effect, JSON-able.
        curves: The agreement of the noise levels; None for methods that do not look at the data.
    """

    stages: Stages
    method: Method
    parameters: dict[str, Any]
    curves: Similarity | None

    def record(self) -> dict[str, Any]:
        """Returns a JSON-able account of the search, as `Stages.save` takes it."""
        record: dict[str, Any] = {"method": self.method, "parameters": self.parameters}
        if self.curves is not None:
            curves = {name: value.double() for name, value in vars(self.curves).items()}
            # Four digits: far below the sampling error, and the file stays small.
            record["curves"] = {name: v.round(decimals=4).tolist() for name, v in curves.items()}
        return record


def find_stages(
    images: Tensor,
    schedule: NoiseSchedule,
    num_stages: int = 3,
    method: Method = "optimal-denoiser",
    *,
    eta: float = 2 / 255,
    alpha: float = 0.9,
    num_samples: int = 256,
    num_times: int = 100,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> StageSearch:
    """Cuts the noise axis of a data set into stages.

    Args:
        images: Images in [-1, 1] or latents, shape (N, C, H, W), float32 or float64.
        schedule: Turns time into noise levels, and is the measure of time.
        num_stages: Number of stages; "optimal-denoiser" makes three.
        method: See the module's text.
        eta: Largest difference of two noise estimates that counts as agreement.
        alpha: Least mean agreement of an end stage with its end ("optimal-denoiser" only).
        num_samples: Number of (image, noise) draws.
        num_times: Number of time cells T.
        seed: Seed of the draws.
        progress: Called with (draws done, draws in all).

    Raises:
        InputError: If a setting is out of range, or the data give no such stages.
    """
    _check(num_stages, method, eta, alpha, num_samples, num_times)
    times = (torch.arange(num_times, dtype=torch.float64) + 0.5) / num_times
    parameters: dict[str, Any] = {"num_stages": num_stages, "schedule": repr(schedule)}
    curves = None
    if method in ("optimal-denoiser", "dp"):
        denoiser = OptimalDenoiser(images, schedule)
        curves = similarity(
            denoiser, times, num_samples=num_samples, eta=eta, seed=seed, progress=progress
        )
        parameters |= {"num_images": len(images), "eta": eta, "num_samples": num_samples}
        parameters |= {"seed": seed}
    if method != "uniform":
        parameters |= {"num_times": num_times}
    if method == "optimal-denoiser":
        parameters |= {"alpha": alpha}
    edges = _edge_times(method, num_stages, times, schedule, curves, alpha)
    log_snr = schedule.log_snr(torch.tensor(edges, dtype=torch.float64))
    return StageSearch(Stages(tuple(log_snr.tolist())), method, parameters, curves)


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


def _edge_times(
    method: Method,
    num_stages: int,
    times: Tensor,
    schedule: NoiseSchedule,
    curves: Similarity | None,
    alpha: float,
) -> tuple[float, ...]:
    """Returns the K-1 increasing times at which a method cuts."""
    num_times = len(times)
    if method == "optimal-denoiser":
        assert curves is not None
        return thresholds(times, curves.to_clean, curves.to_noise, alpha)
    if method == "uniform":
        return tuple(k / num_stages for k in range(1, num_stages))
    if method == "dp":
        assert curves is not None
        cuts = split(within_cost(curves.matrix), num_stages)
    else:  # the size limits are those of interval clustering, arXiv 2306.00354
        fewest, most = num_times // (2 * num_stages), -(-3 * num_times // (2 * num_stages))
        cost = spread_cost(schedule.log_snr(times))
        cuts = split(cost, num_stages, min_cells=max(1, fewest), max_cells=most)
    return tuple(cut / num_times for cut in cuts)


def _check(
    num_stages: int, method: str, eta: float, alpha: float, num_samples: int, num_times: int
) -> None:
    if method not in get_args(Method):
        raise InputError(f"no method {method!r}: choose one of {', '.join(get_args(Method))}")
    if num_stages < 1:
        raise InputError(f"num_stages = {num_stages}: ask for at least 1")
    if method == "optimal-denoiser" and num_stages != 3:
        raise InputError(
            f"method 'optimal-denoiser' has two thresholds and makes 3 stages, not {num_stages}: "
            "use method 'dp' for other numbers"
        )
    if not eta > 0:
        raise InputError(f"eta = {eta}: give a number above 0")
    if not 0 < alpha <= 1:
        raise InputError(f"alpha = {alpha}: give a number in (0, 1]")
    if num_samples < 2:
        raise InputError(f"num_samples = {num_samples}: ask for at least 2, better 100 or more")
    if num_times < num_stages:
        raise InputError(f"num_times = {num_times}: ask for more than stages, better 100")
