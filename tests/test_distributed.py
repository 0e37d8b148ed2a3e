"""Several processes train as one: the same samples, the same steps, the same names."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from stratagem import checkpoint
from stratagem.assemble import assemble
from stratagem.batches import Batch, Batches
from stratagem.config import MemoryConfig, ModelConfig, RunConfig, StagesConfig, dump, load
from stratagem.data.shards import DataSet
from stratagem.distributed import (
    World,
    Wrapped,
    apart,
    connect,
    fill,
    full,
    launched,
    like,
    rank,
    wrap,
    write_shards,
)
from stratagem.errors import InputError, NonFinite, StratagemError
from stratagem.memory.bank import MemoryBank
from stratagem.memory.store import hold
from stratagem.stages import Stages
from stratagem.stopping import Interrupted, StopFlag
from stratagem.train import Hook, TrainState, fit
from stratagem.train_config import TrainConfig

EXACT = 1e-12  # float64: the rounding of sums in another order

# --- what each process does ----------------------------------------------------------------------


def in_float64(batch: Batch) -> Batch:
    condition = {n: c.double() if c.is_floating_point() else c for n, c in batch.condition.items()}
    weight = None if batch.weight is None else batch.weight.double()
    return batch._replace(
        x=batch.x.double(),
        eps=batch.eps.double(),
        t=batch.t.double(),
        condition=condition,
        weight=weight,
    )


def trained(
    config: RunConfig,
    run: Path,
    world: World,
    stop_at: int = 0,
    spoil: Callable[[Batch, int], Batch] | None = None,
) -> tuple[TrainState, list[list[int]]]:
    """Trains in float64 until the end or a stop, from where the run stands; returns ids by step."""
    parts, cfg = assemble(config), config.train
    parts.objective.double()
    state = TrainState(parts.objective, cfg, parts.batches.stages, world=world, seed=config.seed)
    saved = checkpoint.load_latest(run)
    if saved is not None:
        state.restore(saved)
    seen: list[list[int]] = []

    def batches(step: int) -> Batch:
        batch = in_float64(parts.batches(step, world.rank, world.size))
        return batch if spoil is None else spoil(batch, step)

    def note(state: TrainState) -> None:
        own = parts.batches(state.step - 1, world.rank, world.size).ids.tolist()
        shares = world.gather(own)
        seen.append([share[i] for i in range(len(shares[0])) for share in shares if i < len(share)])

    stop = StopFlag()

    def pull(state: TrainState) -> None:
        if world.rank == world.size - 1 and state.step == stop_at:
            stop.number = signal.SIGTERM

    def save(state: TrainState) -> None:
        sharded = cfg.sharded_checkpoints and world.size > 1
        checkpoint.save(run, state.checkpoint(), world=world, sharded=sharded)

    hooks = [Hook(1, note), Hook(1, pull)]
    if not stop_at:
        fit(state, batches, cfg, hooks, save=save, stop=stop)
        return state, seen
    with pytest.raises(Interrupted) as stopped:
        fit(state, batches, cfg, hooks, save=save, stop=stop)
    assert stopped.value.exit_code == 143
    assert state.step == stop_at
    return state, seen


def process(
    number: int, size: int, port: int, name: str, folder: Path, ways: tuple[str, ...]
) -> None:
    """One of `size` processes; runs the scenario of that name."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(number), WORLD_SIZE=str(size), LOCAL_RANK=str(number))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    config = load(folder / "config.yaml")
    with connect("cpu") as world:
        SCENARIOS[name](config, folder, world, ways)


def with_train(config: RunConfig, **settings: Any) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **settings))


def configured(config: RunConfig, way: str) -> RunConfig:
    """The configuration of a way; "single" has one stage per step, after a warm start."""
    if way.startswith("single"):
        assert config.stages is not None
        drawn = {"batch": "single", "policy": "loss", "warm_steps": 2}
        config = dataclasses.replace(config, stages=dataclasses.replace(config.stages, **drawn))
    return with_train(config, **WAYS[way])


WAYS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp-passes": {"accumulate": 2},
    "fsdp": {"parallel": "fsdp"},
    "fsdp-passes": {"parallel": "fsdp", "accumulate": 3},
    "shards": {"parallel": "fsdp", "sharded_checkpoints": True},
    "single": {},
    "single-fsdp": {"parallel": "fsdp"},
    "muon": {"optimizer": "muon", "activation_checkpointing": True},
}


