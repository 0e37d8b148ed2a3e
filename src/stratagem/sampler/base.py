"""What a solver is, and the only loop.

A step goes from t to s < t and sees the network only as predict(x_t, t) -> (x, eps). What a solver
remembers between steps is a value it returns. `sample` owns the loop: it calls the solver for each
interval of a `time_grid`, draws the noise of stochastic ones, and asks the denoiser at every level
that the solver wants, so that a denoiser with stages is called with the decoder of that level.

Steps to sigma_s = 0 are first order and without noise, since there eps is not defined. The
coefficients of a step are computed in float64 whatever the samples are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from stratagem.denoiser import Prediction, Predictor
from stratagem.errors import InputError
from stratagem.randomness import normal_rows
from stratagem.schedule import NoiseSchedule

__all__ = ["Noise", "Predict", "Sampler", "sample"]

Predict = Callable[[Tensor, Tensor], Prediction]
Noise = Callable[[], Tensor]
Callback = Callable[[int, Tensor, Tensor, Prediction | None], None]


class Sampler(ABC):
    """One solver.

    Attributes:
        order: Its order of convergence (of the mean, for a stochastic one).
        stochastic: Whether it draws noise.
    """

    order: int
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
