from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from oracles import GaussianOracle
from stratagem.denoiser import Denoiser, Parameterization, Prediction, Predictor
from stratagem.errors import InputError
from stratagem.schedule import EDM, VP, Cosine, Linear, NoiseSchedule, expand
from stratagem.stages import Stages
from tolerances import FLOAT32, FLOAT64, assert_near

PARAMETERIZATIONS = get_args(Parameterization)
SCHEDULES = [Linear(), Cosine(), VP(), EDM()]
GOLDEN = Path(__file__).parent / "golden"

each_parameterization = pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


class Recorder(nn.Module):
    """A backbone with a fixed answer that remembers its input."""

    def __init__(self, answer: Tensor | None = None) -> None:
        super().__init__()
        self.answer = answer
        self.input, self.time, self.condition = torch.empty(0), torch.empty(0), {}

    def forward(self, x_t: Tensor, time: Tensor, **condition: Any) -> Tensor:
        self.input, self.time, self.condition = x_t, time, condition
        return torch.sin(3 * x_t) if self.answer is None else self.answer


def batch(num: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    x_t = torch.randn(num, 2, 3, 3, generator=rng, dtype=torch.float64)
    return x_t.to(dtype), torch.linspace(0, 1, num, dtype=dtype)


def residual(schedule: NoiseSchedule, prediction: Prediction, x_t: Tensor, t: Tensor) -> Tensor:
    """|alpha x + sigma eps - x_t| against the size of its terms."""
    signal = expand(schedule.alpha(t), x_t) * prediction.x
    noise = expand(schedule.sigma(t), x_t) * prediction.eps
    return (signal + noise - x_t).abs() / (1 + signal.abs() + noise.abs())


@each_parameterization
@each_schedule
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)])
def test_the_pair_adds_up_to_the_input_at_all_times_and_both_ends(
    schedule: NoiseSchedule, parameterization: Parameterization, dtype: torch.dtype, bound: float
) -> None:
    x_t, t = batch(dtype=dtype)
    prediction = Denoiser(Recorder(), schedule, parameterization)(x_t, t)
    for part in prediction:
        assert part.shape == x_t.shape
        assert part.dtype == dtype
        assert torch.isfinite(part).all()
    assert residual(schedule, prediction, x_t, t).max() <= bound


def exact_output(
    parameterization: Parameterization, oracle: GaussianOracle, x_t: Tensor, t: Tensor
) -> Tensor:
    """What the perfect network says, from the definitions and not from the map under test."""
    x, eps = oracle(x_t, t)
    alpha, sigma = expand(oracle.schedule.alpha(t), x_t), expand(oracle.schedule.sigma(t), x_t)
    if parameterization == "edm":  # F = (D - c_skip x_in) / c_out, sigma_data = 0.5
        level = sigma / alpha
        c_skip = 0.25 / (level**2 + 0.25)
        c_out = level * 0.5 / (level**2 + 0.25).sqrt()
        return (x - c_skip * x_t / alpha) / c_out
    if parameterization == "v":
        return oracle.schedule.velocity(x, eps, t)
    return x if parameterization == "x" else eps


@each_parameterization
@each_schedule
def test_the_perfect_network_gives_the_perfect_prediction(
    schedule: NoiseSchedule, parameterization: Parameterization
) -> None:
    x_t, t = batch()
    t = 0.02 + 0.96 * t
    oracle = GaussianOracle(schedule)
    answer = exact_output(parameterization, oracle, x_t, t)
    prediction = Denoiser(Recorder(answer), schedule, parameterization)(x_t, t)
    for ours, exact in zip(prediction, oracle(x_t, t), strict=True):
        assert_near(ours, exact, FLOAT64)


def test_a_straight_path_needs_no_division() -> None:
    x_t, t = batch()
    v = torch.cos(x_t)
    prediction = Denoiser(Recorder(v), Linear(), "v")(x_t, t)
    assert_near(prediction.x, x_t - expand(t, x_t) * v, FLOAT64)
    assert_near(prediction.eps, x_t + (1 - expand(t, x_t)) * v, FLOAT64)


def test_ends_of_the_axis() -> None:
    """At t = 0 the sample is clean; at t = 1 of a straight path it is all noise."""
    x_t, _ = batch(2)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for parameterization in PARAMETERIZATIONS:
        x, eps = Denoiser(Recorder(), Linear(), parameterization)(x_t, ends)
        assert_near(x[0], x_t[0], FLOAT64)
        assert_near(eps[1], x_t[1], FLOAT64)


@each_schedule
def test_edm_inputs_are_those_of_the_paper(schedule: NoiseSchedule) -> None:
    x_t, t = batch()
    t = 0.05 + 0.9 * t
    recorder = Recorder()
    prediction = Denoiser(recorder, schedule, "edm", sigma_data=0.7)(x_t, t)
    sigma = schedule.sigma(t) / schedule.alpha(t)
    clean_scale = x_t / expand(schedule.alpha(t), x_t)
    norm = expand((sigma**2 + 0.7**2).sqrt(), x_t)
    assert_near(recorder.input, clean_scale / norm, FLOAT64)
    assert_near(recorder.time, sigma.log() / 4, FLOAT64)
    sigma = expand(sigma, x_t)
    output = torch.sin(3 * recorder.input)
    exact = 0.7**2 / norm**2 * clean_scale + sigma * 0.7 / norm * output
    assert_near(prediction.x, exact, FLOAT64)