def whole_runs(config: RunConfig, folder: Path, world: World, ways: tuple[str, ...]) -> None:
    """A whole run in every way."""
    for way in ways:
        run = folder / f"{way}-{world.size}"
        _, seen = trained(configured(config, way), run, world)
        if world.rank == 0:
            (run / "seen.json").write_text(json.dumps(seen))


def first_halves(config: RunConfig, folder: Path, world: World, ways: tuple[str, ...]) -> None:
    """Runs that stop at step 3, to be gone on with by others."""
    for way in ways:
        run = folder / f"{way}-half-{world.size}"
        _, seen = trained(configured(config, way), run, world, stop_at=3)
        if world.rank == 0:
            (run / "seen.json").write_text(json.dumps(seen))


def second_halves(config: RunConfig, folder: Path, world: World, ways: tuple[str, ...]) -> None:
    """Goes on with every run that stands at step 3."""
    for way in ways:
        run = next(folder.glob(f"{way}-half-*"))
        _, seen = trained(configured(config, way), run, world)
        if world.rank == 0:
            before = json.loads((run / "seen.json").read_text())
            (run / "seen.json").write_text(json.dumps(before + seen))


def fail_on(world: World, number: int) -> None:
    if world.rank == number:
        raise InputError("mine")


def trouble(config: RunConfig, folder: Path, world: World, ways: tuple[str, ...]) -> None:
    """A failure of one process is one of all; so is a NaN."""
    error: type[Exception] = InputError if world.rank == 1 else StratagemError
    with pytest.raises(error, match="mine") as failed, world.together():
        fail_on(world, 1)
    assert failed.value.exit_code == 2
    assert world.gather(world.rank) == [0, 1]
    assert world.first(world.rank) == 0
    assert world.largest(world.rank) == 1
    assert world.sum(torch.ones(2)).tolist() == [2, 2]

    def spoil(batch: Batch, step: int) -> Batch:
        bad = step in (1, 2) and world.rank == 1
        return batch._replace(x=batch.x * float("nan")) if bad else batch

    for way in ways:
        once = configured(config, way)
        with pytest.raises(NonFinite, match="step 1"):
            trained(once, folder / f"{way}-stop", world, spoil=spoil)
        skipping = with_train(config, nonfinite="skip", nonfinite_limit=3, **WAYS[way])
        state, _ = trained(skipping, folder / f"{way}-skip", world, spoil=spoil)
        assert all(torch.isfinite(full(p)).all() for p in state.objective.parameters())
        assert float(state.sums["skipped"]) == 2
        skipping = with_train(config, nonfinite="skip", nonfinite_limit=2, **WAYS[way])
        with pytest.raises(NonFinite, match="2 steps in a row"):
            trained(skipping, folder / f"{way}-limit", world, spoil=spoil)


SCENARIOS = {f.__name__: f for f in (whole_runs, first_halves, second_halves, trouble)}


# --- and what must come of it --------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on(size: int, name: str, folder: Path, *ways: str) -> None:
    if size == 1:
        SCENARIOS[name](load(folder / "config.yaml"), folder, World(), ways)
    else:
        spawn(process, (size, free_port(), name, folder, ways), nprocs=size)


