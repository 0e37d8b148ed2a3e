"""Noise schedules: how much signal and how much noise a sample holds at time t.

    x_t = alpha_t x + sigma_t eps,    t in [0, 1],  0 = clean,  1 = noise

    log_snr(t) = log(alpha_t^2 / sigma_t^2)            falls with t
    velocity   = dx_t/dt = alpha_t' x + sigma_t' eps   (for fixed x and eps)

Two schedules differ only in where they put a noise level on the time axis and in how they scale
x_t: x_t / alpha_t depends on sigma_t / alpha_t (the "EDM sigma") alone. That is why stages and time
grids are expressed in log-SNR and carried from one schedule to another by `time_of`.

Ends: sigma(0) = 0 everywhere but for EDM, whose t = 0 still holds sigma_min of noise, and for
SqrtLinear, whose t = 0 is the first of its steps; alpha(1) = 0 for Linear and Cosine only. Near
t = 0 the sigma of VP is taken from expm1, so nothing cancels.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from stratagem.errors import InputError

__all__ = ["EDM", "VP", "Cosine", "Linear", "NoiseSchedule", "SqrtLinear", "expand"]

_SIGMA_FLOOR = 1e-12


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Gives a number per example the rank and the dtype of a batch.

    Args:
        t: One number for all examples, shape (), or one per example, shape (B,).
        like: The batch, shape (B, *).

    Returns:
        Shape (), or (B, 1, ..., 1); dtype of `like`.

    Example:
        >>> expand(torch.zeros(4), torch.zeros(4, 3, 8, 8)).shape
        torch.Size([4, 1, 1, 1])
    """
    shape = t.shape + (1,) * (like.ndim - 1) if t.ndim else t.shape
    return t.reshape(shape).to(like.dtype)


class NoiseSchedule(ABC):
    """Maps time to signal and noise scales; every method takes and returns tensors of any shape."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Returns the scale of the signal, shape of t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Returns the scale of the noise, shape of t."""

    @abstractmethod
    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (d alpha / dt, d sigma / dt), each of the shape of t."""

    @abstractmethod
    def time_of(self, log_snr: Tensor) -> Tensor:
        """Returns the time of a log-SNR, the inverse of `log_snr`.

        Values the schedule never reaches, and infinities, give the nearer end of [0, 1].
        """

    def log_snr(self, t: Tensor) -> Tensor:
        """Returns log(alpha^2 / sigma^2), shape of t; infinite where one of the two is zero."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def perturb(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Returns x_t = alpha x + sigma eps.

        Args:
            x: Clean samples, shape (B, *).
            eps: Gaussian noise, shape (B, *).
            t: Times, shape () or (B,).
        """
        return expand(self.alpha(t), x) * x + expand(self.sigma(t), x) * eps

    def velocity(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Returns v = alpha' x + sigma' eps; shapes as in `perturb`."""
        d_alpha, d_sigma = self.derivatives(t)
        return expand(d_alpha, x) * x + expand(d_sigma, x) * eps


@dataclass(frozen=True)
class Linear(NoiseSchedule):
    """The straight path of flow matching and rectified flow.

        alpha = 1 - t,  sigma = t,  velocity = eps - x

    Reference: Liu et al. 2022, Eq. 1, arXiv:2209.03003 (there t counts from noise to data).

    Example:
        >>> Linear().log_snr(torch.tensor([0.0, 0.5, 1.0])).tolist()
        [inf, 0.0, -inf]
    """

    def alpha(self, t: Tensor) -> Tensor:
        """Returns 1 - t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """Returns t."""
        return t

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (-1, 1)."""
        return -torch.ones_like(t), torch.ones_like(t)

    def time_of(self, log_snr: Tensor) -> Tensor:
        """Returns 1 / (1 + exp(log_snr / 2))."""
        return torch.sigmoid(-log_snr / 2)


