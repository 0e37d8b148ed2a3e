"""data/datasets.py: from a folder of files, some of them broken, to a data set."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stratagem.data.arrays import pixels
from stratagem.data.datasets import Reading, digits, open_source, prepare
from stratagem.data.images import load_image
from stratagem.data.official import open_data
from stratagem.data.shards import DataSet
from stratagem.data.sources import Record
from stratagem.data.workers import Form, cores, decode_all
from stratagem.errors import InputError, MissingExtra


def folder(path: Path, num: int = 6) -> Path:
    random = np.random.default_rng(0)
    for index in range(num):
        sub = path / "ab"[index % 2]
        sub.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(sub / f"{index:02d}.png")
    return path


def spoil(path: Path) -> Path:
    (path / "a" / "00.png").write_bytes(b"")
    cut = path / "b" / "03.png"
    cut.write_bytes(cut.read_bytes()[:200])
    return path


# --- digits ------------------------------------------------------------------------------------


def test_the_digits_are_the_digits(tmp_path: Path) -> None:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    data = prepare("digits", tmp_path / "d", holdout=0.1)
    values = load_digits()
    assert (data.num, data.shape, data.flip, data.source) == (1797, (1, 8, 8), False, "digits")
    assert data.classes == list("0123456789")
    assert data.labels.tolist() == values.target.tolist()
    assert len(data.held_out_indices) == 180
    back = data.images(torch.arange(data.num))[:, 0].double() * 16 / 255
    assert torch.equal(back.round(), torch.from_numpy(values.images))
    assert (back - back.round()).abs().max() <= 0.5 * 16 / 255


def test_digits_can_be_larger_but_not_mirrored(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    assert next(digits(32)).image.shape == (1, 32, 32)
    with pytest.raises(InputError, match="cannot be mirrored"):
        prepare("digits", tmp_path / "d", flip=True)


def test_missing_scikit_learn_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r"scikit-learn is not installed.*stratagem\[demo\]"):
        prepare("digits", tmp_path / "d")


# --- folders -----------------------------------------------------------------------------------


def test_a_folder_becomes_a_data_set(tmp_path: Path) -> None:
    source = folder(tmp_path / "photos")
    data = prepare(source, tmp_path / "d", size=16, flip=True)
    assert (data.num, data.shape, data.flip, data.source) == (6, (3, 16, 16), True, "photos")
    assert data.classes == ["a", "b"]
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert list(data.names) == [
        "a/00.png",
        "a/02.png",
        "a/04.png",
        "b/01.png",
        "b/03.png",
        "b/05.png",
    ]
    for index, name in enumerate(data.names):
        image = data.images(torch.tensor([index]))[0]
        assert torch.equal(image, load_image(source / name, 16))


def test_a_manifest_of_something_else_beside_the_images_is_no_matter(tmp_path: Path) -> None:
    source = folder(tmp_path / "photos")
    (source / "manifest.json").write_text("[1, 2]")
    data = prepare(source, tmp_path / "d", size=16)
    assert data.num == 6
    assert [name for name, _ in data.rejected] == ["manifest.json"]
    assert open_data(tmp_path / "d").fingerprint == data.fingerprint


def test_folders_are_rgb_unless_gray_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "g").mkdir()
    Image.fromarray(np.full((40, 40), 9, np.uint8)).save(tmp_path / "g" / "x.png")
    assert prepare(tmp_path / "g", tmp_path / "d").shape == (3, 32, 32)
    assert prepare(str(tmp_path / "g"), tmp_path / "e", gray=True).shape == (1, 32, 32)


def test_broken_images_are_skipped_counted_and_named(tmp_path: Path) -> None:
    source = spoil(folder(tmp_path / "photos"))
    seen: list[tuple[int, int]] = []
    data = prepare(source, tmp_path / "d", size=16, progress=lambda *counts: seen.append(counts))
    assert list(data.names) == ["a/02.png", "a/04.png", "b/01.png", "b/05.png"]
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert [name for name, _ in data.rejected] == ["a/00.png", "b/03.png"]
    assert all(cause for _, cause in data.rejected)
    assert seen == [(done, 6) for done in range(1, 7)]
    assert DataSet.open(tmp_path / "d").rejected == data.rejected


@pytest.mark.filterwarnings("error")
def test_a_bomb_is_rejected_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path / "photos")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 30)
    data = prepare(source, tmp_path / "d", size=16)
    assert data.rejected == [("b/05.png", "too large: 750 pixels, the limit is 720")]


def test_the_fingerprint_does_not_depend_on_the_place(tmp_path: Path) -> None:
    here = spoil(folder(tmp_path / "one" / "photos"))
    there = shutil.copytree(here, tmp_path / "two" / "photos")
    first, second = prepare(here, tmp_path / "d"), prepare(there, tmp_path / "e")
    assert first.fingerprint == second.fingerprint


def test_no_folder_no_images_all_broken(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        prepare(tmp_path / "nowhere", tmp_path / "d")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images in"):
        prepare(tmp_path / "empty", tmp_path / "d")
    (tmp_path / "broken").mkdir()
    for name in ("x.png", "y.jpg"):
        (tmp_path / "broken" / name).write_bytes(b"no image")
    with pytest.raises(InputError, match=r"none of the 2 images in broken can be used; x\.png: "):
        prepare(tmp_path / "broken", tmp_path / "d")
    with pytest.raises(InputError, match="size is 0"):
        prepare(tmp_path / "broken", tmp_path / "d", size=0)
    assert not (tmp_path / "d").exists()


# --- processes ---------------------------------------------------------------------------------


def photos(folder: Path, num: int = 200) -> Path:
    """Small photographs, every seventh of them broken."""
    folder.mkdir()
    for index in range(num):
        pixels = np.full((9, 9, 3), index, np.uint8)
        file = folder / f"{index:03d}.png"
        Image.fromarray(pixels).save(file)
        if index % 7 == 3:
            file.write_bytes(file.read_bytes()[: index % 40])
    return folder


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_the_data_set_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    source, made = photos(tmp_path / "photos"), {}
    for workers in (1, 2, 3):
        out = tmp_path / f"out{workers}"
        data = prepare(source, out, size=8, reading=Reading(workers=workers))
        made[workers] = files_of(out)
    assert made[1] == made[2] == made[3]
    assert (data.num, len(data.rejected)) == (200 - 29, 29)
    assert data.images(torch.arange(data.num))[:, 0, 0, 0].tolist() == [
        index for index in range(200) if index % 7 != 3
    ]


def test_bytes_of_packed_archives_travel_too(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", 140)
    with tarfile.open(tmp_path / "photos.tgz", "w:gz") as archive:
        for file in sorted(source.iterdir()):
            archive.add(file, file.name)
    here = prepare(source, tmp_path / "a", size=8, reading=Reading(workers=1))
    there = prepare(tmp_path / "photos.tgz", tmp_path / "b", size=8, reading=Reading(workers=2))
    assert here.fingerprint == there.fingerprint


def test_processes_keep_the_order_and_do_not_run_ahead() -> None:
    taken = 0

    def records() -> Iterator[Record]:
        for index in range(400):
            assert index - taken <= 2 * 4 * 16  # two processes, four chunks of sixteen
            load = functools.partial(pixels, bytes([index % 256]) * 25, (5, 5))
            yield Record(str(index), None, load)

    for record, image in decode_all(records(), Form(5, 1, None), 2):
        assert record.name == str(taken)
        assert not isinstance(image, str)
        assert image.tolist() == [[[taken % 256] * 5] * 5]
        taken += 1
    assert taken == 400


def test_a_file_that_kills_its_decoder_is_named() -> None:
    fine = functools.partial(pixels, bytes(25), (5, 5))
    deadly = functools.partial(os._exit, 9)
    loads = [deadly if index in {5, 6, 40, 99} else fine for index in range(100)]
    records = (Record(str(index), None, load) for index, load in enumerate(loads))
    results = [
        (record.name, image)
        for record, image in decode_all(records, Form(5, 1, None), 2)
        if isinstance(image, str)
    ]
    assert results == [(n, "it ends the program that decodes it") for n in ("5", "6", "40", "99")]


def test_processes_that_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    records = [Record("x", None, "cause")]
    with pytest.raises(InputError, match="do not start: give --workers 1"):
        list(decode_all(records, Form(5, 1, None), 2))


def test_processes_end_with_what_asked_for_them() -> None:
    code = (
        "import functools, sys\n"
        "from stratagem.data.arrays import pixels\n"
        "from stratagem.data.sources import Record\n"
        "from stratagem.data.workers import Form, decode_all\n"
        "load = functools.partial(pixels, bytes(25), (5, 5))\n"
        "records = (Record('x', None, load) for _ in iter(int, 1))\n"
        "found = decode_all(records, Form(5, 1, None), 2)\n"
        "next(found)\n"
        "print(*[w._process.pid for w in found.gi_frame.f_locals['crew']], flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as asking:
        assert asking.stdout is not None
        pids = [int(word) for word in asking.stdout.readline().split()]
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
        asking.kill()
    limit = time.monotonic() + 20
    while any(map(running, pids)):
        assert time.monotonic() < limit
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_scripts_without_a_guard_can_prepare(tmp_path: Path) -> None:
    """The processes import neither the program that asks for them nor what lies where it runs."""
    photos(tmp_path / "photos", 130)
    (tmp_path / "queue.py").write_text("raise SystemExit(3)")
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from stratagem.data.datasets import Reading, prepare\n"
        "print(prepare('photos', Path('out'), size=8, reading=Reading(workers=2)).num)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.stdout.split() == [b"111"], done.stderr


def test_cores_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")  # as where there is no Linux
    assert cores() == os.cpu_count()


def test_processes_share_memory_where_there_is_no_linux(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = photos(tmp_path / "photos", 40)
    one = prepare(str(source), tmp_path / "one", size=8, reading=Reading(workers=1))
    monkeypatch.delattr(os, "memfd_create")
    two = prepare(str(source), tmp_path / "two", size=8, reading=Reading(workers=2))
    assert one.fingerprint == two.fingerprint


# --- settings ----------------------------------------------------------------------------------


def test_strict_ends_at_the_first_image_that_cannot_be_used(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "photos"), tmp_path / "out"
    origins = {open_source(source, 8, reading=Reading(strict=s)).origin for s in (False, True)}
    assert len(origins) == 2  # what was begun without it is not gone on with
    for workers in (1, 2):
        with pytest.raises(InputError, match=r"^003\.png: .*leave out --strict$"):
            prepare(source, out, size=8, reading=Reading(workers=workers, strict=True))
        assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    for file in source.iterdir():
        if int(file.stem) % 7 == 3:
            file.unlink()
    assert prepare(source, out, size=8, reading=Reading(strict=True)).rejected == []


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    source = folder(tmp_path / "photos")
    with pytest.raises(InputError, match=r"--from has no effect with .*photos"):
        prepare(source, tmp_path / "d", reading=Reading(place=tmp_path))
    with pytest.raises(InputError, match="workers is 0"):
        open_source(source, reading=Reading(workers=0))
    prepare(source, tmp_path / "d")
    with pytest.raises(InputError, match=r"is a data set: .* --strict"):
        prepare(tmp_path / "d", tmp_path / "e", reading=Reading(strict=True))
