"""U-Nets: published sizes, the laws of their parts, and the contract of encoder and decoders."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from stratagem.errors import InputError
from stratagem.nets.cost import macs, parameters
from stratagem.nets.multi_decoder import MultiDecoder
from stratagem.nets.unet import UNetConfig, UNetDecoder, UNetEncoder, UNetFeatures
from stratagem.nets.unet_blocks import (
    ConvResample,
    Pyramid,
    Resample,
    TimeFeatures,
    UNetBlock,
    UNetCondition,
    group_norm,
    scaled_sum,
)
from stratagem.nets.unet_style import STYLES, Style, TimeKind, style
from tolerances import FLOAT32, FLOAT64, assert_near

# Attention heads of 8 instead of 64 and 32, and a group norm that fits: tiny networks.
TINY = {
    name: replace(s, head_width=8 if s.head_width else None, norm_groups=4, norm_width=4)
    for name, s in STYLES.items()
}


def tiny(name: str, **own: Any) -> UNetConfig:
    cfg = UNetConfig(8, 3, 8, (1, 2), 1, (4,), TINY[name], num_classes=5, memory_dim=6)
    return replace(cfg, **own)


def network(cfg: UNetConfig, *widths: int, seed: int = 0) -> MultiDecoder:
    """A network without a zero in its weights, so that all of it shows in the output."""
    torch.manual_seed(seed)
    net = MultiDecoder(UNetEncoder(cfg), [UNetDecoder(cfg, w) for w in widths or (cfg.width,)])
    for p in net.parameters():
        nn.init.normal_(p, std=1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.3)
    return net.eval()


def batch(rows: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    memory = functional.normalize(torch.randn(rows, 6, generator=g), dim=1)
    label = torch.randint(5, (rows,), generator=g)
    x, time = torch.randn(rows, 3, 8, 8, generator=g), torch.rand(rows, generator=g)
    return x, time, {"memory": memory, "label": label}


# --- published sizes -----------------------------------------------------------------------------

MSD = 16  # most groups of a norm in the multistage networks
DDPMPP = replace(STYLES["ddpm++"], norm_groups=MSD)
NCSNPP = replace(STYLES["ncsn++"], time="sin-cos", time_features=1, norm_groups=MSD)
CIFAR = UNetConfig(32, 3, 128, (1, 2, 2, 2), 8, (16,), NCSNPP)
EDM_3 = UNetConfig(32, 3, 128, (2, 2, 2), 4, (16,), DDPMPP, shared_middle=False)
EDM_4 = replace(EDM_3, mults=(1, 2, 2, 2))
LDM = UNetConfig(64, 3, 224, (1, 2, 3, 4), 2, (32, 16, 8), STYLES["ldm"])
LDM_192 = replace(LDM, width=192)
ADM = UNetConfig(64, 3, 192, (1, 2, 3, 4), 3, (32, 16, 8), STYLES["adm"], num_classes=1000)
AUGMENT = 9 * 128  # EDM's map of augmentation labels, which we do not have
NONE = ((32, 16, 8), (), ())  # where the published LDM's decoders attend

Row = tuple[UNetConfig, tuple[int, ...], tuple[tuple[int, ...], ...] | None, float, list[float]]
PUBLISHED: dict[str, Row] = {  # configuration, widths, attention, shared and decoders in millions
    "NCSN++": (CIFAR, (192, 128, 16), None, 43.48, [126.00, 64.04, 3.65]),
    "EDM [2,2,2]": (EDM_3, (192, 128, 16), None, 19.63, [68.28, 36.10, 4.77]),
    "EDM [1,2,2,2]": (EDM_4, (192, 128, 16), None, 21.46, [76.88, 40.35, 4.98]),
    "LDM 224/256-192-128": (LDM, (256, 192, 128), NONE, 107.91, [208.06, 115.92, 61.96]),
    "LDM 192/224-192-128": (LDM_192, (224, 192, 128), NONE, 79.29, [158.33, 109.22, 57.49]),
    "LDM 224/224-192-128": (LDM, (224, 192, 128), NONE, 107.91, [166.14, 115.92, 61.96]),
    "LDM 192/224-192-160": (LDM_192, (224, 192, 160), NONE, 79.29, [158.33, 109.22, 81.44]),
    "LDM 224/224-192-160": (LDM, (224, 192, 160), NONE, 107.91, [166.14, 115.92, 87.02]),
}


def published(name: str) -> MultiDecoder:
    cfg, widths, attention, *_ = PUBLISHED[name]
    return on_meta(cfg, *widths, attention=attention)


def on_meta(
    cfg: UNetConfig, *widths: int, attention: tuple[tuple[int, ...], ...] | None = None
) -> MultiDecoder:
    with torch.device("meta"):
        sides = attention or (None,) * len(widths)
        decoders = [UNetDecoder(cfg, w, s) for w, s in zip(widths, sides, strict=True)]
        return MultiDecoder(UNetEncoder(cfg), decoders)


def giga_macs(net: MultiDecoder, side: int) -> list[float]:
    x, t = torch.zeros(1, 3, side, side, device="meta"), torch.zeros(1, device="meta")
    return [macs(net, x, t, stage=k) / 1e9 for k in range(net.num_stages)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    *_, shared, decoders = PUBLISHED[name]
    net = published(name)
    ours = parameters(net.encoder) + (AUGMENT if name.startswith("EDM") else 0)
    assert ours / 1e6 == pytest.approx(shared, abs=0.005)
    for decoder, millions in zip(net.decoders, decoders, strict=True):
        assert parameters(decoder) / 1e6 == pytest.approx(millions, abs=0.005)


def test_published_counts_of_plain_networks_and_active_ones() -> None:
    net = published("NCSN++")
    active = [(parameters(net.encoder) + parameters(d)) / 1e6 for d in net.decoders]
    assert active == pytest.approx([169.48, 107.52, 47.13], abs=0.01)
    assert parameters(net) / 1e6 == pytest.approx(237.17, abs=0.005)
    plain = {
        107.52: replace(CIFAR, style=replace(NCSNPP, norm_groups=32)),
        106.63: replace(CIFAR, style=STYLES["ddpm++"]),
        55.73: EDM_3,
        61.80: EDM_4,
        274.06: LDM,
        295.90: ADM,
    }
    for millions, cfg in plain.items():
        assert parameters(on_meta(cfg, cfg.width)) / 1e6 == pytest.approx(millions, abs=0.006)
    everywhere = on_meta(LDM, 256, 192, 128)  # attention in every decoder, as the paper says
    assert parameters(everywhere) / 1e6 == pytest.approx(512.42, abs=0.005)


def test_published_macs() -> None:
    ldm = giga_macs(published("LDM 224/256-192-128"), 64)
    assert ldm == pytest.approx([120.4, 78.2, 53.4], abs=0.05)
    # EDM's were counted without the products of attention, 2 L^2 W for each attention.
    products = [2 * (4 * 16**4 + 8**4 + 16**4 * w / 128) * 256 / 1e9 for w in (192, 128, 16)]
    edm = [m - p for m, p in zip(giga_macs(published("EDM [2,2,2]"), 32), products, strict=True)]
    assert edm == pytest.approx([35.56, 21.02, 7.58], abs=0.015)


# --- parts ---------------------------------------------------------------------------------------


def test_styles_by_name() -> None:
    assert style("ddpm++") == Style()
    with pytest.raises(InputError, match=r"'unet'.*ddpm\+\+, ncsn\+\+, adm, ldm"):
        style("unet")


def test_groups_of_a_norm() -> None:
    for most, fewest, width, groups in ((32, 4, 80, 20), (16, 4, 80, 16), (16, 4, 28, 7)):
        assert group_norm(Style(norm_groups=most, norm_width=fewest), width).num_groups == groups
    assert group_norm(STYLES["ldm"], 224).num_groups == 32
    assert group_norm(Style(), 3).num_groups == 1
    with pytest.raises(InputError, match=r"100 channels .* 16 groups"):
        group_norm(DDPMPP, 100)


@pytest.mark.parametrize("fir", [False, True])
def test_halving_is_a_weighted_mean_and_doubling_its_transpose(fir: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=g)
    y = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=g)
    down, up = Resample("down", fir).double(), Resample("up", fir).double()
    assert_near((down(x) * y).sum(), (x * up(y)).sum() / 4, FLOAT64)
    ones = torch.ones_like(x)
    inner = slice(1, -1) if fir else slice(None)  # the filter reads zeros beyond the border
    assert torch.equal(down(ones)[..., inner, inner], torch.ones_like(y)[..., inner, inner])
    assert torch.equal(up(down(ones))[..., 3:5, 3:5], ones[..., 3:5, 3:5])
    taps = [1.0, 3.0, 3.0, 1.0] if fir else [0.0, 1.0, 1.0, 0.0]
    weights = torch.tensor(taps, dtype=torch.float64) / sum(taps)
    patch = x[1, 2, 3:7, 1:5]  # around the corner of pixels (4, 2) to (5, 3)
    assert_near(down(x)[1, 2, 2, 1], weights @ patch @ weights, FLOAT64)
    assert not list(down.state_dict())


def test_a_step_of_the_pyramid_is_convolution_and_filter_in_either_order() -> None:
    torch.manual_seed(0)
    step = Pyramid(3, 5).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    kernel = torch.outer(taps, taps).expand(5, 1, 4, 4)
    full = functional.conv2d(x, step.conv.weight, padding=2)
    other = functional.conv2d(full, kernel, stride=2, groups=5) + step.conv.bias[:, None, None]
    assert_near(step(x), other, FLOAT64)


@pytest.mark.parametrize("kind", ["sin-cos", "cos-sin", "fourier"])
def test_sinusoids_of_the_time(kind: TimeKind) -> None:
    torch.manual_seed(0)
    features = TimeFeatures(kind, 12, scale=10.0)
    time = torch.tensor([0.0, 0.3, 1.0])
    first, second = features(time).double().chunk(2, dim=1)
    assert_near(first**2 + second**2, torch.ones(3, 6), FLOAT32)
    sin, cos = (second, first) if kind == "cos-sin" else (first, second)
    if kind == "fourier":
        frequencies = features.frequencies.double()
        assert list(features.state_dict()) == ["frequencies"]
        spread = TimeFeatures("fourier", 20_000).frequencies.std() / (2 * math.pi)
        assert spread == pytest.approx(16, rel=0.02)
    else:
        last = {"sin-cos": 5, "cos-sin": 6}[kind]
        frequencies = 1e4 ** -(torch.arange(6, dtype=torch.float64) / last)
        assert not list(features.state_dict())
    angle = 10 * time.double()[:, None] * frequencies
    tolerance = 1e-3 if kind == "fourier" else FLOAT32  # angles of some hundred in float32
    assert_near(sin, angle.sin(), tolerance)
    assert_near(cos, angle.cos(), tolerance)


@pytest.mark.parametrize("label_at", ["features", "embedding"])
def test_condition_joins_what_is_given_and_null_what_is_not(label_at: Any) -> None:
    torch.manual_seed(0)
    condition = UNetCondition(Style(label_at=label_at), 8, 16, 5, 6, memory_scale=2.0)
    assert [p.shape for p in condition.parameters() if p.shape[0] == 6] == [
        (6, 8) if label_at == "features" else (6, 16)
    ]
    _, time, given = batch()
    c = condition(time, **given)
    assert c.shape == (3, 16)
    memory = condition.join.memory
    assert memory is not None
    table = condition.label if label_at == "features" else condition.join.label
    assert table is not None
    rows = table(given["label"])
    before, after = (rows, 0) if label_at == "features" else (0, rows)
    own = condition.join.time(condition.features(time) + before) + after
    assert_near(c, functional.silu(own + memory(2 * given["memory"])), FLOAT32)
    null = {"memory": torch.zeros(3, 6), "label": torch.full((3,), 5)}
    absent = condition(time)
    assert torch.equal(condition(time, **null), absent)
    for name in given:
        alone = condition(time, **{**null, name: given[name]})
        assert (alone - absent).abs().amax(1).min() > 1e-3
    assert not torch.equal(condition(time, **given, memory_keep=torch.zeros(3, 16)), c)
    own = UNetCondition(Style(label_at=label_at), 8, 16, 5, 6, null_memory=True)
    assert own.join.null is not None
    with torch.no_grad():
        before = own(time, **given), own(time)
        own.join.null += 1.0
    assert torch.equal(own(time, **given), before[0])
    assert (own(time) - before[1]).abs().min() > 0.01


def test_conditions_the_network_does_not_have_are_refused() -> None:
    net = network(tiny("ddpm++", num_classes=0, memory_dim=0))
    x, time, given = batch()
    for name, message in (("label", "num_classes=0"), ("memory", "memory_dim=0")):
        with pytest.raises(ValueError, match=message):
            net(x, time, **{name: given[name]})


@pytest.mark.parametrize("way", [None, "down", "up"])
@pytest.mark.parametrize("name", ["ddpm++", "ncsn++", "adm"])
def test_a_block_is_its_formula(name: str, way: Any) -> None:
    torch.manual_seed(0)
    like = TINY[name]
    block = UNetBlock(like, 8, 8 if way else 16, 5, attend=True, way=way)
    for p in block.parameters():
        nn.init.normal_(p, std=0.2)
    x, c = torch.randn(2, 8, 4, 4), torch.randn(2, 5)

    def moved(h: Tensor) -> Tensor:
        return Resample(way, like.fir)(h) if way else h

    h = block.conv_in(moved(functional.silu(block.norm_in(x))))
    a = block.modulation(c)[:, :, None, None]
    if name == "adm":
        s, b = a.tensor_split(2, dim=1)
        h = (1 + s) * block.norm_out(h) + b
    else:
        h = block.norm_out(h + a)
    mapped = not isinstance(block.skip, nn.Identity)
    assert mapped == (way is None or name in {"ddpm++", "ncsn++"})
    r = 1.0 if name == "adm" else math.sqrt(0.5)
    y = r * (block.skip(moved(x)) + block.conv_out(functional.silu(h)))
    assert block.norm_attention is not None
    assert block.attention is not None
    n, channels, *sides = y.shape
    tokens = block.norm_attention(y).permute(0, 2, 3, 1).reshape(n, -1, channels)
    mixed = block.attention(tokens).reshape(n, *sides, channels).permute(0, 3, 1, 2)
    assert_near(block(x, c), r * (y + mixed), FLOAT32)
    assert block.attention.heads == (1 if like.head_width is None else channels // 8)


def test_scaled_sum() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    assert scaled_sum(a, b, 1).tolist() == [4.0, 0.0]
    assert scaled_sum(a, b, 0.5).tolist() == [2.0, 0.0]


def test_resampling_by_convolution() -> None:
    torch.manual_seed(0)
    x, c = torch.randn(2, 4, 8, 8), torch.zeros(2, 5)
    down, up = ConvResample("down", 4), ConvResample("up", 4)
    assert_near(down(x, c), down.conv(x), FLOAT32)
    assert down(x, c).shape == (2, 4, 4, 4)
    assert_near(up(x, c), up.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3)), FLOAT32)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    x, time, given = batch()
    for rate, same in ((0.0, True), (0.5, False)):
        net = network(tiny("ddpm++", dropout=rate))
        still = net(x, time, **given)
        assert torch.equal(net(x, time, **given), still)
        assert torch.equal(net.train()(x, time, **given), still) == same


# --- encoder and decoders ------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", STYLES)
def test_every_parameter_and_every_input_acts(name: str, shared: bool) -> None:
    cfg = tiny(name, shared_middle=shared, null_memory=True, time_scale=10.0)
    net = network(cfg, 8, 4) if name != "ldm" else network(cfg, 8, 16)
    x, time, given = batch(4)
    given["memory"][0] = 0
    out = net(x, time, stage=torch.tensor([0, 1, 0, 1]), **given)
    assert out.shape == x.shape
    assert "encoder.condition.join.null" in net.state_dict()
    out.square().sum().backward()
    for p_name, p in net.named_parameters():
        assert p.grad is not None, p_name
        assert torch.isfinite(p.grad).all(), p_name
        assert p.grad.abs().max() > 1e-6, p_name
    for other in (net(x, 1 - time, stage=0, **given), net(x.flip(3), time, stage=0, **given)):
        assert (other - net(x, time, stage=0, **given)).abs().max() > 1e-3


def test_rows_are_routed_and_independent() -> None:
    net = network(tiny("ncsn++"), 12, 8, 4)
    x, time, given = batch(6)
    stage = torch.tensor([2, 0, 1, 2, 0, 0])
    mixed = net(x, time, stage=stage, **given)
    for i, k in enumerate(stage.tolist()):
        row = {name: value[i : i + 1] for name, value in given.items()}
        assert_near(mixed[i : i + 1], net(x[i : i + 1], time[i : i + 1], stage=k, **row), FLOAT32)
    assert (mixed - net(x, time, stage=(stage + 1) % 3, **given)).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("name", STYLES)
def test_features_are_what_the_decoder_needs(name: str) -> None:
    cfg = tiny(name, mults=(1, 2, 1), blocks=2, attention=(8, 2))
    net = network(cfg)
    x, time, given = batch()
    features = net.encoder(x, time, **given)
    assert isinstance(features, UNetFeatures)
    assert [tuple(s.shape[1:]) for s in features.skips] == [
        *[(8, 8, 8)] * 3,  # stem and two blocks
        *[(8, 4, 4)] + [(16, 4, 4)] * 2,  # halved, two blocks
        *[(16, 2, 2)] + [(8, 2, 2)] * 2,
    ]
    assert features.hidden.shape == (3, 8, 2, 2)
    assert features.condition.shape == (3, 32)
    blocks = [m for m in net.encoder.modules() if isinstance(m, UNetBlock)]
    assert sum(b.attention is not None for b in blocks) == 2 * 2 + 1
    each = [[b.attention is not None for b in level] for level in net.decoders[0].blocks]
    last = [True] * 3 if name in {"adm", "ldm"} else [False, False, True]
    assert each == [last, [False] * 3, last]


def test_a_decoder_may_attend_elsewhere() -> None:
    cfg = tiny("ldm")
    none, both = UNetDecoder(cfg, attention=()), UNetDecoder(cfg, attention=(8, 4))
    for decoder, count in ((none, 0), (UNetDecoder(cfg), 2), (both, 4)):
        names = [n for n, _ in decoder.named_parameters() if n.endswith("attention.out.weight")]
        assert len(names) == count
    with pytest.raises(InputError, match=r"sides \[16\] has no effect: the levels have \[8, 4\]"):
        UNetDecoder(cfg, attention=(16,))


def test_a_middle_of_its_own_is_the_shared_one_moved() -> None:
    """With one decoder, who owns the middle changes names only."""
    cfg = tiny("ddpm++")
    shared, own = network(cfg), network(replace(cfg, shared_middle=False), seed=1)
    state = {
        name.replace("encoder.middle", "decoders.0.middle"): tensor
        for name, tensor in shared.state_dict().items()
    }
    own.load_state_dict(state)
    x, time, given = batch()
    assert torch.equal(own(x, time, **given), shared(x, time, **given))


def test_a_network_starts_at_zero_with_blocks_that_pass_their_input_on() -> None:
    torch.manual_seed(0)
    cfg = tiny("adm")
    net = MultiDecoder(UNetEncoder(cfg), [UNetDecoder(cfg)])
    x, time, given = batch()
    assert not net(x, time, **given).any()
    h, c = torch.randn(2, 8, 8, 8), torch.randn(2, 32)
    assert_near(net.encoder.down[0](h, c), functional.avg_pool2d(h, 2), FLOAT32)
    wide = torch.randn(2, 16, 4, 4)
    assert torch.equal(net.encoder.middle[0](wide, c), wide)  # attention included
    maps = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert not any(m.bias.any() for m in maps if m.bias is not None)
    for m in (net.encoder.blocks[0][0].conv_in, net.encoder.middle[0].attention.qkv):
        fans = m.weight[0].numel() + len(m.weight) * m.weight[0, 0].numel()
        assert float(m.weight.detach().std()) == pytest.approx(math.sqrt(2 / fans), rel=0.1)


@pytest.mark.parametrize("name", STYLES)
def test_memory_format_does_not_matter(name: str) -> None:
    net = network(tiny(name))
    x, time, given = batch()
    out = net(x, time, **given)
    net.to(memory_format=torch.channels_last)
    last = net(x.to(memory_format=torch.channels_last), time, **given)
    assert_near(last, out, FLOAT32)


def test_half_precision_stays_close() -> None:
    net = network(tiny("adm"))
    x, time, given = batch()
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, time, **given)
    error = (out.float() - net(x, time, **given)).abs()
    assert error.max() < 0.1
    assert error.mean() < 0.02


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"mults": ()}, "factor"),
        ({"mults": (1, 0)}, "factor"),
        ({"image_size": 7}, "image_size 7 cannot be halved 1 times"),
        ({"width": 6}, "width 6 must be a multiple of 4"),
        ({"blocks": -1}, "blocks -1"),
        ({"condition_mult": 0}, "condition_mult 0"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"attention": (4, 16)}, r"attention at sides \[16\]"),
    ],
)
def test_impossible_sizes_are_refused(own: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny("ddpm++", **own)


def test_impossible_widths_of_decoders_are_refused() -> None:
    with pytest.raises(InputError, match="12 channels cannot have heads of 8"):
        UNetDecoder(tiny("ldm", attention=(8,)), 12)
    with pytest.raises(InputError, match="4 groups"):
        UNetDecoder(tiny("ddpm++"), 9)
    with pytest.raises(InputError, match="at least 1: 0"):
        UNetDecoder(tiny("ddpm++"), 0)