@dataclass(frozen=True)
class Cosine(NoiseSchedule):
    """The variance-preserving cosine path, called GVP in SiT.

        alpha = cos(pi t / 2),  sigma = sin(pi t / 2)

    Reference: Ma et al. 2024, arXiv:2401.08740; Nichol & Dhariwal 2021, Eq. 17 with
    offset 0, arXiv:2102.09672.

    Example:
        >>> Cosine().alpha(torch.tensor([0.0, 1.0])).tolist()
        [1.0, 0.0]
    """

    def alpha(self, t: Tensor) -> Tensor:
        """Returns cos(pi t / 2), exactly 0 at t = 1."""
        return torch.sin((1 - t) * (math.pi / 2))  # cos(pi/2) is 6e-17 in floating point, not 0

    def sigma(self, t: Tensor) -> Tensor:
        """Returns sin(pi t / 2)."""
        return torch.sin(t * (math.pi / 2))

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (-(pi/2) sigma, (pi/2) alpha)."""
        return self.sigma(t) * (-math.pi / 2), self.alpha(t) * (math.pi / 2)

    def time_of(self, log_snr: Tensor) -> Tensor:
        """Returns (2/pi) arctan(exp(-log_snr / 2))."""
        return torch.atan(torch.exp(-log_snr / 2)) * (2 / math.pi)


@dataclass(frozen=True)
class VP(NoiseSchedule):
    """The variance-preserving diffusion of DDPM in continuous time.

        log alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2,  sigma = sqrt(1 - alpha^2)

    d sigma / dt is infinite at t = 0; there it is returned as if sigma were 1e-12.

    Reference: Song et al. 2021, Eq. 33, arXiv:2011.13456.

    Args:
        beta_min: Rate of noise at t = 0, above 0.
        beta_max: Rate of noise at t = 1, at least beta_min.

    Raises:
        InputError: If the rates are not 0 < beta_min <= beta_max.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise InputError(
                f"VP schedule: beta_min={self.beta_min}, beta_max={self.beta_max}: "
                "give 0 < beta_min <= beta_max"
            )

    def _exponent(self, t: Tensor) -> Tensor:
        """Returns -2 log alpha, the integral of the rate."""
        return t * (self.beta_min + t * ((self.beta_max - self.beta_min) / 2))

    def alpha(self, t: Tensor) -> Tensor:
        """Returns exp(log alpha)."""
        return torch.exp(self._exponent(t) / -2)

    def sigma(self, t: Tensor) -> Tensor:
        """Returns sqrt(1 - alpha^2)."""
        return torch.sqrt(-torch.expm1(-self._exponent(t)))

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (-(beta/2) alpha, (beta/2) alpha^2 / sigma), beta being the rate at t."""
        half_beta = (self.beta_min + t * (self.beta_max - self.beta_min)) / 2
        alpha, sigma = self.alpha(t), self.sigma(t)
        return -half_beta * alpha, half_beta * alpha**2 / sigma.clamp(min=_SIGMA_FLOOR)

    def time_of(self, log_snr: Tensor) -> Tensor:
        """Returns the root in [0, 1] of -2 log alpha = log(1 + exp(-log_snr))."""
        slope = self.beta_max - self.beta_min
        end = self.beta_min + slope / 2
        exponent = (-logsigmoid(log_snr)).clamp(max=end)
        # The root of t^2 slope/2 + t beta_min = exponent, in the form that does not cancel.
        root = 2 * exponent / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * exponent))
        return torch.where(exponent < end, root.clamp(max=1), 1.0)  # beyond reach: 1, not nearly 1


@dataclass(frozen=True)
class EDM(NoiseSchedule):
    """The variance-exploding diffusion: the signal keeps its scale, noise grows geometrically.

        alpha = 1,  sigma = sigma_min (sigma_max / sigma_min)^t

    The time axis is that of Song et al. 2021, Section 3.4, arXiv:2011.13456; the noise levels are
    those of Karras et al. 2022, Table 1, arXiv:2206.00364.

    Args:
        sigma_min: Noise at t = 0, above 0.
        sigma_max: Noise at t = 1, above sigma_min.

    Raises:
        InputError: If not 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise InputError(
                f"EDM schedule: sigma_min={self.sigma_min}, sigma_max={self.sigma_max}: "
                "give 0 < sigma_min < sigma_max"
            )

    @property
    def _slope(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Tensor) -> Tensor:
        """Returns 1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """Returns sigma_min (sigma_max / sigma_min)^t."""
        return self.sigma_min * torch.exp(self._slope * t)

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (0, log(sigma_max / sigma_min) sigma)."""
        return torch.zeros_like(t), self._slope * self.sigma(t)

    def time_of(self, log_snr: Tensor) -> Tensor:
        """Returns log(sigma / sigma_min) / log(sigma_max / sigma_min), log sigma = -log_snr/2."""
        return ((-log_snr / 2 - math.log(self.sigma_min)) / self._slope).clamp(0, 1)


