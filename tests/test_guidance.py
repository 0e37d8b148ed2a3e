"""Guidance: scale 1 is the main network, 0 the reference, and the law of the pair always holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles import GaussianOracle
from stratagem.denoiser import Denoiser, Prediction
from stratagem.errors import InputError
from stratagem.guidance import Autoguidance, ClassifierFree, Interval
from stratagem.nets.multi_decoder import MultiDecoder
from stratagem.nets.transformer import TransformerConfig, TransformerDecoder, TransformerEncoder
from stratagem.sampler import Euler, Heun, sample, time_grid
from stratagem.schedule import EDM, VP, Cosine, Linear, NoiseSchedule, expand
from stratagem.stages import Stages
from tolerances import FLOAT32, FLOAT64, assert_near

CLASSES, DIM = 5, 7


class Counted(nn.Module):
    """A backbone that notes the rows of each call."""

    def __init__(self, stages: int = 1) -> None:
        super().__init__()
        cfg = TransformerConfig(8, 4, 2, 24, 2, CLASSES, DIM, init="gmem")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            decoders = [TransformerDecoder(cfg, 1) for _ in range(stages)]
            self.net = MultiDecoder(TransformerEncoder(cfg, 1), decoders)
        self.rows: list[int] = []

    def forward(self, x_t: Tensor, time: Tensor, **condition: Any) -> Tensor:
        self.rows.append(len(x_t))
        return self.net(x_t, time, **condition)


def denoiser(schedule: NoiseSchedule | None = None, stages: Stages | None = None) -> Denoiser:
    backbone = Counted(1 if stages is None else stages.num)
    return Denoiser(backbone, schedule or Linear(), "v", stages).eval().requires_grad_(False)


def rows(wrapped: Denoiser) -> list[int]:
    assert isinstance(wrapped.backbone, Counted)
    return wrapped.backbone.rows


def batch(num: int = 6) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(num, 4, 8, 8, generator=g)
    memory = nn.functional.normalize(torch.randn(num, DIM, generator=g), dim=1)
    label = torch.randint(CLASSES, (num,), generator=g)
    return x, torch.rand(num, generator=g) * 0.9 + 0.05, {"memory": memory, "label": label}


def near(ours: Prediction, reference: Prediction) -> None:
    for a, b in zip(ours, reference, strict=True):
        assert_near(a, b, FLOAT32)


# --- classifier-free -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("null_label", [CLASSES, None])
def test_classifier_free_is_the_formula(scale: float, null_label: int | None) -> None:
    net, (x, t, condition) = denoiser(), batch()
    main, null = net(x, t, **condition), net(x, t)
    rows(net).clear()
    guided = ClassifierFree(net, scale, null_label=null_label)
    expected = Prediction(*(n + scale * (m - n) for m, n in zip(main, null, strict=True)))
    near(guided(x, t, **condition), expected)
    assert rows(net) == ([12] if null_label else [6, 6])  # one call of both halves, or two
    assert guided.schedule is net.schedule
    assert (main.x - null.x).abs().amax(dim=(1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("name", ["memory", "label"])
def test_one_condition_is_enough_and_none_too_few(name: str) -> None:
    net, (x, t, condition) = denoiser(), batch()
    own = {name: condition[name]}
    guided = ClassifierFree(net, 2.0, null_label=CLASSES)
    main, null = net(x, t, **own), net(x, t)
    near(guided(x, t, **own), Prediction(2 * main.x - null.x, 2 * main.eps - null.eps))
    near(guided(x, t, **own, **dict.fromkeys({"memory", "label"} - {name})), guided(x, t, **own))
    for nothing in ({}, {"memory": None}):
        with pytest.raises(InputError, match="no effect without memory or label"):
            guided(x, t, **nothing)


def test_only_the_first_channels_are_guided() -> None:
    net, (x, t, condition) = denoiser(), batch()
    main = net(x, t, **condition)
    some = ClassifierFree(net, 3.0, 3, CLASSES)(x, t, **condition)
    all_ = ClassifierFree(net, 3.0, None, CLASSES)(x, t, **condition)
    for ours, full, plain in zip(some, all_, main, strict=True):
        assert torch.equal(ours[:, :3], full[:, :3])
        assert_near(ours[:, 3:], plain[:, 3:], FLOAT32)
        assert not torch.allclose(full[:, 3:], plain[:, 3:], atol=1e-3)


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VP(), EDM()], ids=lambda s: str(s)[:6])
@pytest.mark.parametrize("channels", [None, 2])
def test_the_pair_still_adds_up(schedule: NoiseSchedule, channels: int | None) -> None:
    net, (x, t, condition) = denoiser(schedule), batch()
    scale = expand(torch.hypot(schedule.alpha(t), schedule.sigma(t)), x)
    x_t = scale * x
    kinds = [
        ClassifierFree(net, 4.0, channels, CLASSES),
        Autoguidance(net, denoiser(schedule), 2.0),
        Interval(ClassifierFree(net, 4.0, channels, CLASSES), 0.3, 0.6),
    ]
    for guided in kinds:
        found = guided(x_t, t, **condition)
        assert_near(schedule.perturb(*found, t) / scale, x, FLOAT32)


def test_stages_are_chosen_for_both_halves() -> None:
    stages = Stages((2.0, -2.0))
    net, (x, t, condition) = denoiser(stages=stages), batch()
    assert len(stages.index(Linear().log_snr(t)).unique()) > 1
    guided = ClassifierFree(net, 2.0, null_label=CLASSES)
    main, null = net(x, t, **condition), net(x, t)
    near(guided(x, t, **condition), Prediction(2 * main.x - null.x, 2 * main.eps - null.eps))
    stage = torch.tensor([0, 1, 2, 0, 1, 2])
    main, null = net(x, t, **condition, stage=stage), net(x, t, stage=stage)
    expected = Prediction(2 * main.x - null.x, 2 * main.eps - null.eps)
    near(guided(x, t, **condition, stage=stage), expected)
    first = {name: value[:1] for name, value in condition.items()}
    main, null = net(x[:1], t[0], **first, stage=1), net(x[:1], t[0], stage=1)
    expected = Prediction(2 * main.x - null.x, 2 * main.eps - null.eps)
    near(guided(x[:1], t[0], **first, stage=1), expected)


# --- interval ------------------------------------------------------------------------------------


def test_outside_the_interval_nothing_unconditional_is_computed() -> None:
    net, (x, _, condition) = denoiser(), batch()
    guided = ClassifierFree(net, 2.0, null_label=CLASSES)
    limited = Interval(guided, 0.25, 0.5)
    for t, inside in [(0.1, False), (0.25, True), (0.4, True), (0.5, True), (0.51, False)]:
        rows(net).clear()
        found = limited(x, torch.tensor(t), **condition)
        assert rows(net) == ([12] if inside else [6]), t
        near(found, (guided if inside else net)(x, torch.tensor(t), **condition))
    assert limited.schedule is net.schedule


def test_each_row_has_its_own_interval() -> None:
    net, (x, t, condition) = denoiser(), batch()
    guided = ClassifierFree(net, 2.0, null_label=CLASSES)
    inside = (t >= 0.3) & (t <= 0.6)
    assert 0 < inside.sum() < 6
    inner, outer = guided(x, t, **condition), net(x, t, **condition)
    rows(net).clear()
    found = Interval(guided, 0.3, 0.6)(x, t, **condition)
    assert rows(net) == [2 * int(inside.sum()), int((~inside).sum())]
    mask = inside[:, None, None, None]
    near(found, Prediction(*(torch.where(mask, i, o) for i, o in zip(inner, outer, strict=True))))


@pytest.mark.parametrize("edges", [(-0.1, 0.5), (0.5, 1.1), (0.6, 0.4), (float("nan"), 1.0)])
def test_impossible_intervals_are_refused(edges: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="does not lie in 0 to 1"):
        Interval(ClassifierFree(denoiser(), 2.0), *edges)


# --- autoguidance, and sampling ------------------------------------------------------------------


def test_autoguidance_moves_away_from_the_weak_network() -> None:
    strong, weak = GaussianOracle(Linear(), 0.3, 0.5), GaussianOracle(Linear(), 0.1, 0.8)
    x, t = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    guided = Autoguidance(strong, weak, 2.0)
    for ours, s, w in zip(guided(x, t), strong(x, t), weak(x, t), strict=True):
        assert_near(ours, 2 * s - w, FLOAT64)
    for scale, same in ((1.0, strong), (0.0, weak)):
        for ours, s in zip(Autoguidance(strong, weak, scale)(x, t), same(x, t), strict=True):
            assert_near(ours, s, FLOAT64)
    weak.calls.clear()
    Interval(guided, 0.5, 1.0)(x, t)
    assert not weak.calls
    with pytest.raises(InputError, match="one schedule"):
        Autoguidance(strong, GaussianOracle(Cosine()), 2.0)


def test_guided_predictors_are_sampled_like_any_other() -> None:
    """Guiding every velocity by hand, inside an interval, gives the same Euler path."""
    net, (x_T, _, condition) = denoiser(), batch()
    times = time_grid(5)
    guided = Interval(ClassifierFree(net, 1.5, null_label=CLASSES), 0.3, 0.7)
    found = sample(guided, Euler(), x_T, times, **condition)
    x = x_T
    for t, s in zip(times[:-1].float(), times[1:].float(), strict=True):
        main, null = net(x, t, **condition), net(x, t)
        v, v_null = main.eps - main.x, null.eps - null.x
        x = x + (s - t) * (v_null + 1.5 * (v - v_null) if 0.3 <= t <= 0.7 else v)
    assert_near(found, x, FLOAT32)
    rows(net).clear()
    sample(guided, Heun(), x_T, times, **condition)
    assert sorted(set(rows(net))) == [6, 12]
