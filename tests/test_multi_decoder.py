from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from stratagem.nets.multi_decoder import MultiDecoder, PassOn, Whole
from stratagem.nets.transformer import TransformerConfig, TransformerDecoder, TransformerEncoder
from tolerances import FLOAT32, assert_near

CFG = TransformerConfig(4, 2, 2, 16, 2, memory_dim=3, num_classes=4, init="gmem")
STAGE = torch.tensor([2, 0, 2, 1, 0, 2, 2])


def network(depths: tuple[int, ...] = (2, 1, 0)) -> MultiDecoder:
    torch.manual_seed(0)
    decoders = [TransformerDecoder(CFG, d, w) for d, w in zip(depths, (16, 24, 8), strict=False)]
    return MultiDecoder(TransformerEncoder(CFG, 1), decoders)


def batch(rows: int = len(STAGE)) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    condition = {
        "memory": torch.randn(rows, 3, generator=g),
        "label": torch.randint(4, (rows,), generator=g),
    }
    return torch.randn(rows, 2, 4, 4, generator=g), torch.rand(rows, generator=g), condition


def test_one_decoder_is_the_plain_composition() -> None:
    net = network((2,))
    x, t, condition = batch()
    expected = net.decoders[0](net.encoder(x, t, **condition))
    assert net.num_stages == 1
    for stage in (None, 0, STAGE):  # nothing to choose
        assert torch.equal(net(x, t, stage=stage, **condition), expected)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_one_stage_for_all_equals_routing_every_row_to_it(stage: int) -> None:
    net = network()
    x, t, condition = batch()
    whole = net(x, t, stage=stage, **condition)
    assert torch.equal(whole, net.decoders[stage](net.encoder(x, t, **condition)))
    assert torch.equal(net(x, t, stage=torch.full((len(x),), stage), **condition), whole)


@pytest.mark.parametrize("stage", [STAGE, torch.tensor([2, 2, 2, 0, 0, 0, 0])])
def test_mixed_batch_equals_single_rows(stage: Tensor) -> None:
    net = network()
    x, t, condition = batch()
    mixed = net(x, t, stage=stage, **condition)
    rows = []
    for i, k in enumerate(stage.tolist()):
        row = {name: value[i : i + 1] for name, value in condition.items()}
        rows.append(net(x[i : i + 1], t[i : i + 1], stage=k, **row))
    assert_near(mixed, torch.cat(rows), FLOAT32)
    # The decoders differ, so a wrong route would show.
    others = net(x, t, stage=(stage + 1) % 3, **condition)
    assert (mixed - others).abs().amax(dim=(1, 2, 3)).min() > 1e-2


class Recorder(nn.Module):
    """A decoder that multiplies by its number and notes the rows it was given."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.seen: list[list[float]] = []

    def forward(self, features: Nest) -> Tensor:
        self.seen.append(features.skips[1][:, 0].tolist())
        assert torch.equal(features.h, features.skips[0])
        return features.h * self.factor


class Nest(NamedTuple):
    h: Tensor
    skips: tuple[Tensor, ...]


class NestEncoder(nn.Module):
    def forward(self, x_t: Tensor, time: Tensor, **_: Tensor | None) -> Nest:
        return Nest(x_t, (x_t, time[:, None]))


def test_each_decoder_runs_once_on_its_rows_and_nested_features_follow() -> None:
    net = MultiDecoder(NestEncoder(), [Recorder(1.0), Recorder(10.0), Recorder(100.0)])
    x, t = torch.ones(5, 1), torch.arange(5.0)
    out = net(x, t, stage=torch.tensor([2, 0, 2, 0, 2]))
    assert out[:, 0].tolist() == [100.0, 1.0, 100.0, 1.0, 100.0]
    assert [d.seen for d in net.decoders] == [[[1.0, 3.0]], [], [[0.0, 2.0, 4.0]]]
    out.sum().backward()
    assert [d.factor.grad for d in net.decoders] == [torch.tensor(2.0), None, torch.tensor(3.0)]


@pytest.mark.parametrize("counts", [(3, 2, 2), (0, 7, 0), (0, 3, 4), (7, 0, 0)])
def test_counts_of_sorted_rows_equal_a_stage_per_row(counts: tuple[int, ...]) -> None:
    net = network()
    x, t, condition = batch()
    stage = torch.arange(3).repeat_interleave(torch.tensor(counts))
    sliced = net(x, t, stage=counts, **condition)
    assert torch.equal(sliced, net(x, t, stage=stage, **condition))
    assert torch.equal(
        network((2,))(x, t, stage=counts, **condition), network((2,))(x, t, **condition)
    )


def test_counts_ask_no_device() -> None:
    """The meta device has no values: whatever waits for one fails."""
    net = network().to("meta")
    x, t, condition = batch()
    given = {name: value.to("meta") for name, value in condition.items()}
    assert net(x.to("meta"), t.to("meta"), stage=(3, 2, 2), **given).shape == x.shape
    with pytest.raises(RuntimeError):
        net(x.to("meta"), t.to("meta"), stage=STAGE.to("meta"), **given)


def test_gradients_reach_used_decoders_and_the_encoder_only() -> None:
    net = network()
    x, t, condition = batch()
    net(x, t, stage=torch.tensor([0, 2, 0, 2, 0, 0, 2]), **condition).square().sum().backward()
    for part, used in ((net.encoder, True), *zip(net.decoders, (True, False, True), strict=True)):
        for name, p in part.named_parameters():
            assert (p.grad is not None and bool(p.grad.any())) == used, name


def test_a_missing_or_impossible_stage_is_refused() -> None:
    net = network()
    x, t, condition = batch()
    with pytest.raises(ValueError, match="3 decoders"):
        net(x, t, **condition)
    for stage in (3, -1, STAGE + 1, STAGE - 1):
        with pytest.raises(ValueError, match=r"0\.\.2"):
            net(x, t, stage=stage, **condition)
    with pytest.raises(ValueError, match="7 images"):
        net(x, t, stage=STAGE[:3], **condition)
    for counts in ((3, 2, 1), (7,), (3, 4), (7, 0, 0, 0)):
        with pytest.raises(ValueError, match="7 images, 3 stages, but"):
            net(x, t, stage=counts, **condition)
    with pytest.raises(ValueError, match="at least one"):
        MultiDecoder(net.encoder, [])


def test_state_dict_and_deepcopy_carry_the_network() -> None:
    net, other = network(), network()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    x, t, condition = batch()
    out = net(x, t, stage=STAGE, **condition)
    assert not torch.equal(other(x, t, stage=STAGE, **condition), out)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x, t, stage=STAGE, **condition), out)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert torch.equal(twin(x, t, stage=STAGE, **condition), out)


def test_networks_that_share_nothing_each_see_their_rows_and_conditions() -> None:
    torch.manual_seed(0)
    wholes = [
        MultiDecoder(TransformerEncoder(CFG, 1), [TransformerDecoder(CFG, d)]) for d in (2, 1, 0)
    ]
    net = MultiDecoder(PassOn(), [Whole(whole) for whole in wholes])
    x, t, condition = batch()
    for given in ({}, {"label": condition["label"], "memory": None}, condition):
        found = net(x, t, stage=STAGE, **given)
        for k, whole in enumerate(wholes):
            rows = STAGE.eq(k)
            own = {n: v[rows] for n, v in given.items() if v is not None}
            assert_near(found[rows], whole(x[rows], t[rows], **own), FLOAT32)
    found.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
