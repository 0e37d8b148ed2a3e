from __future__ import annotations

import pytest
import torch
from torch import nn

from stratagem.nets.cost import macs, mean_macs, parameters
from stratagem.nets.multi_decoder import MultiDecoder
from stratagem.nets.transformer import TransformerConfig, TransformerDecoder, TransformerEncoder

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
