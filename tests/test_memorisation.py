"""Nearest neighbours against brute force; the audit flags copying and clears honest sampling."""

from __future__ import annotations

import math

import pytest
import torch

from stratagem.errors import InputError
from stratagem.metrics.memorisation import (
    Excess,
    Memorisation,
    Vectors,
    audit,
    audit_vectors,
    copying_score,
)
from stratagem.metrics.nearest import Rows, nearest
from stratagem.randomness import normal, permutation


def _images(num: int, seed: int) -> torch.Tensor:
    """Draws uint8 images (num, 3, 4, 4) of one smooth distribution."""
    codes = normal((num, 6), seed, "codes")
    basis = normal((6, 48), 99, "basis")
    return (128 + 20 * codes @ basis).clamp(0, 255).to(torch.uint8).view(num, 3, 4, 4)


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_nearest_equals_brute_force(chunk: int) -> None:
    queries, data = normal((23, 5), 0, "test"), normal((31, 5), 1, "test")
    table = (queries[:, None].double() - data[None].double()).norm(dim=2)
    distances, indices = nearest(queries, data, chunk=chunk)
    assert torch.equal(indices, table.argmin(1))
    torch.testing.assert_close(distances, table.min(1).values, rtol=1e-12, atol=0)


def test_nearest_is_exact_far_from_zero() -> None:
    """In float32, |q|^2 - 2qd + |d|^2 would drown distances of 1e-2 at 1e4."""
    data = torch.full((3, 4), 1e4) + torch.tensor([[0.0], [1 / 64], [1 / 16]])
    distances, indices = nearest(data.flip(0), data)
    assert indices.tolist() == [2, 1, 0]
    assert distances.tolist() == [0, 0, 0]


def test_nearest_can_leave_out_one_row() -> None:
    data = normal((40, 3), 2, "test")
    distances, indices = nearest(data, data, chunk=16, exclude=torch.arange(40))
    table = torch.cdist(data.double(), data.double()).fill_diagonal_(math.inf)
    assert torch.equal(indices, table.argmin(1))
    assert (distances > 0).all()


