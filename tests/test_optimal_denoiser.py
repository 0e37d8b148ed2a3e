"""The optimal denoiser: against brute force, closed forms, its ends, and the official code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oracles import FiniteOracle
from stratagem import randomness
from stratagem.clustering import optimal_denoiser as module
from stratagem.clustering.optimal_denoiser import OptimalDenoiser
from stratagem.clustering.snippet_kernel import SnippetKernel, dropout_temperature
from stratagem.data.images import to_float
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


WIDE = {"linear": Linear(), "cosine": Cosine(), "vp": VP(0.1, 45), "edm": EDM(4e-5, 3e4)}


def brute(
    data: Tensor, schedule: NoiseSchedule, x_t: Tensor, t: Tensor, kernel: Tensor | float = 0.0
) -> Tensor:
    """E[x | x_t, snippet] from all squared distances; kernel (B, N) is the log kernel."""
    like = (-1, *[1] * (data.ndim - 1))
    gap = x_t[:, None] - schedule.alpha(t).reshape(-1, 1, *like[1:]) * data[None]
    logits = gap.flatten(2).square().sum(2) / (-2 * schedule.sigma(t).square()[:, None]) + kernel
    return torch.einsum("bn,n...->b...", logits.softmax(1), data)


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("num", [1, 2, 3, 40])
def test_every_schedule_equals_brute_force_at_every_level(name: str, num: int) -> None:
    """Both ways to ask, with and without snippets, in float64 for log-SNR 20 to -20."""
    schedule, data, rows = WIDE[name], cloud(num, (2, 3)), noise((num, 5), 14)
    data = torch.cat([data, data + 1e-2 * noise((num, 2, 3), 2)])[:num]
    levels = torch.linspace(20, -20, 81, dtype=torch.float64)
    t = schedule.time_of(levels)
    assert_near(schedule.log_snr(t), levels, 1e-6)
    rows = rows / rows.norm(dim=1, keepdim=True)
    x, eps = data[:1], noise((1, 2, 3), 3)
    x_t = schedule.perturb(x.expand(81, 2, 3), eps.expand(81, 2, 3), t)
    for told in (False, True):
        kernel = (rows[:1] @ rows.T - 1) / 0.3 if told else 0.0
        options = {"memory": 7 * rows, "temperature": 0.3} if told else {}
        denoiser = OptimalDenoiser(data, schedule, **options)
        exact = brute(data, schedule, x_t, t, kernel)
        snippet = rows[:1] if told else None
        path = denoiser.along(x, eps, t, snippet)[0]
        assert_near(path, exact, FLOAT64)
        snippets = snippet.expand(81, 5) if snippet is not None else None
        assert_near(denoiser.posterior_mean(x_t, t, snippets), exact, FLOAT64)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("query_chunk", [1, 3, 100])
@pytest.mark.parametrize("data_chunk", [1, 7, 50, 1000])
def test_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, query_chunk: int, data_chunk: int, told: bool
) -> None:
    data, schedule = cloud(50, (6,), twins=0.1), VP()
    times = torch.linspace(0.02, 1, 9, dtype=torch.float64)
    x, eps = noise((5, 6), 5), noise((5, 6), 6)
    x_t, t = schedule.perturb(x, eps, times[:5]), times[:5]
    memory = noise((50, 4), 15) if told else None
    snippets = noise((5, 4), 16) if told else None
    plain = OptimalDenoiser(data, schedule, memory=memory)
    chunked = OptimalDenoiser(
        data, schedule, memory=memory, query_chunk=query_chunk, data_chunk=data_chunk
    )
    whole = plain.along(x, eps, times, snippets)
    monkeypatch.setattr(module, "_PRODUCT_NUMBERS", 3 * 50 * 2)  # two paths at a time
    assert_near(chunked.along(x, eps, times, snippets), whole, FLOAT64)
    whole = plain.posterior_mean(x_t, t, snippets)
    assert_near(chunked.posterior_mean(x_t, t, snippets), whole, FLOAT64)
    assert_near(chunked.prior_mean(snippets, 5), plain.prior_mean(snippets, 5), FLOAT64)
    assert_near(chunked.mean, data.mean(0), FLOAT64)


def test_snippets_say_nothing_at_infinite_temperature_and_all_at_zero() -> None:
    data, schedule, rows = cloud(30, (4,)), Linear(), noise((30, 8), 17)
    times = torch.linspace(0, 1, 11, dtype=torch.float64)
    x, eps = data[:6], noise((6, 4), 18)
    plain = OptimalDenoiser(data, schedule)
    hot = OptimalDenoiser(data, schedule, memory=rows, temperature=float("inf"))
    assert_near(hot.along(x, eps, times, rows[:6]), plain.along(x, eps, times), FLOAT64)
    assert_near(hot.prior_mean(rows[:6], 6), plain.mean.expand(6, 4), FLOAT64)
    cold = OptimalDenoiser(data, schedule, memory=rows, temperature=1e-9)
    assert_near(cold.along(x, eps, times, rows[:6]), x[:, None].expand(6, 11, 4), FLOAT64)
    assert_near(cold.prior_mean(rows[:6], 6), x, FLOAT64)
    foreign = cold.along(noise((6, 4), 5), eps, times[1:], rows[:6])  # the snippet alone decides
    assert_near(foreign, x[:, None].expand(6, 10, 4), FLOAT64)
    between = OptimalDenoiser(data, schedule, memory=rows, temperature=0.5)
    share = brute(data, schedule, 0 * x, torch.ones(6).double(), kernel_of(rows[:6], rows, 0.5))
    assert_near(between.prior_mean(rows[:6], 6), share, FLOAT64)
    assert (share - x).abs().max() > 0.1 < (share - data.mean(0)).abs().max()


def kernel_of(queries: Tensor, rows: Tensor, temperature: float) -> Tensor:
    return (torch.cosine_similarity(queries[:, None], rows[None], dim=2) - 1) / temperature


@pytest.mark.parametrize("num", [1, 4000])
def test_dropout_temperature_is_the_noise_that_dropout_makes(num: int) -> None:
    """Of rows near each other, spoilt as in training, and for rows alike in all directions."""
    scale = torch.linspace(0.1, 2, 16).double()
    rows = (noise((num, 16), 21) + 1) * scale
    rows = rows / rows.norm(dim=1, keepdim=True)
    if num == 1:
        assert dropout_temperature(rows) == pytest.approx(0.4 / 0.6 / 16)
        return
    near = noise((num, 16), 22) * rows.std(0)  # directions to near rows
    keep = (randomness.uniform((num, 16), 0, "test", 23) >= 0.4).double() / 0.6
    along = ((rows * keep - rows) * near).sum(1).square().sum() / near.square().sum()
    assert dropout_temperature(rows) == pytest.approx(float(along), rel=0.1)
    isotropic = dropout_temperature(noise((num, 16), 24), rate=0.25)
    assert isotropic == pytest.approx(0.25 / 0.75 / 16, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16])
def test_narrow_data_from_a_file_are_read_in_chunks(tmp_path: Path, dtype: torch.dtype) -> None:
    """No float copy of the data exists, and results are those of one."""
    shape = (600, 3, 8, 8)
    stored = ((noise(shape, 25) * 40 + 128).clamp(0, 255)).to(dtype)
    if dtype != torch.uint8:
        stored = stored / 128 - 1
    stored.view(torch.uint8).numpy().tofile(tmp_path / "rows")
    mapped = np.memmap(tmp_path / "rows", dtype=np.uint8, mode="c")
    data = torch.from_numpy(mapped).view(dtype).reshape(shape)
    wide = to_float(stored) if dtype == torch.uint8 else stored.float()
    times = torch.linspace(0.1, 1, 4, dtype=torch.float64)
    eps = noise((3, *shape[1:]), 26).float()
    with Largest() as largest:
        denoiser = OptimalDenoiser(data, Linear(), data_chunk=64)
        x, memory = denoiser.points(torch.tensor([5, 0, 599]))
        path = denoiser.along(x, eps, times)
        mean = denoiser.posterior_mean(eps, times[:3])
    assert largest.numel <= 64 * 192
    assert memory is None
    assert denoiser.dtype == x.dtype == path.dtype == mean.dtype == torch.float32
    assert torch.equal(x, wide[[5, 0, 599]])
    exact = OptimalDenoiser(wide, Linear(), data_chunk=64)
    assert torch.equal(path, exact.along(x, eps, times))
    assert torch.equal(mean, exact.posterior_mean(eps, times[:3]))


class Products(TorchDispatchMode):
    """Counts the multiplications of weights with data."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        if func is torch.ops.aten.addmm_.default:
            self.count += args[1].numel() * args[2].shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("told", [False, True])
