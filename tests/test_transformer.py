from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem.errors import InputError
from stratagem.nets.cost import parameters
from stratagem.nets.layers import (
    MLP,
    Attention,
    Block,
    Condition,
    Norm,
    SwiGLU,
    TimeEmbedding,
    modulate,
    norm_layer,
    rotary_table,
    rotate,
    sincos_positions,
)
from stratagem.nets.multi_decoder import MultiDecoder
from stratagem.nets.transformer import (
    SIZES,
    Features,
    Size,
    TransformerConfig,
    TransformerDecoder,
    TransformerEncoder,
    patchify,
    size,
    unpatchify,
)
from tolerances import FLOAT32, NETWORK, assert_near

SIT: dict[str, Any] = {"norm": "layer", "mlp": "gelu", "rope": False}
TINY = TransformerConfig(8, 3, 2, 24, 2, num_classes=5, memory_dim=7, init="gmem")


def build(cfg: TransformerConfig, encoder: int, decoder: int, seed: int = 0) -> MultiDecoder:
    torch.manual_seed(seed)
    return MultiDecoder(TransformerEncoder(cfg, encoder), [TransformerDecoder(cfg, decoder)])


def inputs(cfg: TransformerConfig, rows: int = 4) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(rows, cfg.channels, cfg.image_size, cfg.image_size, generator=g)
    condition = {}
    if cfg.memory_dim:
        memory = torch.randn(rows, cfg.memory_dim, generator=g)
        condition["memory"] = nn.functional.normalize(memory, dim=1)
    if cfg.num_classes:
        condition["label"] = torch.randint(cfg.num_classes, (rows,), generator=g)
    return x, torch.rand(rows, generator=g), condition


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("S", 32_896_160),
        ("B", 130_378_016),
        ("XL", 674_989_472),
        ("1p0B", 1_029_044_768),
        ("1p6B", 1_631_351_376),
    ],
)
def test_published_parameter_counts(name: str, count: int) -> None:
    # GMem's networks without their projector; their count includes the fixed position embedding.
    width, depth, heads = size(name)
    cfg = TransformerConfig(16, 32, 1, width, heads, memory_dim=768)
    with torch.device("meta"):
        net = MultiDecoder(TransformerEncoder(cfg, 4), [TransformerDecoder(cfg, depth - 4)])
    assert parameters(net) + net.encoder.positions.numel() == count


def test_large_is_the_dit_size_and_an_unknown_one_is_refused() -> None:
    assert list(SIZES) == ["S", "B", "L", "XL", "1p0B", "1p6B"]
    assert size("L") == Size(width=1024, depth=24, heads=16)
    with pytest.raises(InputError, match="XL"):
        size("XXL")


# --- layers --------------------------------------------------------------------------------------


def test_positions_differ_and_have_equal_norm() -> None:
    p = sincos_positions(16, 5)
    assert torch.cdist(p, p).add(torch.eye(25)).min() > 0.1
    assert_near(p.square().sum(1), torch.full((25,), 8.0), FLOAT32)


def test_rotation_keeps_norms_and_depends_on_offsets_only() -> None:
    grid, torch_g = 6, torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 20, generator=torch_g)
    table = rotary_table(20, grid)
    rows = torch.arange(grid * grid)
    q_L, k_L = rotate(q.expand(len(rows), -1), table), rotate(k.expand(len(rows), -1), table)
    assert_near(q_L.norm(dim=1), q.norm().expand(len(rows)), FLOAT32)
    score = (q_L @ k_L.T).view(grid, grid, grid, grid)  # (row, column) of q, then of k
    assert_near(score[:-1, :-2, :-1, :-2], score[1:, 2:, 1:, 2:], FLOAT32)
    assert (score[0, 0, 0, 1] - score[0, 0, 1, 0]).abs() > 1e-3


def test_time_embedding_scale_multiplies_the_time() -> None:
    plain, scaled = TimeEmbedding(12), TimeEmbedding(12, scale=1000.0)
    scaled.load_state_dict(plain.state_dict())
    t = torch.tensor([0.0, 0.25, 0.5])
    assert_near(scaled(t), plain(1000 * t), FLOAT32)
    assert not torch.allclose(scaled(t)[1], plain(t)[1], atol=1e-3)


