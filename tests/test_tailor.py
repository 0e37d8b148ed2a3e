from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest

from stratagem.errors import InputError
from stratagem.stages import Stages
from stratagem.tailor import Measure, Setting, Tailoring, difficulty, tailor

STAGES = Stages((2.0, -2.0))
CURVES = {"log_snr": [6, 4, 2, 0, -1, -4], "to_noise": [0.0, 0.2, 0.4, 0.5, 0.7, 1.0]}


def mean(shares: Sequence[float], shared: float, chosen: Sequence[tuple[int, float]]) -> float:
    return shared + sum(s * macs for s, (_, macs) in zip(shares, chosen, strict=True))


class Case:
    """A random choice to make: few stages, decoders whose MACs grow unevenly with their size."""

    def __init__(self, seed: int, num: int = 3, sizes: int = 7) -> None:
        draw = random.Random(seed)
        self.difficulty = [draw.choice([0.0, 0.1, draw.random(), 0.5, 0.5]) for _ in range(num)]
        weights = [0.05 + draw.random() for _ in range(num)]
        self.shares = [w / sum(weights) for w in weights]
        self.shared = draw.random()
        costs = itertools.accumulate(0.05 + draw.random() for _ in range(sizes))
        self.decoders = list(zip(range(2, 2 + sizes), costs, strict=True))
        least = mean(self.shares, self.shared, [self.decoders[0]] * num)
        self.budgets = sorted(least + 3 * draw.random() for _ in range(5))

    def __call__(self, budget: float) -> tuple[tuple[int, float], ...]:
        return tailor(self.difficulty, self.shares, self.shared, self.decoders, budget)

    def best(self, budget: float) -> tuple[tuple[int, float], ...]:
        """The dearest of all choices within the budget that are in proportion to difficulty.

        A choice is if there is a scale for it: at least what each decoder (but the smallest) costs
        per difficulty, and below what the next larger one does.
        """
        found: list[tuple[tuple[int, float], ...]] = []
        for rungs in itertools.product(range(len(self.decoders)), repeat=len(self.shares)):
            low, high = 0.0, math.inf
            for rung, hard in zip(rungs, self.difficulty, strict=True):
                costs = [macs / hard if hard else math.inf for _, macs in self.decoders]
                low = max(low, costs[rung] if rung else 0.0)
                high = min([high, *costs[rung + 1 : rung + 2]])
            chosen = tuple(self.decoders[r] for r in rungs)
            if low < high and mean(self.shares, self.shared, chosen) <= budget:
                found.append(chosen)
        return max(found, key=lambda c: mean(self.shares, self.shared, c))


CASES = [Case(seed, num, 5) for seed in range(15) for num in (1, 2, 3)]


@pytest.mark.parametrize("case", CASES)
def test_the_choice_is_that_of_exhaustive_search(case: Case) -> None:
    for budget in case.budgets:
        assert case(budget) == case.best(budget)


@pytest.mark.parametrize("case", CASES)
def test_within_the_budget_and_no_decoder_shrinks_when_it_grows(case: Case) -> None:
    before = [0] * len(case.shares)
    for budget in case.budgets:
        chosen = case(budget)
        assert mean(case.shares, case.shared, chosen) <= budget
        sizes = [size for size, _ in chosen]
        assert all(new >= old for new, old in zip(sizes, before, strict=True))
        before = sizes


def test_some_budgets_change_the_choice() -> None:
    """The test above would pass on a choice that never changes."""
    assert sum(len({case(b) for b in case.budgets}) > 1 for case in CASES) > len(CASES) / 2


@pytest.mark.parametrize("case", [Case(seed, 4) for seed in range(20)])
def test_the_order_of_the_decoders_is_that_of_the_difficulty(case: Case) -> None:
    sizes = [size for size, _ in case(case.budgets[-1])]
    pairs = list(zip(case.difficulty, sizes, strict=True))
    for (hard, size), (other, another) in itertools.product(pairs, pairs):
        assert hard != other or size == another
        assert hard <= other or size >= another


def test_macs_are_in_proportion_to_difficulty() -> None:
    fine = ((n, n / 1000) for n in itertools.count(1))  # endless, and nearly continuous
    chosen = tailor([0.8, 0.4, 0.0], [0.2, 0.3, 0.5], 0.25, fine, 1.0)
    macs = [m for _, m in chosen]
    # 0.25 + 0.2 a + 0.3 b + 0.5 / 1000 = 1 with a = 2 b
    assert macs == pytest.approx([0.7495 / 0.35, 0.7495 / 0.7, 0.001], abs=0.002)


def test_equal_difficulty_spends_the_budget_on_equal_decoders() -> None:
    chosen = tailor([0.3] * 3, [0.1, 0.1, 0.8], 0.5, [(n, n / 8) for n in range(1, 9)], 1.0)
    assert chosen == ((4, 0.5),) * 3


def test_the_ladder_may_end_before_the_budget() -> None:
    assert tailor([0.5, 0.1], [0.5, 0.5], 0.0, [(1, 0.1), (2, 0.2)], 9.0) == ((2, 0.2),) * 2
    assert tailor([0.0, 0.0], [0.5, 0.5], 0.0, [(1, 0.1), (2, 0.2)], 9.0) == ((1, 0.1),) * 2


def test_a_budget_below_the_smallest_decoders_is_refused() -> None:
    with pytest.raises(InputError, match=r"stages.budget is 0.5, .*costs 0.600 .*raise it"):
        tailor([1.0], [1.0], 0.5, [(1, 0.1)], 0.5)


def test_difficulty_is_the_mean_of_what_the_data_mean_does_not_know() -> None:
    assert difficulty(STAGES, CURVES) == pytest.approx((0.9, (0.6 + 0.5 + 0.3) / 3, 0.0))
    assert difficulty(Stages(()), CURVES) == pytest.approx([1 - sum(CURVES["to_noise"]) / 6])
    with pytest.raises(InputError, match=r"stage 1 lies between two times .*by hand"):
        difficulty(Stages((1.5, 1.0)), CURVES)


def test_a_choice_says_why() -> None:
    setting: Setting = "depths"
    measure: Measure = "calls"
    made = Tailoring(setting, (5, 1), (0.9, 0.1), measure, (0.25, 0.75), (1.5, 0.75), 1.0)
    assert made.mean == pytest.approx(0.9375)
    first, *stages = made.lines()
    assert first.startswith("stages.depths: [5, 1]")
    assert "0.938 of the unified network's MACs, mean over calls (stages.budget 1)" in first
    assert stages == [
        "  stage 0: depth 5, for difficulty 0.900; 25.0% of calls, each 1.500 of the unified "
        "network's MACs",
        "  stage 1: depth 1, for difficulty 0.100; 75.0% of calls, each 0.750 of the unified "
        "network's MACs",
    ]
    assert made.record()["sizes"] == [5, 1]
    assert made.record()["mean"] == made.mean
