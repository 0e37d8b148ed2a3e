"""How well the runs of a table denoise held-out images, between which noise levels.

Every checkpoint sees the same images, times and noise: times are spread by the run's density over
each stage's halves (in mass), noise is fixed. Figures are relative to the first run of a seed.

    python experiments/stage_losses.py out/warm-start
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from stratagem import randomness
from stratagem.assemble import Model, make_density, open_run
from stratagem.data.images import to_float
from stratagem.data.shards import DataSet
from stratagem.objective import Objective
from stratagem.stages import Stages

ROUNDS = 4  # times per image and half of a stage


@torch.no_grad()
def losses(model: Model, x: Tensor, stages: Stages) -> Tensor:
    """Returns the mean loss on images x (N, C, H, W) in each half of the K stages, (2 K,)."""
    schedule = model.denoiser.schedule
    density, objective = make_density(model.config.diffusion, schedule), Objective(model.denoiser)
    ends = [stages.time_interval(k, schedule) for k in range(stages.num)]
    found = []
    for k, (low, high) in enumerate(ends):
        mass = density.cdf(torch.tensor([low, high], dtype=torch.float64))
        middle = float(density.icdf(mass.mean()))
        for half, interval in enumerate(pairwise((low, middle, high))):
            shape = (ROUNDS, len(x))
            u = randomness.uniform(shape, 0, "times", k, half)
            eps = randomness.normal((ROUNDS, *x.shape), 0, "noise", k, half)
            t = density.sample(u, interval).float()
            rounds = [
                objective(x, e, times).denoise.mean() for e, times in zip(eps, t, strict=True)
            ]
            found.append(torch.stack(rounds).mean())
    return torch.stack(found)


def main() -> None:
    """Prints a line per run and seed, of its newest checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    stages, _ = Stages.load(out / "stages.json")
    data = DataSet.open(out / "data")
    x, base = to_float(data.images(data.held_out_indices)), dict[str, Tensor]()
    names = list(json.loads((out / "results.json").read_text())["runs"])
    print("| run, seed | mean | each stage's halves, from the data |\n|---|---|---|")
    for name in names:
        for run in sorted((out / "runs" / name).glob("seed-*/")):
            found = losses(open_run(run), x, stages)
            first = base.setdefault(run.name, found)
            told = [f"{found.mean():.4f}"] + [f"{v:.4f}" for v in found]
            if found is not first:
                mean, parts = found.mean() / first.mean(), found / first
                told = [f"{100 * (v - 1):+.1f} %" for v in (mean, *parts)]
            print(f"| {name} {run.name} | {told[0]} | {', '.join(told[1:])} |")


if __name__ == "__main__":
    main()