def test_tolerance_bounds_the_error_and_saves_work(told: bool) -> None:
    data, tolerance = cloud(400, (12,)).float(), 1e-2
    memory = noise((400, 6), 27) if told else None
    x, eps = data[:5], noise((5, 12), 28).float()
    times = torch.linspace(0.02, 1, 50, dtype=torch.float64)
    snippets = None if memory is None else memory[:5]
    counts, paths, means = [], [], []
    for allowed in (0.0, tolerance):
        denoiser = OptimalDenoiser(data, Linear(), memory=memory, tolerance=allowed, data_chunk=4)
        with Products() as products:
            paths.append(denoiser.along(x, eps, times, snippets))
        counts.append(products.count)
        means.append(denoiser.posterior_mean(x + eps, times[:5], snippets))
    bound = tolerance * (data.amax(0) - data.amin(0)) + 1e-6
    assert ((paths[1] - paths[0]).abs() <= bound).all()
    assert ((means[1] - means[0]).abs() <= bound).all()
    assert float((paths[1] - paths[0]).abs().max()) > 1e-6
    assert counts[1] < 0.8 * counts[0]


class Largest(TorchDispatchMode):
    """Records the size of the largest wide floating-point tensor any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype in (torch.float32, torch.float64):
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


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), "float32"),
        (torch.zeros(0, 2), "no point"),
        (torch.zeros(5), "no point"),
        (torch.tensor([[0.0, float("nan")]]), "NaN"),
    ],
)
def test_refuses_what_is_not_data(data: Tensor, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        OptimalDenoiser(data, Linear())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"memory": torch.ones(3, 2)}, "3 snippets for 4 points"),
        ({"memory": torch.ones(4)}, r"\(N, D\)"),
        ({"memory": torch.zeros(4, 2)}, "zero, NaN"),
        ({"memory": torch.full((4, 2), float("nan"))}, "zero, NaN"),
        ({"memory": torch.ones(4, 2), "temperature": 0.0}, "at least 1e-12"),
        ({"temperature": 1.0}, "no effect without a memory"),
        ({"tolerance": 1.0}, r"\[0, 1\)"),
        ({"tolerance": -0.1}, r"\[0, 1\)"),
    ],
)
def test_refuses_settings(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        OptimalDenoiser(cloud(4, (3,)), Linear(), **options)


def test_refuses_snippets_that_do_not_fit() -> None:
    x, t = cloud(4, (3,)), torch.tensor([0.5])
    told = OptimalDenoiser(x, Linear(), memory=torch.eye(4))
    with pytest.raises(InputError, match="takes no memory"):
        OptimalDenoiser(x, Linear()).along(x, x, t, torch.eye(4))
    with pytest.raises(InputError, match="takes the memory of each query"):
        told.posterior_mean(x, t)
    with pytest.raises(InputError, match=r"give \(4, 4\)"):
        told.along(x, x, t, torch.eye(4)[:3])
    with pytest.raises(InputError, match="dropout rate"):
        dropout_temperature(torch.eye(4), rate=0)


def test_the_kernel_takes_rows_of_any_length() -> None:
    rows = noise((5, 3), 29).half()
    kernel = SnippetKernel(3 * rows, None, torch.device("cpu"))
    assert kernel.temperature == pytest.approx(dropout_temperature(rows), rel=1e-3)
    ours = kernel(kernel.queries(rows[1:3], 2), slice(0, 4))
    assert_near(ours, kernel_of(rows[1:3].double(), rows[:4].double(), kernel.temperature), 0.1)
    assert ours[0, 1] == pytest.approx(0, abs=1e-6)


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
