"""Checkpoints of a run: whole or absent, checked when read, replaced by the one before if damaged.

    RUN/checkpoints/step-00001200/  {model, ema, training}.safetensors, state.json, manifest.json

Each is a folder artifact (SHA-256 per file, manifest last, rename). Together with counter-based
randomness it holds all that training depends on, so a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stratagem.artifact import (
    read_folder,
    read_tensor_file,
    write_folder,
    write_tensor_file,
)
from stratagem.errors import DamagedArtifact, InputError

__all__ = ["Checkpoint", "list_steps", "load", "load_latest", "lock", "save"]

log = logging.getLogger(__name__)
KIND = "checkpoint"
GROUPS = ("model", "ema", "training")


@dataclass(frozen=True)
class Checkpoint:
    """The content of one checkpoint.

    Attributes:
        step: Optimizer steps done.
        tensors: "model", "ema" and "training" (moments, training-only heads) -> tensors by name.
        state: The few other values, JSON-able.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any]


def save(run: Path, checkpoint: Checkpoint, *, keep_last: int = 0, origin: str = "") -> Path:
    """Writes a checkpoint and then, if it stands, removes all but the last `keep_last` (0: none).

    Args:
        run: The run's folder.
        checkpoint: What to write.
        keep_last: How many to keep; 0 keeps all.
        origin: Fingerprint of the configuration that made it.
    """
    path = _folder(run, checkpoint.step)
    meta = {"step": checkpoint.step, "origin": origin}
    with write_folder(path, KIND, meta, replace=True) as draft:
        for group in GROUPS:
            write_tensor_file(draft / f"{group}.safetensors", checkpoint.tensors[group])
        (draft / "state.json").write_text(json.dumps(checkpoint.state, sort_keys=True))
    for step in list_steps(run)[:-keep_last] if keep_last else ():
        shutil.rmtree(_folder(run, step), ignore_errors=True)
    return path


def load(run: Path, step: int) -> Checkpoint:
    """Reads one checkpoint, every sum checked.

    Raises:
        InputError: If there is none of that step.
        DamagedArtifact: If a file is missing, truncated or altered.
    """
    if step not in list_steps(run):
        steps = ", ".join(map(str, list_steps(run))) or "none"
        raise InputError(f"{run} has no checkpoint of step {step}: it has {steps}")
    path = _folder(run, step)
    read_folder(path, KIND)
    tensors = {group: read_tensor_file(path / f"{group}.safetensors") for group in GROUPS}
    return Checkpoint(step, tensors, json.loads((path / "state.json").read_text()))


def load_latest(run: Path) -> Checkpoint | None:
    """Reads the newest intact checkpoint; a damaged one is reported, and the one before taken.

    Returns:
        None if the run has no checkpoint yet.

    Raises:
        DamagedArtifact: If there are checkpoints and none of them is intact.
    """
    steps = list_steps(run)
    for step in reversed(steps):
        try:
            return load(run, step)
        except (DamagedArtifact, InputError) as error:
            log.warning("checkpoint of step %d is skipped: %s", step, error)
            reason = error
    if steps:
        raise DamagedArtifact(f"no checkpoint of {run} is intact; the oldest: {reason}")
    return None


def list_steps(run: Path) -> list[int]:
    """Returns the steps of the run's checkpoints, ascending."""
    names = (p.name.removeprefix("step-") for p in (run / "checkpoints").glob("step-*"))
    return sorted(int(name) for name in names if name.isdigit())


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Holds the run's folder for this process and clears what a killed one left behind.

    The lock is the kernel's, so it ends with the process however that ends.

    Raises:
        InputError: If another process trains there.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / "run.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process trains in {run}: wait for it or choose another --out"
            ) from error
        for orphan in (run / "checkpoints").glob(".*"):
            _restore_or_remove(orphan)
        yield


def _restore_or_remove(orphan: Path) -> None:
    """Removes a draft that was never finished; puts back a folder whose successor never came."""
    name = orphan.name[1:].split(".")[0]
    if orphan.suffix == ".old" and not (orphan.parent / name).exists():
        orphan.rename(orphan.parent / name)
    else:
        shutil.rmtree(orphan, ignore_errors=True)


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"
