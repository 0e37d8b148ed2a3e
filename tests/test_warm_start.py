"""Warm start: one decoder becomes all; what can be preserved is, and a stop changes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem import stage_draw
from stratagem.assemble import assemble, open_run
from stratagem.checkpoint import list_steps, load
from stratagem.config import ModelConfig, RunConfig, StagesConfig, parse
from stratagem.data.shards import DataSet
from stratagem.errors import InputError
from stratagem.nets.multi_decoder import MultiDecoder, PassOn, Whole
from stratagem.nets.transformer import TransformerConfig, TransformerDecoder, TransformerEncoder
from stratagem.nets.unet import UNetConfig, UNetDecoder, UNetEncoder
from stratagem.nets.unet_style import style
from stratagem.nets.warm_start import Origin, origins, part_decoders, tie_gradients, ties
from stratagem.programs.train import train
from stratagem.stages import Stages
from stratagem.train import Interrupted, TrainConfig, TrainState, train_step
from tolerances import FLOAT64, NETWORK, assert_near

CFG = TransformerConfig(8, 2, 2, 16, 2, memory_dim=3, qk_norm=True)
X = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.1, 0.5, 0.9])


def shaken(net: MultiDecoder) -> MultiDecoder:
    """Random numbers everywhere, so that nothing is the identity or zero by chance."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return net


def transformer(
    depths: Sequence[int], widths: Sequence[int | None], cfg: TransformerConfig = CFG
) -> MultiDecoder:
    decoders = [TransformerDecoder(cfg, d, w) for d, w in zip(depths, widths, strict=True)]
    return shaken(MultiDecoder(TransformerEncoder(cfg, 1), decoders))


def warm(net: MultiDecoder, source: int = 0) -> dict[str, Origin]:
    found, weights = origins(net, source), dict(net.named_parameters())
    assert not any(name.startswith((f"decoders.{source}.", "encoder")) for name in found)
    with torch.no_grad():
        for name, origin in found.items():
            new = origin.make(weights)
            assert new.shape == weights[name].shape, name
            weights[name].copy_(new)
    return found


def outputs(net: MultiDecoder, x: Tensor = X) -> list[Tensor]:
    return [net(x, T.to(x), stage=k).detach() for k in range(net.num_stages)]


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [0, 2])
def test_equal_decoders_become_copies(source: int) -> None:
    for net in (
        transformer((2, 2, 2), (None, None, None)),
        transformer((1, 1, 1), (24, 24, 24)),
        shaken(MultiDecoder(PassOn(), [Whole(transformer((1,), (None,))) for _ in range(3)])),
        unet(8, 8, 8),
    ):
        expected = outputs(net)[source]
        assert not torch.equal(outputs(net)[1], expected)
        found = warm(net, source)
        assert all(torch.equal(out, expected) for out in outputs(net))
        assert all(origin.copied for origin in found.values())
        assert len(found) == 2 * len(list(net.decoders[0].parameters()))


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_growth_by_whole_multiples_and_by_blocks_preserves_the_function(norm: Any) -> None:
    for mlp in ("swiglu", "gelu"):
        cfg = dataclasses.replace(CFG, norm=norm, mlp=mlp)
        net = transformer((2, 5, 2, 3, 2), (None, None, 32, 48, 16), cfg).double()
        expected = outputs(net, X.double())[0]
        warm(net)
        for out in outputs(net, X.double()):
            assert_near(out, expected, FLOAT64)
        own = transformer((1, 2), (24, 48), cfg).double()  # the trained one has maps of its own
        expected = outputs(own, X.double())[0]
        warm(own)
        assert_near(outputs(own, X.double())[1], expected, FLOAT64)


