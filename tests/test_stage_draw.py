"""Stage draws: every policy and both kinds of batch give the gradient they promise, exactly."""

from __future__ import annotations

import json
import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from stratagem import stage_draw
from stratagem.batches import Batches
from stratagem.data.shards import DataSet
from stratagem.denoiser import Denoiser
from stratagem.density import LogitNormal, LogNormalSigma, TimeDensity, Uniform
from stratagem.errors import InputError
from stratagem.nets.multi_decoder import MultiDecoder
from stratagem.objective import Objective
from stratagem.schedule import EDM, Linear, NoiseSchedule
from stratagem.stage_draw import (
    WINDOW,
    LossHistory,
    Rows,
    StageDraw,
    least_variance,
    quotas,
    stage_sums,
)
from stratagem.stages import Stages
from tolerances import FLOAT64, assert_near

STAGES = Stages((1.0, -2.0))
INTERVALS = tuple(STAGES.time_interval(k, Linear()) for k in range(3))
Policy = Literal["density", "uniform", "loss"]
Kind = Literal["mixed", "single"]
NUM = 12
STEPS = range(2 * WINDOW, 3 * WINDOW)  # here the policy "loss" knows the losses
each_policy = pytest.mark.parametrize(
    ("policy", "unbiased"),
    [("density", False), ("uniform", False), ("uniform", True), ("loss", False), ("loss", True)],
)


def draw(policy: Policy = "density", batch: Kind = "mixed", *, unbiased: bool = False) -> StageDraw:
    made = StageDraw(LogitNormal(), INTERVALS, policy, batch, unbiased)
    if made.history is not None:
        made.history.note(WINDOW - 1, torch.tensor([9.0, 8.0, 1.0]), (1, 2, 4))
    return made


# --- rows ----------------------------------------------------------------------------------------


@each_policy
@pytest.mark.parametrize("batch", ["mixed", "single"])
def test_rows_are_sorted_and_lie_in_their_stages(
    policy: Policy, unbiased: bool, batch: Kind
) -> None:
    made = draw(policy, batch, unbiased=unbiased)
    for step in STEPS[:30]:
        rows = made.rows(NUM, 7, step)
        assert isinstance(rows, Rows)
        assert sum(rows.counts) == len(rows.t) == len(rows.weight) == NUM
        stage = STAGES.index(Linear().log_snr(rows.t))
        assert torch.equal(stage, torch.arange(3).repeat_interleave(torch.tensor(rows.counts)))
        again = made.rows(NUM, 7, step)
        assert torch.equal(again.t, rows.t)
        assert again.counts == rows.counts
        assert not torch.equal(made.rows(NUM, 8, step).t, rows.t)
    if batch == "mixed":
        assert {made.rows(NUM, 7, step).counts for step in STEPS[:30]} == {rows.counts}
        assert min(rows.counts) >= 1
    else:
        assert {max(made.rows(NUM, 7, step).counts) for step in STEPS[:30]} == {NUM}


def test_a_stage_is_drawn_in_strata() -> None:
    rows = draw().rows(64, 0, 3)
    other = draw().rows(64, 0, 4)
    assert other.counts == rows.counts
    assert not (other.t == rows.t).any()
    for t, interval in zip(rows.t.split(rows.counts), INTERVALS, strict=True):
        low = LogitNormal().cdf(torch.tensor(interval[0]))
        u = (LogitNormal().cdf(t) - low) / LogitNormal().mass(interval)
        assert sorted((u * len(t)).long().tolist()) == list(range(len(t)))


@pytest.mark.parametrize("num", [3, 4, 7, 64, 128])
@pytest.mark.parametrize(
    "shares", [(0.3, 0.3, 0.4), (0.9614, 0.0351, 0.0035), (1 / 3,) * 3, (0.01, 0.01, 0.98)]
)
def test_quotas_are_whole_and_near_their_shares(num: int, shares: tuple[float, ...]) -> None:
    counts = quotas(shares, num)
    assert sum(counts) == num
    assert min(counts) >= 1
    over = sum(max(0.0, 1 - share * num) for share in shares)  # what the least stages are given
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - max(1, share * num)) <= max(1, over) + FLOAT64


def test_fewer_rows_than_stages_are_refused() -> None:
    with pytest.raises(InputError, match=r"batch_size 2 cannot mix 3 stages.*single"):
        draw().rows(2, 0, 0)
    assert sum(draw(batch="single").rows(2, 0, 0).counts) == 2


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (0.9614, 0.0351, 0.0035)])
def test_single_steps_follow_the_shares_evenly(shares: tuple[float, ...]) -> None:
    """Far nearer than independent draws would: within a few steps of 2,000, here 4 of about 20."""
    drawn = [stage_draw._stage_of_step(shares, 3, step) for step in range(2000)]
    for k, share in enumerate(shares):
        assert abs(drawn.count(k) - 2000 * share) <= 4
    seeds = [stage_draw._stage_of_step(shares, seed, 5) for seed in range(2000)]
    for k, share in enumerate(shares):
        assert abs(seeds.count(k) - 2000 * share) <= 4 * math.sqrt(2000 * share) + 1


