"""The search for stages on real images, from data set to saved record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from stratagem.clustering.partition import split, thresholds, total_cost, within_cost
from stratagem.clustering.search import Method, StageSearch, find_stages, share_of_draws
from stratagem.density import LogitNormal, Uniform
from stratagem.errors import InputError
from stratagem.schedule import EDM, VP, Cosine, Linear, NoiseSchedule
from stratagem.stages import Stages


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1


@pytest.fixture(scope="module")
def found(digits: Tensor) -> StageSearch:
    return find_stages(digits, Linear())


def test_defaults_make_three_sensible_stages_of_digits(found: StageSearch) -> None:
    assert found.stages.num == 3
    shares = share_of_draws(found.stages, Uniform(), Linear())
    assert min(shares) > 0.05
    assert sum(shares) == pytest.approx(1)
    # Each end stage does agree with its end, and would not if it were much longer.
    curves = found.curves
    t1, t2 = found.stages.times(Linear())
    inside = curves.times <= t1 + 1e-9
    assert curves.to_clean[inside].mean() >= 0.9 > curves.to_clean[curves.times <= t1 + 0.02].mean()
    inside = curves.times >= t2 - 1e-9
    assert curves.to_noise[inside].mean() >= 0.9 > curves.to_noise[curves.times >= t2 - 0.02].mean()


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VP(), EDM()])
def test_every_schedule_and_method_works_with_the_defaults(
    digits: Tensor, schedule: NoiseSchedule
) -> None:
    for method in get_args(Method):
        stages = find_stages(digits[:300], schedule, method=method, num_samples=32).stages
        assert stages.num == 3
        assert min(share_of_draws(stages, Uniform(), schedule)) > 0.03


def test_curves_of_digits_fall_and_rise(found: StageSearch) -> None:
    curves = found.curves
    assert curves.to_clean[0] == curves.to_noise[-1] == 1
    assert curves.to_clean[:60].diff().max() <= 0.02
    assert curves.to_noise.diff().min() >= -0.03
    assert curves.to_clean_se.max() < 0.03


def test_seeds_move_the_edges_little(digits: Tensor, found: StageSearch) -> None:
    other = find_stages(digits, Linear(), seed=1).stages.times(Linear())
    pairs = zip(found.stages.times(Linear()), other, strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 0.03
    again = find_stages(digits, Linear())
    assert again.stages == found.stages
    assert again.record() == found.record()


@pytest.mark.parametrize("num_stages", [1, 2, 4, 6])
def test_dp_makes_any_number_of_stages(digits: Tensor, num_stages: int) -> None:
    found = find_stages(digits[:300], Linear(), num_stages, "dp", num_samples=32, num_times=40)
    times = found.stages.times(Linear())
    assert len(times) == num_stages - 1
    cost = within_cost(found.curves.matrix)
    ours = total_cost(cost, [round(40 * t) for t in times])
    assert ours == pytest.approx(total_cost(cost, split(cost, num_stages)))


def test_baselines_do_not_need_the_data(digits: Tensor) -> None:
    uniform = find_stages(digits, VP(), 4, "uniform")
    assert uniform.stages.times(VP()) == pytest.approx((0.25, 0.5, 0.75))
    snr = find_stages(digits, VP(), 3, "snr", num_times=1000)
    # The published SNR split, 0.348 and 0.709, on a grid of right ends, not of cells.
    assert snr.stages.times(VP()) == pytest.approx((0.347, 0.708), abs=0.002)
    assert uniform.curves is snr.curves is None


def test_record_goes_through_a_file(found: StageSearch, tmp_path: Path) -> None:
    found.stages.save(tmp_path / "stages.json", found.record())
    stages, record = Stages.load(tmp_path / "stages.json")
    assert stages == found.stages
    assert record == json.loads(json.dumps(found.record()))
    assert record["method"] == "optimal-denoiser"
    assert record["parameters"]["alpha"] == 0.9
    curves = {name: torch.tensor(v, dtype=torch.float64) for name, v in record["curves"].items()}
    times = thresholds(curves["times"], curves["to_clean"], curves["to_noise"], 0.9)
    assert times == pytest.approx(stages.times(Linear()), abs=0.011)
    assert curves["matrix"].shape == (100, 100)


def test_parameters_hold_only_what_had_an_effect(digits: Tensor) -> None:
    uniform = find_stages(digits, Linear(), method="uniform").parameters
    assert set(uniform) == {"num_stages", "schedule"}


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
        ({"num_stages": 4}, "use method 'dp'"),
        ({"eta": 0.0}, "eta = 0.0"),
        ({"alpha": 1.5}, "alpha = 1.5"),
        ({"num_samples": 1}, "num_samples = 1"),
        ({"num_times": 2, "method": "dp"}, "num_times = 2"),
        ({"eta": 10.0}, "raise alpha or lower eta"),
    ],
)
def test_bad_settings_are_refused(digits: Tensor, settings: dict, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        find_stages(digits[:50], Linear(), **{"num_samples": 2, **settings})


def test_one_image_has_no_stages(digits: Tensor) -> None:
    with pytest.raises(InputError, match="clean end never falls under alpha"):
        find_stages(digits[:1], Linear(), num_samples=2)
