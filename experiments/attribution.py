"""What each part of a memory model is worth: one configuration, parts switched on and off.

    plain            neither
    class            the class label
    memory           the snippet
    align            alignment of early tokens with a frozen encoder (REPA)
    memory+align     both, which is GMem

Same images, order, noise and times, same network but for the switched part, three seeds. The runs
are ordinary ones: stopped, the script goes on where it was, and `stratagem compare` reads them.

    python experiments/attribution.py out/attribution [--seeds 3] [--steps 1200]
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from stratagem.assemble import open_run
from stratagem.config import AlignConfig, MemoryConfig, ModelConfig, RunConfig
from stratagem.data.datasets import prepare
from stratagem.programs.bank import build_bank
from stratagem.programs.compare import read_run, result_sections, speed_sentence
from stratagem.programs.evaluate import Reference, evaluate_run
from stratagem.programs.sample import SampleConfig
from stratagem.programs.train import train
from stratagem.report.page import page, save_page
from stratagem.train import TrainConfig

CHECKPOINTS = 5


def configurations(out: Path, steps: int, seed: int) -> dict[str, RunConfig]:
    """Returns the runs by name."""
    plain = RunConfig(
        data=str(out / "data"),
        seed=seed,
        model=ModelConfig(width=64, depth=4, heads=2, patch=2),
        train=TrainConfig(
            steps=steps,
            batch_size=64,
            learning_rate=2e-3,
            warmup_steps=steps // 20,
            ema_decay=0.995,
            checkpoint_every=steps // CHECKPOINTS,
            keep_checkpoints=0,
        ),
    )
    memory = MemoryConfig(str(out / "bank.safetensors"))
    align = AlignConfig(encoder="effnet", block=2, hidden=256)
    labels = dataclasses.replace(plain.model, labels=True)
    return {
        "plain": plain,
        "class": dataclasses.replace(plain, model=labels),
        "memory": dataclasses.replace(plain, memory=memory),
        "align": dataclasses.replace(plain, align=align),
        "memory+align": dataclasses.replace(plain, memory=memory, align=align),
    }


def main() -> None:
    """Trains and evaluates every run that is not finished, then writes one report per seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200)
    options = parser.parse_args()
    out: Path = options.out
    if not (out / "data").exists():
        prepare("digits", out / "data", holdout=1 / 6)
    if not (out / "bank.safetensors").exists():
        build_bank(out / "data", out / "bank.safetensors", encoder="pixels")
    reference = Reference(out / "data", ["pixels", "effnet"])
    for seed in range(options.seeds):
        results = []
        for name, config in configurations(out, options.steps, seed).items():
            run = out / f"seed-{seed}" / name
            train(config, run)
            every = config.train.checkpoint_every
            for step in range(every, config.train.steps + 1, every):
                if not (run / "evaluations" / f"step-{step:08d}").exists():
                    cfg = SampleConfig(num=1000, seed=seed, sampler="dpm++2m", steps=10)
                    evaluate_run(open_run(run, step=step), reference, cfg)
            results.append(read_run(name, run))
            last = results[-1].last
            print(seed, name, last.distances, last.held_out_snippets, flush=True)
        sections = result_sections(results)
        text = page(f"Attribution, seed {seed}", speed_sentence(results), sections)
        save_page(out / f"seed-{seed}.html", text)


if __name__ == "__main__":
    main()
