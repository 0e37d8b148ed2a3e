"""data/shards.py, data/writing.py: what goes in comes out, and damage and stops are noticed."""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stratagem.data.codecs import Codec, PixelCodec
from stratagem.data.disk import amount, disk_bytes, require_room
from stratagem.data.images import to_float
from stratagem.data.shards import KIND, DataSet, Rows, shard_name
from stratagem.data.writing import (
    Items,
    Rejected,
    Sample,
    Source,
    items_of,
    write_dataset,
)
from stratagem.errors import DamagedArtifact, InputError
from tolerances import FLOAT64, assert_near


def pixels(num: int = 10, shape: tuple[int, int, int] = (3, 4, 5)) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, *shape), dtype=torch.uint8, generator=random)


def samples(images: Tensor) -> Iterator[Sample]:
    for index, image in enumerate(images):
        yield Sample(image, index % 3 - 1, f"n/{index}.png")


def write(
    path: Path, images: Tensor, classes: tuple[str, ...] = ("a", "b"), **options: Any
) -> DataSet:
    rejected = [Rejected(*pair) for pair in options.pop("rejected", ())]
    source = Source("test", classes, itertools.chain(rejected, samples(images)))
    return write_dataset(path, source, **{"flip": True, **options})


@pytest.mark.parametrize("shard_size", [1, 3, 5, 10, 99, None])
def test_what_goes_in_comes_out(tmp_path: Path, shard_size: int | None) -> None:
    images = pixels()
    data = write(tmp_path / "d", images, shard_size=shard_size, rejected=[("x.png", "cut")])
    for opened in (data, DataSet.open(tmp_path / "d")):
        assert (opened.num, opened.shape, opened.flip) == (10, (3, 4, 5), True)
        assert torch.equal(opened.images(torch.arange(10)), images)
        assert opened.labels.tolist() == [-1, 0, 1, -1, 0, 1, -1, 0, 1, -1]
        assert list(opened.names) == [f"n/{i}.png" for i in range(10)]
        assert opened.classes == ["a", "b"]
        assert opened.rejected == [("x.png", "cut")]
        assert (opened.source, opened.kind, opened.image_shape) == ("test", "images", (3, 4, 5))
        assert opened.autoencoder is None
        assert opened.origin == opened.fingerprint
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
    for first in range(10):
        assert torch.equal(torch.cat(list(data.batches(4, first))), images[first:])
    mapped = Path("/proc/self/maps").read_text()
    assert f"{tmp_path}/d/images-00000" in mapped  # by opening
    assert f"{tmp_path}/d/images-00001" not in mapped


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
    mean, std = data.statistics.mean, data.statistics.std
    assert_near(torch.tensor(mean).double(), exact.mean(1), 1e-6)
    assert mean == pytest.approx(exact.mean(1).tolist(), abs=FLOAT64)
    assert std == pytest.approx(exact.std(1, correction=0).tolist(), abs=FLOAT64)
    assert std == pytest.approx(x.std(1, correction=0).tolist(), abs=1e-6)


def test_constant_images_have_no_spread(tmp_path: Path) -> None:
    data = write(tmp_path / "d", torch.full((7, 1, 3, 3), 201, dtype=torch.uint8))
    assert data.statistics.std == [0.0]
    assert data.statistics.mean == [201 / 127.5 - 1]


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


@pytest.mark.parametrize(
    "name", ["images-00001.safetensors", "labels.safetensors", "names.safetensors"]
)
def test_a_flipped_bit_is_noticed(tmp_path: Path, name: str) -> None:
    write(tmp_path / "d", pixels(), shard_size=3)
    spoil(tmp_path / "d" / name)
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

    write_dataset(tmp_path / "d", Source("t", [], stream()), flip=False, shard_size=5)
    assert most <= 5 + 2  # the one being made and the one just handed over


def test_progress_counts_images(tmp_path: Path) -> None:
    seen: list[int] = []
    write(tmp_path / "d", pixels(4), progress=seen.append)
    assert seen == [1, 2, 3, 4]


