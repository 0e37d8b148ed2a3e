"""Decoding in processes: results in order, however many there are.

    records -> chunks -> process 0, 1, ..., 0, 1, ... -> chunks in the same order

A process is this module run by a new interpreter, without torch, joined by a pair of sockets and
some memory, in which it leaves the pixels: those of chunk k in part k modulo `_AHEAD`, which is
free again when the next chunk for it is given. It imports nothing of the program that asks, so
scripts need no `if __name__ == "__main__"`. It ends when that program does, however that ended, for
then its socket is closed, and the memory goes with both.

A file that kills its decoder is found by giving the chunk once more, image by image, to a new one.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import multiprocessing
import os
import queue
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from stratagem.data.decoding import cause_of, decode
from stratagem.data.sources import Loader, Record
from stratagem.errors import InputError

__all__ = ["Form", "cores", "decode_all"]

_CHUNK = 16
_AHEAD = 4  # chunks that a process has been given at most
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Form(NamedTuple):
    """What images shall become.

    Attributes:
        size: Side of the square.
        channels: 3 for RGB, 1 for gray.
        limit: Most pixels that an image may have; None for any number.
    """

    size: int
    channels: Literal[1, 3]
    limit: int | None


def cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def decode_all(
    records: Iterable[Record], form: Form, workers: int
) -> Iterator[tuple[Record, np.ndarray | str]]:
    """Yields each record with its image, shape (channels, size, size), uint8, or why there is none.

    Args:
        records: What to decode.
        form: What the images shall become.
        workers: Processes that decode; below 2, this one does.
    """
    if workers < 2:
        with warnings.catch_warnings():
            # Pillow warns of large images; we refuse them and say so in the list of rejected ones
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            for record in records:
                yield record, _attempt(record.load, form)
        return
    with contextlib.ExitStack() as stack:
        crew = [stack.enter_context(_Worker(form)) for _ in range(workers)]
        waiting: deque[tuple[_Worker, list[Record]]] = deque()
        records, turns = iter(records), itertools.cycle(crew)
        while chunk := list(itertools.islice(records, _CHUNK)):
            worker = next(turns)
            worker.ask([record.load for record in chunk])
            waiting.append((worker, chunk))
            if len(waiting) == _AHEAD * workers:
                worker, chunk = waiting.popleft()
                yield from zip(chunk, worker.answer(), strict=True)
        for worker, chunk in waiting:
            yield from zip(chunk, worker.answer(), strict=True)


def _attempt(load: Loader | str, form: Form) -> np.ndarray | str:
    if isinstance(load, str):
        return load
    try:
        source = load()
        if isinstance(source, np.ndarray):
            return decode(source, form.size, form.channels)
        with source:
            return decode(source, form.size, form.channels)
    except Exception as error:  # one image, whatever is wrong with it, ends nothing
        return cause_of(error)


class _Worker:
    """A process that decodes chunks, one after the other."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._asked: deque[list[Loader | str]] = deque()

    def __enter__(self) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        memory = _memory()
        handles = theirs.fileno(), memory
        self._parts = itertools.cycle(_parts(memory, self._form))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "stratagem.data.workers", *map(str, handles)],
            env={**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(sys.path)},
            pass_fds=handles,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the program, which then closes the sockets
        )
        theirs.close()
        os.close(memory)
        self._connection, self._ready = ours, False
        with contextlib.suppress(OSError):  # it is dead: `_receive` sees to that
            self._connection.send(self._form)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def ask(self, loads: list[Loader | str]) -> None:
        """Gives the process a chunk."""
        self._asked.append(loads)
        with contextlib.suppress(OSError):  # it is dead: `answer` sees to that
            self._connection.send(loads)

    def answer(self) -> list[np.ndarray | str]:
        """Returns the results of the chunk that was given first."""
        loads = self._asked.popleft()
        try:
            return self._receive()
        except (EOFError, OSError):
            later, self._asked = list(self._asked), deque()
            self._renew()
            results = [self._alone(load) for load in loads]
            for chunk in later:
                self.ask(chunk)
            return results

    def _alone(self, load: Loader | str) -> np.ndarray | str:
        try:
            self._connection.send([load])
            return self._receive()[0]
        except (EOFError, OSError):
            self._renew()
            return "it ends the program that decodes it"

    def _receive(self) -> list[np.ndarray | str]:
        if not self._ready:
            try:
                self._ready = self._connection.recv()
            except (EOFError, OSError) as error:
                text = "the processes that decode images do not start: give --workers 1"
                raise InputError(text) from error
        causes = self._connection.recv()
        pixels = next(self._parts)
        return [pixels[i].copy() if cause is None else cause for i, cause in enumerate(causes)]

    def _renew(self) -> None:
        self.__exit__(None, None, None)
        self.__enter__()


def _memory() -> int:
    """Returns a handle of memory to share; unlike /dev/shm it is never small."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("images")
    with tempfile.TemporaryFile() as file:  # where only Linux has the other
        return os.dup(file.fileno())


def _parts(memory: int, form: Form) -> np.ndarray:
    """Maps the memory for pixels, shape (_AHEAD, _CHUNK, channels, size, size), uint8."""
    shape = (_AHEAD, _CHUNK, form.channels, form.size, form.size)
    os.ftruncate(memory, math.prod(shape))
    return np.frombuffer(mmap.mmap(memory, math.prod(shape)), np.uint8).reshape(shape)


def _serve(connection: Connection, memory: int) -> None:
    """Answers chunks until the other side is gone: with None for an image, or why there is none.

    Threads take them in and send the results, so that no side waits for room while the other does,
    and this one goes on while the other is busy with a shard.
    """
    form = connection.recv()
    Image.MAX_IMAGE_PIXELS = form.limit
    chunks: queue.SimpleQueue[list[Loader | str]] = queue.SimpleQueue()
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def receive() -> None:
        try:
            while True:
                chunks.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection.send(results.get())

    connection.send(True)
    for work in (receive, answer):
        threading.Thread(target=work, daemon=True).start()
    warnings.simplefilter("ignore")
    for pixels in itertools.cycle(_parts(memory, form)):
        results.put([_leave(load, form, pixels[i]) for i, load in enumerate(chunks.get())])


def _leave(load: Loader | str, form: Form, place: np.ndarray) -> str | None:
    image = _attempt(load, form)
    if isinstance(image, str):
        return image
    place[...] = image
    return None


if __name__ == "__main__":
    with contextlib.suppress(OSError):
        _serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
