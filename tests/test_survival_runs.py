"""Runs survive: stops, signals, numbers that are not finite, and thousands of steps."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stratagem.assemble import assemble
from stratagem.batches import Batch, Batches
from stratagem.checkpoint import list_steps, load, load_latest, save
from stratagem.cli import main
from stratagem.config import (
    MemoryConfig,
    ModelConfig,
    RunConfig,
    StagesConfig,
    UNetModelConfig,
    dump,
)
from stratagem.data.shards import DataSet
from stratagem.errors import NonFinite
from stratagem.memory.bank import MemoryBank
from stratagem.memory.store import hold
from stratagem.programs.train import train
from stratagem.stopping import Finite, Interrupted, StopFlag
from stratagem.train import TrainState, fit, train_step
from stratagem.train_config import TrainConfig


@pytest.fixture(scope="module")
def config(blobs: DataSet, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """All that a checkpoint must hold: dropped snippets, passes, unequal stages, losses, EMA.

    An epoch has 32 images, four steps of eight.
    """
    bank = tmp_path_factory.mktemp("bank") / "bank"
    sides = torch.rand(blobs.num, 2, 6)
    MemoryBank(hold(sides), blobs.labels, blobs.held_out, {}, blobs.fingerprint).save(bank)
    return RunConfig(
        data=str(blobs.path),
        seed=11,
        model=ModelConfig(width=16, depth=3, heads=2, patch=4, labels=True),
        memory=MemoryConfig(str(bank), dropout=0.4, jitter=0.1),
        stages=StagesConfig(edges=(1.0, -1.0), shared=1, depths=(2, 1, 1), policy="loss"),
        train=TrainConfig(
            steps=12,
            batch_size=8,
            accumulate=2,
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=2,
            ema_decay=0.9,
            cosine_weight=0.5,
            condition_dropout=0.2,
            log_every=1,
            threads=1,
        ),
    )


def with_train(config: RunConfig, **settings: Any) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **settings))


def everything(run: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[dict[str, Any]]]:
    """Weights, moments, averages; the rest of the state; the log, but for what measures time."""
    saved = load(run, list_steps(run)[-1])
    tensors = {f"{g}/{n}": t for g, named in saved.tensors.items() for n, t in named.items()}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = {"images_per_second", "peak_memory_mib"}
    log = [{name: line[name] for name in line.keys() - timed} for line in lines]
    return tensors, saved.state, log


def differences(a: Path, b: Path) -> int:
    (tensors, state, log), (others, other_state, other_log) = everything(a), everything(b)
    assert tensors.keys() == others.keys()
    assert state == other_state
    assert log == other_log
    return sum(int((tensors[n] != others[n]).sum()) for n in tensors)


# --- 1: exact resume -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(config, run)
    return run


@pytest.mark.parametrize(
    "stops", [[0], [2], [4], [5, 7], [0, 2, 4, 6, 8, 11]], ids=lambda s: "-".join(map(str, s))
)
def test_resume_is_bit_equal(
    config: RunConfig, whole: Path, tmp_path: Path, stops: list[int]
) -> None:
    """At step 0, inside an epoch, at its end (4, 8), twice in one epoch (5 and 7), and often."""
    run = tmp_path / "parts"
    for step in stops:

        def pull(done: int, total: int, step: int = step) -> None:
            if done == step:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Interrupted):
            train(config, run, progress=pull)
        assert list_steps(run)[-1] == max(step, 1)
    train(config, run)
    numbers = sum(t.numel() for t in everything(run)[0].values())
    found = differences(whole, run)
    print(f"\nstopped at {stops}: {found} of {numbers:,} numbers differ")
    assert found == 0


# --- 5: signals ----------------------------------------------------------------------------------

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}


@pytest.mark.parametrize("number", CODES)
def test_a_signal_is_heard_within_a_step(
    config: RunConfig, tmp_path: Path, number: signal.Signals
) -> None:
    """Sent from outside the loop, at any moment of a step."""
    at: list[int] = []

    def pull(done: int, total: int) -> None:
        if done == 3:
            at.append(done)
            threading.Timer(0.005, os.kill, (os.getpid(), number)).start()
        elif at and done > 3:
            at.append(done)
            time.sleep(0.004)

    with pytest.raises(Interrupted) as stopped:
        train(
            with_train(config, steps=100_000, schedule="constant"), tmp_path / "run", progress=pull
        )
    assert stopped.value.exit_code == CODES[number]
    saved = load_latest(tmp_path / "run")
    assert saved is not None
    assert saved.step == at[-1]
    assert saved.step <= 3 + 5


def command(config: Path, run: Path, *settings: str) -> list[str]:
    found = [sys.executable, "-m", "stratagem", "train", str(config), "--out", str(run)]
    return [*found, *(word for setting in settings for word in ("--set", setting))]


def started(words: list[str], rank: int = 0, size: int = 1, port: int = 0) -> Any:
    world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(world if size > 1 else {})}
    return subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True)


def wait_for(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 90
    while not done():
        assert time.monotonic() < until
        time.sleep(0.02)


def lines_of(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_stop_and_go_on_bit_equal(config: RunConfig, tmp_path: Path) -> None:
    """A signal to one of them, three times over, with batches made in the background."""
    (tmp_path / "c.yaml").write_text(dump(with_train(config, steps=50)))

    def begin(name: str) -> list[Any]:
        words, port = command(tmp_path / "c.yaml", tmp_path / name), free_port()
        return [started(words, rank, 2, port) for rank in range(2)]

    for one in begin("whole"):
        assert one.wait(90) == 0, one.stderr.read()
    for number, code in CODES.items():
        before = lines_of(tmp_path / "parts")
        processes = begin("parts")
        wait_for(lambda before=before: lines_of(tmp_path / "parts") >= before + 3)
        processes[1].send_signal(number)
        for one in processes:
            said = one.communicate(timeout=60)[1]
            assert one.returncode == code, said
        saved = load_latest(tmp_path / "parts")
        assert saved is not None
        print(f"\n{number.name} to one of two: both ended at step {saved.step}, code {code}")
        assert before < saved.step < 50
    for one in begin("parts"):
        assert one.wait(90) == 0, one.stderr.read()
    assert differences(tmp_path / "whole", tmp_path / "parts") == 0


SLOW_STEP = """
import sys, time
from pathlib import Path
from stratagem import train as loop
from stratagem.programs import train as program
from stratagem.config import load

