"""The machine that something is measured on: its name, memory, and speed at what it does best."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["device_name", "peak_bytes", "product_rate", "sheet_rate", "tf32", "wait"]

# Dense bf16 FLOP/s of the makers' data sheets, by a part of the device's name.
_SHEETS = {"H200": 989e12, "H100 80GB HBM3": 989e12, "H800": 989e12, "A100": 312e12}


def product_rate(device: torch.device, precision: str) -> float:
    """Measures the FLOP/s of a large square matrix product; the best of five."""
    gpu = device.type == "cuda"
    size, repeat = (8192, 10) if gpu else (1024, 1)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        wait(device)
        begun = time.perf_counter()
        for _ in range(repeat):
            a @ a
        wait(device)
        best = max(best, repeat * 2 * size**3 / (time.perf_counter() - begun))
    return best


def sheet_rate(device: torch.device) -> float | None:
    """Returns the bf16 FLOP/s that the data sheet of a device promises, or None."""
    name = device_name(device)
    return next((rate for part, rate in _SHEETS.items() if part in name), None)


def device_name(device: torch.device) -> str:
    """Returns what a device is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def peak_bytes(device: torch.device) -> int:
    """Returns the most memory that tensors had on a GPU, or this process has had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def wait(device: torch.device) -> None:
    """Waits until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def tf32() -> Iterator[None]:
    """Lets a GPU round the factors of float32 matrix products to TF32's 10 bits, inside.

    That is what torch lets its convolutions do anyway; on a CPU nothing changes.
    """
    products = torch.backends.cuda.matmul
    before, products.allow_tf32 = products.allow_tf32, True
    try:
        yield
    finally:
        products.allow_tf32 = before
