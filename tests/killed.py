"""Kills a process that saves checkpoints, again and again, for tests/test_survival.py.

    python killed.py FOLDER KILLS SEED

A warm process is forked, so a start costs milliseconds. Each start does what `train` does: it takes
the lock, reads the newest checkpoint, and saves one after another, until it is killed. What it
says, "b STEP" before a save and "d STEP" after it, outlives it in a pipe.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from stratagem import checkpoint
from stratagem.checkpoint import Checkpoint, list_steps, load, load_latest, lock, save

KEEP, EVERY = 2, 50


def content(step: int) -> Checkpoint:
    tensors = {group: {"w": torch.full((3000,), float(step))} for group in checkpoint.GROUPS}
    return Checkpoint(step, tensors, {"step": step})


def started(run: Path, pipe: int) -> None:
    """One start, to be killed."""
    with lock(run):
        saved = load_latest(run)
        step = 0 if saved is None else saved.step
        os.write(pipe, f"s {step}\n".encode())
        while True:
            step += 1
            os.write(pipe, f"b {step}\n".encode())
            save(run, content(step), keep_last=KEEP, keep_every=EVERY)
            os.write(pipe, f"d {step}\n".encode())


def killed(run: Path, delay: float) -> list[tuple[str, int]]:
    """Starts, kills after a delay, and returns what was said."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            started(run, writing)
        except BaseException as error:
            os.write(writing, f"e {type(error).__name__}:{error}\n".encode())
        os._exit(1)
    os.close(writing)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as said:
        lines = [line.split(maxsplit=1) for line in said.read().splitlines()]
    assert os.WIFSIGNALED(status), lines
    return [(word, int(step)) for word, step in lines]


def left(run: Path) -> str:
    """What of an unfinished save or removal a killed process left."""
    names = [p.name for p in (run / "checkpoints").glob(".*")]
    return "old one aside" if any(n.endswith(".old") for n in names) else "draft" if names else ""


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    run, draw, counts = folder / "run", random.Random(seed), Counter[str]()
    known, begun = 0, 0  # saved for certain, and begun
    begin = time.perf_counter()
    for step in range(5):
        save(folder / "trial", content(step))
    slow = (time.perf_counter() - begin) / 5
    for _ in range(kills):
        said = killed(run, draw.uniform(0, 4 * slow))
        for word, step in said:
            if word == "s":
                counts["restarts"] += 1
                assert known <= step <= begun, (known, step, begun)
                counts["intervals lost"] = max(counts["intervals lost"], begun - step)
            known = step if word == "d" else known
            begun = max(begun, step) if word == "b" else begun
        counts["kills in a save"] += bool(said) and said[-1][0] == "b"
        counts["left a draft or half a removal"] += bool(left(run))
        with lock(run):  # the next start
            hidden = [p.name for p in (run / "checkpoints").glob(".*")]
            counts["orphans after the next start"] += len(hidden)
            stand = list_steps(run)
            saved = [load(run, step) for step in stand]  # none is half removed
        assert known <= (stand or [0])[-1] <= begun
        known = (stand or [0])[-1]
        for one in saved:
            for tensors in one.tensors.values():
                assert torch.equal(tensors["w"], torch.full((3000,), float(one.step)))
    save(run, content(begun + 1), keep_last=KEEP, keep_every=EVERY)
    stand = list_steps(run)
    assert len(stand) >= KEEP, stand
    assert not [step for step in stand[:-KEEP] if step % EVERY], stand
    counts["kills"], counts["checkpoints"] = kills, begun
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
