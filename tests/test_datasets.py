"""data/datasets.py: from a folder of files, some of them broken, to a data set."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stratagem.data.datasets import digits, image_folder, prepare
from stratagem.data.images import find_images, load_image
from stratagem.data.shards import DataSet
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
    assert data.names == ["a/00.png", "a/02.png", "a/04.png", "b/01.png", "b/03.png", "b/05.png"]
    for index, name in enumerate(data.names):
        image = data.images(torch.tensor([index]))[0]
        assert torch.equal(image, load_image(source / name, 16))


def test_folders_are_rgb_unless_gray_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "g").mkdir()
    Image.fromarray(np.full((40, 40), 9, np.uint8)).save(tmp_path / "g" / "x.png")
    assert prepare(tmp_path / "g", tmp_path / "d").shape == (3, 32, 32)
    assert prepare(str(tmp_path / "g"), tmp_path / "e", gray=True).shape == (1, 32, 32)


def test_broken_images_are_skipped_counted_and_named(tmp_path: Path) -> None:
    source = spoil(folder(tmp_path / "photos"))
    seen: list[tuple[int, int]] = []
    data = prepare(source, tmp_path / "d", size=16, progress=lambda *counts: seen.append(counts))
    assert data.names == ["a/02.png", "a/04.png", "b/01.png", "b/05.png"]
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert [name for name, _ in data.rejected] == ["a/00.png", "b/03.png"]
    assert all(cause for _, cause in data.rejected)
    assert seen == [(2, 6), (3, 6), (4, 6), (6, 6)]
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
    with pytest.raises(InputError, match="does not exist"):
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


def test_threads_keep_the_order_and_do_not_run_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, lock, started = folder(tmp_path / "photos", 40), threading.Lock(), 0

    def slow(path: Path, size: int, channels: int) -> torch.Tensor:
        nonlocal started
        with lock:
            started += 1
            mine = started
        time.sleep(0.002 * (mine % 3))  # the first does not finish first
        return torch.full((channels, size, size), int(path.stem), dtype=torch.uint8)

    monkeypatch.setattr("stratagem.data.datasets.load_image", slow)
    monkeypatch.setattr("stratagem.data.datasets.os.cpu_count", lambda: 4)
    listing = find_images(source)
    taken, ahead = [], 0
    for sample in image_folder(listing, 2, 1, []):
        if len(taken) < 3:
            time.sleep(0.05)  # long enough to load all the files that were handed out
        ahead = max(ahead, started - len(taken))
        taken.append(int(sample.image[0, 0, 0]))
    assert taken == [*range(0, 40, 2), *range(1, 40, 2)]
    assert ahead <= 2 * 4 + 1
