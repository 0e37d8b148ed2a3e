"""Batches made in the background, while the network is busy with those before.

    threads   make(0)  make(1)  make(2)  ...     at most `depth` wait, and each thread makes one
    training           step 0   step 1   ...     takes them in order

A batch is a pure function of its step, so making it early, or beside others, changes nothing.
Drawing noise and copying pixels leave the interpreter to others. Where a GPU computes, several
threads keep up with it (`threads_for`), and pin the memory, so that the copy to the device needs no
wait. On a CPU there is one: more would take cores from the network.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType

import torch
from torch import Tensor

from stratagem.batches import Batch
from stratagem.data.workers import cores
from stratagem.distributed import World

__all__ = ["Prefetch", "threads_for", "to_device"]

_MOST = 4  # threads: each holds a batch, and they share the interpreter with the loop


def threads_for(world: World) -> int:
    """Returns how many threads make batches: one on a CPU, else what the process has of the cores.

    Processes that compute on GPUs of one machine have equal shares, and the loop keeps a core.
    """
    if world.device.type == "cpu":
        return 1
    here = max(1, min(world.size, torch.cuda.device_count()))
    return max(1, min(_MOST, cores() // here - 1))


class Prefetch:
    """Makes the batches of consecutive steps, in threads of its own, and gives them in order.

    Args:
        make: The batch of a step; called by several threads at once if there are.
        start: The first step.
        stop: The step before which to end.
        depth: How many batches may wait, besides the one that each thread makes.
        threads: How many make them.
        device: Where they will go; for a GPU their memory is pinned.
    """

    def __init__(
        self,
        make: Callable[[int], Batch],
        start: int,
        stop: int,
        *,
        depth: int = 2,
        threads: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self._make, self._steps, self._device = make, iter(range(start, stop)), device
        self._ahead = depth + threads
        self._made = deque[Future[Batch]]()
        self._threads = ThreadPoolExecutor(threads, "batches", self._prepare)

    def __enter__(self) -> Prefetch:
        """Starts the threads."""
        self._ask(self._ahead)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the threads; what they made is dropped."""
        self._threads.shutdown(cancel_futures=True)

    def take(self) -> Batch:
        """Returns the batch of the next step, or raises what making it raised."""
        batch = self._made.popleft().result()
        self._ask(1)
        return batch

    def _ask(self, num: int) -> None:
        for step in islice(self._steps, num):
            self._made.append(self._threads.submit(self._run, step))

    def _prepare(self) -> None:
        """Gives a new thread the device of the process: by itself it would have the first GPU."""
        if self._pins:
            torch.cuda.set_device(self._device)

    @property
    def _pins(self) -> bool:
        return self._device is not None and self._device.type == "cuda"

    def _run(self, step: int) -> Batch:
        return _mapped(self._make(step), _pinned, self._pins)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_cuda else tensor.pin_memory()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Moves a batch to a device without waiting for it; the ids, which are for people, stay."""
    return _mapped(batch, lambda t: t.to(device, non_blocking=True), device.type != "cpu")


def _mapped(batch: Batch, change: Callable[[Tensor], Tensor], wanted: bool) -> Batch:
    if not wanted:
        return batch
    return batch._replace(
        x=change(batch.x),
        eps=change(batch.eps),
        t=change(batch.t),
        condition={name: change(tensor) for name, tensor in batch.condition.items()},
        weight=None if batch.weight is None else change(batch.weight),
    )
