from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from stratagem.errors import DamagedArtifact, InputError
from stratagem.schedule import EDM, VP, Cosine, Linear, NoiseSchedule
from stratagem.stages import Stages

CASES = [Stages(()), Stages((1.5,)), Stages((4.0, -1.84, -4.0)), Stages((1e-9, 0.0))]
SCHEDULES = [Linear(), Cosine(), VP(), EDM()]

each_case = pytest.mark.parametrize("stages", CASES, ids=str)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


@each_case
def test_index_agrees_with_interval_on_random_and_boundary_values(stages: Stages) -> None:
    rng = torch.Generator().manual_seed(1)
    values = torch.randn(500, generator=rng, dtype=torch.float64) * 6
    values = torch.cat([values, torch.tensor([*stages.edges, math.inf, -math.inf])])
    index = stages.index(values)
    assert index.dtype == torch.int64
    for value, k in zip(values.tolist(), index.tolist(), strict=True):
        low, high = stages.interval(k)
        assert low < value <= high or value == low == -math.inf
    assert stages.index(values.view(-1, 1)).shape == (len(values), 1)
    assert stages.index(torch.tensor(0.3)).shape == ()


@each_case
def test_intervals_cover_the_axis_without_gap(stages: Stages) -> None:
    intervals = [stages.interval(k) for k in range(stages.num)]
    assert intervals[0][1] == math.inf
    assert intervals[-1][0] == -math.inf
    for nearer, further in pairwise(intervals):
        assert nearer[0] == further[1]


@each_schedule
@each_case
def test_times_agree_with_the_index(stages: Stages, schedule: NoiseSchedule) -> None:
    times = stages.times(schedule)
    assert len(times) == stages.num - 1
    assert list(times) == sorted(times)
    rng = torch.Generator().manual_seed(2)
    t = torch.rand(400, generator=rng, dtype=torch.float64)
    index = stages.index(schedule.log_snr(t)).tolist()
    for time, k in zip(t.tolist(), index, strict=True):
        low, high = stages.time_interval(k, schedule)
        assert 0 <= low <= time <= high <= 1
    assert stages.time_interval(0, schedule)[0] == 0
    assert stages.time_interval(stages.num - 1, schedule)[1] == 1


def test_edges_carry_from_one_schedule_to_another() -> None:
    # The published splits: VP times 0.4420 and 0.6308 are the EDM sigmas 2.5103 and 7.4046.
    t = torch.tensor([0.4420, 0.6308], dtype=torch.float64)
    stages = Stages(tuple(VP().log_snr(t).tolist()))
    sigma = EDM().sigma(torch.tensor(stages.times(EDM()), dtype=torch.float64))
    torch.testing.assert_close(
        sigma, torch.tensor([2.5103, 7.4046], dtype=torch.float64), atol=1e-4, rtol=0
    )
    # In flow time, t / (1 - t) is sigma.
    flow = torch.tensor(stages.times(Linear()), dtype=torch.float64)
    torch.testing.assert_close(flow / (1 - flow), sigma)


def test_a_stage_out_of_reach_is_empty_in_time() -> None:
    stages = Stages((0.0, -30.0))
    assert stages.time_interval(2, VP()) == (1.0, 1.0)


@pytest.mark.parametrize("edges", [(1.0, 1.0), (-1.0, 1.0), (math.inf, 0.0), (math.nan,)])
def test_bad_edges_are_refused(edges: tuple[float, ...]) -> None:
    with pytest.raises(InputError):
        Stages(edges)


@pytest.mark.parametrize("k", [-1, 2])
def test_a_stage_that_does_not_exist_is_refused(k: int) -> None:
    with pytest.raises(InputError):
        Stages((0.0,)).interval(k)
    with pytest.raises(InputError):
        Stages((0.0,)).time_interval(k, Linear())


def test_save_and_load(tmp_path: Path) -> None:
    stages, record = Stages((1 / 3, -math.pi)), {"method": "uniform", "alpha": 0.9}
    path = tmp_path / "stages.json"
    stages.save(path, record)
    assert Stages.load(path) == (stages, record)
    with pytest.raises(InputError):
        stages.save(path, record)
    stages.save(path, {}, replace=True)
    assert Stages.load(path) == (stages, {})


def test_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "stages.json"
    Stages((1.0,)).save(path, {})
    body = json.loads(path.read_text())
    body["meta"]["edges"] = [2.0]
    path.write_text(json.dumps(body))
    with pytest.raises(DamagedArtifact):
        Stages.load(path)
