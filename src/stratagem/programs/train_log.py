"""The log of a run: a line of means every so many steps, for people and programs.

    RUN/metrics.jsonl   always: {"step": ..., "images": ..., "loss": ..., ...} per line
    RUN/tensorboard/    with train.log tensorboard: the same numbers as scalars
    Weights & Biases    with train.log wandb: one W&B run per run, known by RUN/wandb.id

A continued run cuts off the lines that it will write again. TensorBoard is told to forget them, and
W&B, which keeps what it has, is not told the same step twice.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from stratagem import artifact
from stratagem.config import RunConfig
from stratagem.errors import InputError, MissingExtra
from stratagem.programs.machine import peak_bytes
from stratagem.train import TrainState
from stratagem.train_config import TrainConfig, learning_rate

__all__ = ["MetricsLog", "open_log", "read_log"]

Line = dict[str, Any]
Sink = Callable[[Line], None]


class MetricsLog:
    """Writes one line of means every so many steps.

    Args:
        path: The file; lines past `step`, which a continued run will write again, are dropped.
        cfg: Gives batch size and learning rate.
        step: Where the run stands.
        sinks: Where lines go besides.
    """

    def __init__(self, path: Path, cfg: TrainConfig, step: int, sinks: Sequence[Sink] = ()) -> None:
        self.path = path
        self.cfg = cfg
        self._sinks = sinks
        self._last = (step, time.perf_counter())
        kept = [line for line in read_log(path) if line["step"] <= step]
        artifact.write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._logged = kept[-1]["step"] if kept else 0

    def __call__(self, state: TrainState) -> None:
        """Writes the means since the last line and empties the sums."""
        step, now = state.step, time.perf_counter()
        num = step - self._logged
        if num == 0:
            return
        rate = (step - self._last[0]) * self.cfg.batch_size / (now - self._last[1])
        sums = {name: float(total) for name, total in state.sums.items()}
        skipped = {"skipped": int(sums.pop("skipped"))} if "skipped" in sums else {}
        done = max(1, num - sum(skipped.values()))
        line = {
            "step": step,
            "images": step * self.cfg.batch_size,
            **{name: total / done for name, total in sums.items()},
            **skipped,
            "learning_rate": learning_rate(step - 1, self.cfg),
            "images_per_second": round(rate, 1),
            "peak_memory_mib": round(peak_bytes(state.world.device) / 2**20, 1),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for sink in self._sinks:
            sink(line)
        state.sums.clear()
        self._logged, self._last = step, (step, now)


def read_log(path: Path) -> list[Line]:
    """Reads the lines of a metrics.jsonl, without one that is cut off or still being written."""
    text = path.read_bytes() if path.is_file() else b""
    return [line for row in text.splitlines() if (line := _parsed(row)) is not None]


def _parsed(row: bytes) -> Line | None:
    try:
        line = json.loads(row)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


@contextmanager
def open_log(out: Path, config: RunConfig, step: int) -> Iterator[MetricsLog]:
    """Yields the log of a run that stands at a step.

    Raises:
        MissingExtra: If what `train.log` names is not installed.
        InputError: If W&B does not let the run in.
    """
    opened = {"tensorboard": _tensorboard, "wandb": _wandb}
    with ExitStack() as held:
        sinks = [opened[name](out, config, step, held) for name in dict.fromkeys(config.train.log)]
        yield MetricsLog(out / "metrics.jsonl", config.train, step, sinks)


def _tensorboard(out: Path, config: RunConfig, step: int, held: ExitStack) -> Sink:  # noqa: ARG001
    module = _extra("torch.utils.tensorboard", "tensorboard")
    writer = module.SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
    held.callback(writer.close)

    def write(line: Line) -> None:
        for name, value in line.items():
            if name != "step":
                writer.add_scalar(name, value, line["step"])

    return write


def _wandb(out: Path, config: RunConfig, step: int, held: ExitStack) -> Sink:  # noqa: ARG001
    wandb, note = _extra("wandb", "wandb"), out / "wandb.id"
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "stratagem"),
            name=out.name,
            id=note.read_text() if note.is_file() else None,
            resume="allow",
            dir=str(out),
            config=dataclasses.asdict(config),
        )
    except wandb.Error as error:
        raise InputError(
            f"train.log wandb: {error}; run  wandb login,  set WANDB_MODE=offline, or leave it out"
        ) from error
    artifact.write_bytes(note, run.id.encode())
    held.callback(run.finish)

    def write(line: Line) -> None:
        if line["step"] >= run.step:
            run.log(line, step=line["step"], commit=True)

    return write


def _extra(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(package, "log") from error
