"""The search for stages on real images: from agreement or affinity to stages and their record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from oracles import total_cost
from stratagem.clustering.optimal_denoiser import OptimalDenoiser
from stratagem.clustering.partition import (
    affinity_cost,
    recursive_thresholds,
    split,
    thresholds,
    within_cost,
)
from stratagem.clustering.search import (
    Axis,
    Method,
    StageSearch,
    check_search,
    find_stages,
    share_of_draws,
)
from stratagem.clustering.similarity import Similarity, similarity
from stratagem.density import LogitNormal, LogNormalSigma, TimeDensity, Uniform
from stratagem.errors import InputError
from stratagem.schedule import EDM, VP, Cosine, Linear, NoiseSchedule
from stratagem.stages import Stages


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1


def axis_of(
    schedule: NoiseSchedule, num_times: int = 100, density: TimeDensity | None = None
) -> Axis:
    return Axis(schedule, density or Uniform(), num_times)


def agreement(images: Tensor, axis: Axis, num_samples: int = 32, seed: int = 0) -> Similarity:
    denoiser = OptimalDenoiser(images, axis.schedule)
    return similarity(denoiser, axis.times, num_samples=num_samples, eta=2 / 255, seed=seed)


@pytest.fixture(scope="module")
def curves(digits: Tensor) -> Similarity:
    return agreement(digits, axis_of(Linear()), 256)


@pytest.fixture(scope="module")
def found(curves: Similarity) -> StageSearch:
    return find_stages(axis_of(Linear()), evidence=curves)


def test_defaults_make_three_sensible_stages_of_digits(
    found: StageSearch, curves: Similarity
) -> None:
    assert found.stages.num == 3
    shares = share_of_draws(found.stages, Uniform(), Linear())
    assert min(shares) > 0.05
    assert sum(shares) == pytest.approx(1)
    # Each end stage does agree with its end, and would not if it were much longer.
    t1, t2 = found.stages.times(Linear())
    inside = curves.times <= t1 + 1e-9
    assert curves.to_clean[inside].mean() >= 0.9 > curves.to_clean[curves.times <= t1 + 0.02].mean()
    inside = curves.times >= t2 - 1e-9
    assert curves.to_noise[inside].mean() >= 0.9 > curves.to_noise[curves.times >= t2 - 0.02].mean()


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VP(), EDM()])
def test_every_schedule_and_method_works_with_the_defaults(
    digits: Tensor, schedule: NoiseSchedule
) -> None:
    axis = axis_of(schedule)
    seen = agreement(digits[:300], axis)
    for method in get_args(Method):
        evidence = {"gradient": seen.matrix, "snr": None, "uniform": None}.get(method, seen)
        stages = find_stages(axis, 3, method, evidence).stages
        assert stages.num == 3
        assert min(share_of_draws(stages, Uniform(), schedule)) > 0.03


def test_curves_of_digits_fall_and_rise(curves: Similarity) -> None:
    assert curves.to_clean[0] == curves.to_noise[-1] == 1
    assert curves.to_clean[:60].diff().max() <= 0.02
    assert curves.to_noise.diff().min() >= -0.03
    assert curves.to_clean_se.max() < 0.03


def test_seeds_move_the_edges_little(digits: Tensor, found: StageSearch) -> None:
    axis = axis_of(Linear())
    other = find_stages(axis, evidence=agreement(digits, axis, 256, seed=1)).stages
    pairs = zip(found.stages.times(Linear()), other.times(Linear()), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 0.03


@pytest.mark.parametrize("num_stages", [1, 2, 4, 5, 6])
def test_thresholds_make_any_number_of_stages_of_digits(
    curves: Similarity, num_stages: int
) -> None:
    found = find_stages(axis_of(Linear()), num_stages, evidence=curves)
    cuts, bars = recursive_thresholds(
        curves.times, curves.to_clean, curves.to_noise, curves.matrix, 0.9, num_stages
    )
    assert found.stages.times(Linear()) == pytest.approx(cuts)
    assert found.parameters["alphas"] == list(bars)


@pytest.mark.parametrize("num_stages", [1, 2, 4, 6])
@pytest.mark.parametrize("density", [Uniform(), LogitNormal(1.0, 0.6)])
def test_dp_makes_any_number_of_stages(
    digits: Tensor, num_stages: int, density: TimeDensity
) -> None:
    axis = axis_of(Linear(), 40, density)
    seen = agreement(digits[:300], axis)
    stages = find_stages(axis, num_stages, "dp", seen, min_mass=0.1).stages
    shares = share_of_draws(stages, density, Linear())
    assert len(shares) == num_stages
    assert min(shares) >= 0.1 - 1e-9
    cost = within_cost(seen.matrix)
    ours = total_cost(cost, [round(40 * t) for t in stages.times(Linear())])
    free = total_cost(cost, split(cost, num_stages))
    bound = split(cost, num_stages, mass=axis.cell_mass, min_mass=0.1)
    assert ours == pytest.approx(total_cost(cost, bound))
    assert ours >= free - 1e-12


def test_cell_mass_is_that_of_the_density() -> None:
    axis = axis_of(Linear(), 10, LogitNormal())
    assert float(axis.cell_mass.sum()) == pytest.approx(1)
    assert float(axis.cell_mass[3]) == pytest.approx(LogitNormal().mass((0.3, 0.4)))
    assert axis.times.tolist() == pytest.approx([0.05 + 0.1 * k for k in range(10)])


def test_gradient_is_interval_clustering_of_the_affinity() -> None:
    affinity = torch.block_diag(torch.ones(8, 8), torch.ones(12, 12), torch.ones(10, 10))
    stages = find_stages(axis_of(Linear(), 30), 3, "gradient", affinity).stages
    cost = affinity_cost(affinity)
    times = stages.times(Linear())
    assert times == pytest.approx([c / 30 for c in split(cost, 3, min_cells=5, max_cells=15)])
    assert total_cost(cost, [round(30 * t) for t in times]) == -30
    # All partitions are alike here; without limits single cells come first.
    stages = find_stages(axis_of(Linear(), 30), 3, "gradient", torch.eye(30)).stages
    assert stages.times(Linear())[0] >= 5 / 30 - 1e-9


def test_baselines_do_not_need_the_data() -> None:
    uniform = find_stages(axis_of(VP()), 4, "uniform")
    assert uniform.stages.times(VP()) == pytest.approx((0.25, 0.5, 0.75))
    snr = find_stages(axis_of(VP(), 1000), 3, "snr")
    # The published SNR split, 0.348 and 0.709, on a grid of right ends, not of cells.
    assert snr.stages.times(VP()) == pytest.approx((0.347, 0.708), abs=0.002)
    assert uniform.evidence is snr.evidence is None


def test_record_goes_through_a_file(found: StageSearch, tmp_path: Path) -> None:
    found.stages.save(tmp_path / "stages.json", found.record())
    stages, record = Stages.load(tmp_path / "stages.json")
    assert stages == found.stages
    assert record == json.loads(json.dumps(found.record()))
    assert record["method"] == "optimal-denoiser"
    assert record["parameters"]["alphas"] == [0.9]
    curves = {
        name: torch.tensor(v, dtype=torch.float64)
        for name, v in record["curves"].items()
        if isinstance(v, list)
    }
    times = thresholds(curves["times"], curves["to_clean"], curves["to_noise"], 0.9)
    assert times == pytest.approx(stages.times(Linear()), abs=0.011)
    assert curves["matrix"].shape == (100, 100)
    affinity = find_stages(axis_of(Linear(), 4), 2, "gradient", torch.eye(4) / 3).record()
    assert affinity["affinity"][0] == [0.3333, 0, 0, 0]


def test_parameters_hold_only_what_had_an_effect() -> None:
    uniform = find_stages(axis_of(Linear()), 3, "uniform").parameters
    assert set(uniform) == {"num_stages", "schedule", "density"}
    assert "alphas" not in find_stages(axis_of(Linear()), 3, "snr").parameters


def test_share_of_draws_is_the_mass_of_each_stage() -> None:
    stages = Stages((2.0, 0.0))
    shares = share_of_draws(stages, LogitNormal(), Linear())
    # logit t = -log_snr / 2 is standard normal
    below = torch.special.ndtr(torch.tensor(-1.0)).item()
    assert shares == pytest.approx((below, 0.5 - below, 0.5))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "kmeans"}, "no method 'kmeans'"),
        ({"num_stages": 0, "method": "dp"}, "at least 1"),
        ({"num_stages": 99}, "or use method 'dp'"),
        ({"alpha": 1.5}, "alpha = 1.5"),
        ({"alpha": 0.1}, "raise alpha or lower eta"),
        ({"method": "dp", "min_mass": 0.4}, "0.4 for each of 3 stages: give one from 0 to 0.333"),
        ({"method": "dp", "min_mass": -0.1}, "from 0 to"),
        ({"num_stages": 101, "method": "dp", "min_mass": 0}, "100 times for 101 stages"),
    ],
)
def test_bad_settings_are_refused(curves: Similarity, settings: dict, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        find_stages(axis_of(Linear()), **{"evidence": curves, **settings})


def test_a_stage_that_training_never_draws_is_refused() -> None:
    axis = axis_of(EDM(), 100, LogNormalSigma(EDM(), -1.2, 0.2))
    with pytest.raises(InputError, match=r"stage 0 \(t = 0.000 to 0.333\) gets .* of the training"):
        find_stages(axis, 3, "uniform")
    for times in (0, 2):
        with pytest.raises(InputError, match=f"{times} times for 3 stages"):
            check_search(Axis(EDM(), Uniform(), times), 3, "snr")


def test_one_image_has_no_stages(digits: Tensor) -> None:
    axis = axis_of(Linear())
    with pytest.raises(InputError, match="clean end never falls under alpha"):
        find_stages(axis, evidence=agreement(digits[:1], axis, 2))
