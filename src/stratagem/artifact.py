"""Artifacts: tensors and JSON on disk that say what they are and notice when they are damaged.

Three shapes of one idea, each with a kind, a format version, a body of metadata and SHA-256 sums:

    folder    files + manifest.json       data sets, runs' checkpoints, samples
    tensors   one safetensors file        memory banks
    record    one JSON file               stages

Everything is written under a temporary name beside its target, flushed to the disk, and renamed
at the end: a reader sees the old artifact, the new one, or none, never half of one. Neither
safetensors nor torch notices a flipped bit in a payload, so the sums are checked on reading.

The fingerprint of an artifact is the SHA-256 of its content (kind, metadata, sums): equal content
has an equal fingerprint whenever and wherever it was made. Metadata therefore holds no times.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stratagem.errors import DamagedArtifact, InputError

__all__ = [
    "Manifest",
    "fingerprint",
    "read_folder",
    "read_record",
    "read_tensor_file",
    "read_tensors",
    "write_bytes",
    "write_folder",
    "write_record",
    "write_tensor_file",
    "write_tensors",
]

FORMAT = 1
MANIFEST = "manifest.json"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself.

    Attributes:
        kind: What it is, such as "dataset".
        meta: The resolved configuration that made it and the fingerprints of what it was made from.
        files: File name -> {"sha256": hex digest, "bytes": size}; of a tensor file, tensor name.
    """

    kind: str
    meta: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over kind, metadata and sums, 64 hex digits."""
        return fingerprint({"kind": self.kind, "meta": self.meta, "files": self.files})


def fingerprint(body: Any) -> str:
    """Returns the SHA-256 of a JSON-able body, written with sorted keys.

    Example:
        >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# --- folders -----------------------------------------------------------------------------------


