"""Draws are functions of their key, independent between keys, and standard."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from stratagem.randomness import (
    generator,
    normal,
    normal_at,
    normal_rows,
    permutation,
    uniform,
    uniform_at,
)


def test_a_draw_is_a_function_of_its_key() -> None:
    torch.manual_seed(1)
    a = normal((3, 4), 7, "noise", 12)
    torch.manual_seed(2)
    assert torch.equal(a, normal((3, 4), 7, "noise", 12))
    for other in [(8, "noise", 12), (7, "time", 12), (7, "noise", 13), (7, "noise")]:
        assert not torch.equal(a, normal((3, 4), *other))


def test_keys_do_not_run_together() -> None:
    """(1, 23) and (12, 3) would be one key if counters were joined without a mark between."""
    assert generator(0, "a", 1, 23).random() != generator(0, "a", 12, 3).random()
    assert generator(1, "a").random() != generator(0, "a", 1).random()


def test_seeds_beyond_32_bits_differ() -> None:
    assert not torch.equal(normal((4,), 1, "x"), normal((4,), 1 + 2**32, "x"))


def test_rows_do_not_depend_on_their_neighbours() -> None:
    together = normal_rows([5, 6, 7], (2, 3), "start", 1)
    alone = [normal_rows([s], (2, 3), "start", 1)[0] for s in (5, 6, 7)]
    assert torch.equal(together, torch.stack(alone))
    assert not torch.equal(together[0], together[1])


def test_distributions() -> None:
    z = normal((200_000,), 0, "moments").double()
    assert abs(z.mean()) < 0.01
    assert abs(z.var() - 1) < 0.02
    u = uniform((200_000,), 0, "moments")
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.double().mean() - 0.5) < 0.005


@pytest.mark.parametrize("draw", [normal_at, uniform_at])
def test_a_row_of_a_batch_is_its_own(draw: Callable[..., torch.Tensor]) -> None:
    """Three numbers a row leave half a word of the stream unused, which the next must not see."""
    whole = draw(range(40), (1, 3), 5, "noise", 2)
    assert whole.dtype == torch.float32
    assert len(whole.unique()) == whole.numel()
    for ranks in (1, 2, 3, 4, 8, 32):
        for rank in range(ranks):
            part = draw(range(rank, 40, ranks), (1, 3), 5, "noise", 2)
            assert torch.equal(part, whole[rank::ranks])
    assert torch.equal(draw([7, 0, 7], (1, 3), 5, "noise", 2), whole[[7, 0, 7]])
    assert torch.equal(draw(range(90), (1, 3), 5, "noise", 2)[:40], whole)  # of a larger batch
    assert torch.equal(draw(range(40), (1, 8), 5, "noise", 2)[..., :3], whole)  # of longer rows
    for other in [(6, "noise", 2), (5, "posterior", 2), (5, "noise", 3)]:
        assert not torch.isin(draw(range(40), (1, 3), *other), whole).any()


def test_rows_of_a_batch_are_independent_and_standard() -> None:
    rows = normal_at(range(1000), (500,), 1, "noise", 3)
    for line in (rows, rows.T):  # within a row, and at one place over the rows
        assert abs(line.mean(1)).max() < 5.5 / line.shape[1] ** 0.5
        assert abs(line.var(1) - 1).max() < 5.5 * (2 / line.shape[1]) ** 0.5
    correlated = torch.corrcoef(rows) - torch.eye(1000)
    assert correlated.abs().max() < 6 / 500**0.5  # of half a million pairs
    shares = torch.special.ndtr(rows.double()).flatten().sort().values
    places = (torch.arange(len(shares)) + 0.5) / len(shares)
    assert (shares - places).abs().max() * len(shares) ** 0.5 < 1.95  # Kolmogorov-Smirnov, 0.1 %
    even = uniform_at(range(1000), (500,), 1, "snippet", 3).flatten().sort().values
    assert 0 <= even[0] < even[-1] < 1
    assert (even - places).abs().max() * len(even) ** 0.5 < 1.95


def test_a_row_never_runs_into_the_next() -> None:
    """A stream of a million numbers holds no beginning of another row."""
    long = normal_at([0], (1_000_000,), 2, "noise")[0].numpy()
    for row in (1, 2, 255, 2**32):
        first = normal_at([row], (2,), 2, "noise")[0].numpy()
        assert not ((long[:-1] == first[0]) & (long[1:] == first[1])).any()
    assert np.array_equal(long[:4], normal((4,), 2, "noise").numpy())


def test_permutation_holds_each_number_once() -> None:
    order = permutation(100, 3, "order", 1)
    assert torch.equal(order.sort().values, torch.arange(100))
    assert not torch.equal(order, permutation(100, 3, "order", 2))
