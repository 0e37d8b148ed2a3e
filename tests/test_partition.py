"""Partitions: against exhaustive search and naive sums, and the official code's results."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from oracles import total_cost
from stratagem import randomness
from stratagem.clustering.partition import (
    affinity_cost,
    recursive_thresholds,
    split,
    spread_cost,
    thresholds,
    within_cost,
)
from stratagem.errors import InputError
from stratagem.schedule import VP
from tolerances import FLOAT64, assert_near

GOLDEN = Path(__file__).parent / "golden"


def draw(*shape: int) -> Tensor:
    return randomness.uniform(shape, 0, "test", *shape).double()


def exhaustive(cost: Tensor, num_stages: int, fewest: int, most: int) -> float:
    """The least total cost over all partitions."""
    num_cells = len(cost) - 1
    best = float("inf")
    for cuts in combinations(range(1, num_cells), num_stages - 1):
        bounds = [0, *cuts, num_cells]
        if all(fewest <= j - i <= most for i, j in pairwise(bounds)):
            best = min(best, sum(float(cost[i, j]) for i, j in pairwise(bounds)))
    return best


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize(("fewest", "most"), [(1, 11), (2, 5), (1, 3), (2, 11)])
def test_split_is_the_exhaustive_optimum(num_stages: int, fewest: int, most: int) -> None:
    cost = draw(12, 12)
    if num_stages * most < 11:
        with pytest.raises(InputError, match=r"cannot cut"):
            split(cost, num_stages, min_cells=fewest, max_cells=most)
        return
    cuts = split(cost, num_stages, min_cells=fewest, max_cells=most)
    assert len(cuts) == num_stages - 1
    assert all(fewest <= j - i <= most for i, j in pairwise([0, *cuts, 11]))
    assert abs(total_cost(cost, cuts) - exhaustive(cost, num_stages, fewest, most)) < FLOAT64


def test_split_finds_blocks() -> None:
    similarity = torch.block_diag(torch.ones(4, 4), torch.ones(7, 7), torch.ones(2, 2))
    assert split(within_cost(similarity), 3) == [4, 11]
    assert total_cost(within_cost(similarity), [4, 11]) == pytest.approx(-1)


def test_unweighted_objective_rewards_single_cells() -> None:
    """Why `by_size` is the default: here each of two blocks is one stage."""
    similarity = torch.full((10, 10), 0.2)
    similarity[:5, :5] = similarity[5:, 5:] = 0.6
    similarity.fill_diagonal_(1.0)
    assert split(within_cost(similarity), 2) == [5]
    assert split(within_cost(similarity, by_size=False), 2) != [5]


@pytest.mark.parametrize(("num_stages", "fewest"), [(0, 1), (6, 1), (3, 2)])
def test_split_refuses_what_cannot_be(num_stages: int, fewest: int) -> None:
    with pytest.raises(InputError, match=r"cannot cut 5 cells"):
        split(draw(6, 6), num_stages, min_cells=fewest)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("min_mass", [0.0, 0.1, 0.2, 0.25])
def test_split_by_mass_is_the_exhaustive_optimum(num_stages: int, min_mass: float) -> None:
    cost, mass = draw(12, 12), draw(11).square()
    mass = mass / mass.sum()
    allowed = [
        cuts
        for cuts in combinations(range(1, 11), num_stages - 1)
        if all(mass[i:j].sum() >= min_mass for i, j in pairwise([0, *cuts, 11]))
    ]
    if not allowed:
        with pytest.raises(InputError, match=f"each get {min_mass:g} of the training draws"):
            split(cost, num_stages, mass=mass, min_mass=min_mass)
        return
    best = min(allowed, key=lambda cuts: total_cost(cost, cuts))
    assert split(cost, num_stages, mass=mass, min_mass=min_mass) == list(best)


def test_mass_keeps_single_cells_from_winning() -> None:
    """Under the released code's objective a cell that agrees with itself is a perfect stage."""
    similarity = (-(torch.arange(30.0)[:, None] - torch.arange(30.0)).abs() / 5).exp()
    cost, even = (
        within_cost(similarity, by_size=False),
        torch.full((30,), 1 / 30, dtype=torch.float64),
    )
    assert 1 in (j - i for i, j in pairwise([0, *split(cost, 3), 30]))
    cuts = split(cost, 3, mass=even, min_mass=0.2)
    assert min(j - i for i, j in pairwise([0, *cuts, 30])) >= 6
    # K equal shares of 1 / K exist, whatever their rounding.
    assert split(cost, 3, mass=even, min_mass=1 / 3) == [10, 20]