def test_other_networks_are_told_the_time_itself() -> None:
    x_t, t = batch(dtype=torch.float32)
    for parameterization in ("v", "eps", "x"):
        recorder = Recorder()
        Denoiser(recorder, Cosine(), parameterization)(x_t, t.double())
        assert torch.equal(recorder.time, t)
        assert torch.equal(recorder.input, x_t)


@pytest.mark.parametrize("other", [Linear(), Cosine(), VP()], ids=str)
def test_an_edm_network_works_under_another_schedule(other: NoiseSchedule) -> None:
    """The same noise level of the same sample gives the same clean sample."""
    scaled, t = batch()
    t = 0.1 + 0.8 * t
    recorder = Recorder()
    here = Denoiser(recorder, EDM(), "edm")(scaled, t)
    there_t = other.time_of(EDM().log_snr(t))
    there_x = scaled * expand(other.alpha(there_t), scaled)
    there = Denoiser(recorder, other, "edm")(there_x, there_t)
    assert_near(there.x, here.x, FLOAT64)
    assert_near(there.eps, here.eps, FLOAT64)


@each_parameterization
def test_one_time_for_all_is_the_same_as_one_each(parameterization: Parameterization) -> None:
    x_t, _ = batch()
    denoiser = Denoiser(Recorder(), Linear(), parameterization)
    time = torch.tensor(0.37, dtype=torch.float64)
    alone, each = denoiser(x_t, time), denoiser(x_t, time.expand(len(x_t)))
    assert denoiser.backbone.time.shape == (len(x_t),)
    assert torch.equal(alone.x, each.x)
    assert torch.equal(alone.eps, each.eps)


def test_stages_reach_the_backbone() -> None:
    x_t, t = batch()
    stages, recorder = Stages((1.0, -1.0)), Recorder()
    denoiser = Denoiser(recorder, Linear(), "v", stages)
    denoiser(x_t, t, label=t)
    assert torch.equal(recorder.condition["stage"], stages.index(Linear().log_snr(t)))
    assert torch.equal(recorder.condition["label"], t)
    for time, stage in ((0.0, 0), (0.5, 1), (1.0, 2)):
        denoiser(x_t, torch.tensor(time))
        assert type(recorder.condition["stage"]) is int
        assert recorder.condition["stage"] == stage
    denoiser(x_t, torch.tensor(0.0), stage=2)
    assert recorder.condition["stage"] == 2
    Denoiser(recorder, Linear(), "v")(x_t, t)
    assert recorder.condition == {}


def test_a_half_precision_network_gives_a_prediction_in_the_precision_of_the_sample() -> None:
    x_t, t = batch(dtype=torch.float32)
    prediction = Denoiser(Recorder(x_t.bfloat16()), Linear(), "v")(x_t, t)
    assert prediction.x.dtype == prediction.eps.dtype == torch.float32


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(InputError, match="choose one of v, eps, x, edm"):
        Denoiser(nn.Identity(), Linear(), "score")  # type: ignore[arg-type]
    with pytest.raises(InputError):
        Denoiser(nn.Identity(), Linear(), "edm", sigma_data=0.0)


@pytest.mark.parametrize(
    ("path", "schedule"), [("Linear", Linear()), ("GVP", Cosine()), ("VP", VP())]
)
def test_official_conversions(path: str, schedule: NoiseSchedule) -> None:
    """Noise, score and velocity of the official code; its time and velocity run the other way."""
    golden = {k: v.double() for k, v in load_file(GOLDEN / "transport_paths.safetensors").items()}
    t, x_t = 1 - golden["inputs/t"], golden[f"outputs/{path}/xt"]
    sigma = expand(schedule.sigma(t), x_t)
    from_velocity = Denoiser(Recorder(-golden["inputs/velocity"]), schedule, "v")(x_t, t)
    from_score = Denoiser(Recorder(-sigma * golden["inputs/score"]), schedule, "eps")(x_t, t)
    ours = {
        "noise_from_velocity": from_velocity.eps,
        "score_from_velocity": -from_velocity.eps / sigma,
        "velocity_from_score": -schedule.velocity(*from_score, t),
    }
    for name, value in ours.items():
        assert_near(value, golden[f"outputs/{path}/{name}"], FLOAT32)


def test_a_denoiser_and_the_oracles_are_predictors() -> None:
    """What a sampler takes: a schedule, and a call that gives a Prediction."""
    predictors: list[Predictor] = [
        Denoiser(Recorder(), Linear(), "v"),
        GaussianOracle(Linear(), 0.0, 1.0),
    ]
    for predictor in predictors:
        assert predictor.schedule == Linear()
        assert isinstance(predictor(torch.zeros(2, 3), torch.tensor(0.5)), Prediction)
