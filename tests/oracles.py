"""Exact denoisers: the known answers against which solvers, guidance and objectives are tested.

Both have the interface of a denoiser, `(x_t, t, **condition) -> Prediction` with a `schedule`, and
record their calls. In float64 they are exact up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from stratagem.denoiser import Prediction
from stratagem.schedule import NoiseSchedule, expand


class GaussianOracle(nn.Module):
    """The exact denoiser of data N(mu, std^2 I).

    x   = mu + alpha std^2 / q^2 (x_t - alpha mu),  q^2 = alpha^2 std^2 + sigma^2
    eps = sigma / q^2 (x_t - alpha mu)

    Args:
        schedule: Any schedule.
        mu: Mean, broadcastable to a batch.
        std: Standard deviation.
    """

    mu: Tensor

    def __init__(self, schedule: NoiseSchedule, mu: Tensor | float = 0.3, std: float = 0.5) -> None:
        super().__init__()
        self.schedule = schedule
        self.std = std
        self.register_buffer("mu", torch.as_tensor(mu, dtype=torch.float64))
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> Prediction:
        self.calls.append((x_t, t))
        alpha, sigma = expand(self.schedule.alpha(t), x_t), expand(self.schedule.sigma(t), x_t)
        mu = self.mu.to(x_t.dtype)
        centred = (x_t - alpha * mu) / (alpha**2 * self.std**2 + sigma**2)
        return Prediction(mu + alpha * self.std**2 * centred, sigma * centred)

    def flow(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The exact solution at time s of the probability-flow ODE through x_t at time t."""
        alpha_t, alpha_s = self.schedule.alpha(t), self.schedule.alpha(s)
        q_t = (alpha_t**2 * self.std**2 + self.schedule.sigma(t) ** 2).sqrt()
        q_s = (alpha_s**2 * self.std**2 + self.schedule.sigma(s) ** 2).sqrt()
        return alpha_s * self.mu + (x_t - alpha_t * self.mu) * (q_s / q_t)


class FiniteOracle(nn.Module):
    """The exact denoiser of a finite data set y_1 .. y_N with equal weights.

    x   = sum_i w_i y_i,  w = softmax_i(-|x_t - alpha y_i|^2 / (2 sigma^2))
    eps = (x_t - alpha x) / sigma

    Args:
        schedule: Any schedule.
        data: Shape (N, *).
    """

    data: Tensor

    def __init__(self, schedule: NoiseSchedule, data: Tensor) -> None:
        super().__init__()
        self.schedule = schedule
        self.register_buffer("data", data)
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> Prediction:
        self.calls.append((x_t, t))
        alpha = expand(self.schedule.alpha(t), x_t)
        sigma = expand(self.schedule.sigma(t), x_t).clamp(min=1e-8)
        data = self.data.to(x_t.dtype)
        gap = (x_t - alpha * data.unsqueeze(1)) / sigma  # (N, B, *)
        logits = gap.flatten(2).square().sum(2) / -2
        logits = (logits - logits.amax(0)).clamp(min=-80)  # deep underflow is very slow on a CPU
        x = torch.einsum("nb,n...->b...", torch.softmax(logits, 0), data)
        return Prediction(x, (x_t - alpha * x) / sigma)


def total_cost(cost: Tensor, cuts: Sequence[int]) -> float:
    """The cost of the stages between cuts, with cost[i, j] as `partition.split` takes it."""
    return sum(float(cost[i, j]) for i, j in pairwise([0, *cuts, len(cost) - 1]))
