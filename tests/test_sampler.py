from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from golden_solvers import Golden, measured_order, noise, states
from oracles import FiniteOracle, GaussianOracle
from stratagem.denoiser import Denoiser, Prediction
from stratagem.errors import InputError
from stratagem.randomness import normal_rows
from stratagem.sampler import (
    DDIM,
    DPMMultistep,
    Euler,
    EulerMaruyama,
    Heun,
    Sampler,
    StochasticHeun,
    sample,
    sigma_diffusion,
    time_grid,
)
from stratagem.schedule import EDM, VP, Cosine, Linear, NoiseSchedule
from tolerances import FLOAT64, assert_near

DETERMINISTIC = {
    "Euler": Euler(),
    "DDIM": DDIM(),
    "Heun time": Heun("time"),
    "Heun sigma": Heun("sigma"),
    "2M": DPMMultistep(2),
}
STOCHASTIC = {"EulerMaruyama": EulerMaruyama(), "StochasticHeun": StochasticHeun()}
ALL = DETERMINISTIC | STOCHASTIC
SCHEDULES = [Linear(), Cosine(), VP(), EDM()]
OFFICIAL = {"Linear": Linear(), "GVP": Cosine(), "VP": VP()}

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
each_solver = pytest.mark.parametrize("name", ALL)


def start(schedule: NoiseSchedule, times: Tensor, eps: Tensor) -> Tensor:
    return schedule.sigma(times[0]) * eps


# --- accuracy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VP()], ids=str)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_measured_order_is_the_declared_order(name: str, schedule: NoiseSchedule) -> None:
    solver, oracle = DETERMINISTIC[name], GaussianOracle(schedule)
    x_T, steps, errors = noise(2), [40, 80, 160, 320], []
    for num in steps:
        times = torch.linspace(0.9, 0.1, num + 1, dtype=torch.float64)
        if name == "2M":  # evenly in its own variable
            ends = schedule.log_snr(times[[0, -1]]).tolist()
            times = schedule.time_of(torch.linspace(*ends, num + 1, dtype=torch.float64))
        exact = oracle.flow(x_T, times[0], times[-1])
        errors.append((sample(oracle, solver, x_T, times) - exact).abs().max().item())
    slope = measured_order(steps, errors)
    if name == "2M":
        assert slope >= 1.8
    else:
        assert slope == pytest.approx(solver.order, abs=0.1 if solver.order == 1 else 0.15)


@each_schedule
@pytest.mark.parametrize("name", ["Heun sigma", "2M"])
def test_second_order_holds_all_the_way_to_the_clean_end(
    name: str, schedule: NoiseSchedule
) -> None:
    oracle, errors = GaussianOracle(schedule), []
    for num in (40, 80):
        times = time_grid(num, "karras", schedule=schedule)
        x_T = start(schedule, times, noise())
        exact = oracle.flow(x_T, times[0], times[-1])
        if isinstance(schedule, EDM):  # t = 0 holds sigma_min; the closing prediction removes it
            exact = oracle(exact, times[-1]).x
        errors.append((sample(oracle, ALL[name], x_T, times) - exact).abs().max())
    assert errors[1] < 0.004
    assert errors[0] / errors[1] > 3.5


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@each_solver
def test_samples_of_a_finite_data_set_land_on_it(name: str, schedule: NoiseSchedule) -> None:
    data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-0.5, 0.8], [0.3, -1.0]], dtype=torch.float64)
    oracle = FiniteOracle(schedule, data)
    times = time_grid(80, "karras", schedule=schedule)
    x_T = start(schedule, times, normal_rows(range(40), (2,), "test").double())
    solver = ALL[name]
    if name in STOCHASTIC and isinstance(schedule, EDM):  # sigma falls too fast for w = sigma
        solver = type(solver)(lambda schedule, t: schedule.sigma(t) * schedule.derivatives(t)[1])
    x_0 = sample(oracle, solver, x_T, times, seeds=range(40))
    distance = torch.cdist(x_0, data)
    assert distance.min(1).values.max() < 0.02
    assert len(distance.argmin(1).unique()) == len(data)


@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=str)
@pytest.mark.parametrize("kind", ["uniform", "shifted"])
@each_solver
def test_the_full_axis_from_no_signal_to_no_noise_is_finite(
    name: str, kind: Any, schedule: NoiseSchedule
) -> None:
    oracle = GaussianOracle(schedule)
    for num in (1, 2, 20):
        x_0 = sample(oracle, ALL[name], noise(), time_grid(num, kind), seeds=range(4))
        assert torch.isfinite(x_0).all()
    assert (x_0 - oracle.mu).abs().max() < 4 * oracle.std


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=str)
def test_a_stochastic_solver_keeps_mean_and_variance(name: str, schedule: NoiseSchedule) -> None:
    oracle, num = GaussianOracle(schedule), 200
    x_T = normal_rows(range(8), (1, 50, 50), "test").double()
    x_0 = sample(oracle, STOCHASTIC[name], x_T, time_grid(num), seeds=range(8))
    assert x_0.mean().item() == pytest.approx(0.3, abs=0.02)  # standard error 0.0035
    assert x_0.std().item() == pytest.approx(0.5, abs=0.015)
    deterministic = sample(oracle, Euler(), x_T, time_grid(num))
    correlation = torch.corrcoef(torch.stack([x_0.flatten(), deterministic.flatten()]))[0, 1]
    assert correlation < 0.9  # it has forgotten part of x_T: it does draw noise


