"""data/named.py: real data sets by their names, found whole or refused with how to get them."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stratagem.data.datasets import Reading, open_source, prepare
from stratagem.data.named import NAMED, named_collection
from stratagem.data.sources import Record
from stratagem.errors import InputError
from test_sources import idx, png, tarred, tree


def given(name: str) -> Path:
    """Where a data set is, from the environment, or where its package puts it."""
    variable = f"STRATAGEM_{name.upper().replace('-', '_')}"
    place = Path(os.environ.get(variable) or NAMED[name].place)
    if not place.exists():
        pytest.skip(f"no {name} at {place}: set {variable}, or {NAMED[name].get}")
    return place


def small(monkeypatch: pytest.MonkeyPatch, name: str, usable: int, most: int) -> None:
    """Makes a name mean a small data set."""
    monkeypatch.setitem(NAMED, name, NAMED[name]._replace(usable=usable, most=most))


def records(name: str, place: Path) -> list[Record]:
    return list(named_collection(name, place)[0].records())


@pytest.mark.parametrize("name", NAMED)
def test_absent_data_is_refused_with_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "digits":
        with pytest.raises(InputError, match="leave out --from"):
            named_collection(name, tmp_path)
        return
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError) as caught:
            open_source(name, reading=Reading(place=place))
        assert NAMED[name].get in str(caught.value)
        assert "\n" not in str(caught.value)


# --- the real ones -----------------------------------------------------------------------------


@pytest.mark.slow
def test_fashion_mnist_is_whole(tmp_path: Path) -> None:
    place = given("fashion-mnist")
    data = prepare("fashion-mnist", tmp_path / "d", reading=Reading(place, workers=1))
    assert (data.num, data.shape, data.rejected) == (70_000, (1, 28, 28), [])
    assert data.labels.bincount().tolist() == [7_000] * 10
    assert (data.classes[0], data.classes[-1]) == ("T-shirt/top", "Ankle boot")
    ankle_boot, sneaker = data.labels[0], data.labels[60_000 + 12]
    assert (int(ankle_boot), int(sneaker)) == (9, 7)
    assert data.names[60_000] == "t10k/0000000"
    # mean and deviation of the training images, as everybody normalises by them
    pixels = data.images(torch.arange(60_000)).double() / 255
    assert abs(float(pixels.mean()) - 0.2860) < 5e-5
    assert abs(float(pixels.std()) - 0.3530) < 5e-5


@pytest.mark.slow
def test_emoji_are_whole(tmp_path: Path) -> None:
    place = given("emoji")
    data = prepare("emoji", tmp_path / "d", reading=Reading(place))
    assert (data.num, data.shape, len(data.rejected)) == (10_945, (3, 64, 64), 18)
    assert len(data.classes) == 10
    assert Counter(name.split("/")[0] for name in data.names) == {
        "google": 3786, "twitter": 3786, "fluent": 3373,
    }  # fmt: skip
    assert "google/Smileys & Emotion/grinning/1f600" in data.names


@pytest.mark.slow
def test_cifar10_is_whole(tmp_path: Path) -> None:
    place = given("cifar10")
    data = prepare("cifar10", tmp_path / "d", reading=Reading(place))
    assert (data.num, data.shape) == (60_000, (3, 32, 32))
    assert data.labels.bincount().tolist() == [6_000] * 10


# --- their formats, on a small scale -------------------------------------------------------------


def test_fashion_mnist_of_other_pixels_is_refused(tmp_path: Path) -> None:
    images = np.zeros((2, 28, 28), np.uint8)
    tree(tmp_path, {"train-images-idx3-ubyte": idx(images), "train-labels-idx1-ubyte": idx(images)})
    with pytest.raises(InputError, match="is not fashion-mnist, its sum differs"):
        named_collection("fashion-mnist", tmp_path)


EMOJI = """[
  {"image": "1f600.png", "category": "Smileys", "short_name": "grinning"},
  {"image": "26a7-fe0f.png", "category": "Symbols", "short_name": "sign"},
  {"image": "1f385.png", "category": "Smileys", "short_name": "santa",
   "skin_variations": {"1F3FB": {"image": "1f385-1f3fb.png"}}}
]"""


@pytest.mark.parametrize("packed", [False, True])
def test_emoji_have_group_and_style(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    packages = {
        f"emoji-datasource-{style}": {
            "emoji.json": EMOJI.encode(),
            f"img/{style}/64/1f600.png": png(1),
            f"img/{style}/64/1f385-1f3fb.png": png(2),
            f"img/{style}/sheets/64.png": png(3),
        }
        for style in ("google", "twitter")
    } | {"fluent-emoji-3d": {"assets/26a7.webp": png(4), "assets/a9.webp": png(5)}}
    for name, files in packages.items():
        if packed:
            inside = {f"package/{file}": content for file, content in files.items()}
            tarred(tmp_path / f"lobehub-{name}-1.0.0.tgz", inside, "gz")
        else:
            tree(tmp_path / "node_modules" / name, files)
    small(monkeypatch, "emoji", usable=5, most=4)
    found = open_source("emoji", reading=Reading(tmp_path))
    assert found.classes == ["Smileys", "Symbols"]
    assert callable(found.items)
    items = list(found.items(0))
    names = sorted(item.name for item in items)
    assert names == [
        "fluent/Symbols/sign/26a7-fe0f",
        "fluent/a9",
        "google/Smileys/grinning/1f600",
        "google/Smileys/santa/1f385-1f3fb",
        "twitter/Smileys/grinning/1f600",
        "twitter/Smileys/santa/1f385-1f3fb",
    ]
    small(monkeypatch, "emoji", usable=6, most=4)
    with pytest.raises(InputError, match="has 5 images of emoji, 4 in the largest class, instead"):
        named_collection("emoji", tmp_path)


ROWS = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
CLASSES = [6, 9, 9, 4]


def batch_files(form: str) -> dict[str, bytes]:
    if form == "images":
        kinds = [("train", "frog"), ("train", "truck"), ("test", "truck"), ("test", "deer")]
        return {f"c/{part}/{kind}/{n}.png": png(n) for n, (part, kind) in enumerate(kinds)}
    files = {}
    for part, rows in (("data_batch_1", slice(0, 2)), ("test_batch", slice(2, 4))):
        if form == "python":
            body = {b"data": ROWS[rows], b"labels": CLASSES[rows]}
            files[f"c/{part}"] = pickle.dumps(body)
        else:
            labels = np.array(CLASSES[rows], np.uint8)[:, None]
            files[f"c/{part}.bin"] = np.concatenate([labels, ROWS[rows]], 1).tobytes()
    return {"c/readme.html": b"", **files}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ["images", "python", "binary"])
def test_cifar10_comes_in_three_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, packed: bool
) -> None:
    small(monkeypatch, "cifar10", usable=4, most=2)
    files = batch_files(form)
    place = tarred(tmp_path / "c.tgz", files, "gz") if packed else tree(tmp_path / "t", files)
    data = prepare("cifar10", tmp_path / "d", reading=Reading(place))
    assert data.shape == (3, 32, 32)
    assert sorted(data.labels.tolist()) == sorted(CLASSES)
    if form != "images":
        assert data.labels.tolist() == CLASSES
        assert torch.equal(data.images(torch.arange(4)).flatten(1), torch.from_numpy(ROWS))


def test_a_batch_that_would_run_code_does_not(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    tree(tmp_path, {"data_batch_1": pickle.dumps({b"data": Evil(), b"labels": []})})
    with pytest.raises(InputError, match=r"no batch of cifar10.*it holds posix\.mkdir"):
        records("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()
    tree(tmp_path, {"data_batch_1": b"no pickle"})
    with pytest.raises(InputError, match="no batch of cifar10, or damaged"):
        records("cifar10", tmp_path)


def test_the_digits_go_the_way_of_all_images() -> None:
    pytest.importorskip("sklearn")
    found = open_source("digits", 16)
    assert callable(found.items)
    (first, *_) = list(found.items(1796))
    assert first.name == "digits/1796"
    assert Image.fromarray(first.image[0].numpy()).size == (16, 16)