def test_new_blocks_learn() -> None:
    net = transformer((1, 3), (None, None))
    warm(net)
    net(X, T, stage=1).square().sum().backward()
    for block in net.decoders[1].stack.blocks:
        assert block.modulation.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("depth", "depth_new", "origin"),
    [(4, 2, [1, 3]), (4, 1, [2]), (3, 2, [0, 2]), (2, 4, [None, 0, None, 1]), (5, 5, range(5))],
)
def test_blocks_are_chosen_evenly(depth: int, depth_new: int, origin: Sequence[int | None]) -> None:
    found = origins(transformer((depth, depth_new), (None, None)), 0)
    for block, source in enumerate(origin):
        got = found.get(f"decoders.1.stack.blocks.{block}.attention.qkv.weight")
        if source is None:
            assert got is None
            shut = found[f"decoders.1.stack.blocks.{block}.modulation.weight"]
            assert not shut.make({}).any()
        else:
            assert got is not None
            assert got.copied == f"decoders.0.stack.blocks.{source}.attention.qkv.weight"


@pytest.mark.parametrize("widths", [(32, 16), (32, 24), (48, 8), (16, 24)])
def test_other_widths_keep_the_size_of_what_maps_put_out(widths: tuple[int, int]) -> None:
    """Of maps of uncorrelated weights: the rms of a map's output on normalised input stays."""
    torch.manual_seed(0)
    width, width_new = widths
    # Maps into a repeated channel see equal numbers, into a chosen one uncorrelated numbers.
    net = transformer((1, 1), widths, dataclasses.replace(CFG, mlp_ratio=16))
    warm(net)
    trained, decoder = (d.stack.blocks[0].mlp.up.weight for d in net.decoders)
    x = torch.randn(4000, width)
    take = torch.arange(width_new) * width // width_new
    rms = (x @ trained.T).square().mean().sqrt()
    rms_new = (x[:, take] @ decoder.T).square().mean().sqrt()
    assert (rms_new / rms).item() == pytest.approx(1, abs=0.12)


def unet(*widths: int | None, **options: Any) -> MultiDecoder:
    options = {"style": style("ddpm++"), **options}
    cfg = UNetConfig(8, 2, 16, (1, 2), 1, (4,), **options)
    return shaken(MultiDecoder(UNetEncoder(cfg), [UNetDecoder(cfg, w) for w in widths]))


