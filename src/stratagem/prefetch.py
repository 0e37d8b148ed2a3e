"""Batches made in the background, while the network is busy with those before.

    thread    make(0)  make(1)  make(2)  ...     at most `depth` ahead of what was taken
    training           step 0   step 1   ...

A batch is a pure function of its step, so making it early changes nothing. Drawing noise and
copying pixels leave the interpreter to others; on a machine with a GPU the thread also pins the
memory, so that the copy to the device needs no wait.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor

from stratagem.batches import Batch

__all__ = ["Prefetch", "to_device"]


class Prefetch:
    """Makes the batches of consecutive steps, in order, in a thread of its own.

    Args:
        make: The batch of a step.
        start: The first step.
        stop: The step before which to end.
        depth: How many batches may wait.
        pin: Whether their memory is pinned.
    """

    def __init__(
        self,
        make: Callable[[int], Batch],
        start: int,
        stop: int,
        *,
        depth: int = 2,
        pin: bool = False,
    ) -> None:
        self._make, self._steps, self._pin = make, range(start, stop), pin
        self._made: queue.Queue[Batch | BaseException] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)

    def __enter__(self) -> Prefetch:
        """Starts the thread."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the thread; what it made is dropped."""
        self._closed.set()
        while self._thread.is_alive():  # it may wait for room
            try:
                self._made.get(timeout=0.01)
            except queue.Empty:
                continue

    def take(self) -> Batch:
        """Returns the batch of the next step, or raises what making it raised."""
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        return made

    def _run(self) -> None:
        for step in self._steps:
            try:
                batch = self._make(step)
                made: Batch | BaseException = _mapped(batch, Tensor.pin_memory, self._pin)
            except BaseException as error:
                made = error
            self._made.put(made)
            if self._closed.is_set() or isinstance(made, BaseException):
                return


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