@pytest.mark.parametrize(
    ("density", "edges", "schedule"),
    [
        (LogitNormal(-5.0, 0.1), (1.0, -2.0), Linear()),
        (LogNormalSigma(Linear(), -20.0, 0.1), (0.0,), Linear()),
        (Uniform(), (20.0,), EDM()),
    ],
)
def test_a_stage_without_mass_is_refused(
    density: TimeDensity, edges: tuple[float, ...], schedule: NoiseSchedule
) -> None:
    stages = Stages(edges)
    intervals = tuple(stages.time_interval(k, schedule) for k in range(stages.num))
    with pytest.raises(InputError, match=r"stage \d .*has no mass under the density"):
        StageDraw(density, intervals)


# --- the expected gradient -----------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.7))

    def forward(self, x_t: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.a * x_t), time


class Decoder(nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([weight, 0.3]))

    def forward(self, features: tuple[Tensor, Tensor]) -> Tensor:
        h, time = features
        return self.w[0] * h + self.w[1] * time[:, None, None, None].square()


def gradient(objective: Objective, rows: Rows, stage: int | tuple[int, ...] | None) -> Tensor:
    """Of the weighted mean loss, all parameters in one vector, for one x and eps."""
    ones = torch.ones(len(rows.t), 1, 2, 2).double()
    loss = objective(0.4 * ones, -1.3 * ones, rows.t, stage=stage).denoise
    (loss * rows.weight).mean().backward()
    flat = [p.grad if p.grad is not None else torch.zeros_like(p) for p in objective.parameters()]
    joined = torch.cat([g.reshape(-1).clone() for g in flat])
    objective.zero_grad(set_to_none=True)
    return joined


@pytest.fixture
def objective() -> Objective:
    net = MultiDecoder(Encoder(), [Decoder(w) for w in (0.5, -0.2, 1.1)]).double()
    return Objective(Denoiser(net, Linear(), "v", STAGES))


