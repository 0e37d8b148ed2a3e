"""Solvers that turn noise into samples.

A step goes from t to s < t and sees the network only as predict(x_t, t) -> (x, eps):

    Euler           dx = v dt                                    v = alpha' x + sigma' eps
    DDIM            x_s = alpha_s x + sigma_s eps                exact if (x, eps) did not change
    Heun            trapezoid, in t or in sigma / alpha          two calls a step
    DPMSolver2M     DDIM with x extrapolated in log-SNR          one call a step, second order
    EulerMaruyama   dx = (v + (w / sigma) eps) dt + sqrt(2 w) dW      any w(t) >= 0 keeps the
    StochasticHeun  the same by noise first, then a trapezoid         marginals of the ODE, w = 0

`sample` owns the only loop. What a solver remembers between steps is a value it returns. Any solver
runs on any `time_grid`. Steps to sigma_s = 0 are first order and without noise, since there eps is
not defined. The coefficients of a step are computed in float64 whatever the samples are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from stratagem.denoiser import Prediction, Predictor
from stratagem.errors import InputError
from stratagem.grid import time_grid
from stratagem.randomness import normal_rows
from stratagem.schedule import NoiseSchedule

__all__ = [
    "DDIM",
    "DPMSolver2M",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Sampler",
    "StochasticHeun",
    "sample",
    "sigma_diffusion",
    "time_grid",
]

Predict = Callable[[Tensor, Tensor], Prediction]
Noise = Callable[[], Tensor]
Diffusion = Callable[[NoiseSchedule, Tensor], Tensor]
Callback = Callable[[int, Tensor, Tensor, Prediction | None], None]


class Sampler(ABC):
    """One solver.

    Attributes:
        order: Its order of convergence (of the mean, for a stochastic one).
        stochastic: Whether it draws noise.
    """

    order: ClassVar[int]
    stochastic: ClassVar[bool] = False

    def init(self, x_t: Tensor) -> Any:  # noqa: ARG002
        """Returns the state before the first step; None means nothing is remembered yet."""
        return None

    @abstractmethod
    def step(
        self,
        predict: Predict,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        schedule: NoiseSchedule,
        state: Any,
        noise: Noise,
        /,
    ) -> tuple[Tensor, Any]:
        """Goes from t to s.

        Args:
            predict: (x_t, t) -> Prediction; every call is one call of the network.
            x_t: Samples, shape (B, *).
            t: Their time, shape (), float64.
            s: The time to reach, shape (), float64, below t.
            schedule: The schedule of x_t.
            state: What the previous step returned.
            noise: Draws the standard normal numbers of this step, like x_t; the same at every call.

        Returns:
            x_s like x_t, and the state for the next step.
        """


# --- deterministic solvers ---------------------------------------------------------------------


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


class _Past(NamedTuple):
    """What DPMSolver2M remembers: the last x and the last step h."""

    x: Tensor
    h: Tensor


class DPMSolver2M(Sampler):
    """DPM-Solver++(2M), data prediction; Lu et al. 2022, Algorithm 2, arXiv:2211.01095.

        lambda = log(alpha / sigma),  h = lambda_s - lambda_t
        D   = x + h / (2 h_before) (x - x_before)
        x_s = (sigma_s / sigma_t) x_t - alpha_s (exp(-h) - 1) D

    The first step, and a step to sigma_s = 0 where h is infinite, take D = x, which is DDIM.
    """

    order = 2

    def step(
        self,
        predict: Predict,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        schedule: NoiseSchedule,
        state: _Past | None,
        noise: Noise,  # noqa: ARG002
    ) -> tuple[Tensor, _Past]:
        """Goes from t to s; see `Sampler.step`."""
        x, eps = predict(x_t, t)
        x_s = schedule.perturb(x, eps, s)
        h = (schedule.log_snr(s) - schedule.log_snr(t)) / 2
        if state is not None and torch.isfinite(h):
            # -alpha_s (exp(-h) - 1), without the logarithms
            gain = schedule.alpha(s) - schedule.alpha(t) * schedule.sigma(s) / schedule.sigma(t)
            x_s = x_s + gain * h / (2 * state.h) * (x - state.x)  # a first h may be inf: weight 0
        return x_s, _Past(x, h)


# --- stochastic solvers ------------------------------------------------------------------------


def sigma_diffusion(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Returns w(t) = sigma_t, the "sigma" form of SiT (Ma et al. 2024, arXiv:2401.08740).

    The noise is renewed at the rate w / sigma^2. Where sigma falls faster than in proportion to t
    (EDM) that outgrows any step near the data: there take a w in proportion to sigma^2.
    """
    return schedule.sigma(t)


