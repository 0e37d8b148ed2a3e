"""`stratagem train`: makes a run, or goes on with one.

    RUN/config.yaml   the resolved configuration      RUN/metrics.jsonl   one line every log_every
    RUN/run.json      what the run is made from       RUN/checkpoints/    see `checkpoint`
    RUN/samples/      pictures, if wanted             RUN/snapshots/      averages, if wanted

The same command on the same folder continues where the newest intact checkpoint stands. Started by
torchrun it runs on several processes, as many as there are: see docs/scaling.md. Process 0 holds
the lock and writes; the others read what they need from the same folder.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from stratagem import checkpoint
from stratagem.artifact import read_record, write_bytes, write_record
from stratagem.assemble import Parts, assemble
from stratagem.config import RunConfig, dump, load
from stratagem.data.workers import cores
from stratagem.distributed import World, connect, launched
from stratagem.errors import InputError
from stratagem.programs import Progress, silent
from stratagem.programs.plan import tailored
from stratagem.programs.train_log import open_log
from stratagem.programs.train_samples import SamplePictures
from stratagem.stopping import stop_on_signals
from stratagem.train import Batch, Hook, TrainState, fit, train_step
from stratagem.train_config import TrainConfig

__all__ = ["fastest_threads", "train"]

log = logging.getLogger(__name__)

_ENOUGH = 5.0  # seconds of measuring one number of threads
_ECHO = 2.0  # seconds in which a launcher may pass on a signal that has come already

# What may differ between a run and its continuation without making it another run.
_FREE = {
    *("steps", "checkpoint_every", "keep_checkpoints", "keep_every", "log_every", "threads"),
    *("accumulate", "device", "compile", "activation_checkpointing", "parallel"),
    *("sharded_checkpoints", "nonfinite", "nonfinite_limit", "ema_snapshot_every"),
    *("log", "samples_every", "samples_autoencoder"),
}


def train(config: RunConfig, out: Path, *, progress: Progress = silent) -> TrainState:
    """Trains a run to its end and returns its last state.

    Args:
        config: What to train.
        out: The run's folder.
        progress: Called after each step.

    Raises:
        InputError: If the parts do not belong together, the folder holds another run, or another
            process trains there.
        Interrupted: After a signal, with a checkpoint written.
        NonFinite: If the loss or the gradient is not finite.
        StratagemError: If another process failed, with its reason.
    """
    with connect(config.train.device) as world, ExitStack() as held:
        with world.together():
            config, parts = _assemble(config, world)
        with world.together():
            if world.rank == 0:
                held.enter_context(checkpoint.lock(out))
                _claim(out, config, parts)
        stop = held.enter_context(stop_on_signals(echo=_ECHO if launched() else 0.0))
        cfg = config.train
        stages, seed, pictures = parts.batches.stages, config.seed, None
        with world.together():
            if cfg.samples_every:
                pictures = SamplePictures(out, config, parts, world)
        state = TrainState(parts.objective, cfg, stages, world=world, seed=seed)
        saved = _latest(out, world)
        _set_threads(state, parts, cfg, saved)
        if saved is not None:
            state.restore(saved)
        with world.together():
            hooks = _hooks(out, state, config, pictures, progress, held)
        fit(
            state,
            lambda step: parts.batches(step, world.rank, world.size),
            cfg,
            hooks,
            save=lambda s: _save(out, s.checkpoint(), world, cfg, checkpoint.PLACE),
            stop=stop,
        )
    return state


def _assemble(config: RunConfig, world: World) -> tuple[RunConfig, Parts]:
    """Returns the configuration as it is trained, and its objects."""
    cfg = config.train
    if cfg.batch_size < world.size * cfg.accumulate:
        raise InputError(
            f"train.batch_size {cfg.batch_size} cannot be split among {world.size} processes with "
            f"{cfg.accumulate} passes each: make it larger, or train.accumulate smaller"
        )
    if world.device.type == "cpu" and cfg.precision == "bf16" and world.rank == 0:
        log.warning("train.precision bf16 is slower than float32 on most CPUs")
    config, tailoring = tailored(config)
    parts = assemble(config)
    if tailoring is not None:
        parts.description["tailoring"] = tailoring.record()
    return config, parts


def _latest(out: Path, world: World) -> checkpoint.Checkpoint | None:
    """Reads the newest intact checkpoint: process 0 checks every sum, the others take its word."""
    saved = None
    with world.together():
        if world.rank == 0:
            saved = checkpoint.load_latest(out)
            checkpoint.set_aside(out, after=0 if saved is None else saved.step)
    step = world.first(None if saved is None else saved.step)
    with world.together():
        if step is not None and world.rank:
            saved = checkpoint.load(out, step, verify=False)
    return saved


def _hooks(
    out: Path,
    state: TrainState,
    config: RunConfig,
    pictures: SamplePictures | None,
    progress: Progress,
    held: ExitStack,
) -> list[Hook]:
    """What is done between steps: by all processes in the same order, or by process 0 alone."""
    cfg, hooks = config.train, list[Hook]()
    if cfg.ema_snapshot_every:
        hooks.append(Hook(cfg.ema_snapshot_every, lambda s: _snapshot(out, s, cfg)))
    if pictures is not None:
        hooks.append(Hook(cfg.samples_every, pictures))
    if state.world.rank == 0:
        progress(state.step, max(state.step, cfg.steps))
        line = held.enter_context(open_log(out, config, state.step))
        hooks += [Hook(1, lambda s: progress(s.step, cfg.steps)), Hook(cfg.log_every, line)]
    return hooks


def _snapshot(out: Path, state: TrainState, cfg: TrainConfig) -> None:
    """Keeps the power-function averages of a step; the last step is no exception."""
    if state.step % cfg.ema_snapshot_every == 0:
        averages = {group: a for group, a in state.ema.state_dict().items() if group != "ema"}
        saved = checkpoint.Checkpoint(state.step, averages, {})
        _save(out, saved, state.world, cfg, checkpoint.SNAPSHOTS)


def _save(
    out: Path, saved: checkpoint.Checkpoint, world: World, cfg: TrainConfig, place: str
) -> None:
    checkpoint.save(
        out,
        saved,
        keep_last=cfg.keep_checkpoints if place == checkpoint.PLACE else 0,
        keep_every=cfg.keep_every,
        world=world,
        sharded=cfg.sharded_checkpoints and world.size > 1,
        place=place,
    )


def _claim(out: Path, config: RunConfig, parts: Parts) -> None:
    """Writes the run's description, or makes sure that the folder holds this very run."""
    path = out / "config.yaml"
    if path.is_file():
        old = load(path)
        _compare(old, config, out)
        made = read_record(out / "run.json", "run").meta
        if made != parts.description:
            now = parts.description
            names = sorted(k for k in made | now if made.get(k, "") != now.get(k, ""))
            raise InputError(
                f"{out} was made from other input ({', '.join(names)} changed): choose another "
                "--out, or give back the files it was made from"
            )
        if old != config:
            write_bytes(path, dump(config).encode())
        return
    others = {p.name for p in out.iterdir()} - {"run.lock", "run.json", "stages.json"}
    if others:
        raise InputError(f"{out} holds other files ({min(others)}, ...): choose another --out")
    if parts.stages is not None:
        (out / "stages.json").unlink(missing_ok=True)  # of a start that was killed right here
        parts.stages.save(out / "stages.json", {"data": parts.description["data"]})
    write_record(out / "run.json", "run", parts.description, replace=True)
    write_bytes(path, dump(config).encode())


