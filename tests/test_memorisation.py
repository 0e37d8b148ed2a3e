"""Nearest neighbours against brute force; the audit flags copying and clears honest sampling."""

from __future__ import annotations

import math

import pytest
import torch

from stratagem.errors import InputError
from stratagem.metrics.memorisation import Memorisation, audit, nearest
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
