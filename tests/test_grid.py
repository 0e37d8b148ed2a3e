"""Time grids."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from golden_solvers import Golden
from stratagem.errors import InputError
from stratagem.grid import GridKind, time_grid
from stratagem.schedule import EDM, VP, Cosine, Linear, NoiseSchedule
from tolerances import FLOAT32, FLOAT64, assert_near

SCHEDULES = [Linear(), Cosine(), VP(), EDM()]
ODE = Golden("transport_ode")

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


@pytest.mark.parametrize("num", [1, 2, 17])
@each_schedule
def test_grids_decrease_to_the_clean_end(schedule: NoiseSchedule, num: int) -> None:
    for kind in get_args(GridKind):
        options = {"schedule": schedule} if kind in ("karras", "log_snr") else {}
        times = time_grid(num, kind, **options)
        assert times.shape == (num + 1,)
        assert times.dtype == torch.float64
        assert (times.diff() < 0).all()
        assert 0 < times[0] <= 1
        assert times[-1] == 0


def test_grids_follow_their_formulas() -> None:
    sigma = (-VP().log_snr(time_grid(9, "karras", schedule=VP(), rho=3.0)) / 2).exp()
    assert_near((sigma[:-1] ** (1 / 3)).diff(n=2), torch.zeros(7).double(), FLOAT64)
    assert_near(sigma[[0, -2]], torch.tensor([80.0, 0.002]).double(), FLOAT32)
    options = {"schedule": Cosine(), "sigma_min": 0.01, "sigma_max": 30.0}
    log_snr = Cosine().log_snr(time_grid(9, "log_snr", **options))
    assert_near(log_snr[:-1].diff(n=2), torch.zeros(7).double(), FLOAT64)
    assert_near(log_snr[[0, -2]].div(-2).exp(), torch.tensor([30, 0.01]).double(), FLOAT64)
    # The grid of the official stochastic sampler: linspace(0, 0.996, 50) and a last step of 0.004.
    official = torch.cat([torch.linspace(0, 0.996, 50, dtype=torch.float64), torch.ones(1)])
    assert_near(time_grid(50, "uniform", last_step=0.004), 1 - official, FLOAT64)
    assert_near(time_grid(8, "shifted", shift=1.0), time_grid(8), FLOAT64)
    assert_near(time_grid(8, "quadratic"), time_grid(8) ** 2, FLOAT64)
    roots = time_grid(8, "quadratic", last_step=0.01).sqrt()
    assert_near(roots[:-1], torch.linspace(1, 0.1, 8, dtype=torch.float64), FLOAT64)


def test_a_grid_is_cut_to_the_reach_of_its_schedule() -> None:
    schedule = EDM(0.01, 50.0)
    times = time_grid(4, "karras", schedule=schedule)
    assert (times[0], times[-1]) == (1, 0)
    for sigma in ({"sigma_max": 60.0}, {"sigma_min": 0.001}):
        with pytest.raises(InputError, match="sigma_max <= 50"):
            time_grid(4, "karras", schedule=schedule, **sigma)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cosine", {}),
        ("uniform", {"shift": 2.0}),
        ("uniform", {"last_step": 0.0}),
        ("quadratic", {"last_step": -0.1}),
        ("quadratic", {"rho": 2.0}),
        ("shifted", {"shift": 0.0}),
        ("shifted", {"schedule": VP()}),
        ("karras", {}),
        ("karras", {"schedule": VP(), "rho": 0.0}),
        ("karras", {"schedule": VP(), "sigma_min": 2.0, "sigma_max": 1.0}),
        ("log_snr", {"schedule": VP(), "rho": 7.0}),
    ],
)
def test_bad_grids_are_refused(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="time grid"):
        time_grid(4, kind, **options)
    with pytest.raises(InputError, match="num_steps"):
        time_grid(0)
    with pytest.raises(InputError, match="last_step has no effect on a single step"):
        time_grid(1, "uniform", last_step=0.1)


@pytest.mark.parametrize("shift", [1e-17, 0.1, 0.3, 1 / 0.3, 7.0])
def test_any_shift_starts_at_the_noise_end(shift: float) -> None:
    """0.1 / (1 + (0.1 - 1)) is a hair above 1 in floating point, where no solver starts."""
    grid = time_grid(5, "shifted", shift=shift)
    assert (grid[0], grid[-1]) == (1, 0)
    assert (grid.diff() < 0).all()


@pytest.mark.parametrize(
    "case", ["Linear_velocity_euler_n50_shift0.3", "GVP_velocity_heun2_n12_shift0.3"]
)
def test_official_timestep_shift(case: str) -> None:
    official = ODE[f"outputs/{case}/ts"]
    ours = time_grid(len(official) - 1, "shifted", shift=1 / ODE.cases[case]["timestep_shift"])
    assert_near(1 - ours, official, FLOAT32)
