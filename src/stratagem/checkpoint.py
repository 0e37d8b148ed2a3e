"""Checkpoints of a run: whole or absent, checked when read, replaced by the one before if damaged.

    RUN/checkpoints/step-00001200/  {model, ema, training}.safetensors, state.json, manifest.json
    RUN/snapshots/step-00001000/    averages alone, to be mixed later, see `ema`

Each is a folder artifact (SHA-256 per file, manifest last, rename). Together with counter-based
randomness it holds all that training depends on, so a resumed run repeats the uninterrupted one.

Several processes write one checkpoint together: process 0 writes what all of them have, or each
its own shards of all tensors (shard-*.safetensors, see `distributed.write_shards`). Names and
values are the same in both, and both are read by any number of processes.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stratagem.artifact import read_folder, read_tensor_file, write_folder, write_tensor_file
from stratagem.distributed import World, full, write_shards
from stratagem.errors import DamagedArtifact, InputError

__all__ = ["Checkpoint", "list_steps", "load", "load_latest", "lock", "save", "set_aside"]

log = logging.getLogger(__name__)
KIND = "checkpoint"
GROUPS = ("model", "ema", "training")  # of every checkpoint; it may hold more averages
PLACE, SNAPSHOTS = "checkpoints", "snapshots"
SHARDS = "shard-*.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The content of one checkpoint.

    Attributes:
        step: Optimizer steps done.
        tensors: "model", "ema" and "training" (moments, training-only heads) -> tensors by name,
            and the other averages by their `ema.group_of`, which a snapshot holds alone.
        state: The few other values, JSON-able.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any]


def save(
    run: Path,
    checkpoint: Checkpoint,
    *,
    keep_last: int = 0,
    keep_every: int = 0,
    world: World | None = None,
    sharded: bool = False,
    place: str = PLACE,
) -> Path:
    """Writes a checkpoint, and removes older ones once it has been read back.

    Args:
        run: The run's folder; with several processes, one that all of them see.
        checkpoint: What to write; with several processes, each calls this with what it has.
        keep_last: How many to keep; 0 keeps all.
        keep_every: Those of steps that this divides are kept besides; 0 for none.
        world: The processes; None for one.
        sharded: Whether each process writes its own shards.
        place: The folder inside the run.

    Raises:
        InputError: If the disk is full or cannot be written; the checkpoints before are intact.
        DamagedArtifact: If what was written is read back otherwise; they are intact then, too.
    """
    world = world or World()
    path = _folder(run, checkpoint.step, place)
    meta = {"step": checkpoint.step, "groups": list(checkpoint.tensors)}
    tensors = checkpoint.tensors if sharded else _whole(checkpoint.tensors, keep=world.rank == 0)
    with ExitStack() as stack:
        draft: Path | None = None
        with world.together(), _to_disk(path):
            if world.rank == 0:
                writing = write_folder(path, KIND, meta, replace=True)
                draft = stack.enter_context(writing)
                (draft / "state.json").write_text(json.dumps(checkpoint.state))
                for group in () if sharded else tensors:
                    write_tensor_file(draft / f"{group}.safetensors", tensors[group])
        if sharded:
            with world.together(), _to_disk(path):
                write_shards(world.first(draft), _flat(tensors))
        with world.together(), _to_disk(path):
            stack.close()  # from here on it stands
            steps = [step for step in list_steps(run, place) if step <= checkpoint.step]
            old = [s for s in steps[:-keep_last] if not keep_every or s % keep_every]
            if world.rank == 0 and keep_last and old:
                read_folder(path, KIND)
                for step in old:
                    _remove(_folder(run, step, place))
    return path


@contextmanager
def _to_disk(path: Path) -> Iterator[None]:
    """Says what to do if the disk does not take what is written inside."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): make room, and the same "
            "command goes on from the checkpoint before, which is intact"
        ) from error


def _remove(folder: Path) -> None:
    """Removes a folder; if that is interrupted, what is left has no checkpoint's name."""
    gone = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _whole(
    tensors: Mapping[str, Mapping[str, Tensor]], *, keep: bool
) -> dict[str, dict[str, Tensor]]:
    """Gathers shards, one tensor at a time; only who keeps them has them all."""
    return {
        group: {n: whole.cpu() for n, t in named.items() if (whole := full(t)) is not None and keep}
        for group, named in tensors.items()
    }


