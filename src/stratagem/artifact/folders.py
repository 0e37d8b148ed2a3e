"""Folder artifacts: any files, and a manifest.json with the sum of each, written last.

The folder is filled under a temporary name beside its target and renamed when it is whole. One that
takes hours keeps a fixed name instead, `.NAME.partial`, and is gone on with after a stop.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stratagem.artifact.manifest import (
    FORMAT,
    Manifest,
    flush,
    load_json,
    parse,
    read_body,
    refuse_existing,
    sum_of,
)
from stratagem.errors import DamagedArtifact, InputError

__all__ = ["MANIFEST", "kind_of", "read_folder", "write_folder"]

MANIFEST = "manifest.json"
_UNSIGNED = {"kind", "format", "meta", "files"}  # manifests of before had no sum of their own


@contextlib.contextmanager
def write_folder(
    path: Path,
    kind: str,
    meta: Mapping[str, Any],
    *,
    replace: bool = False,
    origin: str | None = None,
    sums: Mapping[str, str] | None = None,
) -> Iterator[Path]:
    """Yields a temporary folder to fill; it becomes `path` on success and goes otherwise.

    Args:
        path: Where the artifact shall be.
        kind: What it is.
        meta: JSON-able metadata; may still be extended while the folder is open.
        replace: Whether an existing artifact gives way, once the new one stands.
        origin: What identifies the content to be. If given, the folder stays after any stop but an
            InputError, with what was put there, and the next call of the same origin yields it.
        sums: File name -> SHA-256 of what was meant to be written, where it is known; such files
            are not read again. May be filled while the folder is open.

    Raises:
        InputError: If `path` exists and `replace` is false, or there is an unfinished folder of
            another origin, or another process fills it.
    """
    refuse_existing(path, replace)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _passing(path) if origin is None else _staying(path, origin) as draft:
        yield draft
        _seal(draft, kind, dict(meta), sums or {})
        _swap(draft, path)


@contextlib.contextmanager
def _passing(path: Path) -> Iterator[Path]:
    """Yields an empty folder that is gone afterwards."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def _staying(path: Path, origin: str) -> Iterator[Path]:
    """Yields the folder of an origin, new or as it was left; a note beside it says whose it is."""
    draft = path.with_name(f".{path.name}.partial")
    note = draft.with_name(f"{draft.name}.json")
    with note.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process writes {path}: wait for it to end") from error
        stream.seek(0)
        if draft.exists() and stream.read() != origin:
            raise InputError(
                f"{draft} is unfinished, of other input or settings: go on with those, remove it, "
                "or choose another name"
            )
        stream.truncate(0)
        stream.write(origin)
        stream.flush()
        draft.mkdir(exist_ok=True)
        try:
            yield draft
        except InputError:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        finally:
            if not draft.exists():
                note.unlink(missing_ok=True)


def kind_of(path: Path) -> str | None:
    """Says what folder artifact is at a path; None of a folder that is none of ours.

    Raises:
        DamagedArtifact: If its manifest is truncated.
    """
    manifest = path / MANIFEST
    body = load_json(manifest) if manifest.is_file() else None
    return body["kind"] if isinstance(body, dict) and {"kind", "format"} <= body.keys() else None


def read_folder(path: Path, kind: str, *, verify: bool | Callable[[str], bool] = True) -> Manifest:
    """Reads and checks the manifest of a folder artifact.

    Args:
        path: The artifact.
        kind: What it must be.
        verify: Whether every file, or one of a name, is read and its sum compared; sizes are always
            compared.

    Raises:
        InputError: If there is no such folder or it is something else.
        DamagedArtifact: If a file is missing, truncated or altered.
    """
    if not path.is_dir():
        raise InputError(f"no {kind} at {path}: the folder does not exist")
    if not (path / MANIFEST).is_file():
        raise InputError(f"{path} is not a finished {kind}: it has no {MANIFEST}")
    body = read_body(path / MANIFEST)
    manifest = parse(body, path, kind)
    if body.keys() != _UNSIGNED and body.get("sha256") != manifest.fingerprint:
        raise DamagedArtifact(f"{path / MANIFEST} was altered: it does not match its own sum")
    for name, entry in manifest.files.items():
        _check_file(path / name, entry, verify if isinstance(verify, bool) else verify(name))
    return manifest


def _seal(folder: Path, kind: str, meta: dict[str, Any], sums: Mapping[str, str]) -> None:
    """Flushes every file of a folder, but hidden ones, and writes its manifest last."""
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name[0] != "."):
        flush(file)
        name = file.relative_to(folder).as_posix()
        files[name] = {"sha256": sums.get(name) or sum_of(file), "bytes": file.stat().st_size}
    meta = json.loads(json.dumps(meta))  # as it will be read
    body = {"kind": kind, "format": FORMAT, "meta": meta, "files": files}
    body["sha256"] = Manifest(kind, meta, files).fingerprint
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
