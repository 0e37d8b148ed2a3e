"""What a data set of ImageNet's size costs to open and to read.

    python benchmarks/million_rows.py --folder scratch

Writes 1,281,167 rows of metadata with latents of one number each (20 MB), opens them, and draws a
batch. Then writes 8 shards of VA-VAE latents (0.4 GB), reads one whole, from the memory of the
system, and the same file as bytes. One JSON line per step; the folder is left to be removed by
hand. Linux only.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from stratagem import artifact
from stratagem.data.shards import KIND, DataSet, shard_name
from stratagem.memory.ids import Ids

NUM = 1_281_167
PER_SHARD = 341


def make(path: Path, num: int, shape: tuple[int, int, int], counts: list[int]) -> None:
    """Writes a data set of random latents."""
    meta: dict[str, Any] = {
        "num": num,
        "kind": "latents",
        "shape": shape,
        "image_shape": [3, 256, 256],
        "images": "",
        "autoencoder": {},
        "posterior": ["mean", "std"],
        "classes": [f"n{label:08d}" for label in range(1000)],
        "source": "benchmark",
        "flip": True,
        "shards": counts,
        "mean": [0.0] * shape[0],
        "std": [1.0] * shape[0],
    }
    names = Ids.of(f"n{row % 1000:08d}/n{row % 1000:08d}_{row:08d}.JPEG" for row in range(num))
    with artifact.write_folder(path, KIND, meta) as folder:
        rows = {"labels": torch.arange(num) % 1000, "held_out": torch.zeros(num, dtype=torch.bool)}
        artifact.write_tensor_file(folder / "labels.safetensors", rows)
        columns = {"block": names.block, "ends": names.ends}
        artifact.write_tensor_file(folder / "names.safetensors", columns)
        (folder / "rejected.json").write_text("[]")
        for number, count in enumerate(counts):
            latents = {name: torch.randn(count, 2, *shape).half() for name in meta["posterior"]}
            artifact.write_tensor_file(folder / shard_name("latents", number), latents)


def resident() -> float:
    """Returns the memory of this process in MB, mapped pages included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def opening(path: Path, *, verify: bool) -> dict[str, Any]:
    """Opens a data set and draws a batch of 256."""
    before, start = resident(), time.perf_counter()
    data = DataSet.open(path, verify)
    opened = time.perf_counter() - start
    grown = resident() - before
    never = torch.zeros(256, dtype=torch.bool)
    times = []
    for _ in range(200):  # the first ones map the shards
        rows = torch.randint(data.num, (256,))
        start = time.perf_counter()
        data.sample(rows, never, lambda: torch.zeros(256, *data.shape))
        times.append(time.perf_counter() - start)
    return {
        "rows": data.num,
        "verify": verify,
        "seconds": round(opened, 3),
        "megabytes": round(grown),
        "batch_ms": round(1000 * sorted(times[-20:])[10], 1),
    }


def reading(path: Path, number: int, count: int) -> dict[str, Any]:
    """Reads one shard through the data set, and its file as bytes."""
    data, file = DataSet.open(path, False), path / shard_name("latents", number)
    file.read_bytes()
    start = time.perf_counter()
    size = len(file.read_bytes())
    as_bytes = time.perf_counter() - start
    rows = torch.arange(number * count, (number + 1) * count)
    noise = torch.zeros(count, *data.shape)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for flip in (False, True):
            data.latents(rows, torch.full((count,), flip), lambda: noise)
        best = min(best, time.perf_counter() - start)
    return {
        "file_mb_per_s": round(size / as_bytes / 1e6),
        "read_mb_per_s": round(size / best / 1e6),
    }


def main() -> None:
    """Runs every step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder
    counts = [PER_SHARD] * (NUM // PER_SHARD) + [NUM % PER_SHARD]
    if not (folder / "rows").exists():
        make(folder / "rows", NUM, (1, 1, 1), counts)
        make(folder / "latents", 8 * PER_SHARD, (32, 16, 16), [PER_SHARD] * 8)
    for verify in (False, True):
        print(json.dumps(opening(folder / "rows", verify=verify)))
    print(json.dumps(reading(folder / "latents", 3, PER_SHARD)))


if __name__ == "__main__":
    main()