def test_a_disk_that_gives_less_than_asked_for_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads from a network file system may be cut short, by a signal for one."""
    data = write(tmp_path / "d", pixels(40))
    whole = data.images(torch.arange(40))

    class Slow(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            return super().readinto(memoryview(buffer)[:7]) or 0

    def opened(path: Path, mode: str, buffering: int = -1) -> Any:
        raw = Slow(path, mode)
        return raw if buffering == 0 else io.BufferedReader(raw, 8)

    monkeypatch.setattr(Path, "open", opened)
    assert torch.equal(torch.cat(list(data.batches(16))), whole)


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
        write_dataset(tmp_path / "d", Source("t", ["a"], mixed()), flip=False)
    with pytest.raises(InputError, match=r"n/2.png has label 1: there are 1 classes"):
        write(tmp_path / "d", pixels(), classes=("a",))
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


# --- going on ----------------------------------------------------------------------------------

STOP = """
import os, signal, sys, torch
from pathlib import Path
from stratagem.data.writing import Rejected, Sample, Source, write_dataset
def items(first):
    for number in range(first, 40):
        if number == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        if number % 7 == 3:
            yield Rejected(f"n/{number}", "bad")
        else:
            image = torch.full((1, 2, 3), number, dtype=torch.uint8)
            yield Sample(image, number % 2, f"n/{number}")
