"""How fast noise levels are compared: against torch.mm of the same shapes, and in minutes.

    python benchmarks/clustering.py --threads 2                          # every sample, no estimate
    OMP_NUM_THREADS=1 python benchmarks/clustering.py --run 27           # 27 samples stand for 200

Data are random and clipped to [-1, 1], 50,000 x 3,072 float32 by default; `--images FILE` takes
uint8 rows "images" of a shard of a data set instead. Three measurements, one JSON line each:

    product-rate   the optimal denoiser along paths on noise levels where no row can be left out,
                   in turns with torch.mm of (T, N) x (N, n). Only products count as work done:
                   2 T N n operations per path for the means and 4 N n for the logits.
    tolerance      the same on evenly spaced times, exact against `--tolerance`, in turns.
    similarity     the whole call: inner products, posterior means, all pairs of levels. If fewer
                   samples are run than asked for, "extrapolated" says so.

Shares and ratios are medians over the rounds, with the lowest and the highest. On a machine that
does other work too, `--threads 1 --cpu-time` counts processor seconds instead of wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from stratagem.clustering.optimal_denoiser import OptimalDenoiser
from stratagem.clustering.similarity import similarity
from stratagem.randomness import normal
from stratagem.schedule import Linear

# Fewer paths than one batch of `similarity` holds would be charged more than their share of
# reading the data; more would only take longer.
PATHS = 27


def seconds(work: Callable[[], object], cpu_time: bool) -> float:
    """Runs something once and returns how long it took."""
    clock = time.process_time if cpu_time else time.perf_counter
    start = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def in_turns(
    one: Callable[[], object], two: Callable[[], object], options: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Returns the seconds of each, after one round that does not count."""
    pairs = [
        (seconds(one, options.cpu_time), seconds(two, options.cpu_time))
        for _ in range(options.rounds + 1)
    ][1:]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def spread(values: list[float]) -> list[float]:
    """Returns lowest, median and highest."""
    return [round(f(values), 3) for f in (min, statistics.median, max)]


def make_data(options: argparse.Namespace) -> Tensor:
    """Returns the rows, (N, n)."""
    if options.images is not None:
        return load_file(options.images)["images"][: options.points].flatten(1)
    blocks = [
        (normal((min(1000, options.points - i), options.numbers), 0, "benchmark", i) / 2).clamp(
            -1, 1
        )
        for i in range(0, options.points, 1000)
    ]
    return torch.cat(blocks)


def even_times(num: int) -> Tensor:
    """Returns the centres of equal cells of (0, 1)."""
    return (torch.arange(num, dtype=torch.float64) + 0.5) / num


def product_rate(data: Tensor, options: argparse.Namespace) -> dict[str, object]:
    """Compares the denoiser with torch.mm where every row has weight."""
    denoiser = OptimalDenoiser(data, Linear(), device=options.device)
    paths = min(PATHS, options.run)
    x, _ = denoiser.points(torch.arange(paths))
    eps = normal(x.shape, 0, "benchmark noise").to(x)
    # log-SNR -10 and below: the logits of all rows lie within a few units.
    times = Linear().time_of(torch.linspace(-10, -20, options.times, dtype=torch.float64))
    rows, _ = denoiser.points(torch.arange(len(data)))
    weights = torch.rand(options.times, len(data)).to(rows)

    def products() -> None:
        for _ in range(paths):
            torch.mm(weights, rows)

    plain, ours = in_turns(products, lambda: denoiser.along(x, eps, times), options)
    work = 2 * len(data) * rows.shape[1] * paths / 1e9
    rates = [options.times * work / s for s in plain]
    own = [(options.times + 2) * work / s for s in ours]
    shares = [b / a for a, b in zip(rates, own, strict=True)]
    return {
        "torch.mm GFLOP/s": spread(rates),
        "denoiser GFLOP/s": spread(own),
        "share": spread(shares),
        "pass (80 %)": statistics.median(shares) >= 0.8,
    }


def screening(data: Tensor, options: argparse.Namespace) -> dict[str, object]:
    """Compares the exact denoiser with that which may leave out a share of the mass."""
    exact = OptimalDenoiser(data, Linear(), device=options.device)
    loose = OptimalDenoiser(data, Linear(), device=options.device, tolerance=options.tolerance)
    x, _ = exact.points(torch.arange(min(PATHS, options.run)))
    eps = normal(x.shape, 0, "benchmark noise").to(x)
    times = even_times(options.times)
    whole, part = in_turns(
        lambda: exact.along(x, eps, times), lambda: loose.along(x, eps, times), options
    )
    error = (exact.along(x, eps, times) - loose.along(x, eps, times)).abs().max()
    ratios = [b / a for a, b in zip(whole, part, strict=True)]
    return {
        "tolerance": options.tolerance,
        "time, of the exact one's": spread(ratios),
        "largest difference": float(error),
    }


def whole_call(data: Tensor, options: argparse.Namespace) -> dict[str, object]:
    """Times `similarity`, and the reading of the data before it."""
    made: list[OptimalDenoiser] = []
    start = seconds(
        lambda: made.append(OptimalDenoiser(data, Linear(), device=options.device)),
        options.cpu_time,
    )
    times = even_times(options.times)
    spent = seconds(
        lambda: similarity(made[0], times, num_samples=options.run, eta=2 / 255, seed=0),
        options.cpu_time,
    )
    minutes = (start + spent * options.samples / options.run) / 60
    return {
        "samples run": options.run,
        "s per sample": round(spent / options.run, 3),
        "samples": options.samples,
        "minutes": round(minutes, 2),
        "extrapolated": options.run < options.samples,
        "pass (10 minutes)": minutes <= 10,
    }


MEASURES = {"product-rate": product_rate, "tolerance": screening, "similarity": whole_call}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=50_000)
    parser.add_argument("--numbers", type=int, default=3072)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--run", type=int, help="samples really run; by default all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=1e-6)
    parser.add_argument("--threads", type=int, help="by default torch's own choice")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=list(MEASURES))
    options = parser.parse_args()
    options.run = options.run or options.samples
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    data = make_data(options)
    told = {"points": len(data), "numbers": data.shape[1], "times": options.times}
    told |= {"threads": torch.get_num_threads(), "dtype": str(data.dtype)}
    told |= {"device": options.device, "clock": "processor" if options.cpu_time else "wall"}
    print(json.dumps(told), flush=True)
    for name in options.measure:
        measure = MEASURES[name]
        print(json.dumps({name: measure(data, options)}), flush=True)


if __name__ == "__main__":
    main()
