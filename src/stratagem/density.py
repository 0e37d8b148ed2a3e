"""Time densities: where training draws its noise levels.

    t = icdf(u),  u uniform in [0, 1)                        the whole axis
    t = icdf(cdf(a) + u (cdf(b) - cdf(a)))                   restricted to [a, b), no rejection

Every density is one cumulative distribution and its inverse, so that the same uniform numbers can
be drawn in strata over the global batch (less variance of the loss) and restricted to a stage of
the noise axis. `mass` of a stage is the share of the training steps that belong to it.

All arithmetic is in float64; `sample` returns the dtype of u.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from stratagem.errors import InputError
from stratagem.randomness import permutation, uniform
from stratagem.schedule import NoiseSchedule

__all__ = ["LogNormalSigma", "LogitNormal", "TimeDensity", "Uniform", "stratified"]


class TimeDensity(ABC):
    """A probability density on t in [0, 1]."""

    @abstractmethod
    def cdf(self, t: Tensor) -> Tensor:
        """Returns P(time <= t), float64, shape of t; cdf(0) = 0 and cdf(1) = 1."""

    @abstractmethod
    def icdf(self, u: Tensor) -> Tensor:
        """Returns the time whose cdf is u, float64, shape of u."""

    def mass(self, interval: tuple[float, float]) -> float:
        """Returns the probability of an interval of time.

        Example:
            >>> Uniform().mass((0.25, 0.75))
            0.5
        """
        low, high = self.cdf(torch.tensor(interval, dtype=torch.float64)).tolist()
        return high - low

    def sample(self, u: Tensor, interval: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Returns times distributed as this density restricted to an interval.

        Args:
            u: Uniform numbers in [0, 1), any shape.
            interval: (t_low, t_high) inside [0, 1].

        Returns:
            Times in the interval, shape and dtype of u.

        Raises:
            InputError: If the interval is not inside [0, 1] or the density puts no mass on it.
        """
        if not 0 <= interval[0] <= interval[1] <= 1:
            raise InputError(f"time density: interval {interval} must lie inside [0, 1]")
        low, high = self.cdf(torch.tensor(interval, dtype=torch.float64)).to(u.device)
        if not high > low:
            raise InputError(
                f"time density: {self} puts no mass on times {interval}: widen one of the two"
            )
        t = self.icdf(low + u.double() * (high - low))
        return t.clamp(*interval).to(u.dtype)


@dataclass(frozen=True)
class Uniform(TimeDensity):
    """All times alike."""

    def cdf(self, t: Tensor) -> Tensor:
        """Returns t."""
        return t.double()

    def icdf(self, u: Tensor) -> Tensor:
        """Returns u."""
        return u.double()


@dataclass(frozen=True)
class LogitNormal(TimeDensity):
    """logit(t) is normal: most steps at middle noise.

        t = sigmoid(mean + std z),  z standard normal

    A positive mean moves mass towards the noise, t = 1.

    Reference: Esser et al. 2024, Eq. 19, arXiv:2403.03206.

    Raises:
        InputError: If std is not above 0.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_std("logit-normal", self.std)

    def cdf(self, t: Tensor) -> Tensor:
        """Returns Phi((logit t - mean) / std)."""
        return torch.special.ndtr((torch.logit(t.double()) - self.mean) / self.std)

    def icdf(self, u: Tensor) -> Tensor:
        """Returns sigmoid(mean + std Phi^-1(u))."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u.double()))


@dataclass(frozen=True)
class LogNormalSigma(TimeDensity):
    """log(sigma / alpha) is normal, cut off where the schedule ends.

        log(sigma_t / alpha_t) = mean + std z,  z standard normal

    Reference: Karras et al. 2022, Table 1 (P_mean, P_std), arXiv:2206.00364.

    Args:
        schedule: What turns noise levels into times.
        mean: P_mean.
        std: P_std.

    Raises:
        InputError: If std is not above 0 or the schedule reaches none of these noise levels.
    """

    schedule: NoiseSchedule
    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _check_std("log-normal sigma", self.std)
        low, high = self._reach()
        if not high > low:
            raise InputError(f"time density: {self} lies outside the noise levels of its schedule")

    def _untruncated(self, t: Tensor) -> Tensor:
        log_sigma = self.schedule.log_snr(t.double()) / -2
        return torch.special.ndtr((log_sigma - self.mean) / self.std)

    def _reach(self) -> tuple[float, float]:
        """The mass below t = 0 and below t = 1: (0, 1) unless the schedule is bounded in noise."""
        low, high = self._untruncated(torch.tensor([0.0, 1.0])).tolist()
        return low, high

    def cdf(self, t: Tensor) -> Tensor:
        """Returns (Phi(t) - Phi(0)) / (Phi(1) - Phi(0)), Phi being the untruncated distribution."""
        low, high = self._reach()
        return (self._untruncated(t) - low) / (high - low)

    def icdf(self, u: Tensor) -> Tensor:
        """Returns the time of the log-sigma at the quantile u."""
        low, high = self._reach()
        log_sigma = self.mean + self.std * torch.special.ndtri(low + u.double() * (high - low))
        return self.schedule.time_of(-2 * log_sigma)


def stratified(num: int, seed: int, purpose: str, *counters: int) -> Tensor:
    """Draws one uniform number from each of num equal strata of [0, 1), in random order.

        u_i = (k_i + r_i) / num,  k a random order of 0 .. num-1,  r uniform

    Args:
        num: The size of the global batch; every process draws all and keeps its own part.
        seed: The user's seed.
        purpose: What the numbers are for.
        counters: Any integers, such as the step.

    Returns:
        Shape (num,), float64.

    Example:
        >>> u = stratified(5, 0, "time", 7)
        >>> sorted((u * 5).long().tolist())
        [0, 1, 2, 3, 4]
    """
    order = permutation(num, seed, f"{purpose}/strata", *counters)
    within = uniform((num,), seed, purpose, *counters)
    return (order + within.double()) / num


def _check_std(name: str, std: float) -> None:
    if not std > 0:
        raise InputError(f"time density {name}: std={std}: give a number above 0")
