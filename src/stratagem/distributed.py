"""Training on several processes: the only room that knows torch.distributed.

    torchrun -> RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT -> World

Every process has some rows of each batch and the same network, whole (DDP) or in shards (FSDP2).
Losses are divided by the rows of the whole batch, and gradients are summed, so a step is that of
one process. Metrics are summed on the device; only a stop is agreed upon on the CPU, each step, so
that all processes end after the same one.

With one process nothing is set up, and every function here does what is right for one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stratagem.errors import InputError, StratagemError

__all__ = [
    "Parallel",
    "World",
    "Wrapped",
    "apart",
    "connect",
    "fill",
    "full",
    "launched",
    "like",
    "rank",
    "wrap",
    "write_shards",
]

Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class World:
    """The processes that train together, seen from one of them.

    Attributes:
        rank: Which process this is; 0 writes the files.
        size: How many there are.
        device: Where this one computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, values: Tensor) -> Tensor:
        """Sums a tensor of this device over all processes, without waiting for the device."""
        if self.size > 1:
            from torch import distributed

            distributed.all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """Returns the largest of the processes' values; no device is asked."""
        if self.size == 1:
            return value
        from torch import distributed

        found = torch.tensor(value)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes, by rank; small Python objects."""
        values = [value] * self.size
        if self.size > 1:
            from torch import distributed

            distributed.all_gather_object(values, value)
        return values

    def first(self, value: Any) -> Any:
        """Returns the value of process 0."""
        return self.gather(value)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Runs a block that no process leaves alone: where one fails, all do, with its reason.

        Raises:
            StratagemError: On the processes that did not fail, with the exit code of the one.
        """
        failure: BaseException | None = None
        try:
            yield
        except Exception as error:
            failure = error
        said = None if failure is None else (str(failure), getattr(failure, "exit_code", 1))
        failures = self.gather(said)
        if failure is not None:
            raise failure
        for rank, found in enumerate(failures):
            if found is not None:
                raise _Elsewhere(rank, *found)


class _Elsewhere(StratagemError):
    """Another process failed."""

    def __init__(self, rank: int, reason: str, exit_code: int) -> None:
        super().__init__(f"process {rank}: {reason}")
        self.exit_code = exit_code


def apart(
    device: Literal["auto", "cpu", "cuda"] = "auto", *, setting: str = "train.device"
) -> World:
    """Returns what torchrun says of this process, and joins no other: for work where none waits.

    Args:
        device: As for `connect`.
        setting: Where the user chose it.

    Raises:
        InputError: If there is no such GPU, or the environment is not torchrun's.
    """
    number, size, local = (_number(name, n) for name, n in _ENVIRONMENT.items())
    if number >= size:
        raise InputError(f"RANK is {number} of {size} processes: start them with torchrun")
    return World(number, size, _device(device, local, setting))


@contextmanager
def connect(device: Literal["auto", "cpu", "cuda"] = "auto") -> Iterator[World]:
    """Joins the processes that torchrun has started, or yields the world of one process.

    Args:
        device: "cuda" is the GPU of LOCAL_RANK; "auto" takes it where there is one.

    Raises:
        InputError: If there is no such GPU, or the environment is torchrun's only in part.
    """
    world = apart(device)
    if world.size == 1:
        yield world
        return
    from torch import distributed

    backend = "gloo" if world.device.type == "cpu" else "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, rank=world.rank, world_size=world.size)
    try:
        yield world
    finally:
        distributed.destroy_process_group()


def launched() -> bool:
    """Says whether torchrun, or a program like it, has started this process."""
    return "WORLD_SIZE" in os.environ


def rank() -> int:
    """Returns which process this is, before it has joined the others; 0 alone."""
    return _number("RANK", 0)


_ENVIRONMENT = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise InputError(f"{name} is {text!r}: start several processes with torchrun")
    if name != "WORLD_SIZE" and int(text) and not launched():
        raise InputError(f"{name} is {text} of 1 process, without WORLD_SIZE: use torchrun")
    return int(text)


def _device(name: str, local: int, setting: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local >= torch.cuda.device_count():
        raise InputError(
            f"{setting} {name} needs GPU {local}, but torch sees {torch.cuda.device_count()}: "
            "start fewer processes, or set it to cpu"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@dataclass(frozen=True)
class Wrapped:
    """A module in training on several processes.

    Attributes:
        call: What to call in its place.
        holding: Opens a pass whose gradients are not exchanged yet.
    """

    call: Callable[..., Any]
    holding: Callable[[], AbstractContextManager[Any]] = nullcontext


def wrap(
    module: nn.Module, blocks: Sequence[nn.Module], world: World, parallel: Parallel
) -> Wrapped:
    """Makes the gradients of a module the mean over all processes.

    Names of parameters stay as they are. With "fsdp" each parameter of the module itself becomes
    this process's shard, gathered block by block when it is needed.

    Args:
        module: The module, on the world's device, the same on all processes.
        blocks: The parts of it that are gathered one at a time.
        world: The processes.
        parallel: Which way.
    """
    if world.size == 1:
        return Wrapped(module)
    if parallel == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        same = DistributedDataParallel(module, gradient_as_bucket_view=True)
        same.broadcast_buffers = False  # they are constants
        return Wrapped(same, same.no_sync)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for part in (*blocks, module):
        fully_shard(part, mesh=mesh)

    @contextmanager
    def holding() -> Iterator[None]:
        assert isinstance(module, FSDPModule)
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)

    return Wrapped(module, holding)


def full(tensor: Tensor) -> Tensor:
    """Returns a tensor whole; of shards, all processes must ask for it in the same order."""
    return tensor.full_tensor() if _is_shard(tensor) else tensor  # type: ignore[attr-defined]


def _is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; there is none before its module is loaded, which is slow."""
    known = sys.modules.get("torch.distributed.tensor")
    return known is not None and isinstance(tensor, known.DTensor)


def like(whole: Tensor, model: Tensor) -> Tensor:
    """Returns a whole tensor placed as another: its device, and its shard if it is one.

    What has another shape, such as an optimizer's count of steps, is only moved.
    """
    if not _is_shard(model) or whole.shape != model.shape:
        return whole.to(model.device, copy=True)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(model, DTensor)
    mesh, placements = model.device_mesh, model.placements
    return distribute_tensor(whole.to(model.device), mesh, placements, src_data_rank=None)


@torch.no_grad()
def fill(target: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor into a tensor of the same shape, or this process's shard of it."""
    if target.shape != whole.shape:
        raise ValueError(f"expected shape {tuple(target.shape)}, got {tuple(whole.shape)}")
    target.copy_(like(whole, target))


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors with torch.distributed.checkpoint, each process its shards, as safetensors.

    `checkpoint.load` reads them, with any number of processes. All processes must call it.
    """
    from torch.distributed import checkpoint

    writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        checkpoint.save(dict(tensors), storage_writer=writer)
    except checkpoint.CheckpointException as error:  # which is no Exception
        raise OSError(str(next(iter(error.failures.values()))[0])) from error