# --- relations ---------------------------------------------------------------------------------


def test_ddim_is_euler_on_a_straight_path() -> None:
    oracle, times = GaussianOracle(Linear()), time_grid(13, "shifted", shift=2.0)
    assert_near(
        sample(oracle, DDIM(), noise(), times), sample(oracle, Euler(), noise(), times), FLOAT64
    )


@each_schedule
def test_without_diffusion_the_stochastic_solvers_are_the_deterministic_ones(
    schedule: NoiseSchedule,
) -> None:
    oracle = GaussianOracle(schedule)
    times = time_grid(12, "karras", schedule=schedule)
    x_T = start(schedule, times, noise())
    for random, plain in ((EulerMaruyama, Euler()), (StochasticHeun, Heun("time"))):
        ours = sample(oracle, random(lambda _, t: 0 * t), x_T, times, seeds=range(4))
        assert_near(ours, sample(oracle, plain, x_T, times), FLOAT64)


@pytest.mark.parametrize("name", ["DDIM", "Heun sigma", "2M"])
def test_solvers_in_the_noise_level_do_not_depend_on_the_schedule(name: str) -> None:
    """Equal noise levels and equal x_t / alpha give equal samples."""
    results = []
    for schedule in (Linear(), Cosine(), VP()):
        times = time_grid(9, "karras", schedule=schedule)
        x_T = 80 * schedule.alpha(times[0]) * noise()
        results.append(sample(GaussianOracle(schedule), DETERMINISTIC[name], x_T, times))
    assert_near(results[1], results[0], FLOAT64)
    assert_near(results[2], results[0], FLOAT64)


@each_solver
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    oracle, times, seeds = GaussianOracle(Linear()), time_grid(7), [5, 3, 11, 2]
    x_T = noise(dtype=torch.float32)
    whole = sample(oracle, ALL[name], x_T, times, seeds=seeds)
    for part in ([0], [1, 2, 3], [3, 1]):
        alone = sample(oracle, ALL[name], x_T[part], times, seeds=[seeds[j] for j in part])
        assert torch.equal(alone, whole[part])
    assert whole.dtype == torch.float32


def test_equal_seeds_give_equal_noise_and_steps_differ() -> None:
    oracle, times = GaussianOracle(Linear()), time_grid(6)
    draws: list[Tensor] = []

    class Spy(Sampler):
        order, stochastic = 1, True

        def step(self, predict: Any, x_t: Tensor, *rest: Any) -> tuple[Tensor, None]:
            predict(x_t, rest[0])
            draws.extend((rest[-1](), rest[-1]()))
            return x_t, None

    sample(oracle, Spy(), noise(2), times, seeds=[1, 1])
    assert all(torch.equal(draw[0], draw[1]) for draw in draws)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# --- the loop ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "schedule", "calls"),
    [
        ("Euler", Linear(), 10),
        ("DDIM", Linear(), 10),
        ("2M", Linear(), 10),
        ("EulerMaruyama", Linear(), 10),
        ("Heun time", Linear(), 19),
        ("StochasticHeun", Linear(), 19),
        ("Heun sigma", VP(), 19),
        ("Heun sigma", Linear(), 18),  # the first step, from alpha = 0, is first order as well
        ("Heun sigma", EDM(), 21),  # the last step ends at sigma_min; one call more removes that
        ("Euler", EDM(), 11),
    ],
)
def test_number_of_network_calls(name: str, schedule: NoiseSchedule, calls: int) -> None:
    oracle = GaussianOracle(schedule)
    sample(oracle, ALL[name], noise(), time_grid(10), seeds=range(4))
    assert len(oracle.calls) == calls


def test_the_network_sees_times_without_rank_and_no_gradients() -> None:
    oracle = GaussianOracle(Linear())
    oracle.mu.requires_grad_()
    for dtype, time_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        oracle.calls.clear()
        x_0 = sample(oracle, Heun(), noise(dtype=dtype), time_grid(3))
        assert x_0.dtype == dtype
        assert not x_0.requires_grad
        assert {(t.dtype, t.ndim) for _, t in oracle.calls} == {(time_dtype, 0)}


def test_conditions_reach_the_denoiser() -> None:
    class Conditioned:
        schedule = Linear()

        def __call__(self, x_t: Tensor, _: Tensor, **condition: Any) -> Prediction:
            return Prediction(condition["memory"].expand_as(x_t), x_t)

    memory = torch.full((4, 1, 1, 1), 0.7, dtype=torch.float64)
    x_0 = sample(Conditioned(), DDIM(), noise(), time_grid(5), memory=memory)
    assert_near(x_0, torch.full_like(x_0, 0.7), FLOAT64)


