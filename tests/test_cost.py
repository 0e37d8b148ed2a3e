from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stratagem.config import parse
from stratagem.nets.cost import macs, mean_macs, parameters, saved_bytes
from stratagem.nets.multi_decoder import MultiDecoder
from stratagem.nets.transformer import TransformerConfig, TransformerDecoder, TransformerEncoder
from stratagem.networks import make_backbone
from stratagem.programs.cost import Visits, blank_images, network_cost, visits
from stratagem.programs.sample import SampleConfig
from stratagem.stages import Stages

W, L, PATCH, DIM = 16, 9, 2 * 2 * 3, 5  # width, tokens, numbers in a patch, length of memory
CFG = TransformerConfig(
    6, 3, 2, W, 2, memory_dim=DIM, norm="layer", mlp="gelu", rope=False, mlp_ratio=3.0
)
BLOCK = L * (3 * W * W + W * W + 2 * 3 * W * W) + 2 * L * L * W + 6 * W * W
ENCODER = L * PATCH * W + 256 * W + W * W + DIM * W
DECODER = 2 * W * W + L * W * PATCH


def network() -> MultiDecoder:
    decoders = [TransformerDecoder(CFG, 3), TransformerDecoder(CFG, 1)]
    return MultiDecoder(TransformerEncoder(CFG, 2), decoders)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_macs_of_a_transformer_by_hand(device: str) -> None:
    net = network().to(device)
    x, t, memory = torch.zeros(1, 3, 6, 6), torch.zeros(1), torch.zeros(1, DIM)
    inputs = [v.to(device) for v in (x, t, memory)]
    counts = [macs(net, *inputs[:2], memory=inputs[2], stage=k) for k in (0, 1)]
    assert counts == [ENCODER + DECODER + 5 * BLOCK, ENCODER + DECODER + 3 * BLOCK]


def test_macs_grow_with_the_batch_and_leave_no_gradient() -> None:
    net = network()
    one, three = (
        macs(net, torch.zeros(b, 3, 6, 6), torch.zeros(b), memory=torch.zeros(b, DIM), stage=0)
        for b in (1, 3)
    )
    assert three == 3 * one
    assert all(p.grad is None for p in net.parameters())


def test_macs_of_a_convolution() -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1)
    assert macs(conv, torch.zeros(1, 3, 8, 8)) == 8 * 8 * 3 * 5 * 9


def test_parameters_by_hand() -> None:
    block = 3 * W * W + W * W + 2 * 3 * W * W + 6 * W * W + (3 + 1 + 3 + 1 + 6) * W
    encoder = PATCH * W + 256 * W + W * W + DIM * W + 4 * W
    decoder = 2 * W * W + 2 * W + W * PATCH + PATCH
    net = network()
    assert parameters(net.encoder) == encoder + 2 * block
    assert [parameters(d) for d in net.decoders] == [decoder + 3 * block, decoder + block]
    shared = nn.Sequential(nn.Linear(2, 2, bias=False))
    shared.append(shared[0])
    assert parameters(shared) == 4


def test_mean_is_weighted() -> None:
    # The paper's table 2: 20 calls of a sampler in three stages (arXiv 2312.09181).
    assert mean_macs([105.83, 72.97, 48.18], [8, 4, 8]) == pytest.approx(76.198)
    assert mean_macs([7.0], [0.2]) == pytest.approx(7.0)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -0.5], [0.0, 0.0]])
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        mean_macs([1.0, 2.0], weights)
    with pytest.raises(ValueError, match="weights"):
        mean_macs([], [])


def test_saved_bytes_are_what_the_gradient_needs() -> None:
    x = torch.zeros(2, 3)
    assert saved_bytes(nn.Linear(3, 5), x) == x.nbytes  # its weight is its own
    net = nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Flatten(), nn.Linear(5, 1))
    assert saved_bytes(net, x) == x.nbytes + 2 * 5 * 4  # the flat view is the sigmoid's output
    with torch.no_grad():
        assert saved_bytes(net, x) == x.nbytes + 2 * 5 * 4
    assert all(p.grad is None for p in net.parameters())


