"""From the settings of a sampling run to solver and grid."""

from __future__ import annotations

import math
import re
from itertools import product
from typing import Any, get_args

import pytest
import torch

from golden_solvers import Golden, noise, states
from oracles import GaussianOracle
from stratagem.errors import InputError
from stratagem.programs.cost import call_times
from stratagem.programs.solvers import GridName, SampleConfig, SamplerName, make_solver
from stratagem.sampler import DPMMultistep, DPMSinglestep, Heun, sample
from stratagem.schedule import EDM, VP, Cosine, Linear, NoiseSchedule, SqrtLinear
from tolerances import FLOAT64, assert_near

SCHEDULES = [Linear(), Cosine(), VP(), EDM(), SqrtLinear()]
SINGLESTEP = ("dpm-solver-2", "dpm-solver-3", "dpm++2s", "dpm++3s")
TWO_CALLS = ("heun", "heun-edm", "heun-sde")
GRIDS = {name: {"shift": 2.0} if name == "shifted" else {} for name in get_args(GridName)}

any_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def config(**settings: Any) -> SampleConfig:
    return SampleConfig(**{"steps": 12} | settings)


@any_schedule
@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_steps_are_what_they_say(sampler: Any, schedule: NoiseSchedule) -> None:
    """Calls of singlestep solvers, else intervals, the last of one call; on every schedule."""
    if isinstance(schedule, EDM) and sampler in ("euler-maruyama", "heun-sde"):
        return
    grids = [None, *GRIDS] if sampler in SINGLESTEP else [None]
    for grid, steps in product(grids, (9, 11, 12)):
        cfg = config(sampler=sampler, grid=grid, steps=steps, **GRIDS.get(grid, {}))
        times = call_times(cfg, schedule)
        calls = len(times)
        if sampler == "heun-edm" and schedule.alpha(torch.tensor(times[0])) == 0:
            calls += 1  # from no signal, sigma / alpha is infinite: one call
        assert calls == (2 * steps - 1 if sampler in TWO_CALLS else steps)
        assert all(0 <= t <= 1 for t in times)


@pytest.mark.parametrize("sampler", SINGLESTEP)
def test_too_few_calls_for_a_singlestep_solver_are_refused(sampler: Any) -> None:
    least = {"2": 2, "3": 4}[sampler[-1].replace("s", sampler[-2])] + 1  # and one to no noise
    make_solver(config(sampler=sampler, steps=least), Linear())
    with pytest.raises(InputError, match=re.escape(f"--steps {least - 1}: {sampler} counts")):
        make_solver(config(sampler=sampler, steps=least - 1), Linear())
    with pytest.raises(InputError, match=f"take 2: give at least {least + 1}"):
        make_solver(config(sampler=sampler, steps=least, grid="uniform"), Linear())


@any_schedule
@pytest.mark.parametrize("sampler", [*SINGLESTEP, "dpm++3m", "dpm-solver-2m", "dpm-solver-3m"])
def test_calls_between_steps_have_levels_of_their_own(
    sampler: Any, schedule: NoiseSchedule
) -> None:
    """So each goes to the decoder of its own noise level."""
    times = call_times(config(sampler=sampler), schedule)
    assert (torch.tensor(times).diff() < 0).all()


@pytest.mark.parametrize("grid", ["uniform", "quadratic", "karras", "log-snr"])
def test_the_last_step_and_leaving_it_out(grid: Any) -> None:
    """last_step is the smallest time but 0, on every grid."""
    for schedule in (Linear(), Cosine(), VP()):
        for sampler in ("ddim", "dpm-solver-3"):
            cfg = config(sampler=sampler, grid=grid, last_step=0.004)
            _, times = make_solver(cfg, schedule)
            assert times[-1] == 0
            assert times[-2].item() == pytest.approx(0.004)
            whole = config(sampler=sampler, grid=grid, last_step=0.004, denoise=False)
            _, times = make_solver(whole, schedule)
            assert times[-1].item() == pytest.approx(0.004)
            assert len(call_times(whole, schedule)) == 12


def test_grids_by_name() -> None:
    """In sigma / alpha they begin where the schedule does, or at 80."""
    root = make_solver(config(grid="quadratic"), Linear())[1].sqrt()
    assert_near(root, torch.linspace(1, 0, 13, dtype=torch.float64), FLOAT64)
    log_snr = VP().log_snr(make_solver(config(grid="log-snr"), VP())[1])
    assert_near(log_snr[:-1].diff(n=2), torch.zeros(10).double(), FLOAT64)
    assert make_solver(config(grid="karras"), VP())[1][0] == 1
    assert make_solver(config(grid="karras"), Linear())[1][0].item() == pytest.approx(80 / 81)
    edm = make_solver(config(grid="log-snr"), EDM())[1]
    assert_near(edm, torch.linspace(1, 0, 12, dtype=torch.float64), FLOAT64)


def test_default_grids() -> None:
    def same(first: SampleConfig, second: SampleConfig, schedule: NoiseSchedule) -> bool:
        return torch.equal(make_solver(first, schedule)[1], make_solver(second, schedule)[1])

    assert same(config(), config(grid="uniform"), VP())
    assert same(config(), config(grid="karras"), EDM())
    assert same(config(shift=2.0), config(grid="shifted", shift=2.0), Linear())
    single = config(sampler="dpm-solver-3")
    assert same(single, config(sampler="dpm-solver-3", grid="log-snr"), Linear())