def test_swiglu_and_mlp_formulas() -> None:
    x, glu, mlp = torch.randn(3, 4), SwiGLU(4, 5), MLP(4, 5)
    gate, value = x @ glu.up.weight.T[:, :5], x @ glu.up.weight.T[:, 5:]
    gate, value = gate + glu.up.bias[:5], value + glu.up.bias[5:]
    expected = (gate * gate.sigmoid() * value) @ glu.down.weight.T + glu.down.bias
    assert_near(glu(x), expected, FLOAT32)
    h = x @ mlp.up.weight.T + mlp.up.bias
    gelu = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    assert_near(mlp(x), gelu @ mlp.down.weight.T + mlp.down.bias, FLOAT32)


def test_norms_and_modulation() -> None:
    x = torch.randn(2, 3, 8) + 1
    rms = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert_near(norm_layer("rms", 8)(x), rms, FLOAT32)
    layer = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert_near(norm_layer("layer", 8)(x), layer, FLOAT32)
    assert parameters(norm_layer("layer", 8)) == 0
    scale, shift = torch.randn(2, 2, 1, 8)
    assert_near(modulate(x, scale, shift) - modulate(x, scale), shift.expand(2, 3, 8), FLOAT32)


@pytest.mark.parametrize("qk_norm", [None, "layer", "rms"])
def test_attention_is_softmax_attention(qk_norm: Norm | None) -> None:
    attention = Attention(8, 2, qk_norm)
    x = torch.randn(2, 5, 8)
    q, k, v = attention.qkv(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q), attention.k_norm(k)
    mixed = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
    assert_near(attention(x), attention.out(mixed.transpose(1, 2).reshape(2, 5, 8)), FLOAT32)
    if qk_norm == "rms":
        assert_near(q.square().mean(-1), torch.ones(2, 2, 5), 1e-3)


@pytest.mark.parametrize("shift", [True, False])
def test_block_with_closed_gates_is_the_identity(shift: bool) -> None:
    block = Block(8, Attention(8, 2), MLP(8, 16), "layer", shift)
    x, c = torch.randn(2, 5, 8), torch.randn(2, 8)
    assert not torch.equal(block(x, c), x)
    nn.init.zeros_(block.modulation.weight)
    nn.init.zeros_(block.modulation.bias)
    assert torch.equal(block(x, c), x)


def test_condition_is_the_sum_of_its_parts() -> None:
    c = Condition(12, num_classes=3, memory_dim=5)
    t, memory, label = torch.rand(4), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    expected = c.time(t) + c.label.weight[label] + memory @ c.memory.weight.T + c.memory.bias
    assert_near(c(t, memory, label), expected, FLOAT32)