write_dataset(
    Path(sys.argv[1]), Source("t", ["a", "b"], items, "here"), flip=False, holdout=0.2, shard_size=5
)
"""


def items(first: int = 0, num: int = 40, taken: list[int] | None = None) -> Iterator[Any]:
    for number in range(first, num):
        if taken is not None:
            taken.append(number)
        if number % 7 == 3:
            yield Rejected(f"n/{number}", "bad")
        else:
            yield Sample(
                torch.full((1, 2, 3), number, dtype=torch.uint8), number % 2, f"n/{number}"
            )


def test_a_killed_writing_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    options: dict[str, Any] = {"flip": False, "holdout": 0.2, "shard_size": 5}
    whole = write_dataset(tmp_path / "w", Source("t", ["a", "b"], items, "here"), **options)
    killed = subprocess.run(
        [sys.executable, "-c", STOP, str(tmp_path / "d"), "29"], check=False, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "d").exists()
    with pytest.raises(InputError, match=r"\.d\.partial is unfinished, of other input"):
        write_dataset(tmp_path / "d", Source("t", ["a", "b"], items, "there"), **options)
    taken: list[int] = []
    seen: list[int] = []
    again = functools.partial(items, taken=taken)
    data = write_dataset(
        tmp_path / "d", Source("t", ["a", "b"], again, "here"), progress=seen.append, **options
    )
    assert data.fingerprint == whole.fingerprint
    assert taken[0] in {23, 29}  # the fifth shard was on its way to the disk, or there
    assert taken == list(range(taken[0], 40))
    assert seen[-len(taken) :] == [number + 1 for number in taken]
    read_again = seen[: -len(taken)]
    assert len(read_again) >= 4
    assert read_again == sorted(read_again)
    assert read_again[-1] == taken[0]
    assert data.rejected == [(f"n/{number}", "bad") for number in range(3, 40, 7)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "w"]
    assert not [p for p in (tmp_path / "d").iterdir() if p.name[0] == "."]
    for index, name in enumerate(data.names):
        assert name == f"n/{data.position(index)}"


def test_a_shard_damaged_in_between_is_written_anew(tmp_path: Path) -> None:
    options: dict[str, Any] = {"flip": False, "holdout": 0.2, "shard_size": 5}
    whole = write_dataset(tmp_path / "w", Source("t", ["a", "b"], items, "here"), **options)
    code = [sys.executable, "-c", STOP, str(tmp_path / "d"), "29"]
    subprocess.run(code, check=False, capture_output=True)
    shard = sorted((tmp_path / ".d.partial").glob("*-00002.safetensors"))[0]
    body = bytearray(shard.read_bytes())
    body[-1] ^= 1
    shard.write_bytes(body)
    taken: list[int] = []
    again = functools.partial(items, taken=taken)
    data = write_dataset(tmp_path / "d", Source("t", ["a", "b"], again, "here"), **options)
    assert data.fingerprint == whole.fingerprint
    assert 5 < taken[0] < 29  # from the damaged shard on, and not from the beginning


def test_a_stop_while_sealing_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: Any) -> None:
        raise KeyboardInterrupt

    source = Source("t", ["a", "b"], items, "here")
    with monkeypatch.context() as patch:
        patch.setattr("stratagem.artifact.folders._seal", cut)
        with pytest.raises(KeyboardInterrupt):
            write_dataset(tmp_path / "d", source, flip=False)
    taken: list[int] = []
    source = source._replace(items=functools.partial(items, taken=taken))
    assert write_dataset(tmp_path / "d", source, flip=False).num == 34
    assert not taken


def test_two_writers_of_one_data_set_do_not_meet(tmp_path: Path) -> None:
    def nested(first: int) -> Items:
        with pytest.raises(InputError, match="another process writes"):
            write_dataset(tmp_path / "d", Source("t", ["a", "b"], items), flip=False)
        return items(first)

    assert write_dataset(tmp_path / "d", Source("t", ["a", "b"], nested), flip=False).num == 34


def test_a_data_set_is_a_source_of_another(tmp_path: Path) -> None:
    data = write(tmp_path / "d", pixels(70))
    source = Source("test", ["a", "b"], functools.partial(items_of, data))
    copy = write_dataset(tmp_path / "e", source, flip=True)
    assert copy.fingerprint == data.fingerprint
    assert [s.name for s in items_of(data, 66)] == ["n/66.png", "n/67.png", "n/68.png", "n/69.png"]


# --- what a network learns from, and sizes -----------------------------------------------------


def test_pixels_are_mirrored_where_asked_for(tmp_path: Path) -> None:
    data = write(tmp_path / "d", pixels())
    rows, flip = torch.tensor([4, 1]), torch.tensor([False, True])

    def no_noise() -> Tensor:
        raise AssertionError

    x = data.sample(rows, flip, no_noise)
    assert torch.equal(x[0], to_float(pixels()[4]))
    assert torch.equal(x[1], to_float(pixels()[1].flip(-1)))


def test_the_estimate_is_what_is_written(tmp_path: Path) -> None:
    codec: Codec = PixelCodec()
    images, said = pixels(300, (3, 16, 16)), list[int]()
    source = Source("test", ["a", "b"], samples(images), total=300)
    write_dataset(tmp_path / "d", source, flip=True, announce=said.append)
    assert said == [disk_bytes(300, codec, (3, 16, 16))]
    taken = sum(file.stat().st_size for file in (tmp_path / "d").iterdir())
    assert 0.8 * said[0] < taken < said[0]


def test_a_disk_that_cannot_hold_it_is_refused_at_once(tmp_path: Path) -> None:
    seen: list[int] = []
    source = Source("test", ["a", "b"], samples(pixels()), total=10**13)
    with pytest.raises(InputError, match=r"d would take 1\.88e\+03 TB, and the disk has .* free"):
        write_dataset(tmp_path / "d", source, flip=True, progress=seen.append)
    assert not seen
    assert list(tmp_path.iterdir()) == []
    require_room(tmp_path / "d", 10)
    assert [amount(n) for n in (999, 1e3, 2.5e12)] == ["999 bytes", "1 kB", "2.5 TB"]


def test_large_data_is_not_read_through_at_every_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "d", pixels(), shard_size=4)
    spoil(tmp_path / "d" / shard_name("images", 1))
    monkeypatch.setattr("stratagem.data.shards._SUMMED_BYTES", 100)
    DataSet.open(tmp_path / "d")
    spoil(tmp_path / "d" / "names.safetensors")
    with pytest.raises(DamagedArtifact, match="altered"):
        DataSet.open(tmp_path / "d")


def spoil(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def test_rows_are_what_they_are(tmp_path: Path) -> None:
    data = write(tmp_path / "d", pixels())
    assert Rows(data.labels, data.held_out, data.names)._fields == ("labels", "held_out", "names")
    assert json.loads((tmp_path / "d" / "manifest.json").read_text())["kind"] == KIND