@dataclass(frozen=True)
class SqrtLinear(NoiseSchedule):
    """The discrete steps of latent diffusion, joined by straight lines of log alpha.

        alpha_n^2 = prod_{i <= n} (1 - beta_i),  sqrt(beta_i) from sqrt(beta_min) to sqrt(beta_max)
        t = n / (N - 1),  n = 0 .. N-1;  sigma = sqrt(1 - alpha^2)

    So t = 0 is the first step, whose noise is not 0, and (N - 1) t is the number of a step.

    Reference: Rombach et al. 2022, arXiv:2112.10752; Ho et al. 2020, Eq. 4, arXiv:2006.11239.

    Args:
        beta_min: Variance that the first step adds.
        beta_max: Variance that the last step adds.
        num_steps: Number of steps N, at least 2.

    Raises:
        InputError: If not 0 < beta_min <= beta_max < 1, or there are fewer than two steps.

    Example:
        >>> SqrtLinear().alpha(torch.tensor([0.0])).square()
        tensor([0.9985])
    """

    beta_min: float = 0.0015
    beta_max: float = 0.0195
    num_steps: int = 1000

    def __post_init__(self) -> None:
        if not (0 < self.beta_min <= self.beta_max < 1 and self.num_steps > 1):
            raise InputError(
                f"SqrtLinear schedule: beta_min={self.beta_min}, beta_max={self.beta_max}, "
                f"num_steps={self.num_steps}: give 0 < beta_min <= beta_max < 1 and two steps"
            )

    def _knots(self, like: Tensor) -> Tensor:
        return _sqrt_linear_knots(
            self.beta_min, self.beta_max, self.num_steps, like.dtype, like.device
        )

    def _line(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log alpha and its derivative."""
        knots = self._knots(t)
        step = t * (self.num_steps - 1)
        before = step.floor().clamp(0, self.num_steps - 2).long()
        slope = knots[before + 1] - knots[before]
        return knots[before] + slope * (step - before), slope * (self.num_steps - 1)

    def alpha(self, t: Tensor) -> Tensor:
        """Returns exp(log alpha)."""
        return self._line(t)[0].exp()

    def sigma(self, t: Tensor) -> Tensor:
        """Returns sqrt(1 - alpha^2)."""
        return torch.sqrt(-torch.expm1(2 * self._line(t)[0]))

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (alpha log(alpha)', -alpha alpha' / sigma); constant slopes between steps."""
        log_alpha, slope = self._line(t)
        alpha = log_alpha.exp()
        return slope * alpha, -slope * alpha**2 / torch.sqrt(-torch.expm1(2 * log_alpha))

    def time_of(self, log_snr: Tensor) -> Tensor:
        """Returns the time on the line between two steps; alpha^2 = sigmoid(log_snr)."""
        knots = self._knots(log_snr)
        log_alpha = logsigmoid(log_snr) / 2
        after = torch.searchsorted(-knots, -log_alpha).clamp(1, self.num_steps - 1)
        part = (log_alpha - knots[after - 1]) / (knots[after] - knots[after - 1])
        return ((after - 1 + part) / (self.num_steps - 1)).clamp(0, 1)


@functools.cache
def _sqrt_linear_knots(
    beta_min: float, beta_max: float, num_steps: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Log alpha after each step; kept where it is needed, as a GPU would wait for each copy."""
    root = torch.linspace(beta_min**0.5, beta_max**0.5, num_steps, dtype=torch.float64)
    return (torch.log1p(-(root**2)).cumsum(0) / 2).to(device, dtype)
