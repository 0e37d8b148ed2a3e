"""Solvers that turn noise into samples.

    base         what a solver is, and `sample`, the only loop
    ode          Euler, DDIM, Heun
    dpm_solver   DPM-Solver and DPM-Solver++, multistep and singlestep
    stochastic   Euler-Maruyama, stochastic Heun, EDM's churn

Any solver runs on any `time_grid`.
"""

from __future__ import annotations

from stratagem.grid import time_grid
from stratagem.sampler.base import Noise, Predict, Sampler, sample
from stratagem.sampler.dpm_solver import DPMMultistep, DPMSinglestep, singlestep_orders
from stratagem.sampler.ode import DDIM, Euler, Heun
from stratagem.sampler.stochastic import ChurnHeun, EulerMaruyama, StochasticHeun, sigma_diffusion

__all__ = [
    "DDIM",
    "ChurnHeun",
    "DPMMultistep",
    "DPMSinglestep",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Noise",
    "Predict",
    "Sampler",
    "StochasticHeun",
    "sample",
    "sigma_diffusion",
    "singlestep_orders",
    "time_grid",
]
