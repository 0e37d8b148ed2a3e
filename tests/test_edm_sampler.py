"""EDM's sampler, deterministic and stochastic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from golden_solvers import Golden, noise
from oracles import FiniteOracle, GaussianOracle
from stratagem.errors import InputError
from stratagem.randomness import normal_rows
from stratagem.sampler import ChurnHeun, Heun, sample, time_grid
from stratagem.schedule import EDM, VP, Cosine, Linear, NoiseSchedule
from tolerances import FLOAT64, assert_near

KARRAS = Golden("edm_sampler")
TOLERANCE = 1e-6
DETERMINISTIC = [case for case in KARRAS.cases if case.startswith("heun")]
STOCHASTIC = [case for case in KARRAS.cases if case.startswith("stochastic")]

SCHEDULES = [Linear(), Cosine(), VP(), EDM()]

any_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


# --- laws --------------------------------------------------------------------------------------


@any_schedule
def test_outside_its_bounds_churn_is_none(schedule: NoiseSchedule) -> None:
    times = time_grid(8, "karras", schedule=schedule)
    x_T = schedule.sigma(times[0]) * noise()
    reference = sample(GaussianOracle(schedule), Heun("sigma"), x_T, times)
    for bounds in ({"churn_min": 100.0}, {"churn_max": 1e-4}):
        solver = ChurnHeun(40, 8, **bounds)
        ours = sample(GaussianOracle(schedule), solver, x_T, times, seeds=range(4))
        assert torch.equal(ours, reference)
    inside = sample(GaussianOracle(schedule), ChurnHeun(4, 8), x_T, times, seeds=range(4))
    assert (inside - reference).abs().max() > 0.01


@any_schedule
def test_a_churned_sample_keeps_mean_and_variance(schedule: NoiseSchedule) -> None:
    oracle, num = GaussianOracle(schedule), 60
    times = time_grid(num, "karras", schedule=schedule)
    x_T = schedule.sigma(times[0]) * normal_rows(range(8), (1, 50, 50), "test").double()
    x_0 = sample(oracle, ChurnHeun(30, num), x_T, times, seeds=range(8))
    assert x_0.mean().item() == pytest.approx(0.3, abs=0.02)  # standard error 0.0035
    assert x_0.std().item() == pytest.approx(0.5, abs=0.015)
    deterministic = sample(oracle, Heun("sigma"), x_T, times)
    correlation = torch.corrcoef(torch.stack([x_0.flatten(), deterministic.flatten()]))[0, 1]
    assert correlation < 0.9  # it has forgotten part of x_T


def test_churned_samples_of_a_finite_data_set_land_on_it() -> None:
    data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-0.5, 0.8], [0.3, -1.0]], dtype=torch.float64)
    times = time_grid(80, "karras", schedule=EDM())
    x_T = 80 * normal_rows(range(40), (2,), "test").double()
    solver = ChurnHeun(20, 80, churn_min=0.05, churn_max=50.0, noise_scale=1.003)
    x_0 = sample(FiniteOracle(EDM(), data), solver, x_T, times, seeds=range(40))
    distance = torch.cdist(x_0, data)
    assert distance.min(1).values.max() < 0.02
    assert len(distance.argmin(1).unique()) == len(data)


def test_a_churned_image_does_not_depend_on_its_batch() -> None:
    oracle, times, seeds = GaussianOracle(Linear()), time_grid(7), [5, 3, 11, 2]
    x_T = noise(dtype=torch.float32)
    solver = ChurnHeun(5, 7)
    whole = sample(oracle, solver, x_T, times, seeds=seeds)
    alone = sample(oracle, solver, x_T[[3, 1]], times, seeds=[2, 3])
    assert torch.equal(alone, whole[[3, 1]])
    assert whole.dtype == torch.float32


def test_noise_is_not_raised_above_the_schedules_own() -> None:
    for schedule, t in ((EDM(), 1.0), (Linear(), 1.0)):
        oracle = GaussianOracle(schedule)
        at = torch.tensor([t, 0.5], dtype=torch.float64)
        sample(oracle, ChurnHeun(9, 1), noise(), at, seeds=range(4))
        assert oracle.calls[0][1] == 1
        assert_near(oracle.calls[0][0], noise(), FLOAT64)


@pytest.mark.parametrize(
    "settings",
    [
        {"churn": 0.0},
        {"churn": -1.0},
        {"num_steps": 0},
        {"churn_min": -0.1},
        {"churn_min": 2.0, "churn_max": 1.0},
        {"noise_scale": 0.0},
        {"churn": math.nan},
    ],
)
def test_impossible_churn_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="churn"):
        ChurnHeun(**({"churn": 10.0, "num_steps": 18} | settings))


# --- parity with the official code -------------------------------------------------------------


def settings_of(case: str) -> dict[str, float]:
    settings = {**KARRAS.config["defaults"], **KARRAS.cases[case]}
    return {name: float(value) for name, value in settings.items()}


def start(case: str, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """The grid and x_T of a case; a schedule whose t = 0 is sigma_min needs a step less."""
    settings = settings_of(case)
    num_steps = int(settings["num_steps"]) - isinstance(schedule, EDM)
    options = {name: settings[name] for name in ("rho", "sigma_min", "sigma_max")}
    times = time_grid(num_steps, "karras", schedule=schedule, **options)
    x_T = schedule.alpha(times[0]) * options["sigma_max"] * KARRAS["inputs/latents"]
    return times, x_T


def check(case: str, x_0: Tensor, oracle: GaussianOracle) -> None:
    """Compares the result and every call, in the paper's variables x_t / alpha, sigma / alpha."""
    alphas = torch.stack([oracle.schedule.alpha(t) for _, t in oracle.calls])
    sigmas = torch.stack([oracle.schedule.sigma(t) for _, t in oracle.calls]) / alphas
    call_x = torch.stack([x for x, _ in oracle.calls]) / alphas.view(-1, 1, 1, 1, 1)
    assert_near(sigmas, KARRAS[f"outputs/{case}/call_sigma"], TOLERANCE)
    assert_near(call_x, KARRAS[f"outputs/{case}/call_x"], TOLERANCE)
    assert_near(x_0, KARRAS[f"outputs/{case}/x"], TOLERANCE)