class EulerMaruyama(Sampler):
    """Euler-Maruyama for the reverse SDE of Ma et al. 2024, arXiv:2401.08740.

        x_s = x_t - (t - s) (v - w score) + sqrt(2 w (t - s)) n,  score = -eps / sigma

    A step to sigma_s = 0 adds no noise.

    Args:
        diffusion: w as a function of schedule and t, 0-dim; not negative.
    """

    order = 1
    stochastic = True

    def __init__(self, diffusion: Diffusion = sigma_diffusion) -> None:
        self.diffusion = diffusion

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


class StochasticHeun(Sampler):
    """Noise first, then the trapezoidal rule; the SDE and `diffusion` of `EulerMaruyama`.

        x'  = x_t + sqrt(2 w_t (t - s)) n
        x_s = x' + (s - t) / 2 (drift(x', t) + drift(x' + (s - t) drift(x', t), s))

    A step to sigma_s = 0 is that of `EulerMaruyama`. Reference: Karras et al. 2022, Section 4,
    arXiv:2206.00364, adds its noise in the same place.
    """

    order = 1
    stochastic = True

    def __init__(self, diffusion: Diffusion = sigma_diffusion) -> None:
        self.diffusion = diffusion

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


# --- the loop ----------------------------------------------------------------------------------


def sample(
    denoiser: Predictor,
    sampler: Sampler,
    x_T: Tensor,
    times: Tensor,
    *,
    seeds: Sequence[int] | None = None,
    callback: Callback | None = None,
    **condition: Any,
) -> Tensor:
    """Solves from times[0] down to times[-1], without gradients.

    A schedule that keeps noise at t = 0 (EDM) gets one prediction more there, whose x is the
    result: the last step of Karras et al. 2022, Algorithm 1, arXiv:2206.00364.

    Args:
        denoiser: What predicts; its schedule is that of x_T.
        sampler: The solver.
        x_T: Samples at times[0], shape (B, *): sigma(times[0]) times standard normal noise.
        times: Strictly decreasing times in [0, 1], shape (num_steps + 1,); see `time_grid`.
        seeds: One per sample, for stochastic solvers. The noise of a sample depends on its own
            seed and the number of the step alone, not on the batch.
        callback: Called as callback(step, t, x_t, prediction) with every state: before each
            step with the prediction of that step, and last with the final state and None (or
            the closing prediction of the paragraph above).
        **condition: Handed to the denoiser.

    Returns:
        Samples at times[-1], like x_T.

    Raises:
        InputError: If the times do not decrease inside [0, 1], or a stochastic solver has not
            one seed per sample.
    """
    times = _checked(times)
    if sampler.stochastic and (seeds is None or len(seeds) != len(x_T)):
        given = "none" if seeds is None else len(seeds)
        raise InputError(
            f"{type(sampler).__name__} draws noise: give one seed per sample, "
            f"{len(x_T)} in all and not {given}"
        )
    schedule, seen = denoiser.schedule, list[Prediction]()
    precision = torch.promote_types(x_T.dtype, torch.float32)

    def predict(x_t: Tensor, t: Tensor) -> Prediction:
        seen.append(denoiser(x_t, t.to(precision), **condition))
        return seen[-1]

    with torch.no_grad():
        x_t, state = x_T, sampler.init(x_T)
        for step, (t, s) in enumerate(pairwise(times)):
            seen.clear()
            noise = partial(_noise, seeds, x_t, step)
            x_s, state = sampler.step(predict, x_t, t, s, schedule, state, noise)
            if callback is not None:
                callback(step, t, x_t, seen[0])
            x_t = x_s
        end = times[-1]
        closing = predict(x_t, end) if end == 0 and schedule.sigma(end) > 0 else None
        if callback is not None:
            callback(len(times) - 1, end, x_t, closing)
    return x_t if closing is None else closing.x


def _noise(seeds: Sequence[int] | None, x_t: Tensor, step: int) -> Tensor:
    assert seeds is not None, "a solver that calls noise() must say stochastic = True"
    return normal_rows(seeds, x_t.shape[1:], "sampler", step).to(x_t)


def _checked(times: Tensor) -> Tensor:
    """Returns valid times as float64 on the CPU, where asking for their value costs no waiting."""
    times = times.double().cpu()
    inside = times.ndim == 1 and len(times) > 1 and bool(((times >= 0) & (times <= 1)).all())
    if not inside or not (times.diff() < 0).all():
        raise InputError(
            f"times {times.tolist()} must be two or more that decrease strictly inside [0, 1]"
        )
    return times
