"""The engine: passes, batches made early, steps that are not finite, optimizers, precision."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor, nn

from stratagem import prefetch
from stratagem.assemble import assemble
from stratagem.batches import Batch
from stratagem.checkpoint import list_steps, load
from stratagem.config import ModelConfig, RunConfig, StagesConfig, UNetModelConfig, parse
from stratagem.data.shards import DataSet
from stratagem.distributed import Parallel, World
from stratagem.errors import InputError, NonFinite
from stratagem.optimizers import Algorithm, blocks_of, make_optimizers
from stratagem.prefetch import Prefetch, threads_for, to_device
from stratagem.programs.train import train
from stratagem.stopping import Finite, Interrupted, StopFlag
from stratagem.train import TrainState, fit, prepare_blocks, train_step
from stratagem.train_config import TrainConfig, in_bf16
from tolerances import FLOAT32


@pytest.fixture(scope="module")
def config(blobs: DataSet) -> RunConfig:
    """A small transformer of two stages, without memory."""
    return RunConfig(
        data=str(blobs.path),
        seed=3,
        model=ModelConfig(width=16, depth=2, heads=2, patch=2, labels=True),
        stages=StagesConfig(edges=(0.0,), shared=1),
        train=TrainConfig(
            steps=6, batch_size=8, learning_rate=1e-3, threads=1, log_every=1, ema_decay=0.9
        ),
    )


def with_train(config: RunConfig, **settings: Any) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **settings))


def made(config: RunConfig) -> tuple[TrainState, Callable[[int], Batch]]:
    parts = assemble(config)
    state = TrainState(parts.objective, config.train, parts.batches.stages, seed=config.seed)
    return state, parts.batches


def weights(state: TrainState) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in state.objective.named_parameters()}


def after(config: RunConfig, steps: int = 4) -> dict[str, Tensor]:
    state, batches = made(config)
    for step in range(steps):
        train_step(state, batches(step), config.train)
    return weights(state)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], bound: float = 0.0) -> None:
    for name in a.keys() | b.keys():
        torch.testing.assert_close(a[name], b[name], rtol=bound, atol=bound, msg=name)


# --- exact resume, with everything that the engine adds ------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate": 3},
        {"optimizer": "muon", "weight_decay": 0.1},
        {"activation_checkpointing": True, "precision": "bf16"},
    ],
)
def test_resume_is_bit_equal(config: RunConfig, tmp_path: Path, settings: dict[str, Any]) -> None:
    config = with_train(config, **settings)
    train(config, tmp_path / "whole")
    parts = tmp_path / "parts"

    def pull(done: int, total: int) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(Interrupted) as stopped:
        train(config, parts, progress=pull)
    assert stopped.value.exit_code == 138
    train(config, parts)
    a, b = (load(run, list_steps(run)[-1]) for run in (tmp_path / "whole", parts))
    for group, named in a.tensors.items():
        assert_same(dict(named), dict(b.tensors[group]))
    assert a.state == b.state
    lines = [
        (run / "metrics.jsonl").read_text().splitlines() for run in (tmp_path / "whole", parts)
    ]
    assert len(lines[0]) == 6
    for one, other in zip(*lines, strict=True):
        drop = {"images_per_second": 0, "peak_memory_mib": 0}
        assert {**json.loads(one), **drop} == {**json.loads(other), **drop}


def test_prepared_blocks_keep_their_names(config: RunConfig) -> None:
    objective = assemble(config).objective
    names, blocks = list(objective.state_dict()), blocks_of(objective)
    before = [block.forward for block in blocks]
    prepare_blocks(blocks, with_train(config, activation_checkpointing=True).train)
    assert list(objective.state_dict()) == names
    assert all(block.forward != old for block, old in zip(blocks, before, strict=True))


def test_activation_checkpointing_changes_nothing(config: RunConfig) -> None:
    assert_same(after(config), after(with_train(config, activation_checkpointing=True)))


@pytest.mark.slow
def test_compiled_blocks_make_the_same_steps_under_the_same_names(
    config: RunConfig, tmp_path: Path
) -> None:
    compiled = with_train(config, compile=True)
    assert_same(after(config), after(compiled), 1e-4)
    train(compiled, tmp_path / "run")
    train(with_train(config, steps=8), tmp_path / "run")  # and plain ones go on
    assert list_steps(tmp_path / "run")[-1] == 8


def test_bf16_keeps_weights_moments_and_averages_in_float32(config: RunConfig) -> None:
    config = with_train(config, precision="bf16")
    state, batches = made(config)
    metrics = train_step(state, batches(0), config.train)
    kept = state.checkpoint().tensors
    assert {t.dtype for named in kept.values() for t in named.values()} == {torch.float32}
    assert {m.dtype for m in metrics.values()} == {torch.float32}
    full, half = after(with_train(config, precision="float32")), after(config)
    assert any(not torch.equal(full[n], half[n]) for n in full)
    assert_same(full, half, 2e-2)


def test_dropout_inside_the_network_is_a_function_of_the_step(
    config: RunConfig, tmp_path: Path
) -> None:
    unet = UNetModelConfig(width=8, mults=(1,), blocks=1, attention=(), dropout=0.5)
    config = dataclasses.replace(config, model=ModelConfig(), unet=unet, stages=None)
    before = torch.get_rng_state()
    train(config, tmp_path / "a")
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    train(config, tmp_path / "b")
    a, b = (load(tmp_path / run, 6).tensors["model"] for run in "ab")
    assert_same(dict(a), dict(b))
    plain = dataclasses.replace(unet, dropout=0.0)
    train(dataclasses.replace(config, unet=plain), tmp_path / "c")
    assert any(
        not torch.equal(a[n], t) for n, t in load(tmp_path / "c", 6).tensors["model"].items()
    )


# --- steps that are not finite -------------------------------------------------------------------


def spoilt(batches: Callable[[int], Batch], bad: set[int]) -> Callable[[int], Batch]:
    def make(step: int) -> Batch:
        batch = batches(step)
        return batch._replace(x=batch.x * float("inf")) if step in bad else batch

    return make


def fitted(config: RunConfig, bad: set[int], lag: int) -> TrainState:
    state, batches = made(config)
    state.finite = Finite(state.finite.limit, torch.device("cpu"), lag=lag)
    saved: list[TrainState] = []
    fit(state, spoilt(batches, bad), config.train, [], save=saved.append, stop=StopFlag())
    return state


@pytest.mark.parametrize("lag", [0, 1])
def test_a_skipped_step_leaves_weights_and_moments(
    config: RunConfig, lag: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Lag 1 is a GPU's way: the fused kernel looks at the verdict, the host only later."""
    config = with_train(config, nonfinite="skip", steps=1)
    once = fitted(config, set(), lag)
    skipped = fitted(with_train(config, steps=3), {1, 2}, lag)
    assert_same(weights(once), weights(skipped))
    for parameter, other in zip(
        once.objective.parameters(), skipped.objective.parameters(), strict=True
    ):
        a, b = once.moments(parameter), skipped.moments(other)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert float(skipped.sums["skipped"]) == 2
    assert torch.isfinite(skipped.sums["loss"])
    assert "at step 2, images [" in caplog.text
    assert skipped.step == 3
    assert_same(
        weights(fitted(with_train(config, steps=4), {1}, 0)),
        weights(fitted(with_train(config, steps=4), {1}, 1)),
    )


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_too_many_in_a_row_end_the_run(config: RunConfig, lag: int) -> None:
    """Steps that were sent to the device before the host knew move nothing either."""
    config = with_train(config, nonfinite="skip", nonfinite_limit=3, steps=20)
    state, batches = made(config)
    state.finite = Finite(3, torch.device("cpu"), lag=lag)
    make, saved = spoilt(batches, {0, 2, 3, 4}), list[TrainState]()
    with pytest.raises(NonFinite, match=r"at step 4, images \[.*3 steps in a row") as error:
        fit(state, make, config.train, [], save=saved.append, stop=StopFlag())
    assert error.value.exit_code == 4
    assert not saved
    expected = fitted(with_train(config, steps=3), {0, 2}, 0)
    assert_same(weights(state), weights(expected))