class OnDisk:
    """Rows that are read in parts, and how many were read at once."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.shape, self._rows, self.most = rows.shape, rows, 0

    def __getitem__(self, index: slice | torch.Tensor) -> torch.Tensor:
        found = self._rows[index]
        self.most = max(self.most, len(found))
        return found


def test_nearest_needs_the_data_only_in_parts() -> None:
    queries, data = normal((23, 5), 0, "test"), normal((331, 5), 1, "test")
    rows: Rows = OnDisk(data)
    found = nearest(queries, rows, chunk=50)
    for ours, expected in zip(found, nearest(queries, data), strict=True):
        assert torch.equal(ours, expected)
    assert rows.most <= 50


def test_nearest_refuses_what_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="too few"):
        nearest(torch.zeros(1, 2), torch.zeros(0, 2))
    with pytest.raises(InputError, match="2 and of 3 values"):
        nearest(torch.zeros(1, 2), torch.zeros(1, 3))


def test_distances_are_per_pixel_rms_of_unit_range() -> None:
    black, white = torch.zeros(2, 3, 4, 4).byte(), torch.full((5, 3, 4, 4), 255).byte()
    found = audit(white, black, white)
    torch.testing.assert_close(found.distances, torch.ones(5, dtype=torch.float64))
    assert found.ratio == 1


def test_audit_clears_a_sampler_that_draws_from_the_data() -> None:
    flagged = 0
    for seed in range(5):
        found = audit(_images(400, 10 + seed), _images(600, 20), _images(300, 30 + seed))
        flagged += found.copies
        assert found.copy_rate < 0.05
        assert 0.9 < found.ratio < 1.1
    assert flagged == 0


@pytest.mark.parametrize("noise", [0, 2])
def test_audit_flags_a_sampler_that_copies(noise: int) -> None:
    train, held_out = _images(600, 20), _images(300, 21)
    chosen = permutation(600, 0, "test")[:200]
    jitter = (noise * normal((200, 3, 4, 4), 4, "test")).round()
    samples = (train[chosen] + jitter).clamp(0, 255).to(torch.uint8)
    found = audit(samples, train, held_out)
    assert found.copies
    assert found.copy_rate > 0.9
    assert found.copy_rate_min > 0.5
    assert found.ratio < 0.5
    assert found.authentic < 0.1
    assert (found.neighbours == chosen).double().mean() > 0.95


def test_audit_flags_a_sampler_that_copies_now_and_then() -> None:
    train = _images(600, 20)
    samples = torch.cat([_images(380, 22), train[:20]])
    found = audit(samples, train, _images(300, 21))
    assert found.copies
    assert found.ratio > 0.9  # the median alone would not have told
    assert set(found.nearest_pairs(20).tolist()) == set(range(380, 400))


def test_a_mirrored_copy_is_a_copy_only_if_asked() -> None:
    train, held_out = _images(600, 20), _images(300, 21)
    mirrored = train[:100].flip(-1)
    found = audit(mirrored, train, held_out, flip=True)
    assert found.copies
    assert torch.equal(found.neighbours, torch.arange(100))
    assert (found.distances == 0).all()
    assert found.authentic == 0
    plain = audit(mirrored, train, held_out)
    assert (plain.distances > 0).all()
    both = torch.cat([train, train.flip(-1)])  # the same as mirrored training images as well
    known = audit(_images(50, 22), both, held_out)
    sides = audit(_images(50, 22), train, held_out, flip=True)
    torch.testing.assert_close(sides.distances, known.distances)
    torch.testing.assert_close(sides.held_out, known.held_out)


def test_relative_distances_leave_plain_images_in_peace() -> None:
    """Samples near the mean are near to everything; copies are near to one training image."""
    train, held_out = _images(600, 20), _images(300, 21)
    plain = (128 + 0.3 * (_images(200, 22).float() - 128)).round().to(torch.uint8)
    found = audit(plain, train, held_out)
    assert found.score < -3
    assert found.copies
    assert found.copied.p_value > 1e-3
    copied = audit(torch.cat([plain, train[:30]]), train, held_out)
    assert copied.copied.p_value < 1e-6
    assert copied.copied.num >= 30
    assert set(copied.nearest_pairs(30).tolist()) == set(range(200, 230))


def test_relative_distance_is_over_the_nearest_other_held_out_image() -> None:
    samples, train, held_out = (normal((n, 3), n, "test") for n in (9, 31, 17))
    found = audit_vectors(Vectors(samples[None], held_out[None], train, lambda i: train[i][None]))
    among = torch.cdist(held_out, held_out).fill_diagonal_(math.inf).min(1).values
    real = torch.cdist(held_out, train).min(1).values / among
    torch.testing.assert_close(found.held_out_relative, real.double(), rtol=1e-5, atol=0)
    drawn = torch.cdist(samples, train).min(1).values / torch.cdist(samples, held_out).min(1).values
    torch.testing.assert_close(found.relative, drawn.double(), rtol=1e-5, atol=0)


def test_what_a_test_would_miss_is_known() -> None:
    """One copy fewer than `limit` passes, `limit` copies do not."""
    held_out = torch.linspace(1, 2, 300).double()
    far = torch.full((400,), 3.0).double()
    limit = Excess.of(far, held_out).limit
    for copies in (limit - 1, limit):
        found = Excess.of(far.index_fill(0, torch.arange(copies), 0.0), held_out)
        assert found.num == copies
        assert (found.p_value < 1e-3) == (copies == limit)
    assert math.isnan(Excess.of(far, held_out[:0]).p_value)


def test_copying_score_is_the_mean_of_mann_whitney() -> None:
    real = (4 * normal((90,), 0, "test")).round().double()  # with ties
    drawn = (4 * normal((120,), 1, "test") - 1).round().double()
    cells, own = torch.arange(90) % 3, torch.arange(120) % 3
    own[:30] = torch.where(own[:30] == 2, 0, own[:30])
    total = 0.0
    for cell in range(3):
        a, b = real[cells == cell], drawn[own == cell]
        u = (b[:, None] > a).double().sum() + (b[:, None] == a).double().sum() / 2
        n, m = len(a), len(b)
        total += float(u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12) / 3
    assert copying_score(drawn, real, own, cells) == pytest.approx(total, rel=1e-12)
    assert math.isnan(copying_score(drawn[:5], real, own[:5], cells))


def test_copying_score_is_standard_for_an_honest_sampler() -> None:
    scores = []
    for seed in range(60):
        real, drawn = normal((200,), seed, "real").exp(), normal((300,), seed, "drawn").exp()
        one = torch.zeros(300).long()
        scores.append(copying_score(drawn, real, one, one[:200]))
    found = torch.tensor(scores)
    assert abs(float(found.mean())) < 0.5
    assert 0.75 < float(found.std()) < 1.3


def test_duplicates_in_the_data_do_not_hide_copies() -> None:
    train = _images(600, 20)
    held_out = torch.cat([train[:6], _images(294, 21)])  # the 1 % quantile is 0
    assert audit(train[100:200], train, held_out).copies
    assert not audit(_images(100, 22), train, held_out).copies


def test_p_value_is_the_share_of_random_orders() -> None:
    """With 3 samples and 4 held-out images, the threshold is the smallest of the four."""
    held_out = torch.tensor([2.0, 4, 6, 8]).double()
    for count, expected in ((0, 1.0), (1, 3 / 7), (2, 1 / 7), (3, 1 / 35)):
        samples = torch.tensor([1.0] * count + [9.0] * (3 - count)).double()
        found = Memorisation(samples, torch.zeros(3).long(), held_out, 1.0)
        assert found.p_value == pytest.approx(expected)


def test_empty_sets_are_refused() -> None:
    images = _images(3, 0)
    with pytest.raises(InputError, match="one set is empty"):
        audit(images[:0], images, images)
