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

from stratagem.artifact.folders import MANIFEST, kind_of, read_folder, write_folder
from stratagem.artifact.manifest import (
    Manifest,
    fingerprint,
    load_json,
    read_record,
    refuse_existing,
    write_bytes,
    write_record,
)
from stratagem.artifact.tensors import (
    Layout,
    TensorDraft,
    raw_bytes,
    read_tensor_file,
    read_tensors,
    stream_tensors,
    write_tensor_file,
    write_tensors,
)

__all__ = [
    "MANIFEST",
    "Layout",
    "Manifest",
    "TensorDraft",
    "fingerprint",
    "kind_of",
    "load_json",
    "raw_bytes",
    "read_folder",
    "read_record",
    "read_tensor_file",
    "read_tensors",
    "refuse_existing",
    "stream_tensors",
    "write_bytes",
    "write_folder",
    "write_record",
    "write_tensor_file",
    "write_tensors",
]