def test_a_checkpoint_is_not_written_before_the_verdict(config: RunConfig) -> None:
    state, batches = made(with_train(config, checkpoint_every=2))
    state.finite = Finite(1, torch.device("cpu"), lag=5)
    saved: list[int] = []
    with pytest.raises(NonFinite, match="at step 3"):
        fit(
            state,
            spoilt(batches, {3}),
            with_train(config, checkpoint_every=2).train,
            [],
            save=lambda s: saved.append(s.step),
            stop=StopFlag(),
        )
    assert saved == [2]


def test_skipped_steps_are_counted_in_the_log(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_train(config, nonfinite="skip", log_every=3)
    parts = assemble(config)
    monkeypatch.setattr(
        "stratagem.programs.train.assemble",
        lambda _: dataclasses.replace(parts, batches=Spoilt(parts.batches)),
    )
    train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["skipped"] for line in lines] == [1, 0]
    assert all(0 < line["loss"] < 10 for line in lines)
    assert abs(lines[0]["loss"] - lines[1]["loss"]) < 0.6 * lines[1]["loss"]


class Spoilt:
    """Batches of which the one of step 1 is not finite."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.stages = batches, batches.stages

    def __call__(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        return spoilt(lambda s: self.batches(s, rank, ranks), {1})(step)


# --- batches made early --------------------------------------------------------------------------


def numbered(step: int) -> Batch:
    row = torch.full((1,), float(step))
    return Batch(torch.tensor([step]), row, row, row, {"label": row}, row)


def makers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("batches")]


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_come_in_order_and_no_further_than_asked(threads: int) -> None:
    asked: list[int] = []

    def make(step: int) -> Batch:
        asked.append(step)
        return numbered(step)

    with Prefetch(make, 3, 50, depth=2, threads=threads) as batches:
        for step in range(3, 9):
            assert int(batches.take().ids) == step
        until = time.monotonic() + 60
        while len(asked) < 8 + threads and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.05)
        assert sorted(asked) == list(range(3, 11 + threads))  # two wait, and one in each hand
        assert len(makers()) <= threads
    assert not makers()


def test_threads_make_batches_side_by_side_and_give_them_in_order() -> None:
    """Step 2k is made only after step 2k + 1: one thread would never get past the first."""
    done = {step: threading.Event() for step in range(20)}

    def make(step: int) -> Batch:
        assert step % 2 or done[step + 1].wait(60)
        done[step].set()
        return numbered(step)

    with Prefetch(make, 0, 20, threads=2) as batches:
        assert [int(batches.take().ids) for _ in range(20)] == list(range(20))


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_the_background_is_raised_at_its_step(threads: int) -> None:
    def make(step: int) -> Batch:
        if step == 2:
            raise OSError("the disk is gone")
        return numbered(step)

    with Prefetch(make, 0, 9, threads=threads) as batches:
        for step in range(2):
            assert int(batches.take().ids) == step
        with pytest.raises(OSError, match="disk is gone"):
            batches.take()
    assert not makers()


def test_a_loop_that_ends_early_waits_for_no_batch_that_was_not_begun() -> None:
    asked, go = [], threading.Event()

    def make(step: int) -> Batch:
        asked.append(step)
        assert go.wait(60)
        return numbered(step)

    with Prefetch(make, 0, 99, depth=8, threads=2):
        while len(asked) < 2:
            time.sleep(0.001)
        threading.Timer(0.05, go.set).start()
    assert sorted(asked) == [0, 1]
    assert not makers()


def test_batches_are_made_while_a_step_runs() -> None:
    made = {step: threading.Event() for step in range(9)}

    def make(step: int) -> Batch:
        made[step].set()
        return numbered(step)

    with Prefetch(make, 0, 9, depth=2) as batches:
        for step in range(6):
            batches.take()
            assert made[step + 1].wait(60)  # without anybody asking for it
            assert made[step + 2].wait(60)


@pytest.mark.parametrize(
    ("precision", "capability", "expected"),
    [
        ("auto", (9, 0), True),
        ("auto", (7, 5), False),
        ("float32", (9, 0), False),
        ("bf16", (7, 5), True),
    ],
)
def test_bf16_is_for_gpus_that_multiply_it(
    monkeypatch: pytest.MonkeyPatch,
    precision: Literal["auto", "float32", "bf16"],
    capability: tuple[int, int],
    expected: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    cfg = TrainConfig(precision=precision)
    assert in_bf16(cfg, torch.device("cuda", 0)) == expected
    assert in_bf16(cfg, torch.device("cpu")) == (precision == "bf16")


@pytest.mark.parametrize(
    ("cores", "gpus", "processes", "threads"),
    [(16, 1, 1, 4), (16, 8, 1, 4), (32, 8, 8, 3), (32, 8, 16, 3), (8, 8, 8, 1), (2, 1, 1, 1)],
)
def test_threads_that_make_batches_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, gpus: int, processes: int, threads: int
) -> None:
    monkeypatch.setattr(prefetch, "cores", lambda: cores)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert threads_for(World(0, processes, torch.device("cuda", 0))) == threads
    assert threads_for(World(0, processes)) == 1  # a CPU's cores are the network's


def test_ids_stay_where_people_can_read_them() -> None:
    meta = to_device(numbered(1), torch.device("meta"))
    assert meta.ids.device.type == "cpu"
    assert {t.device.type for t in (meta.x, meta.eps, meta.t, meta.condition["label"])} == {"meta"}
    assert meta.weight is not None
    assert meta.weight.is_meta
    assert to_device(numbered(1), torch.device("cpu")).ids == 1


# --- optimizers ----------------------------------------------------------------------------------


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest(config: RunConfig) -> None:
    state, _ = made(with_train(config, optimizer="muon"))
    names = {p: n for n, p in state.objective.named_parameters()}
    adamw, muon = (
        {names[p] for group in o.param_groups for p in group["params"]} for o in state.optimizers
    )
    assert adamw | muon == set(names.values())
    assert not adamw & muon
    assert all("stack.blocks" in n and n.endswith("weight") for n in muon)
    assert any("attention.qkv" in n for n in muon)
    assert {n for n in adamw if "blocks" in n and n.endswith("weight") and "norm" not in n} == set()
    assert len(blocks_of(state.objective)) == 3  # one shared, one of each stage
    assert get_args(Algorithm) == ("adamw", "muon")
    assert get_args(Parallel) == ("ddp", "fsdp")


def test_both_optimizers_learn_at_one_rate(config: RunConfig) -> None:
    """Muon's updates are scaled to the root-mean-square of AdamW's, 0.2 of the learning rate."""
    net = nn.ModuleList([nn.Linear(32, 32)])
    rest = {"learning_rate": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.0}
    muon = make_optimizers(net, "muon", **rest)[-1]
    before = net[0].weight.detach().clone()
    (net[0](torch.randn(64, 32)) ** 2).mean().backward()
    muon.step()
    moved = (net[0].weight - before).square().mean().sqrt().item()
    assert moved == pytest.approx(0.2 * 0.01, rel=0.2)
    for optimizer in get_args(Algorithm):
        long = with_train(config, optimizer=optimizer, learning_rate=3e-3, steps=40)
        state, batches = made(long)
        losses = [float(train_step(state, batches(s), long.train)["loss"]) for s in range(40)]
        assert sum(losses[-10:]) < 0.7 * sum(losses[:10]), optimizer


def test_settings_without_effect_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    for settings, message in [
        ({"nonfinite_limit": 3}, "nonfinite_limit has no effect"),
        ({"sharded_checkpoints": True}, "sharded_checkpoints has no effect"),
        ({"optimizer": "muon", "parallel": "fsdp"}, "muon does not go with"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"optimizer": "sgd"}, "choose one of adamw, muon"),
        ({"device": "tpu"}, "choose one of auto, cpu, cuda"),
    ]:
        with pytest.raises(InputError, match=message):
            parse({"data": "d", "train": settings})


def test_bf16_on_a_cpu_is_warned_of(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        train(with_train(config, precision="bf16", steps=1, device="cpu"), tmp_path / "run")
    assert "bf16 is slower" in caplog.text


def test_what_does_not_make_another_run_may_change(config: RunConfig, tmp_path: Path) -> None:
    train(with_train(config, steps=2), tmp_path / "run")
    other = {"accumulate": 2, "parallel": "fsdp", "nonfinite": "skip", "device": "cpu"}
    assert train(with_train(config, **other), tmp_path / "run").step == 6
    with pytest.raises(InputError, match=r"train\.precision is 'bf16'"):
        train(with_train(config, precision="bf16"), tmp_path / "run")
    assert FLOAT32 == 1e-5
