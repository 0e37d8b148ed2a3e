"""The optimal denoiser: against brute force, closed forms, its ends, and the official code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oracles import FiniteOracle
from stratagem import randomness
from stratagem.clustering.optimal_denoiser import OptimalDenoiser
from stratagem.errors import InputError
from stratagem.schedule import EDM, VP, Cosine, Linear, NoiseSchedule
from tolerances import FLOAT32, FLOAT64, assert_near

GOLDEN = Path(__file__).parent / "golden"
SHAPES = [(7,), (1, 8, 8), (3, 5, 4)]
DTYPES = [(torch.float32, FLOAT32), (torch.float64, FLOAT64)]


def noise(shape: tuple[int, ...], *counters: int) -> Tensor:
    return randomness.normal(shape, 0, "test", *counters).double()


def cloud(num: int, shape: tuple[int, ...], *, twins: float = 0.0) -> Tensor:
    """Points in [-1, 1] plus an offset; with `twins`, every second point has one that far off."""
    data = torch.tanh(noise((num, *shape), 1)) + 0.5
    if twins:
        data[1::2] = data[0::2] + twins * noise((num // 2, *shape), 2)
    return data


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("twins", [0.0, 1e-3, 0.1])
def test_equals_brute_force_from_log_snr_20_to_minus_20(
    dtype: torch.dtype, bound: float, shape: tuple[int, ...], twins: float
) -> None:
    """Twins at the scale of the noise have comparable weights: where cancellation would show."""
    schedule = Cosine()
    data = cloud(60, shape, twins=twins).to(dtype)
    t = schedule.time_of(torch.linspace(20, -20, 41, dtype=torch.float64))
    x_t = schedule.perturb(data[:41].double(), noise((41, *shape), 3), t).to(dtype)
    exact = FiniteOracle(schedule, data.double())(x_t.double(), t).x
    assert_near(OptimalDenoiser(data, schedule).posterior_mean(x_t, t), exact, bound)


def test_twins_do_share_weight_somewhere() -> None:
    """The test above is void unless some posterior lies strictly between two twins."""
    data = cloud(60, (7,), twins=1e-3)
    t = Cosine().time_of(torch.tensor([13.0], dtype=torch.float64))
    x_t = Cosine().perturb(data[:1], noise((1, 7), 3), t)
    mean = OptimalDenoiser(data, Cosine()).posterior_mean(x_t, t)
    share = (mean - data[0]) @ (data[1] - data[0]) / (data[1] - data[0]).square().sum()
    assert 0.01 < float(share) < 0.99


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VP(), EDM()])
def test_a_path_equals_its_points(
    schedule: NoiseSchedule, dtype: torch.dtype, bound: float
) -> None:
    data = cloud(50, (2, 3, 3), twins=0.05)
    times = torch.linspace(0.01, 0.99, 15, dtype=torch.float64)
    x, eps = data[:4], noise((4, 2, 3, 3), 4)
    path = OptimalDenoiser(data.to(dtype), schedule).along(x.to(dtype), eps.to(dtype), times)
    assert path.shape == (4, 15, 2, 3, 3)
    exact = OptimalDenoiser(data.to(dtype).double(), schedule)
    for j, t in enumerate(times):
        x_t = schedule.perturb(x.to(dtype).double(), eps.to(dtype).double(), t)
        assert_near(path[:, j], exact.posterior_mean(x_t, t), bound)


@pytest.mark.parametrize("query_chunk", [1, 3, 100])
@pytest.mark.parametrize("data_chunk", [1, 7, 50, 1000])
def test_chunks_change_nothing(query_chunk: int, data_chunk: int) -> None:
    data, schedule = cloud(50, (6,), twins=0.1), VP()
    times = torch.linspace(0.02, 1, 9, dtype=torch.float64)
    x, eps = noise((5, 6), 5), noise((5, 6), 6)
    x_t = schedule.perturb(x, eps, times[:5])
    plain = OptimalDenoiser(data, schedule)
    chunked = OptimalDenoiser(data, schedule, query_chunk=query_chunk, data_chunk=data_chunk)
    assert_near(chunked.along(x, eps, times), plain.along(x, eps, times), FLOAT64)
    assert_near(
        chunked.posterior_mean(x_t, times[:5]), plain.posterior_mean(x_t, times[:5]), FLOAT64
    )
    assert_near(chunked.mean, data.mean(0), FLOAT64)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_no_tensor_of_queries_by_data_exists() -> None:
    data = cloud(4000, (5,))
    denoiser = OptimalDenoiser(data, Linear(), query_chunk=8, data_chunk=50)
    x_t, t = noise((40, 5), 7), torch.full((40,), 0.5, dtype=torch.float64)
    with Largest() as largest:
        denoiser.posterior_mean(x_t, t)
    assert largest.numel <= 8 * 50  # and 40 queries x 5 numbers, 50 rows x 5


def test_ends_of_the_noise_axis() -> None:
    data = cloud(20, (4,))
    data[7] = data[3]  # equal points share the weight, which changes nothing
    denoiser = OptimalDenoiser(data, Linear())
    x = torch.cat([data[:5], data[5:6] + 1e-3])
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    path = denoiser.along(x, noise((6, 4), 8), ends)
    assert_near(path[:, 0], data[:6], FLOAT64)
    assert_near(path[:, 1], data.mean(0).expand(6, 4), FLOAT64)
    assert_near(denoiser.posterior_mean(x, ends[0]), data[:6], FLOAT64)
    assert_near(denoiser.posterior_mean(100 * x, ends[1]), data.mean(0).expand(6, 4), FLOAT64)


def test_one_point_is_always_the_answer() -> None:
    data = cloud(1, (3, 2))
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    path = OptimalDenoiser(data, Linear()).along(noise((2, 3, 2), 9), noise((2, 3, 2), 10), times)
    assert_near(path, data.expand(2, 5, 3, 2), FLOAT64)


def test_two_points_follow_the_hyperbolic_tangent() -> None:
    """For data {-a, a}: E[x | x_t] = a tanh(alpha a x_t / sigma^2)."""
    a, t = 0.7, torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    x_t, data = noise((19, 1), 11), torch.tensor([[-a], [a]], dtype=torch.float64)
    mean = OptimalDenoiser(data, Linear()).posterior_mean(x_t, t)
    assert_near(mean[:, 0], a * torch.tanh((1 - t) * a * x_t[:, 0] / t**2), FLOAT64)


def test_tweedie() -> None:
    """E[x | x_t] = (x_t + sigma^2 grad log p(x_t)) / alpha, with p the mixture of Gaussians."""
    data, schedule = cloud(12, (4,)), Cosine()
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    x_t = noise((3, 4), 12).requires_grad_()
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    exponents = ((x_t - alpha * data[:, None]) / sigma).square().sum(-1) / -2
    (score,) = torch.autograd.grad(exponents.logsumexp(0).sum(), x_t)
    mean = OptimalDenoiser(data, schedule).posterior_mean(x_t.detach(), t)
    assert_near(mean, ((x_t + sigma**2 * score) / alpha).detach(), FLOAT64)


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_and_noise_rebuild_the_input(shape: tuple[int, ...]) -> None:
    denoiser, t = OptimalDenoiser(cloud(9, shape), VP()), torch.tensor([0.1, 0.6, 1.0]).double()
    x_t = noise((3, *shape), 13)
    like = (3, *[1] * len(shape))
    alpha, sigma = VP().alpha(t).reshape(like), VP().sigma(t).reshape(like)
    eps = denoiser.optimal_eps(x_t, t)
    assert_near(alpha * denoiser.posterior_mean(x_t, t) + sigma * eps, x_t, FLOAT64)
    assert_near(denoiser.optimal_eps(x_t, t[0])[:1], eps[:1], FLOAT64)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (torch.zeros(3, 2, dtype=torch.uint8), "float32"),
        (torch.zeros(0, 2), "no point"),
        (torch.zeros(5), "no point"),
        (torch.tensor([[0.0, float("nan")]]), "NaN"),
    ],
)
def test_refuses_what_is_not_data(data: Tensor, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        OptimalDenoiser(data, Linear())


def golden_case(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    golden = load_file(GOLDEN / f"optimal_denoiser_{name}.safetensors")
    if name == "random":
        return golden["inputs/dataset"], golden
    images = load_digits().images[golden["inputs/dataset_indices"].numpy()] / 16
    return torch.from_numpy(images.astype(np.float32))[:, None], golden


@pytest.mark.parametrize(("path", "schedule"), [("vp", VP()), ("ve", EDM(0.01, 50.0))])
@pytest.mark.parametrize("name", ["digits", "random"])
def test_parity_with_the_official_code(name: str, path: str, schedule: NoiseSchedule) -> None:
    data, golden = golden_case(name)
    x0 = data[golden[f"inputs/{path}/x0_index"]]
    z, t = golden[f"inputs/{path}/z"], golden[f"inputs/{path}/t"]
    s, sigma = (golden[f"outputs/{path}/{key}"] for key in ("s", "sigma"))
    assert_near(schedule.alpha(t.double()), s, FLOAT32)
    assert_near(schedule.sigma(t.double()), s * sigma, FLOAT32)
    denoiser = OptimalDenoiser(data, schedule)
    x_t = schedule.perturb(x0, z, t)
    reference = golden[f"outputs/{path}/posterior_mean"]
    assert (denoiser.posterior_mean(x_t, t) - reference).abs().max() <= 1e-5
    paths = denoiser.along(x0, z, t)
    assert (paths[torch.arange(len(t)), torch.arange(len(t))] - reference).abs().max() <= 1e-5