def _compare(old: RunConfig, new: RunConfig, out: Path) -> None:
    """Refuses to continue a run under another configuration."""
    free = _FREE if new.train.schedule == "constant" else _FREE - {"steps"}
    mask = {name: getattr(new.train, name) for name in free}
    old = dataclasses.replace(old, train=dataclasses.replace(old.train, **mask))
    if old == new:
        return
    key, was, now = "", dataclasses.asdict(old), dataclasses.asdict(new)
    while isinstance(was, dict) and isinstance(now, dict):
        inner = next(k for k in now if was[k] != now[k])
        key, was, now = f"{key}.{inner}", was[inner], now[inner]
    change = f"{key[1:]} is {now!r}, was {was!r}"
    raise InputError(f"{out} holds another run ({change}): choose another --out")


def _set_threads(
    state: TrainState, parts: Parts, cfg: TrainConfig, saved: checkpoint.Checkpoint | None
) -> None:
    """Sets the number of CPU threads; a continued run keeps its own, as sums depend on it.

    Where a GPU computes or cores are shared, torch's number, which torchrun sets to 1, is left.
    """
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    elif state.world.size > 1 or state.world.device.type != "cpu" or cfg.compile:
        return
    elif saved is not None:
        torch.set_num_threads(saved.state["threads"])
    else:
        torch.set_num_threads(fastest_threads(state, parts.batches(0), cfg))


def fastest_threads(state: TrainState, batch: Batch, cfg: TrainConfig, *, rounds: int = 3) -> int:
    """Measures which number of CPU threads trains fastest here and now; the state stays as it is.

    Spinning threads make two of them many times slower than one where the cores are busy.
    """
    most = cores()
    seconds: dict[int, float] = {}
    cfg = dataclasses.replace(cfg, activation_checkpointing=False)  # a copy of blocks keeps it
    for threads in sorted({1, max(1, most // 2), most}):
        torch.set_num_threads(threads)
        trial = TrainState(copy.deepcopy(state.objective), cfg)
        with torch.random.fork_rng([]):
            train_step(trial, batch, cfg)  # the first step also allocates
            start, done, spent = time.perf_counter(), 0, 0.0
            while done < rounds and spent < _ENOUGH:
                train_step(trial, batch, cfg)
                done, spent = done + 1, time.perf_counter() - start
        seconds[threads] = spent / done
    return min(seconds, key=lambda n: seconds[n])
