"""How training ends early: by a signal, after a checkpoint, or by numbers that are not finite.

A non-finite step must not move the weights, and the host must not wait for the device to learn of
it. So the device decides, and the host reads the verdict `lag` steps later:

    bad = not finite(loss, |gradient|)     row = (row + 1) bad, and stays once it is at the limit
    the update is skipped where bad or row >= limit

At the limit nothing moves any more, so the steps that the host has sent meanwhile do no harm.
"""

from __future__ import annotations

import logging
import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor

from stratagem.errors import NonFinite, StratagemError

__all__ = ["Finite", "Interrupted", "StopFlag", "stop_on_signals"]

log = logging.getLogger(__name__)


class Interrupted(StratagemError):
    """A signal ended the run after a checkpoint; the exit code is 128 + its number."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped at step {step}; the same command goes on from there")
        self.exit_code = 128 + number


@dataclass
class StopFlag:
    """Set by a signal, looked at between two steps."""

    number: int = 0


@contextmanager
def stop_on_signals(*, echo: float = 0.0) -> Iterator[StopFlag]:
    """Yields a flag that the first SIGINT, SIGTERM or SIGUSR1 sets; the second one acts at once.

    Args:
        echo: Seconds within which a signal is the first one once more: under Slurm each process
            gets a job's signal from Slurm, and a moment later from torchrun, which has got it, too.
    """
    flag, begun = StopFlag(), 0.0
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        nonlocal begun
        again, now = bool(flag.number), time.monotonic()
        if not again:
            flag.number, begun = number, now
        if echo and now - begun <= echo:
            return
        for n, handler in before.items():
            signal.signal(n, handler)
        if again:
            signal.raise_signal(number)

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Verdict(NamedTuple):
    """What the device says of a step; `ready` tells when the numbers have arrived."""

    step: int
    ids: Tensor
    numbers: Tensor
    ready: torch.cuda.Event | None


class Finite:
    """Decides which updates are skipped, and ends a run that meets too many in a row.

    Args:
        limit: How many non-finite steps in a row end the run; 1 ends it at the first.
        device: Where the numbers are.
        lag: How many steps later the host looks; by default 1, and 0 on a CPU, where it is free.

    Attributes:
        row: How many non-finite steps there are in a row so far, 0-dim.
    """

    def __init__(self, limit: int, device: torch.device, lag: int | None = None) -> None:
        self.limit = limit
        self.row = torch.zeros((), dtype=torch.int64, device=device)
        self.lag = int(device.type != "cpu") if lag is None else lag
        self._verdicts: deque[_Verdict] = deque()

    def judge(self, step: int, ids: Tensor, loss: Tensor, norm: Tensor) -> Tensor:
        """Returns whether the update of a step is to be skipped, 0-dim bool on the device.

        Args:
            step: Which step.
            ids: Its images, here; named where something is wrong.
            loss: Its loss, 0-dim.
            norm: The norm of its gradient, 0-dim.

        Raises:
            NonFinite: If the limit has been reached, in this step or `lag` steps ago.
        """
        bad = ~torch.isfinite(loss + norm)
        ended = self.row >= self.limit
        self.row = torch.where(ended, self.row, torch.where(bad, self.row + 1, 0))
        numbers = torch.stack([loss.double(), norm.double(), self.row.double()])
        ready = None
        if numbers.is_cuda:
            numbers = numbers.to("cpu", non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._verdicts.append(_Verdict(step, ids, numbers, ready))
        self.settle(self.lag)
        return bad | ended

    def settle(self, left: int = 0) -> None:
        """Reads the verdicts of all steps but the last `left`.

        Raises:
            NonFinite: If the limit was reached; no later step has moved anything.
        """
        while len(self._verdicts) > left:
            step, ids, numbers, ready = self._verdicts.popleft()
            if ready is not None:
                ready.synchronize()
            loss, norm, row = numbers.tolist()
            if not row:
                continue
            text = (
                f"loss {loss:.4g} or gradient {norm:.4g} is not finite at step {step}, images "
                f"{ids[:8].tolist()}..."
            )
            if row >= self.limit:
                self._verdicts.clear()
                times = f" ({int(row)} steps in a row)" if row > 1 else ""
                raise NonFinite(f"{text}{times}: lower train.learning_rate")
            log.warning("%s: its update is skipped", text)
