"""Draws are functions of their key, independent between keys, and standard."""

from __future__ import annotations

import torch

from stratagem.randomness import generator, normal, normal_rows, permutation, uniform


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


def test_permutation_holds_each_number_once() -> None:
    order = permutation(100, 3, "order", 1)
    assert torch.equal(order.sort().values, torch.arange(100))
    assert not torch.equal(order, permutation(100, 3, "order", 2))
