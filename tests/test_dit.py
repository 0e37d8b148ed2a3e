"""Official transformers: architecture from shapes, weights in our order, nothing tolerated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from official import HEADS, PROJECTS, TABLES, State, build, condition_of, golden, projector
from stratagem.denoiser import Denoiser
from stratagem.errors import InputError
from stratagem.interop.dit import convert, inspect, reverse_time
from stratagem.nets.cost import parameters
from stratagem.nets.layers import rotary_table, sincos_positions
from stratagem.objective import AlignmentHead, Objective
from stratagem.schedule import Linear
from tolerances import FLOAT32, NETWORK, assert_near

# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROJECTS)
def test_depth_may_be_cut_anywhere(name: str) -> None:
    config, weights, tensors = golden(name)
    official = inspect(weights, PROJECTS[name], heads=config["num_heads"])  # type: ignore[arg-type]
    assert official.depth == config["depth"]
    assert_near(
        sincos_positions(official.cfg.width, official.cfg.grid), weights["pos_embed"][0], FLOAT32
    )
    if official.cfg.rope:
        cos, sin = rotary_table(official.cfg.head_width, official.cfg.grid)
        assert_near(cos, weights["feat_rope.freqs_cos"], FLOAT32)
        assert_near(sin.abs(), weights["feat_rope.freqs_sin"].abs(), FLOAT32)
    found = []
    for shared in range(official.depth + 1):
        net = build(official, shared)
        net.load_state_dict(convert(weights, official, net))
        with torch.no_grad():
            found.append(net(tensors["inputs/x"], tensors["inputs/t"]))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_turned_time_is_exact_and_its_own_inverse() -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(7, 256, generator=g, dtype=torch.float64)
    frequencies = (1e4 ** -(torch.arange(128, dtype=torch.float64) / 128)).float().double()

    def features(t: Tensor) -> Tensor:
        angle = t[:, None] * frequencies
        return torch.cat((angle.cos(), angle.sin()), dim=1)

    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert_near(features(t) @ reverse_time(w).T, features(1 - t) @ w.T, 1e-12)
    assert_near(reverse_time(reverse_time(w)), w, 1e-12)


@pytest.mark.parametrize(
    ("name", "block", "output"),
    [
        ("gmem_lightningdit_a", 4, "train_z"),
        ("gmem_lightningdit_b", 4, "train_z"),
        ("sit_repa", 2, "z0"),
    ],
)
def test_official_alignment_head_is_loaded(name: str, block: int, output: str) -> None:
    _, weights, tensors = golden(name)
    heads = 4 if name in HEADS else None
    official = inspect(weights, PROJECTS[name], heads=heads)  # type: ignore[arg-type]
    net = build(official, shared=block)
    net.load_state_dict(convert(weights, official, net))
    head = projector(weights, official)
    x, t = tensors["inputs/x"], tensors["inputs/t"]
    condition = condition_of(tensors)
    t = 1 - t if official.family.from_noise else t
    expected = tensors[f"outputs/{output}"]
    with torch.no_grad():
        assert_near(head(net.encoder(x, t, **condition).hidden), expected, NETWORK)
        # The objective taps the same tokens; at t = 0 the noised image is the image.
        tap = f"encoder.stack.blocks.{block - 1}"
        objective = Objective(Denoiser(net, Linear(), "v"), head=head, tap=tap)
        at_zero = head(net.encoder(x, torch.zeros_like(t), **condition).hidden)
        losses = objective(x, torch.zeros_like(x), torch.zeros_like(t), align=at_zero, **condition)
    assert_near(losses.align, -torch.ones(len(x)), FLOAT32)


# --- architecture --------------------------------------------------------------------------------


def published() -> State:
    """The names and shapes of GMem-XL/1 as its released file has them."""
    outer = {
        "pos_embed": (1, 256, 1152),
        "x_embedder.proj.weight": (1152, 32, 1, 1),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.2.weight": (1152, 1152),
        "condition_projection.linear.weight": (1152, 768),
        "feat_rope.freqs_cos": (256, 72),
        "feat_rope.freqs_sin": (256, 72),
        "projector.0.0.weight": (2048, 1152),
        "projector.0.2.weight": (2048, 2048),
        "projector.0.4.weight": (768, 2048),
        "final_layer.norm_final.weight": (1152,),
        "final_layer.linear.weight": (32, 1152),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152),
    }
    block = {
        "norm1.weight": (1152,),
        "norm2.weight": (1152,),
        "attn.qkv.weight": (3456, 1152),
        "attn.proj.weight": (1152, 1152),
        "mlp.w12.weight": (6144, 1152),
        "mlp.w3.weight": (1152, 3072),
        "adaLN_modulation.1.weight": (6912, 1152),
    }
    shapes = outer | {f"blocks.{i}.{k}": v for i in range(28) for k, v in block.items()}
    for name in [n for n in shapes if n.endswith(".weight") and "norm" not in n]:
        shapes[name.replace(".weight", ".bias")] = shapes[name][:1]
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_the_largest_released_network_fits_to_the_digit() -> None:
    weights = published()
    assert len(weights) == 358
    official = inspect(weights, "gmem")
    cfg = official.cfg
    assert (cfg.width, official.depth, cfg.heads, cfg.image_size) == (1152, 28, 16, 16)
    assert (cfg.memory_dim, cfg.num_classes, cfg.patch, cfg.channels) == (768, 0, 1, 32)
    with torch.device("meta"):
        net, head = build(official, 4), AlignmentHead(1152, 768)
    fixed = {k: v for k, v in weights.items() if k not in TABLES}
    assert len(convert(fixed, official, net)) == 358 - 3 - 6
    assert parameters(net) + net.encoder.positions.numel() == 674_989_472
    assert parameters(head) == 8_131_328
    # pos_embed counts as a parameter in the published number
    whole = Objective(Denoiser(net, Linear(), "v"), head=head, tap="encoder.stack.blocks.3")
    assert parameters(whole) + net.encoder.positions.numel() == 683_120_800


@pytest.mark.parametrize("name", PROJECTS)
def test_fixed_tables_may_be_absent_but_not_others(name: str) -> None:
    config, weights, _ = golden(name)
    sizes: Any = {"heads": config["num_heads"], "image_size": config["input_size"]}
    project: Any = PROJECTS[name]
    bare = {k: v for k, v in weights.items() if k not in TABLES}
    full, stripped = inspect(weights, project, **sizes), inspect(bare, project, **sizes)
    assert full == stripped
    net = build(full, 1)
    whole, rest = convert(weights, full, net), convert(bare, full, net)
    assert all(torch.equal(whole[k], rest[k]) for k in whole)
    for table in TABLES & set(weights):
        half = weights | {table: weights[table].bfloat16()}  # rounding is no other table
        assert len(convert(half, full, net)) == len(whole)
        with pytest.raises(InputError, match="learned or resized positions"):
            convert(weights | {table: weights[table].flip(-1)}, full, net)


def test_what_the_weights_do_not_tell_is_asked_for() -> None:
    _, sit, _ = golden("sit_class")
    with pytest.raises(InputError, match=r"width 48 is no published one.*--heads"):
        inspect(sit, "sit")
    assert inspect(sit, "sit", heads=4).cfg.heads == 4
    with pytest.raises(InputError, match="must be a multiple of heads"):
        inspect(sit, "sit", heads=5)
    bare = {k: v for k, v in sit.items() if k not in TABLES}
    with pytest.raises(InputError, match=r"^the weights do not tell: give --image-size"):
        inspect(bare, "sit", heads=4)
    with pytest.raises(InputError, match="--image-size 16 contradicts the weights, which say 8"):
        inspect(sit, "sit", heads=4, image_size=16)
    _, modern, _ = golden("lightningdit_class")
    with pytest.raises(InputError, match="--heads 3 contradicts the weights, which say 4"):
        inspect(modern, "lightningdit", heads=3)
    with pytest.raises(InputError, match="--rope no contradicts"):
        inspect(modern, "lightningdit", rope=False)
    half = {k: v for k, v in modern.items() if not k.startswith("feat_rope")}
    with pytest.raises(InputError, match="positions but no rotations"):
        inspect(half, "lightningdit", heads=4)
    for rope in (True, False):
        assert inspect(half, "lightningdit", heads=4, rope=rope).cfg.rope is rope
    wide = published()
    tables = {k: v for k, v in wide.items() if k not in TABLES}
    assert inspect(tables, "gmem", image_size=16).cfg.heads == 16  # of the published width


WRONG_PROJECT = [
    ("gmem_lightningdit_a", "lightningdit", "try --from gmem"),
    ("lightningdit_class", "gmem", "try --from lightningdit, sit or repa"),
    ("sit_class", "gmem", "they have y_embedder"),
    ("sit_repa", "gmem", "try --from lightningdit, sit or repa"),
    ("sit_repa", "sit", "try --from repa"),
    ("sit_class", "repa", "--from sit"),
]


@pytest.mark.parametrize(("name", "project", "message"), WRONG_PROJECT)
def test_another_projects_weights_are_refused(name: str, project: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        inspect(golden(name)[1], project, heads=4)


def test_incomplete_weights_are_no_surprise() -> None:
    _, weights, _ = golden("sit_class")
    with pytest.raises(InputError, match=r"no x_embedder\.proj\.weight with 4 axes"):
        inspect({"y_embedder.embedding_table.weight": torch.zeros(2, 2)}, "sit")
    with pytest.raises(InputError, match=r"no blocks\.0\.adaLN"):
        inspect({k: v for k, v in weights.items() if not k.startswith("blocks")}, "sit", heads=4)
    official = inspect(weights, "sit", heads=4)
    assert official.learn_sigma
