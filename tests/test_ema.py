"""The average follows its formula and stays float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stratagem.ema import Ema
from tolerances import FLOAT32


def test_formula() -> None:
    net = nn.Linear(3, 2)
    ema = Ema(net, 0.9)
    expected = {name: p.detach().clone() for name, p in net.named_parameters()}
    for step in range(1, 200):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * step)
        ema.update(step)
        beta = min(0.9, (1 + step) / (10 + step))
        for name, p in net.named_parameters():
            expected[name] = beta * expected[name] + (1 - beta) * p.detach()
    for name, average in ema.state_dict().items():
        torch.testing.assert_close(average, expected[name], rtol=FLOAT32, atol=FLOAT32)
        assert not torch.allclose(average, dict(net.named_parameters())[name])


def test_average_is_float32_and_apart_from_the_weights() -> None:
    net = nn.Linear(3, 2).to(torch.bfloat16)
    ema = Ema(net, 0.5)
    assert all(a.dtype == torch.float32 for a in ema.weights.values())
    with torch.no_grad():
        net.weight.zero_()
    assert ema.weights["weight"].abs().sum() > 0


def test_state_round_trip() -> None:
    net, other = nn.Linear(3, 2), nn.Linear(3, 2)
    ema, again = Ema(net, 0.5), Ema(other, 0.5)
    again.load_state_dict(ema.state_dict())
    assert all(torch.equal(again.weights[n], ema.weights[n]) for n in ema.weights)
    with pytest.raises(KeyError):
        again.load_state_dict({})
