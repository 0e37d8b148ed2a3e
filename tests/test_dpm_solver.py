"""DPM-Solver and DPM-Solver++: orders, exactness, and the official code's trajectories."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from golden_solvers import Golden, measured_order, noise, states
from oracles import FiniteOracle, GaussianOracle
from stratagem.denoiser import Denoiser, Prediction
from stratagem.errors import InputError
from stratagem.randomness import normal_rows
from stratagem.sampler import (
    DDIM,
    DPMMultistep,
    DPMSinglestep,
    Sampler,
    sample,
    singlestep_orders,
    time_grid,
)
from stratagem.schedule import EDM, VP, Cosine, Linear, NoiseSchedule
from stratagem.stages import Stages
from tolerances import FLOAT64, assert_near

OFFICIAL = Golden("dpm_solver")
TOLERANCE = 1e-4
PREDICTS = {"dpmsolver": "eps", "dpmsolver++": "x"}

each_kind = pytest.mark.parametrize("predicts", ["x", "eps"])


# --- orders ------------------------------------------------------------------------------------


def even_in_log_snr(schedule: NoiseSchedule, num: int, t: float, s: float) -> Tensor:
    ends = schedule.log_snr(torch.tensor([t, s], dtype=torch.float64)).tolist()
    return schedule.time_of(torch.linspace(*ends, num + 1, dtype=torch.float64))


def exact(oracle: FiniteOracle, x_T: Tensor, times: Tensor) -> Tensor:
    """The solution with very many steps of the highest order."""
    fine = even_in_log_snr(oracle.schedule, 240, *times[[0, -1]].tolist())
    return sample(oracle, DPMSinglestep([3] * 240, "x"), x_T, fine)


@each_kind
@pytest.mark.parametrize("between", ["log_snr", "time"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_a_singlestep_solver(order: int, between: Any, predicts: Any) -> None:
    schedule, steps, errors = Cosine(), [20, 40, 80], []
    oracle = GaussianOracle(schedule)
    for num in steps:
        times = even_in_log_snr(schedule, num, 0.8, 0.1)
        x_s = sample(oracle, DPMSinglestep([order] * num, predicts, between), noise(2), times)
        errors.append((x_s - oracle.flow(noise(2), times[0], times[-1])).abs().max().item())
    assert measured_order(steps, errors) == pytest.approx(order, abs=0.2)


@each_kind
@pytest.mark.parametrize(("order", "measured"), [(1, 1), (2, 2), (3, 3), ("halved", 2)])
def test_order_of_a_multistep_solver(order: Any, measured: int, predicts: Any) -> None:
    """The first steps are of lower order: small ones here, so that they do not spoil the others.

    The official third order, which halves the curvature, is a second one.
    """
    schedule, steps, errors = Cosine(), [40, 80, 160], []
    oracle = GaussianOracle(schedule)
    settings = {"order": 3, "halved": True} if order == "halved" else {"order": order}
    for num in steps:
        even = even_in_log_snr(schedule, num, 0.8, 0.1)
        first = schedule.log_snr(even[0]) + torch.tensor([1, 2]).double() * 8 / num**2
        times = torch.cat([even[:1], schedule.time_of(first), even[1:]])
        x_s = sample(oracle, DPMMultistep(predicts=predicts, **settings), noise(2), times)
        errors.append((x_s - oracle.flow(noise(2), times[0], times[-1])).abs().max().item())
    assert measured_order(steps, errors) == pytest.approx(measured, abs=0.2)


@each_kind
def test_order_three_on_a_finite_data_set(predicts: Any) -> None:
    """A field that is not linear."""
    data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-0.5, 0.8]], dtype=torch.float64)
    oracle, steps, errors = FiniteOracle(VP(), data), [15, 30, 60], []
    x_T = normal_rows(range(6), (2,), "test").double()
    for num in steps:
        times = even_in_log_snr(VP(), num, 0.9, 0.3)
        x_s = sample(oracle, DPMSinglestep([3] * num, predicts), x_T, times)
        errors.append((x_s - exact(oracle, x_T, times)).abs().max().item())
    assert measured_order(steps, errors) == pytest.approx(3, abs=0.3)


# --- laws --------------------------------------------------------------------------------------


@each_kind
def test_order_one_is_ddim(predicts: Any) -> None:
    oracle, times = GaussianOracle(Linear()), time_grid(9, "log_snr", schedule=Linear())
    reference = states(oracle, DDIM(), noise(), times)
    for solver in (DPMMultistep(1, predicts), DPMSinglestep([1] * 9, predicts)):
        assert_near(states(oracle, solver, noise(), times), reference, FLOAT64)


class Polynomial:
    """A network whose m is a polynomial of lambda: what a solver of its order integrates exactly.

    The exact solution is known: with y = x_t / own and k = +1 for eps, -1 for x,
    dy / dlambda = -k e^(-k lambda) m(lambda).
    """

    def __init__(self, schedule: NoiseSchedule, predicts: str, powers: int) -> None:
        self.schedule, self.predicts = schedule, predicts
        self.coefficients = [0.7, -0.4, 0.3][:powers]

    def __call__(self, x_t: Tensor, t: Tensor, **_: Any) -> Prediction:
        at = self.schedule.log_snr(t) / 2
        m = sum(c * at**k for k, c in enumerate(self.coefficients)) * torch.ones_like(x_t)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        if self.predicts == "x":
            return Prediction(m, (x_t - alpha * m) / sigma)
        return Prediction((x_t - sigma * m) / alpha, m)

    def flow(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        sign = 1 if self.predicts == "eps" else -1
        own = self.schedule.alpha if self.predicts == "eps" else self.schedule.sigma
        ends = (self.schedule.log_snr(torch.stack([t, s])) / 2).tolist()
        # the integral of lambda^k e^(-sign lambda), by Gauss-Legendre
        points, weights = np.polynomial.legendre.leggauss(40)
        at = (points + 1) / 2 * (ends[1] - ends[0]) + ends[0]
        m = sum(c * at**k for k, c in enumerate(self.coefficients))
        integral = (weights * np.exp(-sign * at) * m).sum() * (ends[1] - ends[0]) / 2
        return own(s) * (x_t / own(t) - sign * integral)


@each_kind
@pytest.mark.parametrize("schedule", [Linear(), VP(), EDM()], ids=str)
def test_a_polynomial_of_the_solvers_degree_is_integrated_exactly(
    schedule: NoiseSchedule, predicts: Any
) -> None:
    """The exponential is in the formula: no step is too large. Steps of unequal length."""
    times = torch.tensor([0.9, 0.75, 0.5, 0.4, 0.2, 0.05], dtype=torch.float64)
    for powers, solver in [
        (1, DPMMultistep(2, predicts)),
        (1, DPMSinglestep([3, 2, 1, 2, 3], predicts)),
        (2, DPMSinglestep([3] * 5, predicts)),
        (2, DPMSinglestep([3] * 5, predicts, "time")),
    ]:
        network = Polynomial(schedule, predicts, powers)
        ours = sample(network, solver, noise(), times)
        assert_near(ours, network.flow(noise(), times[0], times[-1]), FLOAT64)
    network = Polynomial(schedule, predicts, 3)  # once three nodes are known
    solver, state, x_t = DPMMultistep(3, predicts), None, noise()
    for t, s in pairwise(times):
        reference = network.flow(x_t, t, s)
        x_t, state = solver.step(network, x_t, t, s, schedule, state, noise)
        if len(state.nodes) == 3:
            assert_near(x_t, reference, FLOAT64)


@pytest.mark.parametrize("predicts", ["x", "eps"])
def test_solvers_do_not_depend_on_the_schedule(predicts: Any) -> None:
    """Equal noise levels and equal x_t / alpha give equal samples."""
    for solver in (DPMMultistep(3, predicts), DPMSinglestep([3, 3, 3, 2, 1], predicts)):
        results = []
        for schedule in (Linear(), Cosine(), VP()):
            times = time_grid(5, "log_snr", schedule=schedule)
            x_T = 80 * schedule.alpha(times[0]) * noise()
            results.append(sample(GaussianOracle(schedule), solver, x_T, times))
        assert_near(results[1], results[0], FLOAT64)
        assert_near(results[2], results[0], FLOAT64)


@each_kind
def test_the_whole_axis_of_a_straight_path_is_finite(predicts: Any) -> None:
    """Where h is infinite, at both ends, steps are those of DDIM and make one call."""
    for solver in (DPMMultistep(3, predicts), DPMSinglestep([3] * 6, predicts)):
        oracle = GaussianOracle(Linear())
        x_0 = sample(oracle, solver, noise(dtype=torch.float32), time_grid(6))
        assert (x_0 - oracle.mu).abs().max() < 4 * oracle.std
        assert x_0.dtype == torch.float32
        assert len(oracle.calls) == (6 if isinstance(solver, DPMMultistep) else 2 + 4 * 3)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_orders_of_steps_make_just_the_calls(order: int) -> None:
    for num in range(4 if order == 3 else order, 40):
        orders = singlestep_orders(num, order)
        assert sum(orders) == num
        assert max(orders) == orders[0] == order
    with pytest.raises(InputError, match="at least"):
        singlestep_orders(3 if order == 3 else order - 1, order)


def test_impossible_solvers_are_refused() -> None:
    for order in (0, 4):
        with pytest.raises(InputError, match="order"):
            DPMMultistep(order)
        with pytest.raises(InputError, match="order"):
            DPMSinglestep([2, order])
    with pytest.raises(InputError, match="no effect"):
        DPMMultistep(2, halved=True)
    with pytest.raises(InputError, match="more than 2 steps"):
        sample(GaussianOracle(VP()), DPMSinglestep([2, 2]), noise(), time_grid(3))


# --- parity with the official code -------------------------------------------------------------


def solver_and_times(case: dict[str, Any]) -> tuple[Sampler, Tensor]:
    """Our solver and grid of an official case; our grids end with a step to no noise."""
    predicts, order, num = PREDICTS[case["algorithm"]], case["order"], case["steps"]
    log_snr = case["skip_type"] == "logSNR"
    solver: Sampler
    if case["method"] == "multistep":
        solver, orders = DPMMultistep(order, predicts, num_steps=num, halved=order == 3), [1] * num
    else:
        orders = singlestep_orders(num, order)
        solver = DPMSinglestep(orders, predicts, "log_snr" if log_snr else "time")
    if log_snr:
        ends = torch.tensor([case["t_end"], case["t_start"]], dtype=torch.float64)
        low, high = (-VP().log_snr(ends) / 2).exp().tolist()
        grid = {"kind": "log_snr", "schedule": VP(), "sigma_min": low, "sigma_max": high}
        times = time_grid(len(orders) + 1, **grid)
    else:
        kind = {"time_uniform": "uniform", "time_quadratic": "quadratic"}[case["skip_type"]]
        fine = time_grid(num + 1, kind, last_step=case["t_end"])
        times = fine[[0, *accumulate(orders), num + 1]]
    return solver, times if case["denoise_to_zero"] else times[:-1]


def check(case: str, ours: Tensor) -> None:
    """Compares states after each step; the singlestep files leave out the first."""
    official = OFFICIAL[f"outputs/{case}/intermediates"]
    assert_near(ours[-len(official) :], official, TOLERANCE)
    assert len(ours) - len(official) == ("singlestep" in case)
    assert_near(ours[-1], OFFICIAL[f"outputs/{case}/x"], TOLERANCE)


@pytest.mark.parametrize("case", [c for c in OFFICIAL.cases if not c.startswith("staged")])
def test_official_trajectories(case: str) -> None:
    oracle = OFFICIAL.oracle(VP())
    solver, times = solver_and_times(OFFICIAL.cases[case])
    check(case, states(oracle, solver, OFFICIAL["inputs/x_T"], times))
    called = torch.stack([t for _, t in oracle.calls])
    assert_near(called, OFFICIAL[f"outputs/{case}/model_times"], TOLERANCE)
    assert len(called) == OFFICIAL.cases[case]["nfe"]


class Staged(nn.Module):
    """Predicts the noise of Gaussian data whose mean differs from stage to stage."""

    def __init__(self, biases: list[float]) -> None:
        super().__init__()
        self.biases, self.seen = biases, list[tuple[int, float]]()

    def forward(self, x_t: Tensor, time: Tensor, *, stage: int) -> Tensor:
        self.seen.append((stage, time[0].item()))
        alpha, sigma = VP().alpha(time[0]), VP().sigma(time[0])
        mu = OFFICIAL["inputs/mu"] + self.biases[stage]
        return sigma * (x_t - alpha * mu) / (alpha**2 * 0.25 + sigma**2)


@pytest.mark.parametrize("case", [c for c in OFFICIAL.cases if c.startswith("staged")])
def test_official_staged_trajectories(case: str) -> None:
    """Calls between t and s go to the stage of their own noise level, by the denoiser."""
    staged = OFFICIAL.cases[case]["staged"]
    bounds = torch.tensor(staged["compare_step"], dtype=torch.float64)
    stages = Stages(tuple(VP().log_snr(bounds).tolist()))
    network = Staged(staged["mu_bias"])
    denoiser = Denoiser(network, VP(), "eps", stages)
    solver, times = solver_and_times(OFFICIAL.cases[case])
    check(case, states(denoiser, solver, OFFICIAL["inputs/x_T"], times))
    assert [stage for stage, _ in network.seen] == [
        int((bounds < t).sum()) for _, t in network.seen
    ]
    assert {stage for stage, _ in network.seen} == {0, 1, 2}


def test_official_schedule() -> None:
    t = OFFICIAL["inputs/schedule_t"]
    assert_near(VP().alpha(t).log(), OFFICIAL["outputs/schedule/log_alpha"], TOLERANCE)
    assert_near(VP().sigma(t), OFFICIAL["outputs/schedule/std"], TOLERANCE)
    assert_near(VP().log_snr(t) / 2, OFFICIAL["outputs/schedule/lambda"], TOLERANCE)
    back = VP().time_of(2 * OFFICIAL["outputs/schedule/lambda"])
    assert_near(back, OFFICIAL["outputs/schedule/inverse_lambda_of_lambda"], TOLERANCE)
