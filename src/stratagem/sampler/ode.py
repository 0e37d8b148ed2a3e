"""One-step solvers of the probability-flow ODE.

    Euler    dx = v dt                              v = alpha' x + sigma' eps
    DDIM     x_s = alpha_s x + sigma_s eps          exact if (x, eps) did not change
    Heun     trapezoid, in t or in sigma / alpha    two calls a step

None remembers anything between steps.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from stratagem.errors import InputError
from stratagem.sampler.base import Predict, Sampler
from stratagem.schedule import NoiseSchedule

__all__ = ["DDIM", "Euler", "Heun"]


class Euler(Sampler):
    """Euler's method for the probability-flow ODE in t; reference: Lipman et al., arXiv:2210.02747.

    x_s = x_t + (s - t) v
    """

    order = 1

    def step(
        self, predict: Predict, x_t: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule, *_: Any
    ) -> tuple[Tensor, None]:
        """Goes from t to s; see `Sampler.step`."""
        return x_t + (s - t) * schedule.velocity(*predict(x_t, t), t), None


class DDIM(Sampler):
    """Moves along the straight line of the prediction; Song et al. 2021, Eq. 12, arXiv:2010.02502.

        x_s = alpha_s x + sigma_s eps

    It is Euler's method in sigma / alpha, and Euler's method in t on a linear schedule.
    """

    order = 1

    def step(
        self, predict: Predict, x_t: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule, *_: Any
    ) -> tuple[Tensor, None]:
        """Goes from t to s; see `Sampler.step`."""
        return schedule.perturb(*predict(x_t, t), s), None


class Heun(Sampler):
    """The trapezoidal rule; Karras et al. 2022, Algorithm 1, arXiv:2206.00364.

    Args:
        variable: "time" solves dx/dt = v; "sigma" solves dy/dsigma = eps for y = x_t / alpha and
            sigma / alpha as in the paper. Steps to sigma_s = 0, and in "sigma" from alpha_t = 0,
            where the variable is infinite, are first order.

    Raises:
        InputError: If the variable is unknown.
    """

    order = 2

    def __init__(self, variable: Literal["time", "sigma"] = "time") -> None:
        if variable not in ("time", "sigma"):
            raise InputError(f"Heun: variable {variable!r} is unknown: choose time or sigma")
        self.variable = variable

    def step(
        self, predict: Predict, x_t: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule, *_: Any
    ) -> tuple[Tensor, None]:
        """Goes from t to s; see `Sampler.step`."""
        here = predict(x_t, t)
        if self.variable == "time":
            slope = schedule.velocity(*here, t)
            x_s = x_t + (s - t) * slope
            if schedule.sigma(s) == 0:
                return x_s, None
            return x_s + (s - t) / 2 * (schedule.velocity(*predict(x_s, s), s) - slope), None
        x_s = schedule.perturb(*here, s)  # Euler in sigma / alpha is DDIM
        alpha_t, sigma_s = schedule.alpha(t), schedule.sigma(s)
        if sigma_s == 0 or alpha_t == 0:
            return x_s, None
        # alpha_s times the step in sigma / alpha
        width = sigma_s - schedule.alpha(s) * schedule.sigma(t) / alpha_t
        return x_s + width / 2 * (predict(x_s, s).eps - here.eps), None