@pytest.fixture(scope="module")
def folder(blobs: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with everything: memory, dropped conditions, stages of unequal rows."""
    folder = tmp_path_factory.mktemp("ranks")
    images = blobs.images(torch.arange(blobs.num))
    sides = [side.float().flatten(1) + 1 for side in (images, images.flip(-1))]
    store = hold(torch.stack(sides, dim=1))
    bank = MemoryBank(store, blobs.labels, blobs.held_out, {}, blobs.fingerprint)
    bank.save(folder / "bank")
    Stages((2.0, -2.0)).save(folder / "stages", {"data": blobs.fingerprint})
    config = RunConfig(
        data=str(blobs.path),
        seed=5,
        model=ModelConfig(width=16, depth=3, heads=2, patch=2, labels=True),
        memory=MemoryConfig(str(folder / "bank"), dropout=0.4),
        stages=StagesConfig(str(folder / "stages"), 1, (2, 1, 1)),
        train=TrainConfig(
            steps=6,
            batch_size=13,  # the same number of rows for nobody
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=2,
            ema_decay=0.9,
            cosine_weight=0.5,
            condition_dropout=0.2,
            threads=1,
        ),
    )
    (folder / "config.yaml").write_text(dump(config))
    on(1, "whole_runs", folder, "ddp", "ddp-passes", "single", "muon")
    return folder


def final(run: Path) -> dict[str, Tensor]:
    saved = checkpoint.load_latest(run)
    assert saved is not None
    assert saved.step == 6
    return {f"{g}/{n}": t for g, named in saved.tensors.items() for n, t in named.items()}


def check_equal(run: Path, folder: Path) -> None:
    """The run saw the same samples in the same order, and came to the same end."""
    way = run.name.split("-")[0]
    whole, other = final(folder / f"{way if way in ('single', 'muon') else 'ddp'}-1"), final(run)
    assert whole.keys() == other.keys()
    for name, tensor in whole.items():
        bound = EXACT if tensor.dtype == torch.float64 else 1e-6
        assert other[name].dtype == tensor.dtype, name
        torch.testing.assert_close(other[name], tensor, rtol=bound, atol=bound, msg=name)
    seen = [json.loads((r / "seen.json").read_text()) for r in (run, folder / "ddp-1")]
    assert seen[0] == seen[1]
    assert sum(map(len, seen[0])) == 6 * 13


def test_passes_of_one_process_make_the_same_step(folder: Path) -> None:
    check_equal(folder / "ddp-passes-1", folder)
    assert any(t.dtype == torch.float64 for t in final(folder / "ddp-1").values())


def test_the_average_is_float32_and_has_moved(folder: Path) -> None:
    tensors = final(folder / "ddp-1")
    for name in (n for n in tensors if n.startswith("ema/")):
        assert tensors[name].dtype == torch.float32
        weights = tensors["model/" + name.removeprefix("ema/")]
        assert not torch.equal(tensors[name].double(), weights), name


def check_processes(folder: Path, size: int, *ways: str) -> None:
    for way in ways:
        shutil.rmtree(folder / f"{way}-{size}", ignore_errors=True)
    on(size, "whole_runs", folder, *ways)
    for way in ways:
        check_equal(folder / f"{way}-{size}", folder)
        shards = (folder / f"{way}-{size}" / "checkpoints").rglob("shard-*")
        assert len(list(shards)) == (size if way == "shards" else 0)


def test_two_processes_make_the_steps_of_one(folder: Path) -> None:
    """With DDP and passes; and with FSDP, each process with its shard of the checkpoint."""
    check_processes(folder, 2, "ddp-passes", "shards", "single")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_processes_make_the_steps_of_one_in_every_way(folder: Path, size: int) -> None:
    check_processes(folder, size, *WAYS)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "then"), [(2, 1), (1, 2), (4, 2)])
def test_another_number_of_processes_goes_on(
    folder: Path, tmp_path: Path, size: int, then: int
) -> None:
    (tmp_path / "config.yaml").write_text((folder / "config.yaml").read_text())
    ways = ("ddp", "fsdp", "shards")
    on(size, "first_halves", tmp_path, *ways)
    on(then, "second_halves", tmp_path, *ways)
    runs = sorted(tmp_path.glob("*-half-*"))
    assert len(runs) == 3
    for run in runs:
        check_equal(run, folder)


@pytest.mark.slow
def test_trouble_of_one_is_trouble_of_all(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((folder / "config.yaml").read_text())
    on(2, "trouble", tmp_path, "ddp", "fsdp")


def started(run: Path, config: Path, port: int, *settings: str) -> list[subprocess.Popen[str]]:
    """The command line on two processes, as torchrun starts them."""
    command = [sys.executable, "-m", "stratagem", "train", str(config), "--out", str(run)]
    for setting in settings:
        command += ["--set", setting]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", **os.environ}
    return [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(k), "LOCAL_RANK": str(k)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(2)
    ]


@pytest.mark.slow
def test_losses_in_float32_and_signals_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    config = load(folder / "config.yaml")
    config = with_train(config, steps=20, log_every=1, condition_dropout=0.0)
    (tmp_path / "config.yaml").write_text(dump(config))
    alone = [sys.executable, "-m", "stratagem", "train", str(tmp_path / "config.yaml")]
    subprocess.run([*alone, "--out", str(tmp_path / "one")], check=True)
    for done in started(tmp_path / "two", tmp_path / "config.yaml", free_port()):
        assert done.wait(60) == 0, done.stderr
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / n / "metrics.jsonl").open()]
        for n in ("one", "two")
    ]
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)

    run, settings = tmp_path / "long", ("train.steps=100000", "train.schedule=constant")
    processes = started(run, tmp_path / "config.yaml", free_port(), *settings)
    until = time.monotonic() + 60
    while not (run / "metrics.jsonl").is_file() and time.monotonic() < until:
        time.sleep(0.1)
    for refused in started(run, tmp_path / "config.yaml", free_port(), *settings):
        said = refused.communicate(timeout=60)[1]
        assert refused.returncode == 2
        assert "another process trains" in said
    processes[1].send_signal(signal.SIGTERM)
    stopped = [p.communicate(timeout=60)[1] for p in processes]
    assert [p.returncode for p in processes] == [143, 143]
    saved = checkpoint.load_latest(run)
    assert saved is not None
    assert [f"stopped at step {saved.step}" in text for text in stopped] == [True, False]


def test_rows_of_processes_are_those_of_the_whole(blobs: DataSet, folder: Path) -> None:
    batches: Batches = assemble(load(folder / "config.yaml")).batches
    whole = batches(3)
    assert whole.whole is None
    for ranks in (1, 2, 5, 8):
        for own in range(ranks):
            part = batches(3, own, ranks)
            cut = whole.part(own, ranks)
            assert part.size == cut.size == 13
            assert part.counts == cut.counts
            for a, b in zip(part, cut, strict=True):
                if isinstance(a, Tensor):
                    assert torch.equal(a, b)
            assert part.condition.keys() == cut.condition.keys()
            assert all(torch.equal(part.condition[n], cut.condition[n]) for n in cut.condition)


def test_a_launcher_is_known_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not launched()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched()


def test_one_process_needs_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert rank() == 0
    with connect("cpu") as world:
        assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")
        assert world.largest(7) == 7
        module = torch.nn.Linear(2, 2)
        assert isinstance(wrap(module, [], world, "fsdp"), Wrapped)
        assert wrap(module, [], world, "ddp").call is module
    assert apart("cpu") == World()
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(InputError, match="WORLD_SIZE"):
        rank()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="torchrun"), connect("cpu"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=r"train\.device cuda"), connect("cuda"):
        pass


def test_tensors_keep_their_place_and_shape(tmp_path: Path) -> None:
    target, whole = torch.zeros(3), torch.arange(3.0)
    fill(target, whole)
    assert torch.equal(target, whole)
    assert full(target) is target
    assert like(whole, target) is not whole
    with pytest.raises(ValueError, match="shape"):
        fill(target, torch.zeros(2))


def test_shards_are_put_together(tmp_path: Path) -> None:
    """Files as `write_shards` makes them: the header says where each piece belongs."""
    whole = torch.arange(24.0).view(4, 6)
    for number, rows in enumerate((slice(0, 3), slice(3, 4))):
        places = {"model/w": {"saved_offsets": [rows.start, 0]}}
        tensors = {"model/w": whole[rows].contiguous()}
        if number:
            tensors["training/step"] = torch.tensor(4.0)
            places["training/step"] = {"saved_offsets": []}
        file = tmp_path / f"shard-{number}.safetensors"
        save_file(tensors, file, {"DCP_SHARDING_INFO": json.dumps(places)})
    model, training = (checkpoint._Shards(tmp_path, f"{g}/") for g in ("model", "training"))
    assert (list(model), len(model)) == (["w"], 1)
    assert torch.equal(model["w"], whole)
    assert float(training["step"]) == 4
    assert callable(write_shards)


def test_too_few_rows_are_refused(folder: Path, tmp_path: Path) -> None:
    from stratagem.programs.train import train

    config = with_train(load(folder / "config.yaml"), accumulate=14)
    with pytest.raises(InputError, match="cannot be split"):
        train(config, tmp_path / "run")
    body = yaml.safe_load((folder / "config.yaml").read_text())
    assert body["train"]["batch_size"] == 13