@pytest.mark.parametrize("name", ["ddpm++", "adm"])
@pytest.mark.parametrize("shared_middle", [True, False])
def test_unet_decoders_of_other_widths(name: str, shared_middle: bool) -> None:
    options = dataclasses.replace(style(name), head_width=4 if name == "adm" else None)
    net = unet(32, 16, 24, 4, style=options, shared_middle=shared_middle)
    before, (trained, *others) = outputs(net)[0], net.decoders
    warm(net)
    after = outputs(net)
    assert torch.equal(after[0], before)
    for width, decoder, out in zip((16, 24, 4), others, after[1:], strict=True):
        assert 0.3 < (out.std() / before.std()).item() < 3
        first, was = decoder.blocks[0][1], trained.blocks[0][1]  # reads (own width, skip of 16)
        take = torch.arange(width) * 32 // width
        assert torch.equal(first.norm_in.weight[:width], was.norm_in.weight[:32][take])
        assert torch.equal(first.conv_in.weight[:, width:], was.conv_in.weight[take][:, 32:])
        own = was.conv_in.weight[take][:, take] * (32 / width) ** 0.5
        assert_near(first.conv_in.weight[:, :width], own, NETWORK)
        # The trained block passes its 64 channels on as they are; the others choose of them.
        assert isinstance(trained.blocks[1][0].skip, nn.Identity)
        chosen = decoder.blocks[1][0].skip(torch.arange(64.0).view(1, 64, 1, 1)).flatten()
        assert chosen.tolist() == (torch.arange(2 * width) * 64 // (2 * width)).tolist()


def test_unet_decoders_grow_where_no_norm_couples_channels() -> None:
    """Group norms over joined inputs follow only roughly; without them growth is exact."""
    net = unet(8, 16, 24, style=dataclasses.replace(style("adm"), head_width=4)).double()
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    with torch.no_grad():
        for p in net.parameters():  # nothing else keeps numbers small
            p.mul_(0.3)
    expected = outputs(net, X.double())[0]
    warm(net)
    for out in outputs(net, X.double()):
        assert_near(out, expected, FLOAT64)


def test_the_largest_decoder_is_trained() -> None:
    assert transformer((1, 3, 2), (None, None, None)).largest == 1
    assert transformer((1, 1, 1), (None, None, 32)).largest == 2
    assert transformer((2, 2), (None, None)).largest == 0


# --- tied gradients ------------------------------------------------------------------------------


def test_ties_join_what_begins_as_a_copy_of_one_tensor() -> None:
    """Decoders of 2, 4 and 1 blocks, copied from the second: blocks 1 and 3, and block 2."""
    net = transformer((2, 4, 1), (None, None, None))
    names = {parameter: name for name, parameter in net.named_parameters()}
    found = [[names[p] for p in tied] for tied in ties(net, 1)]
    block = "decoders.{}.stack.blocks.{}.attention.qkv.weight".format
    for first, copy in (((1, 1), (0, 0)), ((1, 3), (0, 1)), ((1, 2), (2, 0))):
        assert [block(*first), block(*copy)] in found
    assert not any(block(1, 0) in group for group in found)
    assert ["decoders.1.norm.weight", "decoders.0.norm.weight", "decoders.2.norm.weight"] in found
    assert len(found) == len({group[0] for group in found})
    wide = transformer((1, 1), (32, 16))
    assert all(first.shape == copy.shape for first, copy in ties(wide, 0))  # none that is folded


def test_tied_gradients_speed_up_what_is_common_and_keep_every_stationary_point() -> None:
    tied = [nn.Parameter(torch.zeros(3, 2)) for _ in range(4)]
    own = [torch.randn(3, 2, dtype=torch.float64).float() for _ in tied]

    def mixed(tie: float, rows: int = 4) -> list[Tensor]:
        for k, (p, grad) in enumerate(zip(tied, own, strict=True)):
            p.grad = grad.clone() if k < rows else None
        tie_gradients([tied], tie)
        assert len({p.grad.data_ptr() for p in tied if p.grad is not None}) == 4
        return [p.grad for p in tied if p.grad is not None]

    mean, after = sum(own) / 4, mixed(0.75)
    assert_near(sum(after) / 4, (1 + 3 * 0.75) * mean, NETWORK)
    for grad, new in zip(own, after, strict=True):
        assert_near(new - sum(after) / 4, 0.25 * (grad - mean), NETWORK)
    assert all(torch.equal(a, b) for a, b in zip(mixed(0.0), own, strict=True))
    *_, idle = mixed(0.75, rows=2)  # as if its own were 0
    assert_near(idle, 0.75 * (own[0] + own[1]), NETWORK)
    for p in tied:
        p.grad = None
    tie_gradients([tied], 0.75)
    assert all(p.grad is None for p in tied)


# --- training ------------------------------------------------------------------------------------


@pytest.fixture
def config(blobs: DataSet, tmp_path: Path) -> RunConfig:
    """Three decoders of 2, 4 and 1 blocks: the second is trained first, for 5 of 12 steps."""
    Stages((2.0, -2.0)).save(tmp_path / "stages", {"data": blobs.fingerprint})
    stages = StagesConfig(
        str(tmp_path / "stages"), 1, (2, 4, 1), policy="loss", unbiased=True, warm_steps=5
    )
    return RunConfig(
        data=str(blobs.path),
        seed=5,
        model=ModelConfig(width=16, depth=5, heads=2, patch=2),
        stages=stages,
        train=TrainConfig(
            steps=12,
            batch_size=12,
            learning_rate=1e-2,
            weight_decay=0.1,
            ema_decay=0.9,
            checkpoint_every=100,
            log_every=3,
            threads=1,
        ),
    )


def with_stages(config: RunConfig, **changes: Any) -> RunConfig:
    assert config.stages is not None
    return dataclasses.replace(config, stages=dataclasses.replace(config.stages, **changes))


def started(config: RunConfig) -> tuple[TrainState, Any]:
    parts = assemble(config)
    return TrainState(parts.objective, config.train, parts.batches.stages), parts.batches


def snapshot(state: TrainState) -> dict[str, Tensor]:
    saved = state.checkpoint()
    return {f"{g}/{n}": t.clone() for g, named in saved.tensors.items() for n, t in named.items()}


def test_right_after_the_copy_every_stage_computes_what_the_trained_one_did(
    config: RunConfig,
) -> None:
    equal = with_stages(config, depths=None)
    state, batches = started(equal)
    first = snapshot(state)
    for step in range(5):
        if step == 4:
            assert all(
                torch.equal(value, first[name])
                for name, value in snapshot(state).items()
                if "decoders.1" in name or "decoders.2" in name
            )
        train_step(state, batches(step), equal.train)
    after = snapshot(state)
    assert not torch.equal(
        after["model/decoders.1.norm.weight"], first["model/decoders.1.norm.weight"]
    )
    names = [name for name in after if "decoders.0." in name]
    assert sum("moments" in name for name in names) == 3 * sum("model" in name for name in names)
    for name in names:
        for k in (1, 2):
            assert torch.equal(after[name.replace("decoders.0", f"decoders.{k}")], after[name])
    net, x, t = state.objective.denoiser.backbone, torch.randn(4, 1, 8, 8), torch.rand(4)
    outs = [net(x, t, stage=k) for k in range(3)]
    assert outs[0].std() > 0
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    train_step(state, batches(5), equal.train)  # and from here they part
    outs = [net(x, t, stage=k) for k in range(3)]
    assert not torch.equal(outs[0], outs[1])


def test_tied_wholly_the_copies_train_as_the_one_decoder_does(config: RunConfig) -> None:
    """With tie 1, parting changes nothing; with 0.8 they part, less than with 0."""
    train_cfg = dataclasses.replace(config.train, grad_clip=1e9)  # the norm is of all decoders
    config = with_stages(config, depths=None, policy="density", unbiased=False)
    spread, nets = {}, {}
    for tie in (None, 1.0, 0.8, 0.0):
        state, batches = started(config)
        assert state.stages is not None
        assert state.stages.tie == 0.8
        object.__setattr__(state.stages, "tie", tie)
        if tie is None:
            object.__setattr__(state.stages, "warm_steps", 99)
        for step in range(8):
            train_step(state, batches(step), train_cfg)
        net = nets[tie] = state.objective.denoiser.backbone
        first, second, third = (d.state_dict() for d in net.decoders)
        spread[tie] = sum(
            float((a - b).norm())
            for other in (second, third)
            for a, b in zip(first.values(), other.values(), strict=True)
        )
    for part in ("encoder", "decoders.0"):
        wanted = nets[None].get_submodule(part).state_dict()
        for name, tensor in nets[1.0].get_submodule(part).state_dict().items():
            assert_near(tensor, wanted[name], NETWORK)
    assert spread[1.0] == 0 < spread[0.8] < spread[0.0] / 2


def test_the_largest_serves_all_stages_first(config: RunConfig) -> None:
    state, batches = started(config)
    assert [batches(step).stage for step in (0, 4)] == [1, 1]
    assert batches(5).stage == batches(5).counts
    for step in range(6):
        train_step(state, batches(step), config.train)
    after = snapshot(state)
    copied = after[
        "training/moments.denoiser.backbone.decoders.2.stack.blocks.0.mlp.up.weight.step"
    ]
    new = after["training/moments.denoiser.backbone.decoders.0.norm.weight.step"]
    assert copied == new == 6


def stop_at(config: RunConfig, run: Path, step: int) -> None:
    def progress(done: int, total: int) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(config, run, progress=progress)


def final(run: Path) -> dict[str, Tensor]:
    saved = load(run, list_steps(run)[-1])
    return {f"{g}/{n}": t for g, named in saved.tensors.items() for n, t in named.items()}


@pytest.mark.parametrize("batch", ["mixed", "single"])
def test_a_stop_around_the_copy_or_inside_a_window_changes_no_bit(
    config: RunConfig, batch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_draw, "WINDOW", 3)
    config = with_stages(config, batch=batch)
    train(config, tmp_path / "whole")
    for stops in ([4], [5], [6], [2, 7, 10]):
        run = tmp_path / f"run-{stops[0]}"
        for step in stops:
            stop_at(config, run, step)
        train(config, run)
        whole, stopped = final(tmp_path / "whole"), final(run)
        assert whole.keys() == stopped.keys()
        assert all(torch.equal(whole[name], stopped[name]) for name in whole)
        logs = [
            [json.loads(line)["loss"] for line in (r / "metrics.jsonl").read_text().splitlines()]
            for r in (tmp_path / "whole", run)
        ]
        assert logs[0] == logs[1]
    state = load(tmp_path / "whole", 12).state["history"]["shares"]
    assert set(state) == {"4", "5"}
    assert state["4"] != state["5"]
    assert open_run(tmp_path / "whole").denoiser.stages is not None


def test_a_decoder_without_rows_neither_moves_nor_decays(config: RunConfig) -> None:
    """Each step of single batches moves one decoder: weights, moments and what the EMA follows."""
    config = with_stages(config, batch="single", policy="uniform", warm_steps=0)
    state, batches = started(config)
    moved: set[int] = set()
    for step in range(8):
        before, batch = snapshot(state), batches(step)
        train_step(state, batch, config.train)
        after = snapshot(state)
        stage = batch.counts.index(12)
        for name in before:
            if name.startswith("ema/") or "decoders." not in name:
                continue
            own = f"decoders.{stage}." in name
            same = torch.equal(after[name], before[name])
            assert same or own, name
            if own and name.endswith("out.weight") and "stack" not in name:
                assert not same
        for k in {0, 1, 2} - moved - {stage}:  # never moved: its average is its start
            name = f"decoders.{k}.norm.weight"
            assert torch.equal(after[f"ema/{name}"], before[f"ema/{name}"])
        moved.add(stage)
    assert moved == {0, 1, 2}


def test_a_checkpoint_of_the_warm_start_is_sampled_with_the_one_decoder(
    config: RunConfig, tmp_path: Path
) -> None:
    config = with_stages(config, depths=(4, 4, 4))
    short = dataclasses.replace(config.train, checkpoint_every=4, keep_checkpoints=0)
    train(dataclasses.replace(config, train=short), tmp_path / "run")
    for step, alike in ((4, True), (8, False)):
        net = open_run(tmp_path / "run", step=step).denoiser.backbone
        x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
        outs = [net(x, t, stage=k) for k in range(3)]
        assert outs[0].std() > 0
        assert torch.equal(outs[0], outs[1]) == torch.equal(outs[0], outs[2]) == alike


def test_parting_takes_the_largest() -> None:
    net, other = (transformer((1, 3, 2), (None, None, None)) for _ in range(2))
    part_decoders(net)
    warm(other, 1)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"unbiased": True}, "stages.unbiased has no effect with stages.policy density"),
        ({"warm_steps": 50}, "stages.warm_steps is 50: .* below train.steps, 50"),
        ({"warm_steps": -1}, "stages.warm_steps is -1: it must not be negative"),
        ({"warm_steps": 5, "form": "unified"}, "stages.warm_steps has no effect"),
        ({"tie": 0.5}, "stages.tie has no effect without stages.warm_steps"),
        ({"tie": 1.0, "warm_steps": 5}, "stages.tie is 1.0: it must be at least 0 and below 1"),
        ({"policy": "losses"}, "stages.policy is 'losses': choose one of density, uniform, loss"),
        ({"batch": "one"}, "stages.batch is 'one': choose one of mixed, single"),
    ],
)
def test_settings_without_effect_are_refused(stages: dict[str, Any], message: str) -> None:
    body = {
        "data": "d",
        "model": {"width": 16, "heads": 2, "depth": 3},
        "stages": {"file": "s", "shared": 1, **stages},
        "train": {"steps": 50},
    }
    with pytest.raises(InputError, match=message):
        parse(body)
