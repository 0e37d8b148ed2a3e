"""How to sample: the settings, and the solver and time grid that they name.

`steps` counts intervals of the time grid, the last of which, to no noise, is one call of the
network; for the singlestep solvers it counts the calls themselves, which their steps share out. On
a schedule that keeps noise at t = 0 (edm, sqrt-linear) the closing prediction counts as that last
interval, as in Karras et al. 2022: 18 steps of heun-edm are 35 calls on every schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, cast

import torch
from torch import Tensor

from stratagem.errors import InputError
from stratagem.grid import GridKind, time_grid
from stratagem.programs.snippets import SnippetPolicy
from stratagem.sampler import (
    DDIM,
    ChurnHeun,
    DPMMultistep,
    DPMSinglestep,
    Euler,
    EulerMaruyama,
    Heun,
    Sampler,
    StochasticHeun,
    singlestep_orders,
)
from stratagem.schedule import EDM, NoiseSchedule

__all__ = ["GridName", "SampleConfig", "SamplerName", "make_solver"]

SamplerName = Literal[
    "euler",
    "ddim",
    "heun",
    "heun-edm",
    "dpm++2m",
    "dpm++3m",
    "dpm++2s",
    "dpm++3s",
    "dpm-solver-2",
    "dpm-solver-3",
    "dpm-solver-2m",
    "dpm-solver-3m",
    "euler-maruyama",
    "heun-sde",
]
GridName = Literal["uniform", "shifted", "quadratic", "karras", "log-snr"]

# name -> (order, what the expansion is in)
_MULTISTEP: dict[str, tuple[int, Literal["x", "eps"]]] = {
    "dpm++2m": (2, "x"),
    "dpm++3m": (3, "x"),
    "dpm-solver-2m": (2, "eps"),
    "dpm-solver-3m": (3, "eps"),
}
_SINGLESTEP: dict[str, tuple[int, Literal["x", "eps"]]] = {
    "dpm++2s": (2, "x"),
    "dpm++3s": (3, "x"),
    "dpm-solver-2": (2, "eps"),
    "dpm-solver-3": (3, "eps"),
}
_IN_SIGMA = ("karras", "log_snr")


@dataclass(frozen=True)
class SampleConfig:
    """How to sample.

    Attributes:
        num: How many images.
        seed: Seed of noise and snippets.
        sampler: The solver. heun-edm is EDM's, in sigma / alpha; dpm++2m and the like are
            DPM-Solver++, dpm-solver-3 and the like DPM-Solver: m multistep, s and without a letter
            singlestep; euler-maruyama and heun-sde draw noise on the way, with w(t) = sigma_t.
        steps: Intervals of the time grid; for singlestep solvers (dpm-solver-2, dpm-solver-3,
            dpm++2s, dpm++3s) calls of the network.
        grid: The time grid: uniform, shifted or quadratic in t, karras or log-snr in the noise
            level. By default karras for schedule edm, log-snr for singlestep solvers, else uniform.
        shift: Of grid shifted, which it chooses. Above 1 puts more steps near the noise;
            LightningDiT's and GMem's k is 1 / k here.
        last_step: Size of the last step, to no noise, which is the smallest time but 0; 0 for the
            grid's own.
        denoise: Whether there is that last step; with --no-denoise the samples keep the noise of
            the smallest time, as in DPM-Solver's published figures.
        churn: Of heun-edm: how much noise is renewed, EDM's S_churn; 0 for none.
        churn_min: Smallest sigma / alpha where it is, EDM's S_tmin.
        churn_max: Largest sigma / alpha where it is, EDM's S_tmax; by default no bound.
        churn_noise: Scale of that noise, EDM's S_noise.
        guidance: Strength of classifier-free guidance; 1 for none.
        guide_from: Smallest guided time.
        guide_to: Largest guided time; GMem's interval start s is 1 - s here.
        snippets: Which rows of the bank, see `programs.snippets`; only for a run with memory.
        like: An image or a folder of them, for snippets near.
        like_weights: Of the bank's encoder, for these images: where it is DINOv2 or DINOv3.
        label: The class: of the snippets with "label", or of a run conditioned on classes.
        batch_size: Images sampled at once.
    """

    num: int = 64
    seed: int = 0
    sampler: SamplerName = "heun"
    steps: int = 50
    grid: GridName | None = None
    shift: float = 1.0
    last_step: float = 0.0
    denoise: bool = True
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float | None = None
    churn_noise: float = 1.0
    guidance: float = 1.0
    guide_from: float = 0.0
    guide_to: float = 1.0
    snippets: SnippetPolicy = "train"
    like: str | None = None
    like_weights: str | None = None
    label: int | None = None
    batch_size: int = 256


def make_solver(cfg: SampleConfig, schedule: NoiseSchedule) -> tuple[Sampler, Tensor]:
    """Returns the solver and its time grid.

    Raises:
        InputError: If settings do not go together, with the solver, or with the schedule.
    """
    kind = _kind(cfg, schedule)
    _check(cfg, schedule, kind)
    if cfg.sampler in _SINGLESTEP:
        return _singlestep(cfg, schedule, kind)
    return _solver(cfg, schedule), _grid(cfg, schedule, kind, cfg.steps)


def _solver(cfg: SampleConfig, schedule: NoiseSchedule) -> Sampler:
    if cfg.sampler in _MULTISTEP:
        return DPMMultistep(*_MULTISTEP[cfg.sampler], num_steps=cfg.steps)
    if cfg.churn:
        return ChurnHeun(
            cfg.churn,
            cfg.steps,
            churn_min=cfg.churn_min,
            churn_max=math.inf if cfg.churn_max is None else cfg.churn_max,
            noise_scale=cfg.churn_noise,
        )
    in_sigma = isinstance(schedule, EDM) or cfg.sampler == "heun-edm"
    plain: dict[str, Sampler] = {
        "euler": Euler(),
        "ddim": DDIM(),
        "euler-maruyama": EulerMaruyama(),
        "heun-sde": StochasticHeun(),
    }
    return plain.get(cfg.sampler, Heun("sigma" if in_sigma else "time"))


def _singlestep(
    cfg: SampleConfig, schedule: NoiseSchedule, kind: GridKind
) -> tuple[Sampler, Tensor]:
    """Shares out the calls: one for the step to no noise, and one for a step from no signal."""
    order, predicts = _SINGLESTEP[cfg.sampler]
    start = torch.ones((), dtype=torch.float64)
    first = kind not in _IN_SIGMA and bool(schedule.alpha(start) == 0)
    spent, least = first + cfg.denoise, order if order == 2 else 4
    if cfg.steps - spent < least:
        raise InputError(
            f"--steps {cfg.steps}: {cfg.sampler} counts calls of the network, of which the ends of "
            f"the grid take {spent}: give at least {least + spent}"
        )
    orders = [1] * first + singlestep_orders(cfg.steps - spent, order) + [1] * cfg.denoise
    if kind in _IN_SIGMA:
        return DPMSinglestep(orders, predicts), _grid(cfg, schedule, kind, len(orders))
    fine = _grid(cfg, schedule, kind, sum(orders))  # a time for every call
    stops = [stop for stop in accumulate(orders, initial=0) if stop < len(fine)]
    return DPMSinglestep(orders, predicts, "time"), fine[stops]


def _kind(cfg: SampleConfig, schedule: NoiseSchedule) -> GridKind:
    if cfg.grid is not None:
        return cast(GridKind, cfg.grid.replace("-", "_"))
    if cfg.shift != 1:
        return "shifted"
    if isinstance(schedule, EDM):
        return "karras"
    return "log_snr" if cfg.sampler in _SINGLESTEP else "uniform"


def _grid(cfg: SampleConfig, schedule: NoiseSchedule, kind: GridKind, num: int) -> Tensor:
    """Returns the times of `num` steps, of which `sample` makes the last where t = 0 has noise.

    The grids in sigma / alpha begin at t = 1 if that is a noise level, else at 80.
    """
    options: dict[str, Any] = {}
    if kind == "shifted":
        options["shift"] = cfg.shift
    elif kind in _IN_SIGMA:
        options["schedule"] = schedule
        ends = torch.tensor([1.0, cfg.last_step], dtype=torch.float64)
        high, low = (schedule.log_snr(ends) / -2).exp().tolist()
        options |= {"sigma_max": high} if math.isfinite(high) else {}
        options |= {"sigma_min": low} if cfg.last_step else {}
    elif cfg.last_step:
        options["last_step"] = cfg.last_step
    if _keeps_noise(schedule):
        return time_grid(num - 1, kind, **options)
    if cfg.denoise:
        return time_grid(num, kind, **options)
    return time_grid(num + 1, kind, **options)[:-1]


def _keeps_noise(schedule: NoiseSchedule) -> bool:
    return bool(schedule.sigma(torch.zeros((), dtype=torch.float64)) > 0)


def _check(cfg: SampleConfig, schedule: NoiseSchedule, kind: GridKind) -> None:
    """Refuses settings without effect, and those that need others."""
    if isinstance(schedule, EDM) and cfg.sampler in ("euler-maruyama", "heun-sde"):
        raise InputError(
            f"--sampler {cfg.sampler} does not go with schedule edm: choose heun or heun-edm"
        )
    if _keeps_noise(schedule):
        if cfg.last_step or not cfg.denoise:
            raise InputError(
                f"--last-step and --no-denoise have no effect on schedule {schedule}, whose t = 0 "
                "is its smallest noise: leave them out"
            )
        if cfg.steps < 2:
            raise InputError(f"--steps 1: give at least 2 on schedule {schedule}, one to no noise")
    if not 0 <= cfg.last_step < 1:
        raise InputError(f"--last-step {cfg.last_step}: give a number between 0 and 1")
    if kind == "shifted" and cfg.last_step:
        raise InputError("--shift and --last-step do not go together: give one")
    if (kind == "shifted") != (cfg.shift != 1):
        raise InputError("--shift goes with --grid shifted, and nothing else takes it: give both")
    if not cfg.denoise and kind not in _IN_SIGMA and not cfg.last_step:
        raise InputError(
            "--no-denoise leaves the noise of the smallest time: say which by --last-step, or take "
            "--grid log-snr"
        )
    _check_churn(cfg)


def _check_churn(cfg: SampleConfig) -> None:
    if cfg.churn and cfg.sampler != "heun-edm":
        raise InputError(f"--churn has no effect on --sampler {cfg.sampler}: choose heun-edm")
    if not cfg.churn and (cfg.churn_min, cfg.churn_max, cfg.churn_noise) != (0.0, None, 1.0):
        raise InputError(
            "--churn-min, --churn-max and --churn-noise have no effect without --churn"
        )
