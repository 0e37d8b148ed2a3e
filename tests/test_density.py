from __future__ import annotations

import pytest
import torch

from stratagem.density import LogitNormal, LogNormalSigma, TimeDensity, Uniform, stratified
from stratagem.errors import InputError
from stratagem.schedule import EDM, VP, Cosine, Linear
from stratagem.stages import Stages
from tolerances import FLOAT64, assert_near

DENSITIES = [
    Uniform(),
    LogitNormal(),
    LogitNormal(0.5, 0.7),
    LogNormalSigma(EDM()),
    LogNormalSigma(Linear()),
    LogNormalSigma(VP(), mean=0.0, std=2.0),
    LogNormalSigma(EDM(0.5, 2.0)),  # cut off on both sides
]
each_density = pytest.mark.parametrize("density", DENSITIES, ids=str)


def quantiles(num: int = 4000) -> torch.Tensor:
    return (torch.arange(num, dtype=torch.float64) + 0.5) / num


@each_density
def test_cdf_and_icdf_are_inverse(density: TimeDensity) -> None:
    u = quantiles()
    t = density.icdf(u)
    assert ((t >= 0) & (t <= 1)).all()
    assert (t.diff() > 0).all()
    assert_near(density.cdf(t), u, FLOAT64)


@each_density
def test_all_mass_lies_on_the_axis(density: TimeDensity) -> None:
    ends = density.cdf(torch.tensor([0.0, 1.0]))
    assert_near(ends, torch.tensor([0.0, 1.0], dtype=torch.float64), FLOAT64)


@each_density
@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VP(), EDM()], ids=str)
def test_masses_of_a_partition_sum_to_one(density: TimeDensity, schedule: object) -> None:
    stages = Stages((2.0, -1.84, -4.0))
    masses = [density.mass(stages.time_interval(k, schedule)) for k in range(stages.num)]
    assert min(masses) >= 0
    assert sum(masses) == pytest.approx(1, abs=FLOAT64)


def test_masses_of_the_published_stages() -> None:
    """Log-normal noise levels fall into the published stages with 96.14, 3.51 and 0.35 percent."""
    edges = [-2 * torch.tensor(s, dtype=torch.float64).log().item() for s in (2.5103, 7.6577)]
    stages, density = Stages(tuple(edges)), LogNormalSigma(Linear())
    masses = [density.mass(stages.time_interval(k, Linear())) for k in range(3)]
    assert masses == pytest.approx([0.9614, 0.0351, 0.0035], abs=1e-4)


@each_density
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.6), (0.45, 0.46)])
def test_restricted_draws_stay_inside_and_follow_the_density(
    density: TimeDensity, interval: tuple[float, float]
) -> None:
    u = quantiles()
    t = density.sample(u, interval)
    assert ((t >= interval[0]) & (t <= interval[1])).all()
    # The share of draws below any time is the share of the interval's mass below it.
    below = torch.linspace(*interval, 20, dtype=torch.float64)
    share = torch.searchsorted(t, below).double() / len(t)
    low = density.cdf(torch.tensor(interval[0]))
    expected = (density.cdf(below) - low) / density.mass(interval)
    assert (share - expected).abs().max() <= 1.5 / len(t)


@each_density
def test_the_first_and_the_last_draw_do_not_round_out_of_the_interval(density: TimeDensity) -> None:
    u = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for low in torch.linspace(0.1, 0.8, 50, dtype=torch.float64).tolist():
        t = density.sample(u, (low, low + 0.1))
        assert low <= t[0] <= t[1] <= low + 0.1


@each_density
def test_the_dtype_of_the_draws_is_kept(density: TimeDensity) -> None:
    assert density.sample(torch.rand(3, 2)).dtype == torch.float32
    assert density.sample(torch.rand(3, 2)).shape == (3, 2)


def test_intervals_without_mass_are_refused() -> None:
    u = quantiles(3)
    for density, interval in (
        (Uniform(), (0.5, 0.5)),
        (LogitNormal(-5.0, 0.1), (0.9, 1.0)),
        (Uniform(), (0.5, 0.2)),
        (Uniform(), (0.5, 1.2)),
    ):
        with pytest.raises(InputError):
            density.sample(u, interval)


def test_impossible_settings_are_refused() -> None:
    for make in (
        lambda: LogitNormal(std=0.0),
        lambda: LogNormalSigma(Linear(), std=-1.0),
        lambda: LogNormalSigma(EDM(1.0, 2.0), mean=-50.0),
    ):
        with pytest.raises(InputError):
            make()


@pytest.mark.parametrize("num", [1, 7, 256])
def test_every_stratum_holds_one_draw(num: int) -> None:
    for step in range(20):
        u = stratified(num, 3, "time", step)
        assert ((u >= 0) & (u < 1)).all()
        assert sorted((u * num).long().tolist()) == list(range(num))


def test_strata_are_reproducible_shuffled_and_fresh_at_every_step() -> None:
    first, again, other = (stratified(64, 3, "time", step) for step in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, first.sort().values)
    means = torch.stack([stratified(64, 0, "time", step)[0] for step in range(400)])
    assert means.mean().item() == pytest.approx(0.5, abs=0.06)  # 4 standard errors


def test_a_histogram_of_stratified_draws_matches_the_cdf() -> None:
    density = LogitNormal(-0.4, 1.1)
    t = torch.cat([density.sample(stratified(500, 0, "time", step)) for step in range(20)])
    edges = torch.linspace(0, 1, 21, dtype=torch.float64)
    counts = torch.histogram(t, edges).hist / len(t)
    # One stratum per step can fall on either side of a bin's edge.
    assert (counts - density.cdf(edges).diff()).abs().max() <= 2 / 500
