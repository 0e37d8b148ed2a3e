"""Folder artifacts: any files, and a manifest.json with the sum of each, written last.

The folder is filled under a temporary name beside its target and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stratagem.artifact.manifest import (
    FORMAT,
    Manifest,
    flush,
    load_json,
    parse,
    refuse_existing,
    sum_of,
)
from stratagem.errors import DamagedArtifact, InputError

__all__ = ["MANIFEST", "read_folder", "write_folder"]

MANIFEST = "manifest.json"


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
    refuse_existing(path, replace)
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
    manifest = parse(load_json(path / MANIFEST), path, kind)
    for name, entry in manifest.files.items():
        _check_file(path / name, entry, verify)
    return manifest


def _seal(folder: Path, kind: str, meta: dict[str, Any]) -> None:
    """Flushes every file of a folder to the disk and writes its manifest last."""
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        flush(file)
        name = file.relative_to(folder).as_posix()
        files[name] = {"sha256": sum_of(file), "bytes": file.stat().st_size}
    body = {"kind": kind, "format": FORMAT, "meta": meta, "files": files}
    _write_text(folder / MANIFEST, json.dumps(body, indent=1, sort_keys=True) + "\n")
    flush(folder)


def _swap(draft: Path, path: Path) -> None:
    """Puts a finished draft in the place of `path`; the old one stays until the new one stands."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        os.replace(path, old)
    os.replace(draft, path)
    flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _check_file(file: Path, entry: Mapping[str, Any], verify: bool) -> None:
    if not file.is_file():
        raise DamagedArtifact(f"{file} is missing: restore or rebuild {file.parent}")
    if file.stat().st_size != entry["bytes"]:
        raise DamagedArtifact(
            f"{file} is truncated or altered: {file.stat().st_size} bytes, not {entry['bytes']}"
        )
    if verify and sum_of(file) != entry["sha256"]:
        raise DamagedArtifact(f"{file} was altered: its SHA-256 differs from the manifest's")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)
    flush(path)
