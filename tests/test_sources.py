"""data/sources.py, archives.py, arrays.py: the same images, whatever holds them."""

from __future__ import annotations

import functools
import gzip
import io
import os
import pickle
import random
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stratagem.data.archives import archive_files, is_archive
from stratagem.data.arrays import (
    hugging_face,
    idx_collection,
    idx_files,
    npz_collection,
    pixels,
)
from stratagem.data.datasets import open_source, prepare
from stratagem.data.decoding import cause_of, decode
from stratagem.data.sources import (
    NO_IMAGE,
    SUFFIXES,
    Collection,
    File,
    Loader,
    Record,
    Survey,
    folder_files,
    image_records,
    open_file,
    survey,
)
from stratagem.data.writing import Rejected
from stratagem.errors import InputError, MissingExtra

PACKINGS = ("", "gz", "bz2", "xz")


def picture(seed: int, side: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def png(seed: int = 0, side: int = 6) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(seed, side)).save(stream, "png")
    return stream.getvalue()


TREE = {
    "cat/1.png": png(1),
    "cat/2.png": png(2),
    "dog/in/3.png": png(3),
    "dog/4.png": b"no image",
    "loose.png": png(5),
    "notes.md": b"# notes",
}


def tree(folder: Path, files: dict[str, bytes] = TREE) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def zipped(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, files: dict[str, bytes], packing: str = "") -> Path:
    with tarfile.open(path, f"w:{packing}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def contents(source: Path | str, size: int = 6, **options: Any) -> list[tuple[Any, ...]]:
    """Every item of a source, as something that compares."""
    found = open_source(source, size, **options)
    assert callable(found.items)
    items = list(found.items(0))
    assert found.total == len(items)
    return [
        tuple(item) if isinstance(item, Rejected) else (item.image.tolist(), *item[1:])
        for item in items
    ]


# --- one tree, many holders --------------------------------------------------------------------


def test_a_folder_gives_labels_names_and_causes(tmp_path: Path) -> None:
    found = open_source(tree(tmp_path / "t"), 6)
    assert found.classes == ["cat", "dog"]
    rows = contents(tmp_path / "t")
    assert [row[-1] for row in rows if len(row) == 3] == [
        *("cat/1.png", "cat/2.png", "dog/in/3.png", "loose.png"),
    ]
    assert [row[1] for row in rows if len(row) == 3] == [0, 0, 1, -1]
    assert [row for row in rows if len(row) == 2] == [
        ("dog/4.png", "not an image of a kind that Pillow can read"),
        ("notes.md", NO_IMAGE),
    ]
    assert rows[0][0] == picture(1).transpose(2, 0, 1).tolist()


@pytest.mark.parametrize("holder", ["stored.zip", "packed.zip", *PACKINGS])
def test_archives_give_what_the_folder_gives(tmp_path: Path, holder: str) -> None:
    folder = tree(tmp_path / "t")
    names = sorted(TREE, key=lambda name: name.split("/"))
    files = {f"./top/{name}": TREE[name] for name in names}
    if holder.endswith("zip"):
        method = zipfile.ZIP_STORED if holder.startswith("stored") else zipfile.ZIP_DEFLATED
        archive = zipped(tmp_path / holder, files, method)
    else:
        archive = tarred(tmp_path / f"x.tar{'.' * bool(holder)}{holder}", files, holder)
    assert is_archive(archive)
    inside = contents(archive)
    # a folder that all images lie in is no part of their names; what is no image does not count
    assert [
        (row[0].removeprefix("top/"), *row[1:]) if len(row) == 2 else row for row in inside
    ] == (contents(folder))
    assert open_source(archive).classes == ["cat", "dog"]
    assert sorted(os.listdir(tmp_path)) == sorted([archive.name, "t"])


def test_the_data_set_of_an_archive_is_that_of_the_folder(tmp_path: Path) -> None:
    files = {name: TREE[name] for name in ("cat/1.png", "dog/in/3.png", "dog/x.png")[:2]}
    folder = prepare(tree(tmp_path / "same", files), tmp_path / "a", size=6)
    archive = prepare(zipped(tmp_path / "same.zip", files), tmp_path / "b", size=6)
    assert folder.fingerprint == archive.fingerprint


def test_going_on_skips_what_is_done(tmp_path: Path) -> None:
    for path in (tree(tmp_path / "t"), tarred(tmp_path / "t.tgz", TREE, "gz")):
        source = open_source(path, 6)
        assert callable(source.items)
        whole = [item.name for item in source.items(0)]
        assert [[i.name for i in source.items(n)] for n in range(7)] == [
            whole[n:] for n in range(7)
        ]


def test_changed_archives_are_other_sources(tmp_path: Path) -> None:
    path = tarred(tmp_path / "t.tar", TREE)
    first = open_source(path, 6).origin
    assert open_source(path, 6).origin == first
    assert open_source(path, 7).origin != first
    os.utime(path, ns=(1, 1))
    assert open_source(path, 6).origin != first


# --- what archives do to people ----------------------------------------------------------------


def test_names_stay_inside_and_links_are_not_followed(tmp_path: Path) -> None:
    secret = tree(tmp_path, {"secret.png": png(9)}) / "secret.png"
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("/etc/1.png", "../../2.png", "a/.hidden.png", "__MACOSX/._1.png"):
            member = tarfile.TarInfo(name)
            member.size = len(png())
            archive.addfile(member, io.BytesIO(png()))
        for kind, name in ((tarfile.SYMTYPE, "sym.png"), (tarfile.LNKTYPE, "hard.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, str(secret)
            archive.addfile(link)
        pipe = tarfile.TarInfo("pipe.png")
        pipe.type = tarfile.FIFOTYPE
        archive.addfile(pipe)
    link = zipfile.ZipInfo("sym.png")
    link.external_attr = 0o120777 << 16
    zipped(tmp_path / "x.zip", {})
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(link, str(secret))
        archive.writestr("../ok.png", png())
    names = {file.name: file.load for file in archive_files(path)}
    assert list(names) == ["etc/1.png", "2.png", "sym.png", "hard.png", "pipe.png"]
    assert names["sym.png"] == names["hard.png"] == "a link inside an archive"
    assert names["pipe.png"] == "not a regular file"
    names = {file.name: file.load for file in archive_files(tmp_path / "x.zip")}
    assert names.pop("sym.png") == "a link inside an archive"
    assert list(names) == ["ok.png"]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
def test_a_cut_archive_gives_what_it_has_and_says_so(
    tmp_path: Path, packing: str, share: float
) -> None:
    files = {f"{n}.png": png(n, 40) for n in range(8)}
    path = tarred(tmp_path / f"x.tar.{packing}" if packing else tmp_path / "x.tar", files, packing)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    rows = contents(path, 40)
    good = [row[-1] for row in rows if len(row) == 3]
    assert good == [f"{n}.png" for n in range(len(good))]
    causes = [row[1] for row in rows if len(row) == 2]
    if len(good) < 8 or packing:  # else only the filling after the last file is gone
        assert "cannot be read beyond this" in causes[-1]
    assert packing or len(good) == 8 or "the archive ends within it" in causes
    assert good or packing == "bz2" or share < 0.5  # all in one block


@pytest.mark.parametrize("packing", PACKINGS[1:])
def test_the_end_of_a_packed_archive_is_missed(tmp_path: Path, packing: str) -> None:
    path = tarred(tmp_path / f"x.tar.{packing}", {"a.png": png()}, packing)
    path.write_bytes(path.read_bytes()[:-3])
    assert "cannot be read beyond this" in contents(path)[-1][-1]


def test_headers_of_a_tar_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, kept = tarred(tmp_path / "x.tar", {f"{n}.png": b"" for n in range(9)}), []
    step = tarfile.TarFile.next

    def watch(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
        kept.append(len(archive.members))  # type: ignore[attr-defined]
        return step(archive)

    monkeypatch.setattr(tarfile.TarFile, "next", watch)
    assert len(list(archive_files(path))) == 9
    assert max(kept) <= 1


def test_a_tar_cut_within_a_header_says_so(tmp_path: Path) -> None:
    path = tarred(tmp_path / "x.tar", {"a.png": png(), "b.png": png()})
    path.write_bytes(path.read_bytes()[: 1024 + 100])
    assert [len(row) for row in contents(path)] == [3, 2]


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
def test_what_is_no_archive_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no archive" * 99)
    with pytest.raises(InputError, match=r"none of the 1 images .* cannot be read beyond this"):
        prepare(tmp_path / name, tmp_path / "d")


def test_damaged_and_encrypted_members_of_a_zip(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {"a.png": png(1), "b.png": png(2)}, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[content.index(png(1)) + 60] ^= 255
    second = content.rindex(b"PK\x01\x02")
    content[second + 8] |= 1
    path.write_bytes(content)
    (_, cause), (_, locked) = contents(path)
    assert cause
    assert locked == "encrypted"


# --- webdataset --------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["", "gz"])
def test_shards_have_their_labels_beside_the_images(tmp_path: Path, packing: str) -> None:
    folder, suffix = tmp_path / "shards", f"tar{'.' * bool(packing)}{packing}"
    folder.mkdir()
    shards = [
        {"000.cls": b"2", "000.png": png(1), "001.png": png(2), "001.cls": b"0\n"},
        {"002.json": b'{"label": 1}', "002.png": png(3), "002.seg.png": png(4), "003.cls": b"1"},
        {"004.png": png(5), "004.json": b"broken", "005.txt": b"caption", "005.png": png(6)},
    ]
    for number, files in enumerate(shards):
        tarred(folder / f"{number:04d}.{suffix}", files, packing)
    assert open_source(folder).classes == ["0", "1", "2"]
    rows = contents(folder)
    assert [row[1:] for row in rows if len(row) == 3] == [
        *((2, "000.png"), (0, "001.png"), (1, "002.png"), (-1, "004.png"), (-1, "005.png")),
    ]
    assert [row for row in rows if len(row) == 2] == [
        ("002.seg.png", "a part of a labelled sample that has an image"),
        ("003.cls", NO_IMAGE),
    ]
    (folder / "0001.tar").write_bytes(b"cut") if not packing else None
    assert len(contents(folder)) >= len(rows) - 3  # one broken shard takes none with it


def test_names_beside_images_are_classes(tmp_path: Path) -> None:
    files = {"a.cls": b"dog", "a.png": png(), "b.cls": b"cat", "b.png": png()}
    path = tarred(tmp_path / "x.tar", files)
    assert open_source(path).classes == ["cat", "dog"]
    assert [row[1] for row in contents(path)] == [1, 0]
    tarred(path, files | {"c.cls": b"7", "c.png": png()})
    with pytest.raises(InputError, match=r"by number \(7\) and by name \(cat\)"):
        open_source(path)


def test_archives_beside_images_are_not_shards(tmp_path: Path) -> None:
    tree(tmp_path / "t", {"a.png": png()})
    tarred(tmp_path / "t" / "b.tar", {"c.png": png()})
    assert [row[-1] for row in contents(tmp_path / "t")] == ["a.png", NO_IMAGE]


@pytest.mark.parametrize("name", ["été/日本 😀.png", "a.png"])
def test_zips_of_info_zip_keep_their_names(tmp_path: Path, name: str) -> None:
    """It writes UTF-8 and does not set the flag that says so."""
    file = zipped(tmp_path / "t.zip", {name: png()})
    body = file.read_bytes()
    for head, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = body.index(head) + flags
        bits = struct.unpack_from("<H", body, place)[0] & ~0x800
        body = body[:place] + struct.pack("<H", bits) + body[place + 2 :]
    file.write_bytes(body)
    assert [found.name for found in archive_files(file)] == [name]


# --- strange folders ---------------------------------------------------------------------------


def test_what_is_neither_file_nor_folder_is_named(tmp_path: Path) -> None:
    tree(tmp_path, {"in/a.png": png()})
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    rows = dict(row for row in contents(tmp_path) if len(row) == 2)
    assert rows == {
        "gone.png": "No such file or directory",
        "in/up": "a link to a folder in which it lies",
        "pipe.png": "neither a file nor a folder",
        "self.png": "Too many levels of symbolic links",
    }


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, {"a/1.png": png(), "b/2.png": png()})
    listing = os.scandir

    def refuse(place: str | Path) -> Any:
        if str(place).rstrip("/").endswith("/a"):
            raise PermissionError(13, "Permission denied", place)
        return listing(place)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [file.name for file in folder_files(tmp_path)] == ["a", "b/2.png"]
    assert contents(tmp_path)[0] == ("a", "Permission denied")
    with pytest.raises(InputError, match=r"cannot list .*Permission denied"):
        folder_files(tmp_path / "a")


def test_a_walk_holds_one_folder_at_a_time(tmp_path: Path) -> None:
    tree(tmp_path, {f"{n}/{m}.png": b"" for n in range(3) for m in range(3)})
    files = folder_files(tmp_path)
    assert next(files).name == "0/0.png"
    (tmp_path / "2" / "9.png").write_bytes(b"")
    assert [file.name for file in files][-1] == "2/9.png"


# --- surveys -----------------------------------------------------------------------------------


def collection(*records: Record, **options: Any) -> Collection:
    return Collection("t", lambda: iter(records), **options)


def test_a_survey_counts_what_can_be_used() -> None:
    load: Loader = functools.partial(io.BytesIO, b"")
    records = [Record("a/1", None, load), Record("b/2", 3, load), Record("c/3", None, "cause")]
    found = survey(collection(records[0], records[2]))
    assert isinstance(found, Survey)
    assert (found.classes, found.counts, found.total) == (["a"], {0: 1}, 2)
    found = survey(collection(records[1]))
    assert (found.classes, found.counts) == (["0", "1", "2", "3"], {3: 1})
    found = survey(collection(records[1], classes=["p", "q", "r", "s"]))
    assert (found.classes, found.resolve(records[1])) == (["p", "q", "r", "s"], ("b/2", 3))
    with pytest.raises(InputError, match="has label 3, but 2 classes"):
        survey(collection(records[1], classes=["p", "q"]))
    assert survey(collection()).total == 0


def test_suffixes_and_causes() -> None:
    assert {".jpg", ".png", ".webp"} <= SUFFIXES
    assert [r.name for r in image_records([File("a.JPG", "x"), File("b", "y")])] == ["a.JPG", "b"]
    with open_file(__file__) as stream:
        assert stream.readline().startswith(b'"""data/sources.py')
    assert cause_of(OSError(2, "gone", "/secret/path")) == "gone"
    assert cause_of(struct.error("a\nb")) == "error: a b"
    assert decode(picture(0), 6, 3).tolist() == picture(0).transpose(2, 0, 1).tolist()


# --- arrays ------------------------------------------------------------------------------------


def idx(values: np.ndarray) -> bytes:
    head = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    return head + values.astype(np.uint8).tobytes()


GRAY = np.random.default_rng(0).integers(0, 256, (7, 5, 5), dtype=np.uint8)
LABELS = np.array([3, 0, 1, 2, 3, 0, 1])


def mnist(folder: Path, write: Callable[[Path, bytes], Any], suffix: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    for part, rows in (("train", slice(0, 5)), ("t10k", slice(5, 7))):
        write(folder / f"{part}-images-idx3-ubyte{suffix}", idx(GRAY[rows]))
        write(folder / f"{part}-labels-idx1-ubyte{suffix}", idx(LABELS[rows]))
    return folder


def packed(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content))


def plain(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.mark.parametrize("write", [plain, packed])
def test_idx_files_are_read_in_order_at_their_own_size(
    tmp_path: Path, write: Callable[[Path, bytes], Any]
) -> None:
    folder = mnist(tmp_path / "m", write, ".gz" if write is packed else "")
    data = prepare(folder, tmp_path / "d")
    assert data.shape == (1, 5, 5)
    assert torch.equal(data.images(torch.arange(7))[:, 0], torch.from_numpy(GRAY))
    assert data.labels.tolist() == LABELS.tolist()
    assert data.classes == ["0", "1", "2", "3"]
    assert list(data.names)[4:6] == ["train/0000004", "t10k/0000000"]
    assert [file.name[:4] for file in idx_files(folder)] == ["trai", "t10k"]
    only = open_source(idx_files(folder)[1])
    assert only.total == 2
    assert open_source(folder, 8).total == 7


def test_broken_idx_files(tmp_path: Path) -> None:
    folder = mnist(tmp_path / "m", plain)
    file = folder / "train-images-idx3-ubyte"
    whole = file.read_bytes()
    file.write_bytes(whole[: 16 + 3 * 25 + 7])
    rows = contents(folder)
    assert [len(row) for row in rows] == [3, 3, 3, 2, 3, 3]
    assert rows[3][1] == "the file cannot be read from image 3 of 5 on: it ends too early"
    file.write_bytes(gzip.compress(whole)[:-30])
    with pytest.raises(InputError, match="is no idx file"):
        open_source(folder)
    file.write_bytes(whole)
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:4]))
    with pytest.raises(InputError, match=r"has 4 labels for 5 images"):
        open_source(folder)
    (folder / "train-labels-idx1-ubyte").unlink()
    assert [row[1] for row in contents(folder)] == [-1] * 5 + LABELS[5:].tolist()
    assert idx_collection([file], "x").size == 5


@pytest.mark.parametrize("names", [("images", "labels"), ("arr_0", "arr_1")])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_files(tmp_path: Path, names: tuple[str, str], save: Callable[..., None]) -> None:
    colour = np.stack([picture(n) for n in range(7)])
    save(tmp_path / "c.npz", **dict(zip(names, (colour, LABELS), strict=True)))
    data = prepare(tmp_path / "c.npz", tmp_path / "d")
    assert torch.equal(data.images(torch.arange(7)), torch.from_numpy(colour).permute(0, 3, 1, 2))
    assert data.labels.tolist() == LABELS.tolist()
    for shape in ((7, 5, 5), (7, 5, 5, 1)):
        save(tmp_path / "g.npz", **{names[0]: GRAY.reshape(shape)})
        assert open_source(tmp_path / "g.npz").classes == []
        rows = contents(tmp_path / "g.npz", 5)
        assert [row[0][0] for row in rows] == GRAY.tolist()


def test_npz_files_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    wrong: list[tuple[dict[str, np.ndarray], str]] = [
        ({"pictures": GRAY}, "call its array images"),
        ({"images": GRAY.astype(np.float32)}, "has images of float32"),
        ({"images": np.zeros((7, 3, 5, 5), np.uint8)}, "the channels come last"),
        ({"images": np.asfortranarray(GRAY)}, "has images of uint8"),
        ({"images": GRAY, "labels": LABELS[:3]}, "for 7 images"),
    ]
    for arrays, message in wrong:
        np.savez(file, **arrays)
        with pytest.raises(InputError, match=message):
            npz_collection(file)
    np.savez(file, images=GRAY)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(InputError, match="is it whole"):
        npz_collection(file)


def test_rows_become_pictures() -> None:
    assert pixels(GRAY[0].tobytes(), (5, 5, 1)).tolist() == GRAY[0].tolist()
    assert pixels(picture(0).tobytes(), (6, 6, 3)).tolist() == picture(0).tolist()


# --- Hugging Face ------------------------------------------------------------------------------


def test_a_saved_data_set_of_hugging_face(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    rows = {"image": [{"bytes": png(n)} for n in range(3)] + [None], "label": [1, 0, 1, 0]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=data).save_to_disk(str(tmp_path / "parts"))
    for place in (tmp_path / "saved", tmp_path / "parts", f"hf:{tmp_path / 'parts'}:train"):
        found = contents(place)
        assert open_source(place).classes == ["cat", "dog"]
        assert [row[1] for row in found] == [1, 0, 1, "no image in this row"]
        assert found[0][0] == picture(0).transpose(2, 0, 1).tolist()
    with pytest.raises(InputError, match="cannot be opened"):
        hugging_face(str(tmp_path / "parts"), "test")
    data.remove_columns("image").save_to_disk(str(tmp_path / "blind"))
    with pytest.raises(InputError, match="has no column of images: it has label"):
        hugging_face(str(tmp_path / "blind"))


def test_missing_datasets_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"datasets is not installed.*stratagem\[data\]"):
        open_source("hf:mnist")


def test_loaders_travel(tmp_path: Path) -> None:
    """What decodes in another process was pickled on the way there."""
    folder = mnist(tmp_path / "m", plain)
    np.savez(tmp_path / "x.npz", images=GRAY)
    zipped(tmp_path / "x.zip", {"a.png": png()})
    tarred(tmp_path / "x.tar", {"a.png": png()})
    tree(tmp_path / "t", {"a.png": png()})
    for files in (folder_files(tmp_path / "t"), *map(archive_files, tmp_path.glob("x.[zt]*"))):
        for file in files:
            assert not isinstance(file.load, str)
            again = pickle.loads(pickle.dumps(file.load))()
            assert again.read() == png()
    for made in (idx_collection(idx_files(folder), "m"), npz_collection(tmp_path / "x.npz")):
        record = next(made.records())
        assert not isinstance(record.load, str)
        assert np.array_equal(pickle.loads(pickle.dumps(record.load))(), GRAY[0])


def test_bytes_at_random_never_end_it(tmp_path: Path) -> None:
    """Forty images, each with some bytes altered: all are kept or named."""
    chance, folder = random.Random(0), tmp_path / "t"
    for number in range(40):
        content = bytearray(png(number, 30))
        for _ in range(3):
            content[chance.randrange(len(content))] = chance.randrange(256)
        tree(folder, {f"{number:02d}.png": bytes(content)})
    rows = contents(folder)
    assert len(rows) == 40
    assert 0 < sum(len(row) == 2 for row in rows) <= 40