@pytest.mark.parametrize(
    ("settings", "schedule", "message"),
    [
        ({"grid": "uniform", "shift": 2.0}, Linear(), "--shift"),
        ({"grid": "shifted"}, Linear(), "--shift"),
        ({"grid": "shifted", "shift": 2.0, "last_step": 0.1}, Linear(), "do not go together"),
        ({"denoise": False}, Linear(), "--no-denoise"),
        ({"denoise": False, "grid": "quadratic"}, Linear(), "--no-denoise"),
        ({"denoise": False}, EDM(), "no effect"),
        ({"last_step": 0.1}, EDM(), "no effect"),
        ({"last_step": 0.1}, SqrtLinear(), "no effect"),
        ({"steps": 1}, EDM(), "at least 2"),
        ({"last_step": -0.1, "grid": "log-snr"}, VP(), "--last-step"),
        ({"last_step": 1.0, "grid": "log-snr"}, VP(), "--last-step"),
        ({"last_step": 0.999, "grid": "log-snr"}, Linear(), "time grid"),
        ({"churn": 10.0}, EDM(), "--churn"),
        ({"churn_min": 0.1, "sampler": "heun-edm"}, EDM(), "without --churn"),
        ({"churn_max": 1.0, "sampler": "heun-edm"}, EDM(), "without --churn"),
        ({"churn_noise": 1.1, "sampler": "heun-edm"}, EDM(), "without --churn"),
        ({"churn": -1.0, "sampler": "heun-edm"}, EDM(), "above 0"),
        ({"churn": 1.0, "churn_max": -1.0, "sampler": "heun-edm"}, EDM(), "above 0"),
        ({"sampler": "euler-maruyama"}, EDM(), "choose heun"),
    ],
)
def test_settings_without_effect_are_refused(
    settings: dict[str, Any], schedule: NoiseSchedule, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_solver(config(**settings), schedule)


# --- parity with the official code, by the settings a user gives -------------------------------


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("dpmsolver_singlestep_o3_logSNR_n20", {"sampler": "dpm-solver-3"}),
        ("dpmsolver_singlestep_o2_logSNR_n9", {"sampler": "dpm-solver-2"}),
        ("dpmsolver_multistep_o2_logSNR_n12", {"sampler": "dpm-solver-2m", "grid": "log-snr"}),
        ("dpmsolverpp_singlestep_o3_logSNR_n12", {"sampler": "dpm++3s"}),
        ("dpmsolverpp_singlestep_o3_time_uniform_n11", {"sampler": "dpm++3s", "grid": "uniform"}),
        ("dpmsolverpp_singlestep_o2_logSNR_n9", {"sampler": "dpm++2s"}),
        ("dpmsolverpp_multistep_o2_logSNR_n12", {"sampler": "dpm++2m", "grid": "log-snr"}),
        ("dpmsolverpp_multistep_o1_time_quadratic_n8", {"sampler": "ddim", "grid": "quadratic"}),
    ],
)
def test_official_dpm_solver(case: str, settings: dict[str, Any]) -> None:
    golden = Golden("dpm_solver")
    official = golden.cases[case]
    cfg = SampleConfig(
        steps=official["steps"], last_step=official["t_end"], denoise=False, **settings
    )
    solver, times = make_solver(cfg, VP())
    oracle = golden.oracle(VP())
    ours = states(oracle, solver, golden["inputs/x_T"], times)
    assert_near(ours[-1], golden[f"outputs/{case}/x"], 1e-4)
    called = torch.stack([t for _, t in oracle.calls])
    assert_near(called, golden[f"outputs/{case}/model_times"], 1e-4)


def test_official_edm_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    golden, case = Golden("edm_sampler"), "stochastic_churn40_n18"
    cfg = SampleConfig(
        steps=18, sampler="heun-edm", churn=40, churn_min=0.05, churn_max=50, churn_noise=1.003
    )
    solver, times = make_solver(cfg, EDM())
    draws = golden["inputs/noise"]
    monkeypatch.setattr("stratagem.sampler.base.normal_rows", lambda *given: draws[given[-1]])
    oracle, x_T = golden.oracle(EDM()), 80 * golden["inputs/latents"]
    x_0 = sample(oracle, solver, x_T, times, seeds=[0, 1])
    assert_near(x_0, golden[f"outputs/{case}/x"], 1e-6)
    assert len(oracle.calls) == 35


def test_solvers_by_name() -> None:
    def solver(name: Any, schedule: NoiseSchedule = Linear()) -> Any:  # noqa: B008
        return make_solver(config(sampler=name), schedule)[0]

    assert solver("heun").variable == "time"
    assert solver("heun", EDM()).variable == solver("heun-edm").variable == "sigma"
    for name, order, predicts in [
        ("dpm++2m", 2, "x"),
        ("dpm++3m", 3, "x"),
        ("dpm-solver-2m", 2, "eps"),
        ("dpm-solver-3m", 3, "eps"),
        ("dpm++2s", 2, "x"),
        ("dpm++3s", 3, "x"),
        ("dpm-solver-2", 2, "eps"),
        ("dpm-solver-3", 3, "eps"),
    ]:
        found = solver(name)
        assert isinstance(found, DPMSinglestep if name in SINGLESTEP else DPMMultistep)
        assert (found.order, found.predicts) == (order, predicts)
    assert isinstance(solver("heun-edm"), Heun)
    oracle, x_T = GaussianOracle(VP()), noise()
    few, times = make_solver(config(sampler="dpm++3m", steps=6), VP())
    falling = sample(oracle, DPMMultistep(3, "x", num_steps=6), x_T, times)
    assert torch.equal(sample(oracle, few, x_T, times), falling)
    assert not torch.equal(sample(oracle, DPMMultistep(3, "x"), x_T, times), falling)
    churned = make_solver(config(sampler="heun-edm", churn=4.0, churn_max=9.0), Linear())[0]
    assert (churned.gamma, churned.churn_max) == (4 / 12, 9.0)
    assert make_solver(config(sampler="heun-edm", churn=4.0), VP())[0].churn_max == math.inf