# --- published networks, from their configuration -------------------------------------------------


def published() -> MultiDecoder:
    """The paper's CIFAR-10 network (arXiv 2312.09181), but for filters, without content."""
    sizes = {"width": 128, "mults": [1, 2, 2, 2], "blocks": 8, "norm_groups": 16}
    stages = {"edges": [0.0, -2.0], "widths": [192, 128, 16]}
    run = parse({"data": "cifar10", "unet": sizes, "stages": stages})
    made = {"shape": [3, 32, 32], "num_classes": 0, "memory_dim": 0, "stages": [0.0, -2.0]}
    return make_backbone(run, made)


def attention(tokens: int, width: int) -> int:
    return 4 * tokens * width**2 + 2 * tokens**2 * width


def test_the_paper_counts_neither_attention_nor_filters() -> None:
    with torch.device("meta"):
        image = blank_images({"shape": (3, 32, 32), "memory_dim": 0, "num_classes": 0})
        met = Visits((0.2, 0.3, 0.5), (9, 3, 8))  # 20 calls in three stages: the paper's weights
        whole = network_cost(published(), image, met)
    # Eight attentions at 16 x 16 in the encoder, one at 4 x 4 in its middle, one per decoder.
    shared = 8 * attention(256, 256) + attention(16, 256)
    left_out = [shared + attention(256, 2 * width) for width in (192, 128, 16)]
    theirs = [m - left for m, left in zip(whole.stage_macs, left_out, strict=True)]
    assert [m / 1e9 for m in theirs] == pytest.approx([29.93, 17.64, 6.31], abs=0.006)
    assert mean_macs(theirs, met.calls) / 1e9 == pytest.approx(18.65, abs=0.02)
    # Told whole, a call costs 3 to 13 % more.
    more = [m / t for m, t in zip(whole.stage_macs, theirs, strict=True)]
    assert more == pytest.approx([1.034, 1.052, 1.129], abs=0.001)
    assert whole.mean_macs == mean_macs(whole.stage_macs, met.calls)
    assert whole.mean_macs_draws == mean_macs(whole.stage_macs, met.draws)


def test_a_stage_uses_the_encoder_and_its_decoder() -> None:
    net = network()
    made = {"shape": (3, 6, 6), "memory_dim": DIM, "num_classes": 0}
    cost = network_cost(net, blank_images(made), Visits((0.5, 0.5), (1, 1)))
    assert cost.parameters == parameters(net)
    shared = parameters(net.encoder)
    assert cost.stage_parameters == tuple(shared + parameters(d) for d in net.decoders)
    one = MultiDecoder(net.encoder, [net.decoders[0]])  # of all stages
    cost = network_cost(one, blank_images(made), Visits((0.5, 0.5), (1, 1)))
    assert cost.stage_parameters == (parameters(one),) * 2
    assert cost.stage_macs[0] == cost.stage_macs[1]


def test_training_and_sampling_meet_the_stages_differently() -> None:
    body = {"data": "x", "diffusion": {"schedule": "linear", "density": "uniform"}}
    stages = Stages((0.0,))  # t = 0.5 on the linear path, where sigma = alpha
    met = visits(parse(body), stages, SampleConfig(sampler="euler", steps=5))
    assert met == Visits((0.5, 0.5), (2, 3))  # calls at t = 1, 0.8, 0.6 and 0.4, 0.2
    narrow = Stages((-2 * math.log(4),))  # t = 0.8 belongs to the stage behind it
    assert visits(parse(body), narrow, SampleConfig(sampler="euler", steps=10)).calls == (7, 3)
    even = parse(body | {"stages": {"edges": [-2.0], "shared": 6, "policy": "uniform"}})
    assert visits(even, narrow, SampleConfig()).draws == (0.5, 0.5)
    assert visits(parse(body), narrow, SampleConfig()).draws == pytest.approx((0.8, 0.2))
    assert visits(parse(body), None, SampleConfig(steps=7)) == Visits((1.0,), (13,))
