"""Artifacts round trip, refuse damage with the file's name, and never stand half written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from stratagem.artifact import (
    MANIFEST,
    Layout,
    Manifest,
    TensorDraft,
    fingerprint,
    kind_of,
    load_json,
    raw_bytes,
    read_folder,
    read_record,
    read_tensor_file,
    read_tensors,
    refuse_existing,
    stream_tensors,
    write_bytes,
    write_folder,
    write_record,
    write_tensor_file,
    write_tensors,
)
from stratagem.artifact.manifest import FORMAT, flush, parse, read_body, signed, sum_of
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


def test_foreign_manifests_are_no_artifacts(tmp_path: Path) -> None:
    assert kind_of(make_folder(tmp_path / "f")) == "thing"
    assert kind_of(tmp_path) is None
    for text in ("[1, 2]", '{"kind": "dataset"}', "null"):
        (tmp_path / MANIFEST).write_text(text)
        assert kind_of(tmp_path) is None
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(DamagedArtifact, match=MANIFEST):
        kind_of(tmp_path)


def test_a_plain_tensor_file_is_what_safetensors_writes(tmp_path: Path) -> None:
    kinds = [torch.bool, torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.int32]
    kinds += [torch.float32, torch.float64, torch.int64]
    tensors = {f"é{n % 2}{n}": torch.arange(n + 1).to(kind) for n, kind in enumerate(kinds)}
    tensors |= {"strided": torch.arange(6.0).view(2, 3).T, "scalar": torch.tensor(1.5), **TENSORS}
    sum_ = write_tensor_file(tmp_path / "t", tensors)
    content = (tmp_path / "t").read_bytes()
    assert content == safetensors.torch.save({n: t.contiguous() for n, t in tensors.items()})
    assert sum_ == hashlib.sha256(content).hexdigest()


def test_known_sums_are_not_computed_again(tmp_path: Path) -> None:
    """What a disk spoils after the sum was taken is noticed, not sealed."""
    sums: dict[str, str] = {}
    with write_folder(tmp_path / "f", "thing", {}, sums=sums) as draft:
        sums["t"] = write_tensor_file(draft / "t", TENSORS)
        body = bytearray((draft / "t").read_bytes())
        body[-1] ^= 1
        (draft / "t").write_bytes(body)
    with pytest.raises(DamagedArtifact, match="SHA-256 differs"):
        read_folder(tmp_path / "f", "thing")


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


# --- written in pieces -------------------------------------------------------------------------

LAYOUT: Layout = {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}
PIECES = [("b", 1, TENSORS["b"][1:]), ("a", 0, TENSORS["a"][:1]), ("a", 1, TENSORS["a"][1:]),
          ("b", 0, TENSORS["b"][:1])]  # fmt: skip


def test_a_file_written_in_pieces_is_the_file_written_at_once(tmp_path: Path) -> None:
    whole = write_tensors(tmp_path / "whole", "bank", TENSORS, {"x": [1]})
    with stream_tensors(tmp_path / "pieces", "bank", LAYOUT, {"x": [1]}) as draft:
        for name, row, rows in PIECES:
            draft.write(name, row, rows)
    assert draft.manifest == whole
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pieces", "whole"]


def test_every_type_is_aligned_and_read_by_safetensors_itself(tmp_path: Path) -> None:
    types = [torch.bool, torch.int8, torch.uint8, torch.float16, torch.bfloat16, torch.float32,
             torch.int32, torch.int64, torch.float64]  # fmt: skip
    tensors = {f"t{n}": torch.arange(2 * n + 1).to(dtype) for n, dtype in enumerate(types)}
    tensors["scalar"] = torch.tensor(3.5)
    tensors["turned"] = torch.arange(6).reshape(2, 3).T
    write_tensors(tmp_path / "t", "bank", tensors, {})
    for read in (load_file(tmp_path / "t"), read_tensors(tmp_path / "t", "bank")[0]):
        assert set(read) == set(tensors)
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)


def test_a_draft_is_gone_on_with(tmp_path: Path) -> None:
    for name, row, rows in PIECES:
        draft = TensorDraft(tmp_path / "draft", "bank", LAYOUT, {})
        draft.write(name, row, rows)
        draft.sync()
        draft.close(remove=False)
    draft = TensorDraft(tmp_path / "draft", "bank", LAYOUT, {})
    with pytest.raises(InputError, match="another process writes"):
        TensorDraft(tmp_path / "draft", "bank", LAYOUT, {})
    with pytest.raises(DamagedArtifact, match="draft"):
        read_tensors(tmp_path / "draft", "bank", verify=False)  # not sealed, so not an artifact
    draft.seal(tmp_path / "done")
    draft.close(remove=True)
    tensors, _ = read_tensors(tmp_path / "done", "bank")
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert [p.name for p in tmp_path.iterdir()] == ["done"]


def test_a_failed_stream_leaves_what_was_there(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t", "bank", TENSORS, {})
    before = (tmp_path / "t").read_bytes()
    with pytest.raises(InputError, match="already exists"):
        refuse_existing(tmp_path / "t", replace=False)

    def fail() -> None:
        with stream_tensors(tmp_path / "t", "bank", LAYOUT, {}, replace=True) as draft:
            draft.write(*PIECES[0])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "t").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize(
    ("name", "row", "rows"),
    [
        ("a", 0, torch.zeros(1, 3).double()),
        ("a", 0, torch.zeros(1, 2)),
        ("a", 1, torch.zeros(2, 3)),
    ],
)
def test_rows_of_another_layout_are_a_mistake(
    tmp_path: Path, name: str, row: int, rows: torch.Tensor
) -> None:
    with (
        pytest.raises(AssertionError),
        stream_tensors(tmp_path / "t", "bank", LAYOUT, {}) as draft,
    ):
        draft.write(name, row, rows)


def test_tensors_are_mapped_and_not_read(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t", "bank", TENSORS, {})
    tensors, _ = read_tensors(tmp_path / "t", "bank", verify=False)
    place = (tmp_path / "t").read_bytes().index(bytes(raw_bytes(TENSORS["a"])))
    with (tmp_path / "t").open("r+b") as file:
        file.seek(place)
        file.write(bytes(raw_bytes(torch.tensor([9.0]))))
    assert tensors["a"][0, 0] == 9
    tensors["a"][0, 1] = 7  # in this process alone
    one = bytes(raw_bytes(torch.tensor([1.0])))
    assert (tmp_path / "t").read_bytes()[place + 4 : place + 8] == one


def test_sums_are_those_of_the_bytes_between(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abcdefgh")
    flush(tmp_path / "f")
    assert sum_of(tmp_path / "f") == hashlib.sha256(b"abcdefgh").hexdigest()
    assert sum_of(tmp_path / "f", 2, 1, 4) == hashlib.sha256(b"def").hexdigest()
    assert sum_of(tmp_path / "f", 2, 1, 1) == hashlib.sha256(b"").hexdigest()


def test_a_manifest_is_parsed_and_its_signature_checked(tmp_path: Path) -> None:
    path = tmp_path / MANIFEST
    body = {"kind": "bank", "format": FORMAT, "meta": {"x": 1}, "files": {}}
    assert parse(body, path, "bank") == Manifest("bank", {"x": 1}, {})
    whole = {**body, "sha256": Manifest("bank", {"x": 1}, {}).fingerprint}
    assert signed(whole, path, "bank").meta == {"x": 1}
    with pytest.raises(DamagedArtifact, match="does not match its sum"):
        signed({**whole, "meta": {"x": 2}}, path, "bank")
    path.write_text("{")
    with pytest.raises(DamagedArtifact, match=MANIFEST):
        load_json(path)


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


def test_a_body_without_its_last_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}\n')
    assert read_body(path) == {"a": 1}
    path.write_text('{"a": 1}')  # what it says is whole, but the file is not
    with pytest.raises(DamagedArtifact, match=r"a\.json is truncated"):
        read_body(path)