def test_a_denoiser_samples() -> None:
    denoiser = Denoiser(lambda x_t, _: -x_t, Linear(), "v")  # type: ignore[arg-type]
    x_0 = sample(denoiser, Euler(), noise(), time_grid(10))
    assert_near(x_0, noise() * 1.1**10, FLOAT64)


def test_the_callback_sees_every_state_and_its_prediction() -> None:
    oracle, times = GaussianOracle(VP()), time_grid(4)
    seen: list[tuple[int, Tensor, Tensor, Prediction | None]] = []
    x_0 = sample(oracle, Heun(), noise(), times, callback=lambda *state: seen.append(state))
    assert [step for step, *_ in seen] == [0, 1, 2, 3, 4]
    assert [t.item() for _, t, *_ in seen] == times.tolist()
    assert torch.equal(seen[0][2], noise())
    assert torch.equal(seen[-1][2], x_0)
    assert seen[-1][3] is None
    for _, t, x_t, prediction in seen[:-1]:
        assert_near(prediction.x, oracle(x_t, t).x, FLOAT64)
    sample(GaussianOracle(EDM()), Heun(), noise(), times, callback=lambda *s: seen.append(s))
    assert seen[-1][3] is not None


def test_the_default_diffusion_is_sigma() -> None:
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert torch.equal(sigma_diffusion(VP(), t), VP().sigma(t))


def test_bad_calls_are_refused() -> None:
    oracle, grid = GaussianOracle(Linear()), time_grid(3)
    for solver in STOCHASTIC.values():
        for seeds in (None, [1, 2, 3]):
            with pytest.raises(InputError, match="seed"):
                sample(oracle, solver, noise(), grid, seeds=seeds)
    for times in ([0.0, 1.0], [1.0], [1.0, 0.5, 0.5], [1.5, 0.0], [1.0, -0.1], [1.0, math.nan]):
        with pytest.raises(InputError, match="times"):
            sample(oracle, Euler(), noise(), torch.tensor(times))
    with pytest.raises(InputError):
        Heun("space")  # type: ignore[arg-type]


# --- parity with the official code -------------------------------------------------------------


ODE, SDE = Golden("transport_ode"), Golden("transport_sde")


@pytest.mark.parametrize(
    "case", [c for c, v in ODE.cases.items() if v["method"] in ("euler", "heun2")]
)
def test_official_ode_trajectories(case: str) -> None:
    """The official time runs from noise to data, and its last trapezoid evaluates at no noise."""
    settings = ODE.cases[case]
    times = 1 - ODE[f"outputs/{case}/ts"]
    if settings["method"] == "heun2":
        times = times.clamp(min=1e-9)  # as good as 0, yet our Heun makes its second call there
    solver = {"euler": Euler(), "heun2": Heun("time")}[settings["method"]]
    oracle = ODE.oracle(OFFICIAL[settings["path"]])
    ours = states(oracle, solver, ODE["inputs/init"], times)
    assert_near(ours, ODE[f"outputs/{case}/xs"], 1e-4)


def official_diffusion(form: str, norm: float, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    d_alpha, d_sigma = schedule.derivatives(t)
    return {
        "constant": norm * torch.ones_like(t),
        "SBDM": norm * (sigma * d_sigma - d_alpha / alpha * sigma**2),
        "sigma": norm * sigma,
        "linear": norm * t,
        "decreasing": 0.25 * (1 - norm * torch.cos(math.pi * t)) ** 2,
        "inccreasing-decreasing": norm * torch.sin(math.pi * t) ** 2,
    }[form]


@pytest.mark.parametrize("case", SDE.cases)
def test_official_sde_trajectories(case: str) -> None:
    settings = SDE.cases[case]
    schedule = OFFICIAL[settings["path"]]
    predict, draws = SDE.oracle(schedule), SDE["inputs/noise"]

    def diffusion(schedule: NoiseSchedule, t: Tensor) -> Tensor:
        form, norm = settings["diffusion_form"], settings["diffusion_norm"]
        return official_diffusion(form, norm, schedule, t)

    solver = {"Euler": EulerMaruyama, "Heun": StochasticHeun}[settings["method"]](diffusion)
    times = 1 - torch.linspace(
        settings["t0"], settings["t1"], settings["num_steps"], dtype=torch.float64
    )
    x_t, ours = SDE["inputs/init"], []
    for k in range(len(times) - 1):
        draw = draws[k]
        x_t, _ = solver.step(
            predict, x_t, times[k], times[k + 1], schedule, None, lambda draw=draw: draw
        )
        ours.append(x_t)
    end, clean = times[-1], torch.zeros((), dtype=torch.float64)
    match settings["last_step"]:
        case "Mean":
            x_t, _ = solver.step(predict, x_t, end, clean, schedule, None, lambda: draws[0])
        case "Tweedie":
            x_t = predict(x_t, end).x
        case "Euler":
            x_t, _ = Euler().step(predict, x_t, end, clean, schedule, None, lambda: draws[0])
    assert_near(torch.stack([*ours, x_t]), SDE[f"outputs/{case}/xs"], 5e-5)