def slow(*args, **keywords):
    Path(sys.argv[2] + ".began").touch()
    time.sleep(60)

loop.train_step = slow
program.train(load(Path(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_second_signal_leaves_at_once(
    config: RunConfig, tmp_path: Path, number: signal.Signals
) -> None:
    """Inside a step of a minute."""
    (tmp_path / "c.yaml").write_text(dump(config))
    words = [sys.executable, "-c", SLOW_STEP, str(tmp_path / "c.yaml"), str(tmp_path / "run")]
    process = started(words)
    wait_for((tmp_path / "run.began").exists)
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    begun = time.monotonic()
    process.send_signal(number)
    assert process.wait(5) == -number
    print(f"\nleft {1000 * (time.monotonic() - begun):.0f} ms after the second signal")


# --- 6: numbers that are not finite --------------------------------------------------------------


def made(config: RunConfig) -> tuple[TrainState, Batches]:
    parts = assemble(config)
    state = TrainState(parts.objective, config.train, parts.batches.stages, seed=config.seed)
    return state, parts.batches


class Spoiler:
    """Puts a value into one place of a step."""

    def __init__(self, where: str, value: float, state: TrainState, bad: set[int]) -> None:
        self.where, self.value, self.state, self.bad = where, value, state, bad
        self.weight = next(p for n, p in state.objective.named_parameters() if "embed" in n)
        if where == "gradient":
            self.weight.register_hook(self._gradient)

    def __call__(self, batches: Batches) -> Callable[[int], Batch]:
        def make(step: int) -> Batch:
            batch = batches(step)
            if step not in self.bad:
                return batch
            if self.where == "input":
                batch.x[0, 0, 0, 0] = self.value
            elif self.where == "condition":
                batch.condition["memory"][1, 2] = self.value
            elif self.where == "loss":
                assert batch.weight is not None
                batch.weight[0] = self.value
            return batch

        return make

    def _gradient(self, gradient: Tensor) -> Tensor:
        if self.state.step not in self.bad:
            return gradient
        spoilt = gradient.clone()
        spoilt[0, 0] = self.value
        return spoilt


def kept(state: TrainState) -> dict[str, Tensor]:
    """Weights and moments."""
    saved = state.checkpoint().tensors
    return {f"{g}/{n}": t.clone() for g in ("model", "training") for n, t in saved[g].items()}


@pytest.mark.parametrize(
    ("value", "lag"), [(float("nan"), 0), (float("inf"), 1)], ids=["nan", "inf-as-on-a-gpu"]
)
@pytest.mark.parametrize("where", ["input", "condition", "loss", "gradient"])
def test_what_is_not_finite_moves_nothing(
    config: RunConfig, where: str, value: float, lag: int, caplog: pytest.LogCaptureFixture
) -> None:
    """By policy: stopped at once, or skipped; and ended after so many in a row."""
    plain = with_train(config, accumulate=1)

    def run(config: RunConfig, bad: set[int], steps: int) -> TrainState:
        cfg = dataclasses.replace(config.train, steps=steps)
        state, batches = made(config)
        state.finite = Finite(state.finite.limit, torch.device("cpu"), lag=lag)
        states.append(state)
        make = Spoiler(where, value, state, bad)(batches)
        fit(state, make, cfg, [], save=lambda _: None, stop=StopFlag())
        return state

    states: list[TrainState] = []
    good = kept(run(plain, set(), 2))
    with pytest.raises(NonFinite, match=r"at step 2, images \[\d+(, \d+)*\]") as stopped:
        run(plain, {2, 3, 4}, 8)
    assert stopped.value.exit_code == 4
    assert all(torch.equal(t, good[n]) for n, t in kept(states[-1]).items())
    skipping = with_train(plain, nonfinite="skip", nonfinite_limit=3)
    state = run(skipping, {2, 3}, 4)
    assert all(torch.equal(t, good[n]) for n, t in kept(state).items())
    assert float(state.sums["skipped"]) == 2
    assert "at step 3, images [" in caplog.text
    with pytest.raises(NonFinite, match="3 steps in a row"):
        run(skipping, {2, 3, 4}, 8)
    assert all(torch.equal(t, good[n]) for n, t in kept(states[-1]).items())


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_weights_that_are_not_finite_are_never_saved(config: RunConfig, nonfinite: str) -> None:
    """As a faulty memory makes them: in the weights, or in the average alone."""
    config = with_train(config, nonfinite=nonfinite, checkpoint_every=2)
    for name in ("weight", "average"):
        state, batches = made(config)
        tensors = dict(state.objective.denoiser.backbone.named_parameters())
        tensors = tensors if name == "weight" else state.ema.weights
        with torch.no_grad():
            next(iter(tensors.values())).view(-1)[0] = float("nan")
        saved: list[int] = []
        with pytest.raises(NonFinite, match="not finite at step") as error:
            fit(
                state,
                batches,
                config.train,
                [],
                save=lambda s: saved.append(s.step),  # noqa: B023
                stop=StopFlag(),
            )
        assert error.value.exit_code == 4
        assert not saved


def test_the_program_ends_with_code_4(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = with_train(
        config, learning_rate=1e30, warmup_steps=0, schedule="constant", grad_clip=1e30
    )
    (tmp_path / "c.yaml").write_text(dump(wild))
    assert main(["train", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 4
    said = capsys.readouterr().err.splitlines()[-1]
    assert "is not finite at step" in said
    assert "lower train.learning_rate" in said


def test_the_log_has_the_gradient_and_every_term(config: RunConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "run")
    for line in everything(tmp_path / "run")[2]:
        assert {"loss", "cosine", "grad_norm", "learning_rate", "step"} <= line.keys()


# --- 7: many steps -------------------------------------------------------------------------------

LONG = """
import json, os, sys
from pathlib import Path
from stratagem.config import load
from stratagem.programs.train import train

pages = os.sysconf("SC_PAGE_SIZE")
found = {}

def look(done, total):
    if done in (1000, 5000):
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * pages
        found[done] = resident, len(os.listdir("/proc/self/fd"))

train(load(Path(sys.argv[1])), Path(sys.argv[2]), progress=look)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_5000_steps_leak_nothing(config: RunConfig, tmp_path: Path) -> None:
    assert config.stages is not None
    small = dataclasses.replace(
        config,
        stages=None,
        model=ModelConfig(width=16, depth=1, heads=2, patch=4),
    )
    small = with_train(small, steps=5000, accumulate=1, checkpoint_every=250, log_every=20)
    (tmp_path / "c.yaml").write_text(dump(small))
    words = [sys.executable, "-c", LONG, str(tmp_path / "c.yaml"), str(tmp_path / "run")]
    done = subprocess.run(
        words,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    (early, handles), (late, later) = json.loads(done.stdout).values()
    print(f"\nresident {early / 2**20:.1f} -> {late / 2**20:.1f} MiB, handles {handles} -> {later}")
    assert later == handles
    assert late < 1.01 * early


def test_handles_stay_constant(config: RunConfig, tmp_path: Path) -> None:
    found: list[int] = []

    def look(done: int, total: int) -> None:
        found.append(len(os.listdir("/proc/self/fd")))

    train(with_train(config, checkpoint_every=2), tmp_path / "run", progress=look)
    assert len(set(found[3:])) == 1, found


# --- 8: names and precision ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "way",
    [{"activation_checkpointing": True}, {"precision": "bf16"}],
)
def test_names_are_the_same_in_every_way(
    config: RunConfig, whole: Path, tmp_path: Path, way: dict[str, Any]
) -> None:
    """And what was saved so is loaded plain.

    Compiled blocks: tests/test_engine.py; DDP and FSDP: tests/test_distributed.py.
    """
    other = with_train(config, **way)
    state, batches = made(other)
    train_step(state, batches(0), other.train)
    save(tmp_path, state.checkpoint())
    plain = {group: set(named) for group, named in load(whole, 12).tensors.items()}
    assert {group: set(named) for group, named in load(tmp_path, 1).tensors.items()} == plain
    back = made(config)[0]
    back.restore(load(tmp_path, 1))
    assert all(torch.equal(t, kept(state)[n]) for n, t in kept(back).items())
    weights = dict(state.objective.denoiser.backbone.named_parameters())
    assert any(not torch.equal(t, weights[n]) for n, t in state.ema.weights.items())


@pytest.mark.parametrize("net", ["sit", "lightningdit", "unet"])
def test_norms_and_averages_are_float32_under_bf16(config: RunConfig, net: str) -> None:
    """The residual stream of transformers is float32, and so is what their norms give.

    Norms of what a product gave, of queries and keys or in a U-Net, take and give its bf16, but
    compute in float32: they give the float32 norm, rounded.
    """
    if net == "unet":
        unet = UNetModelConfig(width=8, mults=(1,), blocks=1, attention=(8,))
        staged = StagesConfig(edges=(0.0,))
        config = dataclasses.replace(config, model=ModelConfig(), unet=unet, stages=staged)
    else:
        model = dataclasses.replace(config.model, style=net, qk_norm=True)
        config = dataclasses.replace(config, model=model)
    config = with_train(config, precision="bf16")
    state, batches = made(config)
    wide, narrow = set[str](), set[str]()
    for name, module in state.objective.named_modules():
        if not isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
            continue

        def note(norm: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            if inputs[0].dtype == output.dtype == torch.float32:
                wide.add(name)
                return
            narrow.add(name)
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                exact = type(norm).forward(norm, inputs[0].float())
            torch.testing.assert_close(output.float(), exact, rtol=2**-7, atol=2**-9)

        module.register_forward_hook(note)
        assert {p.dtype for p in module.parameters()} <= {torch.float32}
    train_step(state, batches(0), config.train)
    print(f"\n{net}: {len(wide)} norms take and give float32, {len(narrow)} compute in it")
    if net == "unet":
        assert not wide
    else:
        assert all("q_norm" in name or "k_norm" in name for name in narrow)
        assert len(wide) == 2 * len(narrow) // 2 + 3  # two of each block, one of each decoder
    assert {t.dtype for t in state.ema.weights.values()} == {torch.float32}


# --- the device is not waited for ----------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Refuses operations that would wait for a device: what asks for a number or a size."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), keywords: Any = None
    ) -> Any:
        name = function.__name__.split(".")[0]
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "unique"}, name
        return function(*args, **(keywords or {}))


@pytest.fixture
def staged(config: RunConfig) -> RunConfig:
    return with_train(config, nonfinite="skip", nonfinite_limit=3, schedule="constant")


def test_a_step_asks_the_device_nothing(staged: RunConfig) -> None:
    """With a lag of one step, as on a GPU; the step itself is the same on any device."""
    state, batches = made(staged)
    state.finite = Finite(3, torch.device("cpu"), lag=1)
    made_before = [batches(step) for step in range(3)]
    with NoWaiting():
        for batch in made_before:
            train_step(state, batch, staged.train)
    state.finite.lag = 0
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        train_step(state, made_before[0], staged.train)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_not_waited_for(staged: RunConfig) -> None:
    device = torch.device("cuda")
    from stratagem.distributed import World
    from stratagem.prefetch import to_device

    parts = assemble(staged)
    stages = parts.batches.stages
    state = TrainState(parts.objective, staged.train, stages, world=World(device=device))
    batches = [to_device(parts.batches(step), device) for step in range(4)]
    train_step(state, batches[0], staged.train)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            train_step(state, batch, staged.train)
    finally:
        torch.cuda.set_sync_debug_mode("default")