@any_schedule
@pytest.mark.parametrize("case", DETERMINISTIC)
def test_official_deterministic_sampler(case: str, schedule: NoiseSchedule) -> None:
    """The same sampler on any schedule: it knows only x_t / alpha and sigma / alpha."""
    if isinstance(schedule, EDM):
        settings = settings_of(case)
        schedule = EDM(settings["sigma_min"], settings["sigma_max"])
    oracle = KARRAS.oracle(schedule)
    times, x_T = start(case, schedule)
    check(case, sample(oracle, Heun("sigma"), x_T, times), oracle)


@pytest.mark.parametrize(
    ("case", "schedule"),
    [(c, s) for c in STOCHASTIC for s in SCHEDULES if KARRAS.cases[c].get("S_min") or s != EDM()],
    ids=str,
)
def test_official_stochastic_sampler(
    case: str, schedule: NoiseSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the official draws in place of ours.

    Without S_min the official code raises the noise at sigma_min too, where `sample` closes on the
    schedule of EDM, and above sigma_max, where that schedule ends.
    """
    settings = settings_of(case)
    solver = ChurnHeun(
        settings["S_churn"],
        int(settings["num_steps"]),
        churn_min=settings["S_min"],
        churn_max=settings["S_max"],
        noise_scale=settings["S_noise"],
    )
    oracle, draws = KARRAS.oracle(schedule), KARRAS["inputs/noise"]
    monkeypatch.setattr("stratagem.sampler.base.normal_rows", lambda *given: draws[given[-1]])
    times, x_T = start(case, schedule)
    check(case, sample(oracle, solver, x_T, times, seeds=[0, 1]), oracle)


def test_every_official_case_is_checked() -> None:
    assert sorted([*DETERMINISTIC, *STOCHASTIC]) == sorted(KARRAS.cases)
    assert len(DETERMINISTIC) == len(STOCHASTIC) == 2
