"""How fast `prepare` decodes and crops, beside Pillow alone; and how fast shards are read.

    python benchmarks/prepare.py [FOLDER] [--workers 2] [--size 256] [--rounds 3]

All sides decode the same files on as many processes at the same time: Pillow in loops that open,
decode, halve, scale and crop, and keep nothing; our stream of images, with its processes started,
pixels sent and bad files caught; and `prepare` as a user calls it, which also writes and seals the
data set. They take turns, and the ratio is that of the fastest turns, since others may use the
machine; for the same reason the CPU time of all processes of a side stands beside it. Without a
FOLDER, photographs of 500 x 375 pixels are made up (JPEG, quality 90, 70 kB).

Then the data set is read in order in batches, and its files as bytes, each from the disk: the
kernel is asked to forget them first.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from stratagem.data.datasets import Reading, open_source, prepare
from stratagem.data.shards import DataSet


def photographs(folder: Path, num: int) -> Path:
    """Makes up photographs: coarse colours with grain."""
    random = np.random.default_rng(0)
    for index in range(num):
        coarse = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC))
        grain = random.normal(0, 9, image.shape)
        pixels = (image + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:05d}.jpg", quality=90)
    return folder


def pillow_alone(files: list[str], size: int) -> None:
    """Decodes and crops, and nothing else."""
    for file in files:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
            while min(image.size) >= 2 * size:
                image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
            scale = size / min(image.size)
            wide, high = round(image.width * scale), round(image.height * scale)
            image = image.resize((wide, high), Image.Resampling.BICUBIC)
            left, top = (wide - size) // 2, (high - size) // 2
            np.asarray(image.crop((left, top, left + size, top + size)))


def seconds_of_pillow(files: list[str], size: int, workers: int) -> float:
    """Measures that in processes that have been started."""
    parts = [(files[part::workers], size) for part in range(workers)]
    with multiprocessing.Pool(workers) as pool:
        begun = time.perf_counter()
        pool.starmap(pillow_alone, parts, chunksize=1)
        return time.perf_counter() - begun


def seconds_of_stream(folder: Path, size: int, workers: int) -> float:
    """Measures our decoding, from nothing to the last image."""
    begun = time.perf_counter()
    items = open_source(folder, size, reading=Reading(workers=workers)).items
    assert callable(items)
    for _ in items(0):
        pass
    return time.perf_counter() - begun


def seconds_of_prepare(folder: Path, out: Path, size: int, workers: int) -> float:
    """Measures all that a user waits for."""
    begun = time.perf_counter()
    prepare(folder, out, size=size, reading=Reading(workers=workers))
    return time.perf_counter() - begun


def forget(path: Path) -> None:
    """Asks the kernel to drop a folder's files from memory."""
    for file in path.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def as_bytes(path: Path) -> None:
    """Reads the files of a folder into one buffer."""
    buffer = bytearray(1 << 22)
    for file in path.iterdir():
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def in_batches(path: Path) -> None:
    """Reads a data set in order."""
    for _ in DataSet.open(path, verify=False).batches(64):
        pass


def read_speeds(path: Path, rounds: int) -> list[list[float]]:
    """Returns GB/s of the files as bytes, and of the data set in batches, which take turns."""
    size, speeds = sum(file.stat().st_size for file in path.iterdir()), [list[float](), []]
    for _ in range(rounds):
        for read, found in zip((as_bytes, in_batches), speeds, strict=True):
            forget(path)
            begun = time.perf_counter()
            read(path)
            found.append(size / (time.perf_counter() - begun) / 1e9)
    return speeds


def cpu_seconds() -> float:
    """Returns the CPU time of this process and of those of it that have ended."""
    times = os.times()
    return sum(times[:4])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num", type=int, default=1500)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, out = options.folder, Path(place) / "data"
        if folder is None:
            (Path(place) / "photographs").mkdir()
            folder = photographs(Path(place) / "photographs", options.num)
        files = sorted(str(path) for path in folder.rglob("*.*") if path.is_file())
        how = options.size, options.workers
        sides: dict[str, Callable[[], float]] = {
            "Pillow alone": lambda: seconds_of_pillow(files, *how),
            "decoded": lambda: seconds_of_stream(folder, *how),
            "prepare": lambda: seconds_of_prepare(folder, out, *how),
        }
        wall: dict[str, list[float]] = {name: [] for name in sides}
        cpu: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            shutil.rmtree(out, ignore_errors=True)
            for name, side in sides.items():
                before = cpu_seconds()
                wall[name].append(side())
                cpu[name].append(cpu_seconds() - before)
        print(f"{len(files):,} files, {options.workers} processes, size {options.size}")
        for name in sides:
            for clock, taken in (("wall", wall), ("CPU", cpu)):
                own, least = min(taken[name]), min(taken["Pillow alone"])
                text = f"{len(files) / own:8,.0f} images/s {least / own:5.2f}"
                print(f"{name:13} {clock:4} {text}  {[round(t, 2) for t in taken[name]]}")
        for name, speeds in zip(("bytes", "shards"), read_speeds(out, options.rounds), strict=True):
            print(f"{name:13} {max(speeds):8.2f} GB/s  {[round(speed, 2) for speed in speeds]}")


if __name__ == "__main__":
    main()