@each_policy
def test_mixed_and_single_batches_have_the_promised_gradient(
    policy: Policy, unbiased: bool, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact, by enumeration: what is random runs through a grid of equal points for every count.

    n rows in n strata, all at the offset r: with r = (j + 1/2) n / M, j < M / n, the n rows visit
    each of M midpoints once, whatever n is. Outcomes of the stage are weighed by its share.
    """
    made = {kind: draw(policy, kind, unbiased=unbiased) for kind in ("mixed", "single")}
    counts = made["mixed"].rows(NUM, 0, 200).counts
    grid = math.lcm(NUM, *counts)
    offset = 0

    def strata(num: int, *_: object) -> Tensor:
        r = ((offset % (grid // num)) + 0.5) * num / grid if num else 0.0
        return (torch.arange(num, dtype=torch.float64) + r) / max(1, num)

    monkeypatch.setattr(stage_draw, "stratified", strata)
    mixed, single = torch.zeros(7).double(), torch.zeros(7).double()
    shares = made["single"].shares(200)
    steps = {made["single"].rows(NUM, 0, s).counts.index(NUM): s for s in STEPS}
    assert sorted(steps) == [0, 1, 2]
    for offset in range(grid):  # noqa: B007 (read by strata)
        rows = made["mixed"].rows(NUM, 0, 200)
        mixed += gradient(objective, rows, rows.counts) / grid
        for k, share in enumerate(shares):
            rows = made["single"].rows(NUM, 0, steps[k])
            single += share * gradient(objective, rows, rows.counts) / grid
    masses = [LogitNormal().mass(interval) for interval in INTERVALS]
    expected = torch.zeros(7).double()
    midpoints = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    for k, target in enumerate(masses if unbiased else shares):
        t = LogitNormal().sample(midpoints, INTERVALS[k])
        expected += target * gradient(objective, Rows(t, (), torch.ones(grid).double()), None)
    assert_near(mixed, expected, FLOAT64)
    assert_near(single, expected, FLOAT64)
    assert policy == "density" or (torch.tensor(shares) - torch.tensor(masses)).abs().max() > 0.05


# --- least variance ------------------------------------------------------------------------------


def test_the_shares_of_the_loss_minimise_the_second_moment() -> None:
    p, loss = torch.tensor([0.7, 0.25, 0.05]).double(), torch.tensor([0.1, 2.0, 5.0]).double()
    shares = torch.tensor(least_variance(p.tolist(), loss.tolist())).double()
    assert shares.sum().item() == pytest.approx(1)
    assert (p / shares).max() <= 10
    best = (shares - 0.1 * p) / 0.9
    others = torch.distributions.Dirichlet(torch.ones(3).double()).sample((1000,))
    nearby = best + 0.01 * (others - others.mean(1, keepdim=True))

    def moment(q: Tensor) -> Tensor:
        return (p**2 * loss / q).sum(-1)

    for rivals in (others, nearby, p[None], torch.full((1, 3), 1 / 3)):
        assert (moment(best) <= moment(rivals) + FLOAT64).all()
    assert least_variance((0.5, 0.5), (0.0, 0.0)) == (0.5, 0.5)


def test_the_shares_of_the_loss_make_the_gradient_of_a_linear_model_steadiest() -> None:
    """The derivation: residual r ~ N(0, s_k^2), gradient 2 r j, |j| = 1 in all stages."""
    p, s = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 1.0, 3.0]).double()
    g = 2 * s * torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0)).double()
    variance = {
        name: (p**2 * g.square().mean(0) / torch.tensor(q).double()).sum().item()
        for name, q in {
            "density": p.tolist(),
            "uniform": [1 / 3] * 3,
            "rms loss": (p * s**2 / (p * s**2).sum()).tolist(),  # E[loss^2]^(1/2) ~ s^2
            "loss": least_variance(p.tolist(), (s**2).tolist()),
        }.items()
    }
    assert min(variance, key=lambda name: variance[name]) == "loss"


# --- history -------------------------------------------------------------------------------------


def test_shares_follow_the_losses_one_window_late() -> None:
    history = LossHistory((0.5, 0.5))
    for step in range(2 * WINDOW):
        assert history.shares(step + WINDOW) is not None  # a batch made a whole window ahead
        losses = torch.tensor([4.0, 4.0, 1.0]) if step < WINDOW else torch.tensor([1.0, 1.0, 1.0])
        history.note(step, stage_sums(losses, (2, 1)), (2, 1))
    assert history.shares(0) == history.shares(2 * WINDOW - 1) == (0.5, 0.5)
    assert history.shares(2 * WINDOW) == history.shares(3 * WINDOW - 1)
    assert history.shares(2 * WINDOW) == pytest.approx(least_variance((0.5, 0.5), (4.0, 1.0)))
    # half of what was known is forgotten in a window: (4 + 1) / 2
    assert history.shares(3 * WINDOW) == pytest.approx(least_variance((0.5, 0.5), (2.5, 1.0)))
    with pytest.raises(KeyError):
        history.shares(4 * WINDOW)


def test_a_stage_never_seen_leaves_the_shares_at_the_masses() -> None:
    history = LossHistory((0.9, 0.1))
    history.note(WINDOW - 1, torch.tensor([3.0, 0.0]), (5, 0))
    assert history.shares(2 * WINDOW) == (0.9, 0.1)
    history.note(2 * WINDOW - 1, torch.tensor([0.0, 3.0]), (0, 5))
    assert history.shares(3 * WINDOW) == pytest.approx(least_variance((0.9, 0.1), (0.6, 0.6)))


@pytest.mark.parametrize("stop", [1, WINDOW - 1, WINDOW, WINDOW + 3, 3 * WINDOW])
def test_a_history_goes_on_from_its_state(stop: int) -> None:
    losses = torch.rand(4 * WINDOW, 5, generator=torch.Generator().manual_seed(0))
    whole = resumed = LossHistory((0.6, 0.4))
    for step in range(4 * WINDOW):
        if step == stop:
            sums, state = whole.state()
            resumed = LossHistory((0.6, 0.4))
            resumed.restore(sums, json.loads(json.dumps(state)))
        for history in {id(whole): whole, id(resumed): resumed}.values():
            history.note(step, stage_sums(losses[step], (3, 2)), (3, 2))
        for ahead in (1, WINDOW + 1):
            assert whole.shares(step + ahead) == resumed.shares(step + ahead)
    assert torch.equal(whole.state()[0], resumed.state()[0])
    assert whole.shares(5 * WINDOW - 1) != (0.6, 0.4)


# --- in batches ----------------------------------------------------------------------------------


def test_batches_carry_weights_counts_and_the_route(blobs: DataSet) -> None:
    made = StageDraw(LogitNormal(), INTERVALS, "uniform", unbiased=True, warm_steps=2)
    batches = Batches(blobs, LogitNormal(), 12, 1, stages=made)
    batch = batches(2)
    rows = made.rows(12, 1, 2)
    assert batch.counts == batch.stage == rows.counts == (4, 4, 4)
    assert torch.equal(batch.t, rows.t.float())
    assert batch.weight is not None
    assert torch.equal(batch.weight, rows.weight.float())
    assert batches(1).stage == made.warm_decoder == 0
    assert batches(1).counts == (4, 4, 4)
    plain = Batches(blobs, LogitNormal(), 12, 1)(2)
    assert plain.weight is plain.counts is plain.stage is None
    assert torch.equal(plain.x, batch.x)  # the draw of times moves nothing else
    assert torch.equal(plain.eps, batch.eps)
