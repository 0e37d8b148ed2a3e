"""Agreement of noise levels: against its definition, its ends, and the official code's matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stratagem import randomness
from stratagem.clustering import similarity as module
from stratagem.clustering.optimal_denoiser import OptimalDenoiser
from stratagem.clustering.similarity import Similarity, pairwise_agreement, similarity
from stratagem.errors import InputError
from stratagem.schedule import VP, Cosine, Linear
from test_optimal_denoiser import cloud, golden_case
from tolerances import FLOAT64, assert_near

TIMES = (torch.arange(8, dtype=torch.float64) + 0.5) / 8


def test_pairwise_agreement_is_the_share_of_close_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    values = randomness.normal((3, 5, 11), 0, "test").double()
    monkeypatch.setattr(module, "_PAIR_NUMBERS", 60)  # one row of the batch at a time
    matrix = pairwise_agreement(values, 0.5)
    for a in range(5):
        for b in range(5):
            close = ((values[:, a] - values[:, b]).abs() <= 0.5).double().mean()
            assert_near(matrix[a, b], close, FLOAT64)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("space", ["eps", "x"])
def test_follows_the_definition(space: str, told: bool) -> None:
    """Rebuilds every curve from posterior means at single points and the public draws."""
    data, schedule, eta, num = cloud(14, (2, 3), twins=0.2), Cosine(), 0.05, 20
    memory = randomness.normal((14, 4), 0, "test") if told else None
    denoiser = OptimalDenoiser(data, schedule, memory=memory)
    ours = similarity(denoiser, TIMES, num_samples=num, eta=eta, seed=5, space=space)
    order = randomness.permutation(14, 5, "similarity data")
    seen = []
    for k in range(num):
        i = order[k % 14]
        x, eps = data[i], randomness.normal((2, 3), 5, "similarity noise", k).double()
        snippet = None if memory is None else memory[i].expand(8, 4)
        prior = denoiser.prior_mean(snippet, 8)[0]
        x_t = schedule.alpha(TIMES)[:, None, None] * x + schedule.sigma(TIMES)[:, None, None] * eps
        means = denoiser.posterior_mean(x_t, TIMES, snippet)
        if space == "x":
            estimates, clean, noise = means, x, prior
        else:
            alpha, sigma = (f(TIMES)[:, None, None] for f in (schedule.alpha, schedule.sigma))
            estimates = (x_t - alpha * means) / sigma
            clean, noise = eps, (x_t - alpha * prior) / sigma
        pairs = (estimates[:, None] - estimates[None]).abs() <= eta
        ends = [(estimates - end).abs() <= eta for end in (clean, noise)]
        seen.append([agree.double().flatten(-2).mean(-1) for agree in (*ends, pairs)])
    to_clean, to_noise, matrix = (torch.stack(values) for values in zip(*seen, strict=True))
    assert_near(ours.to_clean, to_clean.mean(0), FLOAT64)
    assert_near(ours.to_noise, to_noise.mean(0), FLOAT64)
    assert_near(ours.matrix, matrix.mean(0), FLOAT64)
    assert_near(ours.to_clean_se, to_clean.std(0) / num**0.5, FLOAT64)
    assert_near(ours.to_noise_se, to_noise.std(0) / num**0.5, FLOAT64)
    assert_near(ours.log_snr, schedule.log_snr(TIMES), FLOAT64)
    assert 0.05 < ours.matrix.median() < 0.95, "the case decides nothing"


@pytest.mark.parametrize("space", ["eps", "x"])
def test_ends_agree_with_themselves(space: str) -> None:
    times = torch.tensor([1e-4, 0.5, 1 - 1e-9], dtype=torch.float64)
    denoiser = OptimalDenoiser(cloud(30, (3, 4)), Linear())
    ours = similarity(denoiser, times, num_samples=4, eta=1e-3, seed=0, space=space)
    assert isinstance(ours, Similarity)
    assert ours.to_clean[0] == ours.to_noise[-1] == 1
    assert (ours.matrix.diagonal() == 1).all()
    assert torch.equal(ours.matrix, ours.matrix.T)


def test_noise_estimates_do_not_depend_on_the_range_of_the_data() -> None:
    """Data doubled and sigma doubled: the same posterior, so the same agreement at the same eta."""
    data = cloud(30, (3, 4))
    levels = torch.linspace(4, -4, 9, dtype=torch.float64)
    shift = 2 * torch.tensor(2.0).double().log()  # sigma doubled is log-SNR lowered by log 4
    one, two = (
        similarity(
            OptimalDenoiser(scale * data, Linear()),
            Linear().time_of(levels - offset),
            num_samples=10,
            eta=0.01,
            seed=0,
        )
        for scale, offset in ((1, 0), (2, shift))
    )
    assert_near(two.matrix, one.matrix, FLOAT64)
    assert_near(two.to_noise, one.to_noise, FLOAT64)


def test_eta_of_images_is_a_share_of_their_range() -> None:
    """The same pixels in [0, 1], [-1, 1] and as uint8: the same agreement, at twice the sigma."""
    pixels = ((cloud(30, (3, 4)) * 60) + 128).clamp(0, 255).byte()
    levels = torch.linspace(4, -4, 9, dtype=torch.float64)
    shift = 2 * torch.tensor(2.0).double().log()
    unit, signed, stored = (
        similarity(
            OptimalDenoiser(data, Linear()),
            Linear().time_of(levels - offset),
            num_samples=10,
            eta=2 / 255,
            seed=0,
            space="x",
            data_range=width,
        )
        for data, offset, width in (
            (pixels / 255, 0, None),
            (pixels / 127.5 - 1, shift, 2.0),
            (pixels, shift, 2.0),
        )
    )
    assert 0.05 < unit.matrix.median() < 0.95, "the case decides nothing"
    for other in (signed, stored):
        # an entry may lie at eta to within rounding
        assert (other.matrix - unit.matrix).abs().max() <= 2 / 120
        assert (other.to_noise - unit.to_noise).abs().max() <= 2 / 120
    assert torch.equal(stored.matrix, signed.matrix)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"eta": 0.0}, "eta = 0.0"),
        ({"num_samples": 1}, "at least 2"),
        ({"data_range": 2.0}, "no effect"),
        ({"space": "x", "data_range": 0.0}, "highest minus lowest"),
        ({"space": "x", "data_range": float("inf")}, "highest minus lowest"),
    ],
)
def test_refuses_settings(options: dict[str, Any], reason: str) -> None:
    denoiser = OptimalDenoiser(cloud(5, (4,)), Linear())
    with pytest.raises(InputError, match=reason):
        similarity(denoiser, TIMES, **{"num_samples": 2, "eta": 0.1, "seed": 0} | options)


def test_batches_change_nothing_and_report(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = OptimalDenoiser(cloud(10, (4,)), VP())
    whole = similarity(denoiser, TIMES, num_samples=7, eta=0.05, seed=0)
    monkeypatch.setattr(module, "_BATCH_NUMBERS", 3 * 8 * 4)
    calls: list[tuple[int, int]] = []
    parts = similarity(
        denoiser,
        TIMES,
        num_samples=7,
        eta=0.05,
        seed=0,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(3, 7), (6, 7), (7, 7)]
    for name, value in vars(whole).items():
        assert_near(getattr(parts, name), value, FLOAT64)


@pytest.mark.parametrize("name", ["digits", "random"])
def test_parity_of_the_similarity_matrix(name: str) -> None:
    """The official code compares posterior means on [0, 1] images at 2/256."""
    data, golden = golden_case(name)
    x = data[golden["inputs/sim/x0_index"]]
    means = OptimalDenoiser(data, VP()).along(x, golden["inputs/sim/z"], golden["inputs/sim/t"])
    matrix = pairwise_agreement(means.flatten(2), 2 / 256)
    assert (matrix - golden["outputs/sim/matrix"]).abs().max() <= 1e-6
