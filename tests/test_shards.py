"""data/shards.py: what goes in comes out, in constant memory, and damage is noticed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stratagem.data.images import to_float
from stratagem.data.shards import DataSet, Sample, write_dataset
from stratagem.errors import DamagedArtifact, InputError
from tolerances import FLOAT64, assert_near


def pixels(num: int = 10, shape: tuple[int, int, int] = (3, 4, 5)) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, *shape), dtype=torch.uint8, generator=random)


def samples(images: Tensor) -> Iterator[Sample]:
    for index, image in enumerate(images):
        yield Sample(image, index % 3 - 1, f"n/{index}.png")


def write(path: Path, images: Tensor, **options: Any) -> DataSet:
    defaults = {"classes": ["a", "b"], "source": "test", "flip": True}
    return write_dataset(path, samples(images), **{**defaults, **options})


@pytest.mark.parametrize("shard_size", [1, 3, 5, 10, 99, None])
def test_what_goes_in_comes_out(tmp_path: Path, shard_size: int | None) -> None:
    images = pixels()
    data = write(tmp_path / "d", images, shard_size=shard_size, rejected=[("x.png", "cut")])
    for opened in (data, DataSet.open(tmp_path / "d")):
        assert (opened.num, opened.shape, opened.flip) == (10, (3, 4, 5), True)
        assert torch.equal(opened.images(torch.arange(10)), images)
        assert opened.labels.tolist() == [-1, 0, 1, -1, 0, 1, -1, 0, 1, -1]
        assert opened.names == [f"n/{i}.png" for i in range(10)]
        assert opened.classes == ["a", "b"]
        assert opened.rejected == [("x.png", "cut")]
        assert opened.source == "test"
        assert opened.path == tmp_path / "d"
    shards = len(list((tmp_path / "d").glob("images-*")))
    assert shards == -(-10 // (shard_size or 10))


def test_images_come_in_the_order_asked_for(tmp_path: Path) -> None:
    images = pixels()
    data = write(tmp_path / "d", images, shard_size=3)
    order = torch.tensor([9, 0, 3, 3, 2, 8])
    assert torch.equal(data.images(order), images[order])
    assert data.images(torch.empty(0, dtype=torch.int64)).shape == (0, 3, 4, 5)


def test_batches_pass_over_everything_once(tmp_path: Path) -> None:
    images = pixels()
    data = write(tmp_path / "d", images, shard_size=3)
    batches = list(data.batches(4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat(batches), images)


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_out_of_range_is_refused(tmp_path: Path, index: int) -> None:
    with pytest.raises(InputError, match=f"no image {index}"):
        write(tmp_path / "d", pixels()).images(torch.tensor([0, index]))


def test_what_is_handed_out_is_a_copy(tmp_path: Path) -> None:
    data = write(tmp_path / "d", pixels())
    data.images(torch.arange(10)).zero_()
    assert torch.equal(data.images(torch.arange(10)), pixels())
    assert torch.equal(DataSet.open(tmp_path / "d").images(torch.arange(10)), pixels())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_shards_hold_no_file_open(tmp_path: Path) -> None:
    write(tmp_path / "d", pixels(50), shard_size=1)
    before = len(os.listdir("/proc/self/fd"))
    data = DataSet.open(tmp_path / "d")
    data.images(torch.arange(50))
    assert len(os.listdir("/proc/self/fd")) == before


def test_another_process_gets_the_path_not_the_pixels(tmp_path: Path) -> None:
    data = write(tmp_path / "d", pixels(200))
    parcel = pickle.dumps(data)
    assert len(parcel) < 1000
    assert torch.equal(pickle.loads(parcel).images(torch.arange(200)), pixels(200))


# --- statistics and hold-out -------------------------------------------------------------------


def test_statistics_are_those_of_the_floats(tmp_path: Path) -> None:
    data = write(tmp_path / "d", pixels(), shard_size=3)
    x = to_float(pixels()).double().transpose(0, 1).flatten(1)
    exact = (pixels().double() / 127.5 - 1).transpose(0, 1).flatten(1)
    assert_near(torch.tensor(data.mean).double(), exact.mean(1), 1e-6)
    assert data.mean == pytest.approx(exact.mean(1).tolist(), abs=FLOAT64)
    assert data.std == pytest.approx(exact.std(1, correction=0).tolist(), abs=FLOAT64)
    assert data.std == pytest.approx(x.std(1, correction=0).tolist(), abs=1e-6)


def test_constant_images_have_no_spread(tmp_path: Path) -> None:
    data = write(tmp_path / "d", torch.full((7, 1, 3, 3), 201, dtype=torch.uint8))
    assert data.std == [0.0]
    assert data.mean == [201 / 127.5 - 1]


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.1, 2), (0.25, 5), (0.9, 18)])
def test_the_holdout_has_the_size_asked_for(tmp_path: Path, fraction: float, count: int) -> None:
    data = write(tmp_path / "d", pixels(20), holdout=fraction)
    assert int(data.held_out.sum()) == count == len(data.held_out_indices)
    both = torch.cat([data.train_indices, data.held_out_indices])
    assert both.sort().values.tolist() == list(range(20))
    assert not data.held_out[data.train_indices].any()


def test_the_holdout_depends_on_the_seed_alone(tmp_path: Path) -> None:
    def drawn(name: str, **options: int) -> list[int]:
        data = write(tmp_path / name, pixels(40), holdout=0.5, **options)
        return data.held_out_indices.tolist()

    first = drawn("a", seed=3)
    assert first == drawn("b", seed=3, shard_size=7)
    assert first != drawn("c", seed=4)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 0.99, float("nan")])
def test_an_impossible_holdout_is_refused(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(InputError, match="holdout"):
        write(tmp_path / "d", pixels(), holdout=fraction)
    assert list(tmp_path.iterdir()) == []


# --- fingerprints and damage -------------------------------------------------------------------


def test_equal_content_has_an_equal_fingerprint(tmp_path: Path) -> None:
    here, there = write(tmp_path / "a", pixels()), write(tmp_path / "sub" / "b", pixels())
    assert here.fingerprint == there.fingerprint
    other = pixels()
    other[9, 2, 3, 4] ^= 1
    assert write(tmp_path / "c", other).fingerprint != here.fingerprint
    assert write(tmp_path / "d", pixels(), flip=False).fingerprint != here.fingerprint


@pytest.mark.parametrize("name", ["images-00001.safetensors", "labels.safetensors", "names.json"])
def test_a_flipped_bit_is_noticed(tmp_path: Path, name: str) -> None:
    write(tmp_path / "d", pixels(), shard_size=3)
    data = bytearray((tmp_path / "d" / name).read_bytes())
    data[-3] ^= 1
    (tmp_path / "d" / name).write_bytes(data)
    with pytest.raises(DamagedArtifact, match="altered"):
        DataSet.open(tmp_path / "d")


def test_a_truncated_shard_is_noticed_without_reading_it(tmp_path: Path) -> None:
    write(tmp_path / "d", pixels(), shard_size=3)
    shard = tmp_path / "d" / "images-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DamagedArtifact, match="truncated"):
        DataSet.open(tmp_path / "d", verify=False)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"#" + data[9:],
        lambda data: data.replace(b'"images"', b'"omages"'),
        lambda data: data.replace(b'"U8"', b'"I8"'),
    ],
)
def test_a_damaged_header_is_noticed_without_sums(tmp_path: Path, damage: Any) -> None:
    write(tmp_path / "d", pixels())
    shard = tmp_path / "d" / "images-00000.safetensors"
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(DamagedArtifact, match="rebuild"):
        DataSet.open(tmp_path / "d", verify=False)


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        DataSet.open(tmp_path / "nowhere")
    write(tmp_path / "d", pixels())
    (tmp_path / "d" / "manifest.json").unlink()
    with pytest.raises(InputError, match="not a finished dataset"):
        DataSet.open(tmp_path / "d")


# --- writing -----------------------------------------------------------------------------------


def test_writing_holds_one_shard_at_most(tmp_path: Path) -> None:
    alive, most = 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def stream() -> Iterator[Sample]:
        nonlocal alive, most
        for index in range(60):
            image = torch.full((1, 2, 2), index, dtype=torch.uint8)
            weakref.finalize(image, gone)
            alive += 1
            most = max(most, alive)
            yield Sample(image, -1, str(index))

    write_dataset(tmp_path / "d", stream(), classes=[], source="t", flip=False, shard_size=5)
    assert most <= 5 + 2  # the one being made and the one just handed over


def test_progress_counts_images(tmp_path: Path) -> None:
    seen: list[int] = []
    write(tmp_path / "d", pixels(4), progress=seen.append)
    assert seen == [1, 2, 3, 4]


def test_no_images_is_an_error_that_names_the_cause(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images in test"):
        write(tmp_path / "d", pixels(0))
    with pytest.raises(InputError, match="none of the 1 images in test can be used; x: cut"):
        write(tmp_path / "d", pixels(0), rejected=[("x", "cut")])
    assert list(tmp_path.iterdir()) == []


def test_bad_samples_are_named_and_leave_nothing_behind(tmp_path: Path) -> None:
    def mixed() -> Iterator[Sample]:
        yield Sample(pixels()[0], 0, "fine")
        yield Sample(pixels(shape=(1, 4, 5))[0], 0, "odd one")

    with pytest.raises(InputError, match=r"odd one has shape \(1, 4, 5\)"):
        write_dataset(tmp_path / "d", mixed(), classes=["a"], source="t", flip=False)
    with pytest.raises(InputError, match=r"n/2.png has label 1: there are 1 classes"):
        write(tmp_path / "d", pixels(), classes=["a"])
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    first = write(tmp_path / "d", pixels())
    with pytest.raises(InputError, match="already exists"):
        write(tmp_path / "d", pixels(3))
    assert DataSet.open(tmp_path / "d").fingerprint == first.fingerprint


def test_a_data_set_may_be_moved(tmp_path: Path) -> None:
    first = write(tmp_path / "d", pixels(), shard_size=4)
    shutil.copytree(tmp_path / "d", tmp_path / "e")
    second = DataSet.open(tmp_path / "e")
    assert second.fingerprint == first.fingerprint
    assert json.loads((tmp_path / "e" / "manifest.json").read_text())["kind"] == "dataset"
