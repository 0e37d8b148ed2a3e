"""Frechet distance: closed forms of Gaussians, and statistics that no batching can change."""

from __future__ import annotations

import pytest
import torch

from stratagem.errors import InputError
from stratagem.metrics.frechet import (
    Interval,
    Statistics,
    bootstrap,
    frechet_distance,
    joined,
    merge,
    moments,
    refuse_few,
    statistics,
)
from stratagem.randomness import normal, permutation
from tolerances import FLOAT64


def _rotation(dim: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(normal((dim, dim), seed, "test").double()).Q


def _gaussian(mean: torch.Tensor, cov: torch.Tensor, num: int = 10**6) -> Statistics:
    return Statistics(mean.double(), cov.double(), num)


@pytest.fixture
def features() -> torch.Tensor:
    """Correlated features far from zero, where naive sums of squares cancel."""
    return normal((500, 12), 0, "test") @ normal((12, 12), 1, "test") + 1000


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("size", [1, 7, 499, 500])
def test_statistics_do_not_depend_on_batches_or_order(features: torch.Tensor, size: int) -> None:
    shuffled = features[permutation(len(features), 0, "test")]
    found = statistics(shuffled.split(size))
    rows = features.double()
    assert found.num == 500
    assert _relative(found.mean, rows.mean(0)) < FLOAT64
    assert _relative(found.cov, torch.cov(rows.T)) < FLOAT64


def test_merging_is_associative_and_commutative(features: torch.Tensor) -> None:
    a, b, c = (moments(part) for part in features.split([100, 1, 399]))
    left, right = merge(merge(a, b), c), merge(c, merge(b, a))
    assert _relative(left.cov, right.cov) < FLOAT64
    assert left.num == right.num == 500
    assert joined(None, a) is a
    assert joined(a, b).num == 101


def test_no_vectors_and_non_finite_vectors_are_refused() -> None:
    with pytest.raises(InputError, match="no images"):
        statistics([torch.zeros(0, 3)])
    with pytest.raises(InputError, match="NaN"):
        moments(torch.tensor([[1.0, float("nan")]]))


def test_distance_of_commuting_gaussians() -> None:
    """|mu_a - mu_b|^2 + sum (sd_a - sd_b)^2, whatever the common axes."""
    turn = _rotation(16, 2)
    sd_a, sd_b = torch.linspace(0.1, 3, 16).double(), torch.linspace(2, 0, 16).double()
    mean_a, mean_b = normal((2, 16), 3, "test").double()
    a = _gaussian(mean_a, turn @ torch.diag(sd_a**2) @ turn.T)
    b = _gaussian(mean_b, turn @ torch.diag(sd_b**2) @ turn.T)
    expected = float((mean_a - mean_b).square().sum() + (sd_a - sd_b).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_distance_of_gaussians_in_the_plane() -> None:
    """tr (A B)^1/2 = sqrt(tr AB + 2 sqrt(det AB)) for 2 x 2, which do not commute here."""
    first = torch.tensor([[2.0, 0.7], [0.7, 1.0]]).double()
    second = torch.tensor([[0.5, -0.3], [-0.3, 3.0]]).double()
    product = first @ second
    overlap = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = float(first.trace() + second.trace() - 2 * overlap)
    zero = torch.zeros(2)
    found = frechet_distance(_gaussian(zero, first), _gaussian(zero, second))
    assert found == pytest.approx(expected, rel=1e-6)


def test_distance_is_zero_for_equal_sets_and_symmetric(features: torch.Tensor) -> None:
    a, b = moments(features[:250]), moments(features[250:])
    assert frechet_distance(a, a) < 1e-6 * float(a.cov.trace())
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 0


def test_singular_covariances_are_exact() -> None:
    """Two orthogonal planes in eight dimensions share nothing: the traces add up."""
    a = _gaussian(torch.zeros(8), torch.diag(torch.tensor([1.0, 4, 0, 0, 0, 0, 0, 0])))
    b = _gaussian(torch.zeros(8), torch.diag(torch.tensor([0.0, 0, 9, 1, 0, 0, 0, 0])))
    assert frechet_distance(a, b) == pytest.approx(15.0, rel=1e-9)


def test_too_few_images_are_refused_unless_asked(features: torch.Tensor) -> None:
    few, many = moments(features[:12]), moments(features)
    for pair in ((few, many), (many, few)):
        with pytest.raises(InputError, match=r"12 images are too few .* at least 13"):
            frechet_distance(*pair)
        assert frechet_distance(*pair, allow_few=True) > 0
    assert frechet_distance(moments(features[:13]), many) > 0


def test_different_features_are_refused(features: torch.Tensor) -> None:
    with pytest.raises(InputError, match="12 and 11 dimensions"):
        frechet_distance(moments(features), moments(features[:, 1:]))


def test_one_vector_more_than_dimensions_is_enough() -> None:
    refuse_few(5, 4)
    with pytest.raises(InputError, match="use at least 5"):
        refuse_few(4, 4)


def test_counted_vectors_are_repeated_vectors(features: torch.Tensor) -> None:
    counts = torch.arange(500) % 4
    found = moments(features, counts)
    repeated = moments(features.repeat_interleave(counts, 0))
    assert found.num == repeated.num == int(counts.sum())
    assert _relative(found.mean, repeated.mean) < FLOAT64
    assert _relative(found.cov, repeated.cov) < FLOAT64


def test_statistics_of_unknown_number_are_not_refused(features: torch.Tensor) -> None:
    found = moments(features)
    published = Statistics(found.mean, found.cov, 0)
    assert frechet_distance(moments(features[:250]), published) > 0
    with pytest.raises(InputError, match="12 images are too few"):
        frechet_distance(moments(features[:12]), published)


def test_samples_of_other_gaussians_reach_the_closed_form() -> None:
    """|d|^2 + D (1 - s)^2 for N(0, 1) and N(d, s^2) in D dimensions, but for the bias of N."""
    a, b = normal((40_000, 4), 0, "test"), 2 * normal((40_000, 4), 1, "test") + 1
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(4 + 4, rel=0.02)


def test_bootstrap_is_reproducible_and_about_the_distance() -> None:
    rows, real = normal((200, 3), 0, "test"), moments(normal((5000, 3), 1, "test") + 1)
    found, again = bootstrap(rows, real, 50), bootstrap(rows, real, 50)
    assert found == again
    assert found != bootstrap(rows, real, 50, seed=1)
    distance = frechet_distance(moments(rows), real)
    assert 0 < found.low < distance < found.high
    assert found.high - found.low == pytest.approx(4 * found.error, rel=0.3)
    with pytest.raises(InputError, match="at least 2"):
        bootstrap(rows, real, 1)


def test_bootstrap_error_is_the_scatter_of_other_samples() -> None:
    """The truth of the interval: 95 % of what other samples of as many images give."""
    real = moments(normal((20_000, 3), 0, "real") + 1)
    draws = [normal((150, 3), n, "samples") for n in range(200)]
    distances = torch.tensor([frechet_distance(moments(rows), real) for rows in draws])
    found = [bootstrap(rows, real, 60) for rows in draws[:20]]
    errors = torch.tensor([interval.error for interval in found])
    assert float(errors.mean()) == pytest.approx(float(distances.std()), rel=0.15)
    # they cover the mean distance of such samples; 20 intervals of 95 % miss it once
    covered = sum(interval.low < distances.mean() < interval.high for interval in found)
    assert covered >= 16


def test_redrawn_samples_are_farther() -> None:
    """The bias of few images is seen, and not added to the interval."""
    rows, real = normal((60, 10), 0, "test"), moments(normal((20_000, 10), 1, "test"))
    found = bootstrap(rows, real, 40)
    distance = frechet_distance(moments(rows), real)
    assert isinstance(found, Interval)
    assert found.bias > 2 * found.error
    assert found.high < distance + found.bias
