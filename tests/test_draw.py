"""memory/draw.py: draw j depends on (seed, j) alone, and is a row that it may be."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from banks import make
from stratagem.errors import InputError
from stratagem.memory.bank import MemoryBank
from stratagem.memory.draw import Pairs, Policy, draw, draw_nearest, draw_pairs, rows_of_noise
from stratagem.memory.interpolate import blend
from stratagem.memory.store import hold
from stratagem.randomness import normal_rows

ALL = get_args(Policy)
OFTEN = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])


def bank_of(policy: str) -> MemoryBank:
    return make(frequency=OFTEN) if policy == "frequency" else make()


def draws(num: int, policy: Any, seed: int = 0) -> Tensor:
    return draw(bank_of(policy), num, policy, seed, label=1 if policy == "label" else None)


def allowed(policy: str) -> set[int]:
    rows = range(12)
    seen = {row for row in rows if row % 4 != 3}
    return {
        "uniform": set(rows),
        "train": seen,
        "stratified": seen,
        "frequency": seen - {0},
        "held-out": set(rows) - seen,
        "label": {row for row in seen if row % 3 == 2},
    }[policy]


def even(counts: Tensor, shares: Tensor) -> bool:
    """Chi square below the quantile of one in a thousand (Wilson and Hilferty)."""
    expected = counts.sum() * shares.double() / shares.sum()
    free = len(counts) - 1
    limit = free * (1 - 2 / (9 * free) + 3.09 * math.sqrt(2 / (9 * free))) ** 3
    return float(((counts - expected) ** 2 / expected).sum()) < limit


@pytest.mark.parametrize("policy", ALL)
def test_every_eligible_row_is_drawn_and_no_other(policy: str) -> None:
    rows = draws(600, policy)
    assert rows.dtype == torch.int64
    assert set(rows.tolist()) == allowed(policy)


@pytest.mark.parametrize("policy", ALL)
def test_draw_j_does_not_depend_on_how_many(policy: str) -> None:
    many = draws(100, policy, seed=5)
    for num in (0, 1, 7, 99):
        assert torch.equal(draws(num, policy, seed=5), many[:num])
    assert not torch.equal(draws(100, policy, seed=6), many)


def test_draws_with_replacement_are_even() -> None:
    assert even(torch.bincount(draws(12000, "uniform"), minlength=12), torch.ones(12))


def test_draws_by_frequency_follow_it() -> None:
    rows = sorted(allowed("frequency"))
    counts = torch.bincount(draws(20000, "frequency"), minlength=12)[rows]
    assert even(counts, OFTEN[rows])
    assert not even(counts, torch.ones(len(rows)))


@pytest.mark.parametrize("num", [4, 9, 22, 90])
def test_stratified_draws_differ_by_one_at_most(num: int) -> None:
    counts = torch.bincount(draws(num, "stratified"), minlength=12)
    counts = counts[sorted(allowed("stratified"))]
    assert int(counts.max() - counts.min()) <= 1
    assert int(counts.sum()) == num


def test_each_pass_has_its_own_order() -> None:
    first, second = draws(18, "stratified").split(9)
    assert first.tolist() != second.tolist()
    assert sorted(first.tolist()) == sorted(second.tolist())


def test_training_rows_are_the_default() -> None:
    assert torch.equal(draw(make(), 50), draw(make(), 50, "train", 0))


def test_a_label_narrows_held_out_rows_too() -> None:
    assert set(draw(make(), 200, "held-out", label=1).tolist()) == {11}
    with pytest.raises(InputError, match="no held-out image of label 7"):
        draw(make(), 3, "held-out", label=7)


def test_impossible_draws_are_refused() -> None:
    bank = make()
    with pytest.raises(InputError, match="no training image of label 7"):
        draw(bank, 3, "label", label=7)
    with pytest.raises(InputError, match="no training image of label 2"):
        draw(make(labels=torch.arange(12) % 4 - 1), 3, "label", label=2)  # all of it is held out
    for policy, label in [("label", None), ("train", 1), ("stratified", 1)]:
        with pytest.raises(InputError, match="give a label with 'label' or 'held-out'"):
            draw(bank, 3, policy, label=label)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown draw policy 'best'"):
        draw(bank, 3, "best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="prepare the data with a holdout"):
        draw(make(held_out=torch.zeros(12)), 3, "held-out")
    with pytest.raises(InputError, match="all are held out"):
        draw(make(held_out=torch.ones(12)), 3)
    with pytest.raises(InputError, match="no frequencies"):
        draw(bank, 3, "frequency")


# --- near, between, and by noise ---------------------------------------------------------------


def test_draws_near_images_take_turns() -> None:
    bank = make()
    queries = bank.lookup(torch.tensor([5, 9]))
    rows = draw_nearest(bank, queries, 7)
    cosines = queries @ bank.lookup(torch.arange(12)).T
    cosines[:, bank.held_out] = -2
    order = cosines.argsort(descending=True)
    assert rows.tolist() == [order[j % 2, j // 2] for j in range(7)]
    assert rows[:2].tolist() == [5, 9]
    with pytest.raises(InputError, match="there are 9"):
        draw_nearest(bank, queries, 20)


def test_pairs_are_of_different_training_rows_and_even() -> None:
    bank = make()
    pairs = draw_pairs(bank, 9000, seed=1)
    assert isinstance(pairs, Pairs)
    seen = sorted(allowed("train"))
    place = {row: number for number, row in enumerate(seen)}
    first, second = (torch.tensor([place[r] for r in rows.tolist()]) for rows in pairs[:2])
    assert not (first == second).any()
    counts = torch.bincount(9 * first + second, minlength=81)
    assert even(counts[counts > 0], torch.ones(72))
    assert pairs.weight.min() >= 0
    assert pairs.weight.max() < 1
    assert abs(float(pairs.weight.mean()) - 0.5) < 0.02
    assert all(torch.equal(a[:50], b) for a, b in zip(pairs, draw_pairs(bank, 50, 1), strict=True))
    between = blend(bank.lookup(pairs.first), bank.lookup(pairs.second), pairs.weight)
    torch.testing.assert_close(between.norm(dim=1), torch.ones(9000))


def test_pairs_may_share_a_label() -> None:
    bank = make()
    pairs = draw_pairs(bank, 60, label=0)
    assert set(bank.labels[pairs.first].tolist() + bank.labels[pairs.second].tolist()) == {0}
    with pytest.raises(InputError, match="needs two"):
        draw_pairs(make(held_out=torch.arange(12) > 0), 3)


def test_noise_chooses_rows_as_in_version_1() -> None:
    """u = Phi(sqrt(n) mean z) is uniform for normal z, and a function of the noise alone."""
    bank = make()
    noise = normal_rows(range(12000), (2, 3, 3), "test")
    rows = rows_of_noise(bank, noise)
    assert even(torch.bincount(rows, minlength=12), torch.ones(12))
    assert torch.equal(rows_of_noise(bank, noise[7:9]), rows[7:9])
    by_frequency = rows_of_noise(make(frequency=OFTEN), noise)
    assert even(torch.bincount(by_frequency, minlength=12)[1:], OFTEN[1:])
    assert not (by_frequency == 0).any()


@pytest.mark.parametrize(
    ("frequency", "below", "above", "ends"),
    [
        (None, [0, 1, 2], [1, 2, 3], [0, 3]),
        (torch.tensor([1.0, 1, 2, 0]), [0, 1, 2], [1, 2, 2], [0, 2]),
        (torch.tensor([0.0, 1, 1, 2]), [1, 2, 3], [2, 3, 3], [1, 3]),
    ],
)
def test_noise_is_mapped_by_the_normal_distribution(
    frequency: Tensor | None, below: list[int], above: list[int], ends: list[int]
) -> None:
    bank = MemoryBank(
        hold(torch.eye(4)[:, None]), torch.zeros(4), torch.zeros(4), {}, "", frequency=frequency
    )
    quartiles = torch.tensor([-0.6745, 0.0, 0.6745])
    for points, rows in ((quartiles - 1e-3, below), (quartiles + 1e-3, above)):
        noise = points[:, None].expand(3, 16) / 4  # sqrt(16) mean = point
        assert rows_of_noise(bank, noise).tolist() == rows
    assert rows_of_noise(bank, torch.tensor([[-1e4], [1e4]])).tolist() == ends
