from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stratagem.errors import InputError
from stratagem.schedule import EDM, VP, Cosine, Linear, NoiseSchedule, SqrtLinear, expand
from tolerances import FLOAT32, FLOAT64, assert_near

SCHEDULES = [Linear(), Cosine(), VP(), VP(0.2, 0.2), EDM(), SqrtLinear()]
VARIANCE_PRESERVING = [Cosine(), VP(), VP(0.2, 0.2), SqrtLinear()]
GOLDEN = Path(__file__).parent / "golden"
OFFICIAL = {"Linear": Linear(), "GVP": Cosine(), "VP": VP()}

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


def inner_times(num: int = 301) -> torch.Tensor:
    return torch.linspace(0, 1, num + 2, dtype=torch.float64)[1:-1]


@each_schedule
def test_derivatives_are_those_of_autograd(schedule: NoiseSchedule) -> None:
    t = inner_times().requires_grad_()
    for scale, ours in zip(
        (schedule.alpha, schedule.sigma), schedule.derivatives(t.detach()), strict=True
    ):
        (reference,) = torch.autograd.grad(scale(t).sum() + 0 * t.sum(), t)
        assert_near(ours, reference, FLOAT64)


@each_schedule
def test_log_snr_falls_and_is_the_logarithm_of_the_ratio(schedule: NoiseSchedule) -> None:
    t = inner_times()
    log_snr = schedule.log_snr(t)
    assert (log_snr.diff() < 0).all()
    assert_near(log_snr, (schedule.alpha(t) ** 2 / schedule.sigma(t) ** 2).log(), FLOAT64)


@each_schedule
def test_time_of_inverts_log_snr(schedule: NoiseSchedule) -> None:
    reach = schedule.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
    log_snr = torch.linspace(-20, 20, 401, dtype=torch.float64)
    log_snr = log_snr[(log_snr >= reach[1]) & (log_snr <= reach[0])]
    assert len(log_snr) > 60
    t = schedule.time_of(log_snr)
    assert ((t >= 0) & (t <= 1)).all()
    assert_near(schedule.log_snr(t), log_snr, FLOAT64)
    assert_near(schedule.time_of(schedule.log_snr(inner_times())), inner_times(), FLOAT64)


@each_schedule
def test_time_of_gives_the_nearer_end_out_of_reach(schedule: NoiseSchedule) -> None:
    ends = schedule.time_of(torch.tensor([math.inf, 1e4, -1e4, -math.inf], dtype=torch.float64))
    assert_near(ends, torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64), FLOAT64)
    assert ((ends >= 0) & (ends <= 1)).all()


def test_end_values() -> None:
    t = torch.tensor([0.0, 1.0])
    for schedule in (Linear(), Cosine()):
        assert schedule.alpha(t).tolist() == [1, 0]
        assert schedule.sigma(t).tolist() == [0, 1]
        assert schedule.log_snr(t).tolist() == [math.inf, -math.inf]
    assert VP().alpha(t)[0] == 1
    assert VP().sigma(t)[0] == 0
    assert VP().alpha(t.double())[1].item() == pytest.approx(math.exp(-10.05 / 2), rel=1e-12)
    assert EDM(0.01, 50.0).alpha(t).tolist() == [1, 1]
    assert_near(EDM(0.01, 50.0).sigma(t), torch.tensor([0.01, 50.0]), FLOAT32)


@pytest.mark.parametrize("schedule", VARIANCE_PRESERVING, ids=str)
def test_variance_is_preserved(schedule: NoiseSchedule) -> None:
    t = inner_times()
    assert_near(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t), FLOAT64)


@each_schedule
def test_nothing_cancels_near_the_data_in_float32(schedule: NoiseSchedule) -> None:
    t = torch.logspace(-6, -2, 50, dtype=torch.float32)
    exact = schedule.sigma(t.double())
    assert ((schedule.sigma(t).double() - exact).abs() <= 1e-6 * exact).all()


@each_schedule
def test_values_and_slopes_are_finite_at_both_ends(schedule: NoiseSchedule) -> None:
    t = torch.tensor([0.0, 1.0])
    for value in (schedule.alpha(t), schedule.sigma(t), *schedule.derivatives(t)):
        assert torch.isfinite(value).all()


@each_schedule
def test_velocity_is_the_slope_of_perturb(schedule: NoiseSchedule) -> None:
    rng = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 5, 3, 2, 2, generator=rng, dtype=torch.float64)
    t = torch.rand(5, generator=rng, dtype=torch.float64) * 0.8 + 0.1
    h = 1e-6
    slope = (schedule.perturb(x, eps, t + h) - schedule.perturb(x, eps, t - h)) / (2 * h)
    assert_near(schedule.velocity(x, eps, t), slope, 1e-7)  # the error of a central difference
    one_by_one = torch.stack([schedule.perturb(a, b, c) for a, b, c in zip(x, eps, t, strict=True)])
    assert torch.equal(schedule.perturb(x, eps, t), one_by_one)


def test_expand_keeps_the_dtype_of_the_batch() -> None:
    batch = torch.zeros(4, 3, 2, 2, dtype=torch.float32)
    assert expand(torch.ones(4, dtype=torch.float64), batch).shape == (4, 1, 1, 1)
    assert expand(torch.tensor(0.5, dtype=torch.float64), batch).shape == ()
    mixed = Linear().perturb(batch, batch, torch.rand(4, dtype=torch.float64))
    assert mixed.dtype == torch.float32


def test_impossible_settings_are_refused() -> None:
    for make in (
        lambda: VP(beta_min=0.0),
        lambda: VP(2.0, 1.0),
        lambda: EDM(0.0, 1.0),
        lambda: EDM(3.0, 2.0),
    ):
        with pytest.raises(InputError):
            make()


@pytest.mark.parametrize("path", OFFICIAL)
def test_official_paths(path: str) -> None:
    """The official time runs from noise (0) to data (1), so slopes change their sign."""
    golden = load_file(GOLDEN / "transport_paths.safetensors")
    schedule = OFFICIAL[path]
    ours_t = 1 - golden["inputs/t"].double()
    x, eps = golden["inputs/x1"].double(), golden["inputs/x0"].double()
    d_alpha, d_sigma = schedule.derivatives(ours_t)
    ours = {
        "alpha": schedule.alpha(ours_t),
        "sigma": schedule.sigma(ours_t),
        "d_alpha": -d_alpha,
        "d_sigma": -d_sigma,
        "xt": schedule.perturb(x, eps, ours_t),
        "ut": -schedule.velocity(x, eps, ours_t),
    }
    for name, value in ours.items():
        assert_near(value, golden[f"outputs/{path}/{name}"], FLOAT32)


def test_official_variance_preserving_schedule() -> None:
    golden = load_file(GOLDEN / "dpm_solver.safetensors")
    t = golden["inputs/schedule_t"].double()
    half_log_snr = VP().log_snr(t) / 2
    assert_near(VP().alpha(t).log(), golden["outputs/schedule/log_alpha"], 1e-4)
    assert_near(VP().sigma(t), golden["outputs/schedule/std"], 1e-4)
    assert_near(half_log_snr, golden["outputs/schedule/lambda"], 1e-4)
    inverse = VP().time_of(2 * golden["outputs/schedule/lambda"].double())
    assert_near(inverse, golden["outputs/schedule/inverse_lambda_of_lambda"], 1e-4)
