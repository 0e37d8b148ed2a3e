"""Artifacts round trip, refuse damage with the file's name, and never stand half written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stratagem.artifact import (
    Manifest,
    fingerprint,
    read_folder,
    read_record,
    read_tensor_file,
    read_tensors,
    write_bytes,
    write_folder,
    write_record,
    write_tensor_file,
    write_tensors,
)
from stratagem.errors import DamagedArtifact, InputError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2]), "e": torch.zeros(0, 3)}


def make_folder(path: Path) -> Path:
    with write_folder(path, "thing", {"x": 1}) as draft:
        write_tensor_file(draft / "t.safetensors", TENSORS)
        (draft / "note.txt").write_text("hello")
    return path


def test_folder_round_trip(tmp_path: Path) -> None:
    manifest = read_folder(make_folder(tmp_path / "f"), "thing")
    assert manifest.meta == {"x": 1}
    assert sorted(manifest.files) == ["note.txt", "t.safetensors"]
    again = read_tensor_file(tmp_path / "f" / "t.safetensors")
    assert all(torch.equal(again[name], TENSORS[name]) for name in TENSORS)
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    a = read_folder(make_folder(tmp_path / "a"), "thing").fingerprint
    assert a == read_folder(make_folder(tmp_path / "b"), "thing").fingerprint
    assert a != Manifest("thing", {"x": 2}, {}).fingerprint
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with write_folder(tmp_path / "f", "thing", {}) as draft:
            (draft / "x").write_text("x")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_replacing_keeps_the_old_one_until_the_end(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "f")
    with pytest.raises(InputError, match="already exists"), write_folder(path, "thing", {}):
        pass
    with write_folder(path, "thing", {"x": 2}, replace=True):
        assert read_folder(path, "thing").meta == {"x": 1}
    assert read_folder(path, "thing").meta == {"x": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["t.safetensors", "note.txt"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove", "extend"])
def test_damaged_folders_are_refused(tmp_path: Path, name: str, damage: str) -> None:
    file = make_folder(tmp_path / "f") / name
    acts: dict[str, Callable[[], object]] = {
        "flip": lambda: flip_bit(file, -1),
        "truncate": lambda: file.write_bytes(file.read_bytes()[:-1]),
        "empty": lambda: file.write_bytes(b""),
        "remove": file.unlink,
        "extend": lambda: file.write_bytes(file.read_bytes() + b"x"),
    }
    acts[damage]()
    with pytest.raises(DamagedArtifact, match=name):
        read_folder(tmp_path / "f", "thing")


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "f") / "manifest.json"
    text = path.read_text()
    for broken in ["", text[: len(text) // 2], "[]", '{"kind": "thing"}']:
        path.write_text(broken)
        with pytest.raises(DamagedArtifact, match="f"):
            read_folder(tmp_path / "f", "thing")


def test_tensors_round_trip_and_notice_every_flipped_bit(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    written = write_tensors(path, "bank", TENSORS, {"encoder": "e"})
    tensors, manifest = read_tensors(path, "bank")
    assert manifest == written
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    size = path.stat().st_size
    for position in range(8, size, 7):  # anywhere behind the length of the header
        flip_bit(path, position)
        with pytest.raises((DamagedArtifact, InputError), match=r"t\.safetensors"):
            read_tensors(path, "bank")
        flip_bit(path, position)
    read_tensors(path, "bank")
    for length in (0, 7, size // 2, size - 1):
        whole = path.read_bytes()
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedArtifact, match=r"t\.safetensors"):
            read_tensors(path, "bank")
        path.write_bytes(whole)


def test_files_are_readable_by_the_group(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t", "bank", TENSORS, {})
    make_folder(tmp_path / "f")
    for file in [tmp_path / "t", *(tmp_path / "f").iterdir()]:
        assert file.stat().st_mode & 0o044, file


def test_bytes_are_written_whole(tmp_path: Path) -> None:
    write_bytes(tmp_path / "new" / "a", b"one")
    write_bytes(tmp_path / "new" / "a", b"two")
    assert (tmp_path / "new" / "a").read_bytes() == b"two"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a"]


def test_records_round_trip_and_notice_changes(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    write_record(path, "stages", {"edges": [0.1, -2.0]})
    assert read_record(path, "stages").meta == {"edges": [0.1, -2.0]}
    body = json.loads(path.read_text())
    body["meta"]["edges"][0] = 0.2
    path.write_text(json.dumps(body))
    with pytest.raises(DamagedArtifact, match=r"s\.json"):
        read_record(path, "stages")


def test_the_wrong_thing_is_an_input_error(tmp_path: Path) -> None:
    make_folder(tmp_path / "f")
    write_tensors(tmp_path / "t", "bank", TENSORS, {})
    write_record(tmp_path / "r", "stages", {})
    write_tensor_file(tmp_path / "foreign", TENSORS)
    for read, name in [(read_folder, "f"), (read_tensors, "t"), (read_record, "r")]:
        with pytest.raises(InputError, match="not a run"):
            read(tmp_path / name, "run")
        with pytest.raises(InputError, match="does not exist"):
            read(tmp_path / "absent", "run")
    with pytest.raises(InputError, match="not written by stratagem"):
        read_tensors(tmp_path / "foreign", "bank")
    with pytest.raises(InputError, match="not a finished"):
        read_folder(tmp_path, "run")


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "f") / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(InputError, match="format 99"):
        read_folder(tmp_path / "f", "thing")
