"""Tensor files: safetensors whose header holds kind, metadata and the sum of each tensor.

    8 bytes: length of the header | header, JSON | tensors, the widest numbers first

A file may be larger than the memory. It is written in pieces, and reading maps it: only what is
used is brought from the disk. Plain files, without kind and sums, serve inside folder artifacts,
whose manifest holds their sum.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stratagem.artifact.manifest import FORMAT, Manifest, flush, refuse_existing, signed, sum_of
from stratagem.errors import DamagedArtifact, InputError

__all__ = [
    "Layout",
    "TensorDraft",
    "raw_bytes",
    "read_tensor_file",
    "read_tensors",
    "stream_tensors",
    "write_tensor_file",
    "write_tensors",
]

_NO_SUM = "0" * 64  # as long as a SHA-256 in hexadecimal
_CODES = {  # in the order in which safetensors keeps them
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name of a tensor -> its type and shape."""


class TensorDraft:
    """A tensor file in the making: rows of its tensors are written, in any order, and then sealed.

    The header stands first and holds the sums of what follows it. A sum has a fixed length, so
    zeros keep its place until the end, when the file is read once to compute it.

    Args:
        file: The draft; one that is there already is gone on with, and must have this layout.
        kind: What the artifact is.
        layout: What tensors it has.
        meta: JSON-able metadata.

    Raises:
        InputError: If another process writes the draft.
    """

    def __init__(
        self,
        file: Path,
        kind: str,
        layout: Layout,
        meta: Mapping[str, Any],
    ) -> None:
        self._path, self._layout = file, layout
        self._spans: dict[str, tuple[int, int]] = {}
        end = 0
        for name in sorted(layout, key=lambda n: (-layout[n][0].itemsize, n)):  # aligned so
            dtype, shape = layout[name]
            self._spans[name] = (end, end := end + dtype.itemsize * math.prod(shape))
        self.manifest = Manifest(kind, dict(meta), self._sums(lambda _: _NO_SUM))
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = file.open("r+b" if file.exists() else "x+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._stream.close()
            raise InputError(f"another process writes {file}: wait for it to end") from error
        self._start = self._write_header(_NO_SUM)
        self._stream.truncate(self._start + end)

    def write(self, name: str, row: int, rows: Tensor) -> None:
        """Writes rows, shape (n, ...), of a tensor from its row `row` on."""
        dtype, shape = self._layout[name]
        assert rows.dtype == dtype, (name, rows.dtype)
        assert tuple(rows.shape[1:]) == shape[1:], (name, rows.shape)
        start, end = self._spans[name]
        start += row * dtype.itemsize * math.prod(shape[1:])
        assert start + rows.nbytes <= end, (name, row, rows.shape)
        self._stream.seek(self._start + start)
        self._stream.write(raw_bytes(rows))

    def sync(self) -> None:
        """Forces what was written to the disk."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def seal(self, path: Path) -> Manifest:
        """Writes the sums into the header and gives the file its name."""
        self._stream.flush()
        files = self._sums(lambda name: sum_of(self._path, self._start, *self._spans[name]))
        self.manifest = dataclasses.replace(self.manifest, files=files)
        self._write_header(self.manifest.fingerprint)
        self.sync()
        os.replace(self._path, path)
        flush(path.parent)
        return self.manifest

    def close(self, *, remove: bool) -> None:
        """Ends the writing; an unsealed draft goes or, to be gone on with, stays."""
        self._stream.close()
        if remove:
            self._path.unlink(missing_ok=True)

    def _sums(self, of: Callable[[str], str]) -> dict[str, dict[str, Any]]:
        spans = self._spans.items()
        return {name: {"sha256": of(name), "bytes": end - start} for name, (start, end) in spans}

    def _write_header(self, seal: str) -> int:
        """Writes the header, signed if sealed, at the beginning and returns its length."""
        manifest = self.manifest
        body = {"kind": manifest.kind, "format": FORMAT, "meta": manifest.meta}
        body |= {"files": manifest.files, "sha256": seal}
        header: dict[str, Any] = {"__metadata__": {"stratagem": json.dumps(body, sort_keys=True)}}
        for name, span in self._spans.items():
            dtype, shape = self._layout[name]
            header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": span}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._stream.seek(0)
        self._stream.write(len(text).to_bytes(8, "little") + text)
        return 8 + len(text)


@contextlib.contextmanager
def stream_tensors(
    path: Path,
    kind: str,
    layout: Layout,
    meta: Mapping[str, Any],
    *,
    replace: bool = False,
) -> Iterator[TensorDraft]:
    """Yields a draft to fill; it becomes `path` on success and goes otherwise.

    Raises:
        InputError: If `path` exists and `replace` is false.
    """
    refuse_existing(path, replace)
    draft = TensorDraft(path.with_name(f".{path.name}.{os.getpid()}.tmp"), kind, layout, meta)
    try:
        yield draft
        draft.seal(path)
    finally:
        draft.close(remove=True)


def write_tensors(
    path: Path,
    kind: str,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    replace: bool = False,
) -> Manifest:
    """Writes one safetensors file whose header holds kind, metadata and a sum per tensor."""
    plain = {name: t.detach().cpu() for name, t in tensors.items()}
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in plain.items()}
    with stream_tensors(path, kind, layout, meta, replace=replace) as draft:
        for name, tensor in plain.items():
            draft.write(name, 0, tensor)
    return draft.manifest


def read_tensors(
    path: Path, kind: str, *, verify: bool = True
) -> tuple[dict[str, Tensor], Manifest]:
    """Reads a file of tensors; with `verify`, compares the sum of every one of them.

    Tensors are mapped from the file and not copied: what is never used is never read.

    Raises:
        InputError: If there is no such file or it is something else.
        DamagedArtifact: If it is truncated or altered.
    """
    if not path.is_file():
        raise InputError(f"no {kind} at {path}: the file does not exist")
    with path.open("rb") as stream:
        if stream.read(9)[8:] not in {b"{", b""}:  # where safetensors has its JSON header
            raise InputError(f"{path} is not a {kind}: it is no safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("stratagem")
            if header is None:
                raise InputError(f"{path} is not a {kind}: it was not written by stratagem")
            manifest = signed(json.loads(header), path, kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedArtifact(f"{path} is damaged ({error}): restore or rebuild it") from error
    if set(tensors) != set(manifest.files):
        raise DamagedArtifact(f"{path} is damaged: it lacks tensors that its header names")
    for name, tensor in tensors.items():
        if (
            verify
            and hashlib.sha256(raw_bytes(tensor)).hexdigest() != manifest.files[name]["sha256"]
        ):
            raise DamagedArtifact(
                f"{path} is damaged: tensor {name!r} was altered; restore or rebuild it"
            )
    return tensors, manifest


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes plain safetensors inside an open folder artifact, and returns the file's SHA-256.

    The tensors go to the file as they lie in memory, byte for byte what `safetensors` would write.
    """
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    codes, header, end = list(_CODES.values()), dict[str, Any](), 0
    for name in sorted(plain, key=lambda n: (codes.index(_CODES[plain[n].dtype]), n)):
        dtype, shape = _CODES[plain[name].dtype], list(plain[name].shape)
        span = [end, end := end + plain[name].nbytes]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    parts: list[bytes | memoryview] = [head, *(raw_bytes(plain[name]) for name in header)]
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        for part in parts:
            digest.update(part)
            stream.write(part)
    return digest.hexdigest()


def read_tensor_file(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Reads plain safetensors; on the CPU, tensors are mapped from the file and not copied.

    Raises:
        DamagedArtifact: If the file is not readable as safetensors.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DamagedArtifact(f"{path} is damaged ({error}): restore or rebuild it") from error


def raw_bytes(tensor: Tensor) -> memoryview:
    r"""Returns the numbers of a tensor as bytes, without a copy where they lie in order.

    Example:
        >>> bytes(raw_bytes(torch.tensor([1, 256], dtype=torch.int32)))
        b'\x01\x00\x00\x00\x00\x01\x00\x00'
    """
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