# --- patches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_unpatchify_inverts_patchify(patch: int) -> None:
    x = torch.randn(2, 5, 6, 6)
    patches = patchify(x, patch)
    assert patches.shape == (2, (6 // patch) ** 2, patch * patch * 5)
    assert torch.equal(unpatchify(patches, patch), x)
    # Token 1 is the second patch of the first row of patches.
    corner = x[:, :, :patch, patch : 2 * patch].permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(patches[:, 1], corner)


# --- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, SIT, {"qk_norm": True}, {"shift": False}])
def test_zero_initialised_network_returns_zero(options: dict[str, Any]) -> None:
    cfg = dataclasses.replace(TINY, init="adaln-zero", **options)
    net = build(cfg, 1, 1)
    x, t, condition = inputs(cfg)
    assert torch.equal(net(x, t, **condition), torch.zeros_like(x))
    features = net.encoder(x, t, **condition)
    start = net.encoder.embed(patchify(x, cfg.patch)) + net.encoder.positions
    assert torch.equal(features.hidden, start)
    assert features.condition.shape == (4, cfg.width)


def test_gmem_initialisation_opens_everything() -> None:
    net = build(dataclasses.replace(TINY, width=96), 2, 2)
    x, t, condition = inputs(TINY)
    with torch.no_grad():
        assert 0.3 < net(x, t, **condition).std() < 3
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        else:
            assert p.std() > 0.01 or "norm" in name, name


@pytest.mark.parametrize("options", [{}, {**SIT, "qk_norm": True}, {"shift": False}])
def test_every_parameter_gets_a_finite_gradient(options: dict[str, Any]) -> None:
    cfg = dataclasses.replace(TINY, **options)
    net = build(cfg, 1, 2)
    x, t, condition = inputs(cfg)
    net(x, t, **condition).square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.any(), name


def test_rows_are_independent_and_mode_does_not_matter() -> None:
    net = build(TINY, 1, 1)
    x, t, condition = inputs(TINY)
    with torch.no_grad():
        out = net.train()(x, t, **condition)
        assert torch.equal(net.eval()(x, t, **condition), out)
        alone = net(x[2:3], t[2:3], **{k: v[2:3] for k, v in condition.items()})
    assert_near(alone, out[2:3], FLOAT32)


def test_none_is_the_null_row() -> None:
    net = build(TINY, 1, 1)
    x, t, condition = inputs(TINY)
    nulls = {"memory": torch.zeros(4, 7), "label": torch.full((4,), 5)}
    with torch.no_grad():
        out, null = net(x, t, **condition), net(x, t, **nulls)
        assert_near(net(x, t), null, FLOAT32)
        assert_near(net(x, t, memory=nulls["memory"]), null, FLOAT32)
        keep = torch.tensor([True, False, True, False])
        mixed = {
            "memory": condition["memory"] * keep[:, None],
            "label": condition["label"].where(keep, 5),
        }
        assert_near(net(x, t, **mixed), out.where(keep[:, None, None, None], null), FLOAT32)
    assert (out - null).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_conditions_without_an_input_are_refused() -> None:
    x, t, condition = inputs(TINY)
    net = build(dataclasses.replace(TINY, num_classes=0), 0, 1)
    net(x, t, memory=condition["memory"])
    with pytest.raises(ValueError, match="num_classes"):
        net(x, t, label=condition["label"])
    net = build(dataclasses.replace(TINY, memory_dim=0), 0, 1)
    net(x, t, label=condition["label"])
    with pytest.raises(ValueError, match="memory_dim"):
        net(x, t, memory=condition["memory"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 3}, "image_size 8 must be a multiple of patch"),
        ({"patch": 0}, "patch"),
        ({"heads": 5}, "heads"),
        ({"width": 26, "heads": 1}, "position"),
        ({"width": 24, "heads": 4}, "rope"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TINY, **change)


def test_decoder_of_its_own_width() -> None:
    torch.manual_seed(0)
    encoder = TransformerEncoder(TINY, 1)
    decoder = TransformerDecoder(TINY, 2, width=36)
    assert [b.attention.heads for b in decoder.stack.blocks] == [3, 3]
    x, t, condition = inputs(TINY)
    features = encoder(x, t, **condition)
    assert decoder(features).shape == x.shape
    # The decoder of the adapted features is the decoder without adapters.
    plain = TransformerDecoder(dataclasses.replace(TINY, width=36, heads=3), 2)
    plain.load_state_dict({k: v for k, v in decoder.state_dict().items() if "adapt" not in k})
    hidden, condition_ = features
    adapted = Features(decoder.adapt_hidden(hidden), decoder.adapt_condition(condition_))
    assert_near(plain(adapted), decoder(features), FLOAT32)
    with pytest.raises(InputError, match="decoder width 30"):
        TransformerDecoder(TINY, 1, width=30)


def test_double_precision_agrees_with_single() -> None:
    net = build(TINY, 1, 1)
    x, t, condition = inputs(TINY)
    wide = copy.deepcopy(net).double()
    with torch.no_grad():
        out = wide(
            x.double(), t.double(), memory=condition["memory"].double(), label=condition["label"]
        )
        assert out.dtype == torch.float64
        assert_near(net(x, t, **condition), out, NETWORK)


@pytest.mark.parametrize("options", [{}, {**SIT, "qk_norm": True}])
def test_mixed_precision_is_close(options: dict[str, Any]) -> None:
    cfg = dataclasses.replace(TINY, **options)
    net = build(cfg, 1, 1)
    x, t, condition = inputs(cfg)
    with torch.no_grad():
        exact = net(x, t, **condition)
        with torch.autocast("cpu", torch.bfloat16):
            rough = net(x, t, **condition)
    error = (rough.float() - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < 0.03


def test_fixed_tables_are_not_saved() -> None:
    net = build(TINY, 1, 1)
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}