def _flat(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{group}/{name}": t for group, named in tensors.items() for name, t in named.items()}


def load(run: Path, step: int, *, verify: bool = True, place: str = PLACE) -> Checkpoint:
    """Reads one checkpoint, or snapshot; with `verify`, every sum is checked.

    Raises:
        InputError: If there is none of that step.
        DamagedArtifact: If a file is missing, truncated or altered.
    """
    if step not in list_steps(run, place):
        steps = ", ".join(map(str, list_steps(run, place))) or "none"
        raise InputError(f"{run} has no checkpoint of step {step}: it has {steps}")
    path = _folder(run, step, place)
    groups = read_folder(path, KIND, verify=verify).meta.get("groups", GROUPS)
    tensors: Mapping[str, Mapping[str, Tensor]]
    if list(path.glob(SHARDS)):
        tensors = {group: _Shards(path, f"{group}/") for group in groups}
    else:
        tensors = {group: read_tensor_file(path / f"{group}.safetensors") for group in groups}
    return Checkpoint(step, tensors, json.loads((path / "state.json").read_text()))


class _Shards(Mapping[str, Tensor]):
    """Tensors of one group, each put together of its shards when it is asked for.

    The header of a shard file says at which offsets of the whole tensor each of its own begins.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self._prefix = prefix
        self._places: dict[str, list[tuple[Path, list[int]]]] = {}
        for file in sorted(folder.glob(SHARDS)):
            with safe_open(file, framework="pt") as shard:
                for name, info in json.loads(shard.metadata()["DCP_SHARDING_INFO"]).items():
                    if name.startswith(prefix):
                        place = (file, info["saved_offsets"])
                        self._places.setdefault(name.removeprefix(prefix), []).append(place)

    def __getitem__(self, name: str) -> Tensor:
        """Reads one tensor whole."""
        pieces = []
        for file, offsets in self._places[name]:
            with safe_open(file, framework="pt") as shard:
                pieces.append((offsets, shard.get_tensor(self._prefix + name)))
        ends = [[o + n for o, n in zip(at, t.shape, strict=True)] for at, t in pieces]
        whole = torch.empty(
            [max(sizes) for sizes in zip(*ends, strict=True)], dtype=pieces[0][1].dtype
        )
        for (offsets, piece), end in zip(pieces, ends, strict=True):
            whole[tuple(slice(a, b) for a, b in zip(offsets, end, strict=True))] = piece
        return whole

    def __iter__(self) -> Iterator[str]:
        """Yields the names."""
        return iter(self._places)

    def __len__(self) -> int:
        """Counts the names."""
        return len(self._places)


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


def set_aside(run: Path, after: int) -> None:
    """Renames the checkpoints after a step: a run that fell back to it counts them no more."""
    for step in list_steps(run):
        if step > after:
            aside = _folder(run, step, PLACE).with_name(f"damaged-{step:08d}")
            shutil.rmtree(aside, ignore_errors=True)
            _folder(run, step, PLACE).rename(aside)


def list_steps(run: Path, place: str = PLACE) -> list[int]:
    """Returns the steps of the run's checkpoints, or snapshots, ascending."""
    names = (p.name.removeprefix("step-") for p in (run / place).glob("step-*"))
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
        for place in (PLACE, SNAPSHOTS):
            for orphan in (run / place).glob(".*"):
                _restore_or_remove(orphan)
        for draft in run.glob(".*.tmp"):
            draft.unlink()
        yield


def _restore_or_remove(orphan: Path) -> None:
    """Removes a draft that was never finished; puts back a folder whose successor never came."""
    name = orphan.name[1:].split(".")[0]
    if orphan.suffix == ".old" and not (orphan.parent / name).exists():
        orphan.rename(orphan.parent / name)
    else:
        shutil.rmtree(orphan, ignore_errors=True)


def _folder(run: Path, step: int, place: str) -> Path:
    return run / place / f"step-{step:08d}"
