"""`stratagem demo`: both methods on real images, from a folder to a report, in a few minutes.

    prepare -> bank (of each encoder) -> stages -> train -> evaluate at every checkpoint -> report

Five small networks see the same images in the same order from the same seed: plain, memory with
each of two encoders, stages, and memory with stages, which takes the encoder that was faster
without copying. Each step calls the function of the verb of that name, and what is finished is
kept, so a stopped demonstration goes on where it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from stratagem.artifact import read_record, write_record
from stratagem.assemble import assemble, open_run
from stratagem.config import MemoryConfig, ModelConfig, RunConfig, StagesConfig
from stratagem.data.datasets import prepare
from stratagem.data.shards import DataSet
from stratagem.errors import InputError
from stratagem.programs import Progress
from stratagem.programs.bank import build_bank
from stratagem.programs.compare import (
    RunResult,
    images_to_reach,
    read_run,
    speed_sentence,
    too_near,
)
from stratagem.programs.demo_page import DemoResult, demo_page
from stratagem.programs.evaluate import evaluate_run
from stratagem.programs.reference import Reference
from stratagem.programs.sample import SampleConfig
from stratagem.programs.stages import stages as find_stages
from stratagem.programs.train import fastest_threads
from stratagem.programs.train import train as train_run
from stratagem.report.page import save_page
from stratagem.train import TrainConfig, TrainState

__all__ = ["DemoConfig", "choose_encoder", "demo"]

ENCODERS = ("pixels", "effnet")
Task = Callable[[str, str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class DemoConfig:
    """What the demonstration does.

    Attributes:
        data: "digits", or a folder of images.
        seed: Of everything.
        steps: Training steps of each run.
        num: Samples per evaluation.
    """

    data: str = "digits"
    seed: int = 0
    steps: int = 1200
    num: int = 1000


@dataclass(frozen=True)
class _Workshop:
    """Where the demonstration works, and with what."""

    out: Path
    cfg: DemoConfig
    threads: int
    task: Task

    @property
    def data(self) -> Path:
        return self.out / "data"

    @property
    def stages(self) -> Path:
        return self.out / "stages.json"

    def bank(self, encoder: str) -> Path:
        return self.out / f"bank-{encoder}.safetensors"

    def run(self, name: str) -> Path:
        return self.out / "runs" / name


class _Real(NamedTuple):
    """What samples are compared with: at every checkpoint, and at the last."""

    quick: Reference
    full: Reference


def demo(out: Path, cfg: DemoConfig, *, task: Task) -> tuple[Path, str]:
    """Runs the demonstration, or the rest of it.

    Args:
        out: The folder of everything it makes.
        cfg: What to do.
        task: Opens a progress display, given a label and a unit.

    Returns:
        The report's path and its leading sentence.

    Raises:
        InputError: If the folder holds another demonstration, or the images cannot be used.
        Interrupted: After a signal while training, with a checkpoint written.
    """
    shop = _open(out, cfg, task)
    base = _base(shop)
    _make_banks(shop)
    if not shop.stages.exists():
        _make_stages(shop)
    real = _Real(Reference(shop.data, ["pixels"]), Reference(shop.data, ["pixels", "effnet"]))
    memories = {e: MemoryConfig(str(shop.bank(e))) for e in ENCODERS}
    results = {"plain": _train_and_evaluate(shop, "plain", base, real)}
    for encoder, memory in memories.items():
        with_memory = dataclasses.replace(base, memory=memory)
        name = f"memory-{encoder}"
        results[name] = _train_and_evaluate(shop, name, with_memory, real)
    chosen = choose_encoder(results["plain"], {e: results[f"memory-{e}"] for e in ENCODERS})
    staged = _staged(base, shop.stages)
    results["stages"] = _train_and_evaluate(shop, "stages", staged, real)
    both = dataclasses.replace(staged, memory=memories[chosen])
    results["memory+stages"] = _train_and_evaluate(shop, "memory+stages", both, real)
    result = DemoResult(shop.data, shop.stages, base, list(results.values()), chosen)
    sentence = speed_sentence(result.runs)
    save_page(out / "report.html", demo_page(result, sentence))
    return out / "report.html", sentence


def _open(out: Path, cfg: DemoConfig, task: Task) -> _Workshop:
    """Prepares the data once, and measures once how many threads are fastest."""
    record, settings = out / "demo.json", dataclasses.asdict(cfg)
    if not record.is_file():
        if not (out / "data").exists():
            with task("prepare", "images") as progress:
                holdout, flip = 1 / 6, cfg.data != "digits"
                prepare(
                    cfg.data, out / "data", holdout=holdout, flip=flip, seed=cfg.seed,
                    progress=progress,
                )  # fmt: skip
        threads = _measure_threads(_base(_Workshop(out, cfg, 1, task)))
        write_record(record, "demo", {"config": settings, "threads": threads})
    made = read_record(record, "demo").meta
    if made["config"] != settings:
        raise InputError(f"{out} holds a demonstration of other settings: choose another --out")
    torch.set_num_threads(made["threads"])
    return _Workshop(out, cfg, made["threads"], task)


def _measure_threads(base: RunConfig) -> int:
    parts = assemble(base)
    return fastest_threads(TrainState(parts.objective, base.train), parts.batches(0), base.train)


def _base(shop: _Workshop) -> RunConfig:
    """The plain run; the others add to it and change nothing else."""
    side = DataSet.open(shop.data, verify=False).shape[1]
    steps = shop.cfg.steps
    return RunConfig(
        data=str(shop.data),
        seed=shop.cfg.seed,
        model=ModelConfig(width=64, depth=3, heads=2, patch=max(2, side // 8)),
        train=TrainConfig(
            steps=steps,
            batch_size=64,
            learning_rate=2e-3,
            warmup_steps=steps // 20,
            ema_decay=0.995,
            checkpoint_every=max(1, steps // 5),
            keep_checkpoints=0,
            log_every=max(1, steps // 40),
            threads=shop.threads,
        ),
    )


def _staged(base: RunConfig, stages: Path) -> RunConfig:
    """One shared block; then three near the data, two between, one near the noise."""
    model = dataclasses.replace(base.model, depth=4)
    return dataclasses.replace(base, model=model, stages=StagesConfig(str(stages), 1, (3, 2, 1)))


def _make_banks(shop: _Workshop) -> None:
    for encoder in ENCODERS:
        if not shop.bank(encoder).exists():
            with shop.task(f"bank build ({encoder})", "images") as progress:
                build_bank(shop.data, shop.bank(encoder), encoder=encoder, progress=progress)


def _make_stages(shop: _Workshop) -> None:
    with shop.task("stages", "samples") as progress:
        find_stages(shop.data, shop.stages, seed=shop.cfg.seed, progress=progress)


def _train_and_evaluate(shop: _Workshop, name: str, config: RunConfig, real: _Real) -> RunResult:
    run = shop.run(name)
    with shop.task(f"train {name}", "steps") as progress:
        train_run(config, run, progress=progress)
    every = config.train.checkpoint_every
    steps = list(range(every, config.train.steps + 1, every))
    cfg = SampleConfig(num=shop.cfg.num, seed=shop.cfg.seed, sampler="dpm++2m", steps=10)
    with shop.task(f"evaluate {name}", "checkpoints") as progress:
        for done, step in enumerate(steps):
            progress(done, len(steps))
            if not (run / "evaluations" / f"step-{step:08d}").exists():
                last = step == steps[-1]
                reference = real.full if last else real.quick
                evaluate_run(open_run(run, step=step), reference, cfg, held_out_snippets=last)
        progress(len(steps), len(steps))
    return read_run(name, run)


def choose_encoder(plain: RunResult, memories: dict[str, RunResult]) -> str:
    """Takes the encoder whose run reaches the plain run's last distance after the fewest images.

    Encoders whose samples hold more copies than chance allows come last.
    """
    metric, target = next(iter(plain.last.distances.items()))

    def rank(encoder: str) -> tuple[bool, float]:
        run = memories[encoder]
        images = images_to_reach(run, metric, target)
        return too_near(run.last), float("inf") if images is None else images

    return min(memories, key=rank)
