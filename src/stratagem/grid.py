"""Time grids: where a solver stops on its way from noise to data.

A grid is num_steps + 1 times that decrease to 0. Solver and grid are independent.

Shift above 1 spends more steps near the noise, t = 1. LightningDiT and GMem count time from the
noise, t' = 1 - t, and shift it as t' = k u' / (1 + (k - 1) u'). In our direction, u = 1 - u',

    1 - t' = (1 - u') / (1 + (k - 1) u') = u / (k - (k - 1) u) = (u/k) / (1 + (1/k - 1) u)

which is our shift = 1 / k: their 0.3 is 3.33 here.

The grids in sigma / alpha end with a step to t = 0. On a schedule that keeps noise at t = 0 (EDM)
sigma_min lies there already: such a grid has num_steps + 1 levels, and `sampler.sample` makes the
step to no noise itself.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from stratagem.errors import InputError
from stratagem.schedule import NoiseSchedule

__all__ = ["GridKind", "time_grid"]

GridKind = Literal["uniform", "shifted", "quadratic", "karras", "log_snr"]

_GRID_OPTIONS = {
    "uniform": {"last_step"},
    "shifted": {"shift"},
    "quadratic": {"last_step"},
    "karras": {"schedule", "rho", "sigma_min", "sigma_max"},
    "log_snr": {"schedule", "sigma_min", "sigma_max"},
}


def time_grid(num_steps: int, kind: GridKind = "uniform", **options: Any) -> Tensor:
    """Returns the times at which a solver stops, shape (num_steps + 1,), float64, decreasing to 0.

        uniform    t_i = 1 - i / N; with last_step, uniform from 1 to last_step and then 0
        shifted    t = shift u / (1 + (shift - 1) u), u uniform; Esser et al. 2024, Eq. 23,
                   arXiv:2403.03206
        quadratic  t_i = (1 - i / N)^2; with last_step, sqrt(t) uniform from 1 to its root, then 0
        karras     sigma_i = (a + i / (N - 1) (b - a))^rho for sigma / alpha and i < N, then t = 0;
                   a = sigma_max^(1/rho), b = sigma_min^(1/rho); Karras et al. 2022, Eq. 5,
                   arXiv:2206.00364
        log_snr    log(sigma_i) uniform from sigma_max to sigma_min, i < N, then t = 0

    Args:
        num_steps: Number of steps N, at least 1.
        kind: Which grid.
        **options: shift (3.0) of "shifted"; last_step of "uniform" and "quadratic"; of "karras" and
            "log_snr": schedule (required), sigma_min (0.002), sigma_max (80.0), both by default cut
            to what the schedule reaches, and rho (7.0) of "karras".

    Raises:
        InputError: If the kind is unknown, an option is missing, out of range or without effect.

    Example:
        >>> time_grid(4).tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0]
        >>> time_grid(2, "shifted", shift=3.0).tolist()
        [1.0, 0.75, 0.0]
    """
    if kind not in get_args(GridKind):
        raise InputError(f"time grid {kind!r} is unknown: choose {', '.join(get_args(GridKind))}")
    if num_steps < 1:
        raise InputError(f"time grid: num_steps={num_steps}: give at least 1")
    for name in options.keys() - _GRID_OPTIONS[kind]:
        raise InputError(f"time grid: {name} has no effect on the {kind} grid: leave it out")
    if kind in ("uniform", "quadratic"):
        return _power_grid(num_steps, 1 if kind == "uniform" else 2, **options)
    if kind == "shifted":
        return _shifted_grid(num_steps, **options)
    if "schedule" not in options:
        raise InputError(f"time grid: the {kind} grid needs schedule=")
    rho = math.inf if kind == "log_snr" else options.pop("rho", 7.0)
    return _sigma_grid(num_steps, rho=rho, **options)


def _power_grid(num_steps: int, power: int, last_step: float | None = None) -> Tensor:
    """The grids that are uniform in a root of t."""
    if last_step is not None and num_steps == 1:
        raise InputError("time grid: last_step has no effect on a single step: leave it out")
    root = 1 / num_steps if last_step is None else max(0.0, last_step) ** (1 / power)
    if not (0 < root < 1 or root == num_steps == 1):
        raise InputError(f"time grid: last_step={last_step}: give a number between 0 and 1")
    grid = torch.linspace(1, root, num_steps, dtype=torch.float64) ** power
    return torch.cat([grid, torch.zeros(1, dtype=torch.float64)])


def _shifted_grid(num_steps: int, shift: float = 3.0) -> Tensor:
    if not 0 < shift < math.inf:
        raise InputError(f"time grid: shift={shift}: give a number above 0")
    u = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    grid = shift * u / (1 + (shift - 1) * u)
    grid[0] = 1.0  # for a shift such as 0.1, rounding leaves the first a hair above 1
    return grid


def _sigma_grid(
    num_steps: int,
    schedule: NoiseSchedule,
    rho: float,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Tensor:
    """The grids that are laid in sigma / alpha; rho = infinity is the one uniform in log-SNR."""
    reach = (schedule.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64)) / -2).exp().tolist()
    low = max(0.002, reach[0]) if sigma_min is None else sigma_min
    high = min(80.0, reach[1]) if sigma_max is None else sigma_max
    slack = 1 + 1e-9  # the reach is computed, sigma_min is typed
    if not (0 < low < high and reach[0] <= low * slack and high <= reach[1] * slack and rho > 0):
        raise InputError(
            f"time grid: sigma_min={low}, sigma_max={high}, rho={rho} on {schedule}: give rho > 0 "
            f"and {reach[0]:g} <= sigma_min < sigma_max <= {reach[1]:g}"
        )
    reaches_end = low <= reach[0] * slack
    ramp = torch.linspace(0, 1, num_steps + reaches_end, dtype=torch.float64)
    if math.isinf(rho):
        log_sigma = math.log(high) + ramp * (math.log(low) - math.log(high))
    else:
        root = high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))
        log_sigma = rho * root.log()
    grid = schedule.time_of(-2 * log_sigma)
    end = torch.zeros(1, dtype=torch.float64)
    return torch.cat([grid[:-1] if reaches_end else grid, end])
