"""Does a warm start remove the early dip of multi-decoder training?

    unified    one decoder for all stages
    cold       one decoder per stage, each trained from its random start
    warm       the same, but one decoder serves all stages for a first share of the steps

Same images, order, noise and times, same encoder, decoders of equal size, so a call costs the same
in all three; a step trains each decoder on its stage's share of the batch. Three seeds.

The runs are ordinary ones: stopped, the script goes on where it was.

    python experiments/warm_start.py out/warm-start [--seeds 3] [--steps 800] [--share 0.25]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from stratagem.assemble import open_run
from stratagem.config import ModelConfig, RunConfig, StagesConfig
from stratagem.data.datasets import prepare
from stratagem.programs.evaluate import Reference, evaluate_run
from stratagem.programs.sample import SampleConfig
from stratagem.programs.stages import stages
from stratagem.programs.train import train
from stratagem.train import TrainConfig

CHECKPOINTS = 8
Figures = dict[int, tuple[float, float]]  # step -> mean loss since the last one, fd_pixels


def configurations(out: Path, steps: int, share: float, seed: int) -> dict[str, RunConfig]:
    """Returns the runs by name."""
    split = StagesConfig(str(out / "stages.json"), shared=1)
    cold = RunConfig(
        data=str(out / "data"),
        seed=seed,
        model=ModelConfig(width=64, depth=3, heads=2, patch=2),
        stages=split,
        train=TrainConfig(
            steps=steps,
            batch_size=64,
            learning_rate=2e-3,
            warmup_steps=steps // 20,
            ema_decay=0.99,
            checkpoint_every=steps // CHECKPOINTS,
            keep_checkpoints=0,
            log_every=steps // CHECKPOINTS,
            threads=1,
        ),
    )
    unified = dataclasses.replace(split, form="unified")
    warm = dataclasses.replace(split, warm_steps=round(share * steps))
    return {
        "unified": dataclasses.replace(cold, stages=unified),
        "cold": cold,
        "warm": dataclasses.replace(cold, stages=warm),
    }


def figures(run: Path, config: RunConfig, reference: Reference) -> Figures:
    """Trains and evaluates what is not finished; returns the figures of each checkpoint."""
    train(config, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for line in lines:
        step = line["step"]
        file = run / "evaluations" / f"step-{step:08d}" / "evaluation.json"
        if not file.exists():
            cfg = SampleConfig(num=1000, seed=config.seed, sampler="dpm++2m", steps=10)
            evaluate_run(open_run(run, step=step), reference, cfg)
        distances = json.loads(file.read_text())["distances"]
        found[step] = (line["loss"], next(iter(distances.values())))
    return found


def table(runs: Sequence[dict[str, Figures]], which: int) -> list[str]:
    """Writes means over seeds (least, most), and the paired difference to unified in percent."""
    lines = ["| images | unified | cold | warm | cold - unified | warm - unified |"]
    lines.append("|---|---|---|---|---|---|")
    for step in runs[0]["unified"]:
        cells = [str(64 * step)]
        for name in ("unified", "cold", "warm"):
            values = [seed[name][step][which] for seed in runs]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f}, {max(values):.3f})")
        for name in ("cold", "warm"):
            ratios = [seed[name][step][which] / seed["unified"][step][which] for seed in runs]
            cells.append(", ".join(f"{100 * (ratio - 1):+.1f}" for ratio in ratios) + " %")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Trains and evaluates every run that is not finished, then prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--share", type=float, default=0.25)
    options = parser.parse_args()
    out: Path = options.out
    if not (out / "data").exists():
        prepare("digits", out / "data", holdout=1 / 6)
    if not (out / "stages.json").exists():
        found = stages(out / "data", out / "stages.json", method="dp")
        print("stages", found.search.stages.edges, "share of draws", found.record["share_of_draws"])
    reference = Reference(out / "data", ["pixels"])
    runs = []
    for seed in range(options.seeds):
        named = configurations(out, options.steps, options.share, seed)
        folder = out / f"seed-{seed}"
        places = {name: folder / name for name in named}
        places["warm"] = folder / f"warm-{options.share:g}"
        runs.append({name: figures(places[name], c, reference) for name, c in named.items()})
        print(f"seed {seed} done", flush=True)
    for which, title in enumerate(("loss since the checkpoint before", "fd_pixels32")):
        print(f"\n{title}\n")
        print("\n".join(table(runs, which)))


if __name__ == "__main__":
    main()