@contextlib.contextmanager
def write_folder(
    path: Path, kind: str, meta: Mapping[str, Any], *, replace: bool = False
) -> Iterator[Path]:
    """Yields a temporary folder to fill; it becomes `path` on success and goes otherwise.

    Args:
        path: Where the artifact shall be.
        kind: What it is.
        meta: JSON-able metadata; may still be extended while the folder is open.
        replace: Whether an existing artifact gives way, once the new one stands.

    Raises:
        InputError: If `path` exists and `replace` is false.
    """
    _refuse_existing(path, replace)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        _seal(draft, kind, dict(meta))
        _swap(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read_folder(path: Path, kind: str, *, verify: bool = True) -> Manifest:
    """Reads and checks the manifest of a folder artifact.

    Args:
        path: The artifact.
        kind: What it must be.
        verify: Whether every file is read and its sum compared; sizes are always compared.

    Raises:
        InputError: If there is no such folder or it is something else.
        DamagedArtifact: If a file is missing, truncated or altered.
    """
    if not path.is_dir():
        raise InputError(f"no {kind} at {path}: the folder does not exist")
    if not (path / MANIFEST).is_file():
        raise InputError(f"{path} is not a finished {kind}: it has no {MANIFEST}")
    manifest = _manifest(_load_json(path / MANIFEST), path, kind)
    for name, entry in manifest.files.items():
        _check_file(path / name, entry, verify)
    return manifest


def _seal(folder: Path, kind: str, meta: dict[str, Any]) -> None:
    """Flushes every file of a folder to the disk and writes its manifest last."""
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        _flush(file)
        name = file.relative_to(folder).as_posix()
        files[name] = {"sha256": _sum_of(file), "bytes": file.stat().st_size}
    body = {"kind": kind, "format": FORMAT, "meta": meta, "files": files}
    _write_text(folder / MANIFEST, json.dumps(body, indent=1, sort_keys=True) + "\n")
    _flush(folder)


def _swap(draft: Path, path: Path) -> None:
    """Puts a finished draft in the place of `path`; the old one stays until the new one stands."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        os.replace(path, old)
    os.replace(draft, path)
    _flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


# --- tensor files ------------------------------------------------------------------------------


def write_tensors(
    path: Path,
    kind: str,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    replace: bool = False,
) -> Manifest:
    """Writes one safetensors file whose header holds kind, metadata and a sum per tensor."""
    _refuse_existing(path, replace)
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    files = {name: {"sha256": _sum_of_tensor(t), "bytes": t.nbytes} for name, t in plain.items()}
    manifest = Manifest(kind, dict(meta), files)
    header = {"kind": kind, "format": FORMAT, "meta": manifest.meta, "files": files}
    header["sha256"] = manifest.fingerprint
    write_bytes(path, save(plain, metadata={"stratagem": json.dumps(header, sort_keys=True)}))
    return manifest


def read_tensors(
    path: Path, kind: str, *, verify: bool = True
) -> tuple[dict[str, Tensor], Manifest]:
    """Reads a file of `write_tensors`; with `verify`, compares the sum of every tensor.

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
            manifest = _signed(json.loads(header), path, kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedArtifact(f"{path} is damaged ({error}): restore or rebuild it") from error
    if set(tensors) != set(manifest.files):
        raise DamagedArtifact(f"{path} is damaged: it lacks tensors that its header names")
    for name, tensor in tensors.items():
        if verify and _sum_of_tensor(tensor) != manifest.files[name]["sha256"]:
            raise DamagedArtifact(
                f"{path} is damaged: tensor {name!r} was altered; restore or rebuild it"
            )
    return tensors, manifest


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes plain safetensors inside an open folder artifact, whose manifest will hold its sum."""
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    path.write_bytes(save(plain))


def read_tensor_file(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Reads plain safetensors.

    Raises:
        DamagedArtifact: If the file is not readable as safetensors.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DamagedArtifact(f"{path} is damaged ({error}): restore or rebuild it") from error


# --- records -----------------------------------------------------------------------------------


def write_record(
    path: Path, kind: str, meta: Mapping[str, Any], *, replace: bool = False
) -> Manifest:
    """Writes one JSON file with its own sum."""
    _refuse_existing(path, replace)
    manifest = Manifest(kind, dict(meta), {})
    body = {"kind": kind, "format": FORMAT, "meta": manifest.meta, "sha256": manifest.fingerprint}
    write_bytes(path, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())
    return manifest


def read_record(path: Path, kind: str) -> Manifest:
    """Reads a file of `write_record`.

    Raises:
        InputError: If there is no such file or it is something else.
        DamagedArtifact: If it is truncated or altered.
    """
    if not path.is_file():
        raise InputError(f"no {kind} at {path}: the file does not exist")
    return _signed(_load_json(path), path, kind)


# --- shared ------------------------------------------------------------------------------------


def _refuse_existing(path: Path, replace: bool) -> None:
    if path.exists() and not replace:
        raise InputError(f"{path} already exists: remove it or choose another name")


def _manifest(body: Any, path: Path, kind: str) -> Manifest:
    if not isinstance(body, dict) or not {"kind", "format", "meta"} <= set(body):
        raise DamagedArtifact(f"{path} is damaged: its manifest lacks kind, format or meta")
    if body["kind"] != kind:
        raise InputError(f"{path} is a {body['kind']}, not a {kind}")
    if body["format"] != FORMAT:
        raise InputError(
            f"{path} has format {body['format']}, this version reads format {FORMAT}: "
            "rebuild it or use the version that made it"
        )
    return Manifest(kind, body["meta"], body.get("files", {}))


def _signed(body: Any, path: Path, kind: str) -> Manifest:
    """Reads a manifest that carries its own sum."""
    manifest = _manifest(body, path, kind)
    if body.get("sha256") != manifest.fingerprint:
        raise DamagedArtifact(f"{path} is damaged: its content does not match its sum; rebuild it")
    return manifest


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedArtifact(f"{path} is damaged ({error}): restore or rebuild it") from error


def _check_file(file: Path, entry: Mapping[str, Any], verify: bool) -> None:
    if not file.is_file():
        raise DamagedArtifact(f"{file} is missing: restore or rebuild {file.parent}")
    if file.stat().st_size != entry["bytes"]:
        raise DamagedArtifact(
            f"{file} is truncated or altered: {file.stat().st_size} bytes, not {entry['bytes']}"
        )
    if verify and _sum_of(file) != entry["sha256"]:
        raise DamagedArtifact(f"{file} was altered: its SHA-256 differs from the manifest's")


def _sum_of(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sum_of_tensor(tensor: Tensor) -> str:
    data = tensor.reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Writes one file under a temporary name beside it, flushes it, and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(data)
        _flush(draft)
        os.replace(draft, path)
        _flush(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    _flush(path)


def _flush(path: Path) -> None:
    """Forces a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
