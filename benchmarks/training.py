"""What docs/performance.md says of training on a CPU: the loop against a bare step, and adaLN.

    python benchmarks/training.py            about four minutes, one thread

The first table measures small networks of each kind with `stratagem bench train`, on noise, by the
wall clock and by the CPU time of the training thread: on a machine that does other work, too, only
the second says what the loop costs. The second table is that of `stratagem bench sample`, by the
wall clock. The third asks whether the maps from the condition to the shifts, scales and gates of
all blocks should be one product of their joined weights, which each step must join anew, for every
block owns its own (names of checkpoints, shards, Muon).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional

from stratagem.config import MemoryConfig, ModelConfig, RunConfig, StagesConfig, UNetModelConfig
from stratagem.programs import bench, machine
from stratagem.programs.blank import Blank
from stratagem.train import TrainConfig

DIGITS = Blank(shape=(1, 8, 8), memory_dim=192)
IMAGES = Blank(shape=(3, 32, 32), memory_dim=384)
MEMORY = MemoryConfig("none")
STAGES = (2.0, -2.0)
CONFIGS = {
    "digits, 3 decoders, 64 x 4": (
        DIGITS,
        RunConfig(
            data="none",
            model=ModelConfig(width=64, depth=4, heads=2, patch=2),
            memory=MEMORY,
            stages=StagesConfig(edges=STAGES, shared=1, depths=(3, 2, 1)),
            train=TrainConfig(batch_size=64, threads=1),
        ),
    ),
    "32 pixels, one decoder, 192 x 6": (
        IMAGES,
        RunConfig(
            data="none",
            model=ModelConfig(width=192, depth=6, heads=3, patch=4),
            memory=MEMORY,
            train=TrainConfig(batch_size=16, threads=1),
        ),
    ),
    "32 pixels, U-Net, 3 decoders": (
        IMAGES,
        RunConfig(
            data="none",
            unet=UNetModelConfig(width=32, mults=(1, 2), blocks=1, attention=(16,)),
            stages=StagesConfig(edges=STAGES, widths=(32, 16, 16)),
            train=TrainConfig(batch_size=8, threads=1),
        ),
    ),
}


def loops() -> None:
    """Prints the first table."""
    print("| network | clock | images/s | of bare | MFU | forward | backward | AdamW | clip | EMA |"
          " rest | data, beside it |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    clocks = {"wall": time.perf_counter, "thread": time.thread_time}
    for name, (sizes, config) in CONFIGS.items():
        for clock, seconds in clocks.items():
            bench.time = machine.time = SimpleNamespace(perf_counter=seconds)  # type: ignore
            speed = bench.bench_train(config, sizes, seconds=25)
            ms = speed.milliseconds
            order = ("forward", "backward", "optimizer", "clip", "ema", "rest", "data")
            parts = " | ".join(f"{ms[part]:.3g}" for part in order)
            rate = f"{speed.images_per_second:,.4g} | {speed.ratio:.1%} | {speed.mfu:.0%}"
            print(f"| {name} | {clock} | {rate} | {parts} |", flush=True)


def sampling() -> None:
    """Prints the second table."""
    bench.time = machine.time = time  # type: ignore
    print("\n| network | sampler | images/s | calls | time in the network |")
    print("|---|---|---|---|---|")
    for name, (sizes, config) in CONFIGS.items():
        how = bench.SampleConfig(sampler="dpm++2m", steps=10, batch_size=config.train.batch_size)
        speed = bench.bench_sample(config, how, sizes, seconds=10)
        rate = f"{speed.images_per_second:,.4g} | {speed.calls} | {speed.network_share:.1%}"
        print(f"| {name} | dpm++2m, 10 steps | {rate} |", flush=True)


def adaln() -> None:
    """Prints the third table."""
    print("\n| width x blocks, rows | a product per block, ms | one product, ms | ratio |")
    print("|---|---|---|---|")
    for width, depth, rows in ((64, 4, 64), (384, 12, 8), (384, 12, 64), (768, 12, 16)):
        maps = [nn.Linear(width, 6 * width) for _ in range(depth)]
        c = torch.randn(rows, width, requires_grad=True)
        found: dict[str, list[float]] = {"each": [], "joined": []}
        for _ in range(9):
            for name, make in {"each": each, "joined": joined}.items():
                found[name].append(seconds_of(make, maps, c))
        own, one = (1000 * statistics.median(times[2:]) for times in found.values())
        print(
            f"| {width} x {depth}, {rows} | {own:.2f} | {one:.2f} | {one / own:.2f} |", flush=True
        )


def each(maps: list[nn.Linear], c: Tensor) -> list[Tensor]:
    """Makes a product per block."""
    return [own(c) for own in maps]


def joined(maps: list[nn.Linear], c: Tensor) -> list[Tensor]:
    """Makes one product for all."""
    weight, bias = torch.cat([m.weight for m in maps]), torch.cat([m.bias for m in maps])
    return list(functional.linear(c, weight, bias).chunk(len(maps), dim=-1))


def seconds_of(
    make: Callable[[list[nn.Linear], Tensor], list[Tensor]], maps: list[nn.Linear], c: Tensor
) -> float:
    """Measures forward and backward, in CPU time of this thread."""
    begun = time.thread_time()
    torch.stack([part.sum() for part in make(maps, c)]).sum().backward()
    taken = time.thread_time() - begun
    for parameter in (c, *(p for m in maps for p in m.parameters())):
        parameter.grad = None
    return taken


if __name__ == "__main__":
    torch.set_num_threads(1)
    loops()
    sampling()
    adaln()
