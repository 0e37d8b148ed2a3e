"""Solvers that draw noise on the way.

    EulerMaruyama    dx = (v + (w / sigma) eps) dt + sqrt(2 w) dW     any w(t) >= 0 keeps the
    StochasticHeun   the same by noise first, then a trapezoid        marginals of the ODE, w = 0
    ChurnHeun        EDM's: the noise level is raised a little, then Heun in sigma / alpha

The noise of a step is drawn once, for the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stratagem.errors import InputError
from stratagem.sampler.base import Noise, Predict, Sampler
from stratagem.sampler.ode import Heun
from stratagem.schedule import NoiseSchedule

__all__ = ["ChurnHeun", "EulerMaruyama", "StochasticHeun", "sigma_diffusion"]

Diffusion = Callable[[NoiseSchedule, Tensor], Tensor]


def sigma_diffusion(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Returns w(t) = sigma_t, the "sigma" form of SiT (Ma et al. 2024, arXiv:2401.08740).

    The noise is renewed at the rate w / sigma^2. Where sigma falls faster than in proportion to t
    (EDM) that outgrows any step near the data: there take a w in proportion to sigma^2.

    Example:
        >>> from stratagem.schedule import Linear
        >>> sigma_diffusion(Linear(), torch.tensor(0.25))
        tensor(0.2500)
    """
    return schedule.sigma(t)


@dataclass(frozen=True)
class EulerMaruyama(Sampler):
    """Euler-Maruyama for the reverse SDE of Ma et al. 2024, arXiv:2401.08740.

        x_s = x_t - (t - s) (v - w score) + sqrt(2 w (t - s)) n,  score = -eps / sigma

    A step to sigma_s = 0 adds no noise.

    Args:
        diffusion: w as a function of schedule and t, 0-dim; not negative.
    """

    order = 1
    stochastic = True
    diffusion: Diffusion = sigma_diffusion

    def step(
        self,
        predict: Predict,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        schedule: NoiseSchedule,
        state: Any,
        noise: Noise,
    ) -> tuple[Tensor, Any]:
        """Goes from t to s; see `Sampler.step`."""
        w = self.diffusion(schedule, t)
        x_s = x_t + (s - t) * _reverse_drift(predict, x_t, t, schedule, w)
        if schedule.sigma(s) == 0:
            return x_s, state
        return x_s + (2 * w * (t - s)).sqrt() * noise(), state


@dataclass(frozen=True)
class StochasticHeun(Sampler):
    """Noise first, then the trapezoidal rule; the SDE and `diffusion` of `EulerMaruyama`.

        x'  = x_t + sqrt(2 w_t (t - s)) n
        x_s = x' + (s - t) / 2 (drift(x', t) + drift(x' + (s - t) drift(x', t), s))

    A step to sigma_s = 0 is that of `EulerMaruyama`. Reference: Karras et al. 2022, Section 4,
    arXiv:2206.00364, adds its noise in the same place.
    """

    order = 1
    stochastic = True
    diffusion: Diffusion = sigma_diffusion

    def step(
        self,
        predict: Predict,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        schedule: NoiseSchedule,
        state: Any,
        noise: Noise,
    ) -> tuple[Tensor, Any]:
        """Goes from t to s; see `Sampler.step`."""
        w_t, w_s = self.diffusion(schedule, t), self.diffusion(schedule, s)
        if schedule.sigma(s) == 0:
            return x_t + (s - t) * _reverse_drift(predict, x_t, t, schedule, w_t), state
        x_t = x_t + (2 * w_t * (t - s)).sqrt() * noise()
        slope = _reverse_drift(predict, x_t, t, schedule, w_t)
        slope_s = _reverse_drift(predict, x_t + (s - t) * slope, s, schedule, w_s)
        return x_t + (s - t) / 2 * (slope + slope_s), state


def _reverse_drift(
    predict: Predict, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, w: Tensor
) -> Tensor:
    """Returns v - w score = v + (w / sigma) eps from one prediction."""
    x, eps = predict(x_t, t)
    return schedule.velocity(x, eps, t) + w / schedule.sigma(t) * eps


class ChurnHeun(Sampler):
    """EDM's stochastic sampler; Karras et al. 2022, Algorithm 2, arXiv:2206.00364.

    With y = x_t / alpha_t and rho = sigma_t / alpha_t (the paper's sigma),

        gamma   = min(churn / num_steps, sqrt(2) - 1) if churn_min <= rho <= churn_max, else 0
        rho_hat = (1 + gamma) rho
        y_hat   = y + noise_scale sqrt(rho_hat^2 - rho^2) n

    and from there a step of `Heun("sigma")`. The noise is never raised above the schedule's own
    largest; where alpha_t = 0 there is nothing to raise.

    Args:
        churn: The paper's S_churn, above 0; at 0 the solver is `Heun("sigma")`.
        num_steps: Steps over which the churn is spread, N.
        churn_min: The paper's S_tmin.
        churn_max: The paper's S_tmax.
        noise_scale: The paper's S_noise, 1 or a little above.

    Raises:
        InputError: If a setting is out of range.
    """

    order = 1
    stochastic = True

    def __init__(
        self,
        churn: float,
        num_steps: int,
        *,
        churn_min: float = 0.0,
        churn_max: float = math.inf,
        noise_scale: float = 1.0,
    ) -> None:
        if not (churn > 0 and num_steps > 0 and 0 <= churn_min < churn_max and noise_scale > 0):
            raise InputError(
                f"churn={churn} over {num_steps} steps from {churn_min} to {churn_max} with "
                f"noise_scale={noise_scale}: give numbers above 0, the bounds in order"
            )
        self.gamma = min(churn / num_steps, math.sqrt(2) - 1)
        self.churn_min, self.churn_max = churn_min, churn_max
        self.noise_scale = noise_scale
        self._heun = Heun("sigma")

    def step(
        self,
        predict: Predict,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        schedule: NoiseSchedule,
        state: Any,
        noise: Noise,
    ) -> tuple[Tensor, Any]:
        """Goes from t to s; see `Sampler.step`."""
        alpha, rho = schedule.alpha(t), schedule.sigma(t) / schedule.alpha(t)
        if self.churn_min <= rho <= self.churn_max and torch.isfinite(rho):
            t = schedule.time_of(-2 * ((1 + self.gamma) * rho).log())
            alpha_hat, rho_hat = schedule.alpha(t), schedule.sigma(t) / schedule.alpha(t)
            added = (rho_hat**2 - rho**2).clamp(min=0).sqrt()
            x_t = alpha_hat / alpha * x_t + self.noise_scale * alpha_hat * added * noise()
        return self._heun.step(predict, x_t, t, s, schedule, state, noise)
