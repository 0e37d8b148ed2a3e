"""How much memory a bank needs beyond its own file: build, use, compress, edit, import.

    python benchmarks/bank_memory.py --rows 1281167 --dim 768 --folder scratch

The bank is synthetic: unit vectors around a space of 64 dimensions. Every step runs in a process of
its own. Counted is anonymous memory (RssAnon of /proc/self/status), at its peak over what the
process had after its imports, for pages of a mapped file belong to the file and are given back when
memory is short. One JSON line per step; the scratch folder takes four times the bank and is left
to be removed by hand. Linux only.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from stratagem.interop.banks import read_bank
from stratagem.memory import edit
from stratagem.memory.bank import MemoryBank
from stratagem.memory.build import build
from stratagem.memory.compress import compress, fidelity
from stratagem.memory.draw import draw
from stratagem.memory.search import nearest, rows_near
from stratagem.memory.store import blank
from stratagem.randomness import normal

BATCH = 2048


class Work:
    """The steps, each of which finds what those before it wrote.

    Args:
        folder: Scratch folder.
        rows: Number of rows of the bank.
        dim: Width.
    """

    def __init__(self, folder: Path, rows: int, dim: int) -> None:
        self.folder, self.rows, self.dim = folder, rows, dim
        self.space = normal((64, dim), 0, "benchmark-space")

    def encode(self, images: Tensor) -> Tensor:
        """Makes vectors of images that are but their numbers, shape (B, 1)."""
        first = int(images[0])
        codes = normal((len(images), 64), first, "benchmark-codes")
        noise = normal((len(images), self.dim), first, "benchmark-noise")
        return codes @ self.space + 2 * noise + 4

    def batches(self, start: int) -> Iterator[Tensor]:
        """Yields the numbers of images."""
        for first in range(start, self.rows, BATCH):
            yield torch.arange(first, min(first + BATCH, self.rows))[:, None]

    def file(self, name: str) -> Path:
        """Returns the path of a bank."""
        return self.folder / f"{name}.safetensors"

    def bank(self) -> MemoryBank:
        """Opens the bank without reading it."""
        return MemoryBank.load(self.file("full"), verify=False)

    def build(self) -> None:
        """Builds it as float16."""
        labels = torch.arange(self.rows) % 1000
        frame = MemoryBank(
            blank(self.rows, 1, self.dim, "float16"),
            labels,
            torch.zeros(self.rows),
            {"name": "synthetic"},
            "",
        )
        build(self.file("full"), frame, self.batches, self.encode)

    def use(self) -> None:
        """Opens it with verification, draws, and looks up 1,000 batches of 256."""
        bank = MemoryBank.load(self.file("full"))
        for rows in draw(bank, 256_000).split(256):
            bank.lookup(rows)
        bank.info()

    def int8(self) -> None:
        """Compresses to one byte per number."""
        compress(self.bank(), "int8").save(self.file("int8"))

    def low_rank(self) -> None:
        """Compresses to the rank that reaches cosine 0.95."""
        compress(self.bank(), "low-rank", cosine=0.95).save(self.file("low-rank"))

    def compare(self) -> None:
        """Measures energy, cosines and recall of the low-rank bank."""
        found = fidelity(self.bank(), MemoryBank.load(self.file("low-rank")))
        print(json.dumps({"low-rank": found}), flush=True)

    def search(self) -> None:
        """Finds the ten nearest rows of 64 queries."""
        bank = self.bank()
        nearest(bank, bank.lookup(draw(bank, 64)), 10)

    def edits(self) -> None:
        """Adds, interpolates, removes and merges, then writes the result of all."""
        bank = self.bank()
        new = edit.add(
            bank, self.encode(torch.arange(14)[:, None]), [f"new/{k}" for k in range(14)]
        )
        new = edit.interpolate(new, torch.tensor([[3, 17]]), [0.25, 0.5, 0.75])
        new = edit.remove(new, rows_near(new, new.lookup(torch.tensor([5])), 0.9))
        edit.merge(new, MemoryBank.load(self.file("low-rank"))).save(self.file("edited"))

    def official(self) -> None:
        """Imports a float32 .pth of the same rows, which the first half of this step writes."""
        read_bank(self.folder / "official.pth").save(self.file("imported"))


STEPS = ("build", "use", "int8", "low_rank", "compare", "search", "edits", "official")


def anonymous() -> int:
    """Returns the anonymous memory of this process in bytes."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def measure(step: Callable[[], None]) -> tuple[int, float]:
    """Runs a step and returns the growth of anonymous memory at its peak, and seconds."""
    before = peak = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.monotonic()
    step()
    seconds = time.monotonic() - start
    done.set()
    thread.join()
    return peak - before, seconds


def main() -> None:
    """Runs all steps in turn, or one in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_281_167)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--step", choices=STEPS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.step is None:
        for step in STEPS:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--step", step], check=True)
        return
    work = Work(options.folder, options.rows, options.dim)
    if options.step == "official":
        vectors = work.bank().store.columns["vectors"]
        torch.save(vectors[:, 0].float(), options.folder / "official.pth")
    growth, seconds = measure(getattr(work, options.step))
    line = {"step": options.step, "anonymous MB": round(growth / 1e6, 1), "s": round(seconds, 1)}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
