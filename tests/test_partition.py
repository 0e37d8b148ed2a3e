"""Partitions: against exhaustive search and naive sums, and the official code's results."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stratagem import randomness
from stratagem.clustering.partition import (
    affinity_cost,
    split,
    spread_cost,
    thresholds,
    total_cost,
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