def test_mass_that_cannot_be_shared_out_is_refused() -> None:
    heavy = torch.tensor([0.9, 0.025, 0.025, 0.025, 0.025])
    with pytest.raises(InputError, match=r"2 stages that each get 0.2 of the training draws"):
        split(draw(6, 6), 2, mass=heavy, min_mass=0.2)


@pytest.mark.parametrize("by_size", [True, False])
def test_within_cost_is_the_mean_of_the_block(by_size: bool) -> None:
    similarity = draw(7, 7)
    cost = within_cost(similarity, by_size=by_size)
    for i, j in combinations(range(8), 2):
        weight = (j - i) / 7 if by_size else 1.0
        assert_near(cost[i, j], -weight * similarity[i:j, i:j].mean(), FLOAT64)


@pytest.mark.parametrize("sign", [1, -1])
def test_spread_and_affinity_cost_are_their_sums(sign: int) -> None:
    values, affinity = sign * draw(9).cumsum(0), draw(9, 9)
    spread, negative = spread_cost(values), affinity_cost(affinity)
    for i, j in combinations(range(10), 2):
        middle = torch.arange(i, j)[(j - i) // 2]
        assert_near(spread[i, j], (values[i:j] - values[middle]).abs().sum(), FLOAT64)
        assert_near(negative[i, j], -affinity[middle, i:j].sum(), FLOAT64)


def test_even_values_are_cut_evenly() -> None:
    assert split(spread_cost(torch.arange(33.0)), 3) == [11, 22]  # odd sizes, so one optimum


@pytest.mark.parametrize("alpha", [0.5, 0.7, 0.9])
def test_thresholds_are_running_means(alpha: float) -> None:
    times = torch.linspace(0, 1, 40, dtype=torch.float64)
    to_clean, to_noise = torch.sigmoid(20 * (0.3 - times)), torch.sigmoid(20 * (times - 0.8))
    t1, t2 = thresholds(times, to_clean, to_noise, alpha)
    kept = [t for t in times if to_clean[times <= t].mean() >= alpha]
    assert t1 == max(kept)
    assert t2 == min(t for t in times if to_noise[times >= t].mean() >= alpha)


def test_the_first_crossing_counts() -> None:
    """S0 returns to 1 near pure noise; its mean over all times exceeds alpha again at the end."""
    times = torch.arange(20.0)
    to_clean = torch.ones(20)
    to_clean[3:6] = 0.0
    to_noise = (times >= 12).float()
    assert to_clean.mean() >= 0.8
    assert thresholds(times, to_clean, to_noise, 0.8) == (2.0, 10.0)


def test_thresholds_say_why_they_fail() -> None:
    times, falling = torch.arange(10.0), torch.linspace(1, 0, 10)
    with pytest.raises(InputError, match=r"clean end never falls under alpha = 0.3.*raise alpha"):
        thresholds(times, falling, falling.flip(0), 0.3)
    with pytest.raises(InputError, match=r"noise end is 0.000, under.*lower alpha"):
        thresholds(times, falling, falling, 0.8)
    with pytest.raises(InputError, match=r"overlap.*raise alpha"):
        thresholds(times, falling, falling.flip(0), 0.6)


def agreement(num: int = 60) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Times and agreement that falls with the distance in time: S(a, b), S0 and S1."""
    times = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    level = 8 * times + 3 * times.square()  # falls faster next to the noise
    matrix = 0.2 + 0.8 * (-(level[:, None] - level).abs()).exp()
    return times, matrix[0].clamp(min=0.3) ** 0.5, matrix[-1] ** 0.5, matrix


def test_recursion_begins_with_the_paper() -> None:
    times, to_clean, to_noise, matrix = agreement()
    cuts, bars = recursive_thresholds(times, to_clean, to_noise, matrix, 0.85, 3)
    assert cuts == thresholds(times, to_clean, to_noise, 0.85)
    assert bars == (0.85,)
    assert recursive_thresholds(times, to_clean, to_noise, matrix, 0.85, 1) == ((), ())


@pytest.mark.parametrize("num_stages", [5, 7])
def test_recursion_cuts_the_middle_by_its_own_ends(num_stages: int) -> None:
    times, to_clean, to_noise, matrix = agreement()
    cuts, bars = recursive_thresholds(times, to_clean, to_noise, matrix, 0.85, num_stages)
    assert len(cuts) == num_stages - 1
    assert list(cuts) == sorted(set(cuts))
    at = {float(t): k for k, t in enumerate(times)}
    for level in range(1, num_stages // 2):
        low, high = at[cuts[level - 1]], at[cuts[-level]]
        near, far = matrix[low, low : high + 1], matrix[high, low : high + 1]
        bar = (1 + max(near.mean(), far.mean())) / 2
        assert bars[level] == pytest.approx(float(bar))
        t1, t2 = thresholds(times[low : high + 1], near, far, float(bar))
        assert (cuts[level], cuts[-1 - level]) == (t1, t2)


def test_even_numbers_cut_the_innermost_where_its_ends_change_places() -> None:
    times, to_clean, to_noise, matrix = agreement()
    cuts, bars = recursive_thresholds(times, to_clean, to_noise, matrix, 0.85, 2)
    assert bars == ()
    before = times < cuts[0]
    assert (to_noise <= to_clean)[before].all()
    assert to_noise[~before][0] > to_clean[~before][0]
    outer, _ = recursive_thresholds(times, to_clean, to_noise, matrix, 0.85, 3)
    (t1, middle, t2), _ = recursive_thresholds(times, to_clean, to_noise, matrix, 0.85, 4)
    assert (t1, t2) == outer
    levels = [8 * t + 3 * t * t for t in (t1, middle, t2)]
    assert abs(levels[1] - (levels[0] + levels[2]) / 2) <= 14 / 60  # a step, at most 14 wide


def test_recursion_says_why_it_ends() -> None:
    times, to_clean, to_noise, matrix = agreement()
    with pytest.raises(InputError, match=r"the middle, t = .* cannot be cut .*fewer stages or"):
        recursive_thresholds(times, to_clean, to_noise, matrix, 0.85, 21)
    with pytest.raises(InputError, match=r"middle.*a stage would hold no time.*method 'dp'"):
        recursive_thresholds(times, to_clean, to_noise, torch.eye(60), 0.85, 5)
    with pytest.raises(InputError, match=r"^agreement with the clean end never falls"):
        recursive_thresholds(times, to_clean, to_noise, matrix, 0.1, 5)
    with pytest.raises(InputError, match=r"^no time agrees more with the noise end"):
        recursive_thresholds(times, torch.ones(60), torch.ones(60), matrix, 0.9, 2)
    with pytest.raises(InputError, match=r"^every time agrees more with the noise end"):
        recursive_thresholds(times, torch.zeros(60), torch.ones(60), matrix, 0.9, 2)


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("case", ["0", "1", "2", "digits", "random"])
def test_parity_of_partitions(case: str, num_stages: int) -> None:
    """Ours is the exhaustive maximiser of the official objective."""
    if case.isdigit():
        golden = load_file(GOLDEN / "interval_partition_synthetic.safetensors")
        similarity, key = golden[f"inputs/{case}/similarity"], f"outputs/{case}/{num_stages}"
    else:
        golden = load_file(GOLDEN / f"optimal_denoiser_{case}.safetensors")
        similarity, key = golden["outputs/sim/matrix"], f"outputs/partition/{num_stages}"
    cost = within_cost(similarity, by_size=False)
    cuts = split(cost, num_stages)
    assert [0, *cuts] == golden[f"{key}/starts"].tolist()
    assert -total_cost(cost, cuts) == pytest.approx(float(golden[f"{key}/objective"]), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "num_cells", "num_stages"),
    [("snr", 100, 2), ("snr", 100, 3), ("snr", 100, 4), ("snr", 60, 5), ("snr", 1000, 3)]
    + [("affinity", 40, k) for k in (2, 3, 4)],
)
def test_parity_of_interval_clustering(kind: str, num_cells: int, num_stages: int) -> None:
    golden = load_file(GOLDEN / "interval_cluster.safetensors")
    if kind == "snr":
        times = (torch.arange(num_cells, dtype=torch.float64) + 1) / num_cells
        cost = spread_cost(VP().log_snr(times))
    else:
        cost = affinity_cost(golden["inputs/affinity"])
    fewest, most = num_cells // (2 * num_stages), -(-3 * num_cells // (2 * num_stages))
    cuts = split(cost, num_stages, min_cells=fewest, max_cells=most)
    key = f"outputs/{kind}_n{num_cells}_k{num_stages}"
    assert [*reversed(cuts), 0] == golden[f"{key}/lms"].tolist()
    assert total_cost(cost, cuts) == pytest.approx(float(golden[f"{key}/total_cost"]), rel=1e-4)
