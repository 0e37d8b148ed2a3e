"""`stratagem train`: makes a run, or goes on with one.

    RUN/config.yaml   the resolved configuration      RUN/metrics.jsonl   one line every log_every
    RUN/run.json      what the run is made from       RUN/checkpoints/    see `checkpoint`

The same command on the same folder continues where the newest intact checkpoint stands.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import time
from pathlib import Path

import torch

from stratagem import checkpoint
from stratagem.artifact import read_record, write_record
from stratagem.assemble import Parts, assemble
from stratagem.config import RunConfig, dump, load
from stratagem.errors import InputError
from stratagem.programs import Progress, silent
from stratagem.train import (
    Batch,
    Hook,
    TrainConfig,
    TrainState,
    fit,
    learning_rate,
    stop_on_signals,
    train_step,
)

__all__ = ["fastest_threads", "train"]

# What may differ between a run and its continuation without making it another run.
_FREE = {"steps", "checkpoint_every", "keep_checkpoints", "log_every", "threads"}


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
    """
    parts = assemble(config)
    with checkpoint.lock(out), stop_on_signals() as stop:
        _claim(out, config, parts)
        state = TrainState(parts.objective, config.train)
        saved = checkpoint.load_latest(out)
        _set_threads(state, parts, config.train, saved)
        if saved is not None:
            state.restore(saved)
        log = MetricsLog(out / "metrics.jsonl", config.train, state.step)
        cfg = config.train
        progress(state.step, cfg.steps)
        fit(
            state,
            parts.batches,
            cfg,
            [Hook(1, lambda s: progress(s.step, cfg.steps)), Hook(cfg.log_every, log)],
            save=lambda s: _save(out, s, cfg),
            stop=stop,
        )
    return state


class MetricsLog:
    """Writes one line of means every so many steps.

    Args:
        path: The file; lines past `step`, which a continued run will write again, are dropped.
        cfg: Gives batch size and learning rate.
        step: Where the run stands.
    """

    def __init__(self, path: Path, cfg: TrainConfig, step: int) -> None:
        self.path = path
        self.cfg = cfg
        self._last = (step, time.perf_counter())
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if (line_step := _step_of(line)) and line_step <= step]
        path.write_text("".join(line + "\n" for line in kept))
        self._logged = _step_of(kept[-1]) if kept else 0

    def __call__(self, state: TrainState) -> None:
        """Writes the means since the last line and empties the sums."""
        step, now = state.step, time.perf_counter()
        num = step - self._logged
        if num == 0:
            return
        rate = (step - self._last[0]) * self.cfg.batch_size / (now - self._last[1])
        line = {
            "step": step,
            "images": step * self.cfg.batch_size,
            **{name: total / num for name, total in state.sums.items()},
            "learning_rate": learning_rate(step - 1, self.cfg),
            "images_per_second": round(rate, 1),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        state.sums.clear()
        self._logged, self._last = step, (step, now)


def _step_of(line: str) -> int:
    """Returns the step of a line of the log, 0 for one that was cut off."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return 0


def _save(out: Path, state: TrainState, cfg: TrainConfig) -> None:
    checkpoint.save(out, state.checkpoint(), keep_last=cfg.keep_checkpoints)


def _claim(out: Path, config: RunConfig, parts: Parts) -> None:
    """Writes the run's description, or makes sure that the folder holds this very run."""
    path = out / "config.yaml"
    if path.is_file():
        _compare(load(path), config, out)
        made = read_record(out / "run.json", "run").meta
        if made != parts.description:
            names = sorted(k for k in made if made[k] != parts.description.get(k))
            raise InputError(
                f"{out} was made from other input ({', '.join(names)} changed): choose another "
                "--out, or give back the files it was made from"
            )
        return
    others = [p.name for p in out.iterdir() if p.name != "run.lock"]
    if others:
        raise InputError(f"{out} holds other files ({others[0]}, ...): choose another --out")
    if parts.stages is not None:
        parts.stages.save(out / "stages.json", {"data": parts.description["data"]})
    write_record(out / "run.json", "run", parts.description)
    path.write_text(dump(config))


def _compare(old: RunConfig, new: RunConfig, out: Path) -> None:
    """Refuses to continue a run under another configuration."""
    free = _FREE if new.train.schedule == "constant" else _FREE - {"steps"}
    mask = {name: getattr(new.train, name) for name in free}
    old = dataclasses.replace(old, train=dataclasses.replace(old.train, **mask))
    if old == new:
        return
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    key = next(k for k in after if before[k] != after[k])
    if isinstance(before[key], dict) and isinstance(after[key], dict):
        inner = next(k for k in after[key] if before[key][k] != after[key][k])
        change = f"{key}.{inner} is {after[key][inner]!r}, was {before[key][inner]!r}"
    else:
        change = f"{key} is {after[key]!r}, was {before[key]!r}"
    raise InputError(f"{out} holds another run ({change}): choose another --out")


def _set_threads(
    state: TrainState, parts: Parts, cfg: TrainConfig, saved: checkpoint.Checkpoint | None
) -> None:
    """Sets the number of CPU threads; a continued run keeps its own, as sums depend on it."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    elif saved is not None:
        torch.set_num_threads(saved.state["threads"])
    else:
        torch.set_num_threads(fastest_threads(state, parts.batches(0), cfg))


def fastest_threads(state: TrainState, batch: Batch, cfg: TrainConfig, *, rounds: int = 3) -> int:
    """Measures which number of CPU threads trains fastest here and now; the state stays as it is.

    Spinning threads make two of them many times slower than one where the cores are busy.
    """
    most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    seconds: dict[int, float] = {}
    for threads in sorted({1, max(1, most // 2), most}):
        torch.set_num_threads(threads)
        trial = TrainState(copy.deepcopy(state.objective), cfg)
        train_step(trial, batch, cfg)  # the first step also allocates
        start = time.perf_counter()
        for _ in range(rounds):
            train_step(trial, batch, cfg)
        seconds[threads] = time.perf_counter() - start
    return min(seconds, key=lambda n: seconds[n])
