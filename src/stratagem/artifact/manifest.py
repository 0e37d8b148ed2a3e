"""What an artifact says of itself, and how its bytes reach the disk.

    fingerprint = SHA-256 of JSON {kind, meta, files}, keys sorted

A record is an artifact that is nothing but its manifest: one JSON file with its own sum.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stratagem.errors import DamagedArtifact, InputError

__all__ = [
    "FORMAT",
    "Manifest",
    "fingerprint",
    "flush",
    "load_json",
    "parse",
    "read_body",
    "read_record",
    "refuse_existing",
    "signed",
    "sum_of",
    "write_bytes",
    "write_record",
]

FORMAT = 1
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


def write_record(
    path: Path, kind: str, meta: Mapping[str, Any], *, replace: bool = False
) -> Manifest:
    """Writes one JSON file with its own sum."""
    refuse_existing(path, replace)
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
    return signed(read_body(path), path, kind)


def read_body(path: Path) -> Any:
    """Reads the JSON of a record or a manifest, whose last byte ends a line."""
    body = load_json(path)
    if not path.read_bytes().endswith(b"\n"):
        raise DamagedArtifact(f"{path} is truncated: restore or rebuild it")
    return body


def refuse_existing(path: Path, replace: bool) -> None:
    """Raises InputError if `path` exists and shall not be replaced."""
    if path.exists() and not replace:
        raise InputError(f"{path} already exists: remove it or choose another name")


def parse(body: Any, path: Path, kind: str) -> Manifest:
    """Reads a manifest from JSON and refuses other kinds and formats."""
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


def signed(body: Any, path: Path, kind: str) -> Manifest:
    """Reads a manifest that carries its own sum."""
    manifest = parse(body, path, kind)
    if body.get("sha256") != manifest.fingerprint:
        raise DamagedArtifact(f"{path} is damaged: its content does not match its sum; rebuild it")
    return manifest


def load_json(path: Path) -> Any:
    """Reads a JSON file; one that is none is a DamagedArtifact."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedArtifact(f"{path} is damaged ({error}): restore or rebuild it") from error


def sum_of(file: Path, base: int = 0, start: int = 0, end: int | None = None) -> str:
    """SHA-256 of a file, or of its bytes base + start to base + end."""
    digest = hashlib.sha256()
    left = file.stat().st_size if end is None else end - start
    with file.open("rb") as stream:
        stream.seek(base + start)
        while chunk := stream.read(min(_CHUNK, left)):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Writes one file under a temporary name beside it, flushes it, and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(data)
        flush(draft)
        os.replace(draft, path)
        flush(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Forces a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
