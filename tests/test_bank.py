"""memory/{bank,build,store,ids,search}.py: unit rows, nothing mutates, a stopped build goes on."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import banks
from banks import ENCODER, encode, exact, flat, make, pixels
from stratagem.artifact import read_tensors, write_tensors
from stratagem.errors import DamagedArtifact, InputError
from stratagem.memory import build as build_module
from stratagem.memory.bank import KIND, MemoryBank
from stratagem.memory.build import build
from stratagem.memory.draw import draw
from stratagem.memory.ids import Ids
from stratagem.memory.search import nearest, rows_near
from stratagem.memory.store import (
    Codec,
    Columns,
    Held,
    Int8,
    Joined,
    LowRank,
    Plain,
    Recoded,
    Selected,
    Store,
    blank,
    codec_of,
    hold,
    same,
    store_of,
    unit,
)
from stratagem.randomness import normal
from tolerances import FLOAT32, assert_near

EVERY = torch.arange(12)
HALF = 2.0**-11  # relative rounding of float16


def frame(num: int = 12, form: str = "float16", **changes: Any) -> MemoryBank:
    fields = {"store": blank(num, 2, 16, form), "labels": torch.arange(num) % 3 - 1}
    fields |= {"held_out": torch.arange(num) % 4 == 3}
    return make(num, **{**fields, **changes})


def from_image(size: int, num: int = 12) -> Callable[[int], Iterator[Tensor]]:
    """All images from one on, in batches."""
    return lambda start: (part for part in pixels(num)[start:].split(size) if len(part))


# --- building ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "bound"), [("float16", HALF), ("float32", FLOAT32)])
@pytest.mark.parametrize("size", [1, 5, 12, 50])
def test_rows_are_the_unit_vectors_of_the_images(
    tmp_path: Path, size: int, form: str, bound: float
) -> None:
    bank = build(tmp_path / "b", frame(form=form), from_image(size), encode)
    assert (bank.num, bank.dim, bank.flips, bank.format) == (12, 16, True, form)
    mirrored = EVERY % 2 == 1
    assert_near(bank.lookup(EVERY), exact()[:, 0], bound)
    assert_near(bank.lookup(EVERY, mirrored), exact()[EVERY, mirrored.long()], bound)
    assert bank.labels.tolist() == [-1, 0, 1] * 4
    assert [bank.ids[row] for row in (0, 11)] == ["img/0.png", "img/11.png"]
    assert bank.shape == (1, 4, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_bank_without_mirror_images_has_one_side(tmp_path: Path) -> None:
    bank = build(tmp_path / "b", frame(store=blank(12, 1, 16, "float32")), from_image(5), encode)
    assert not bank.flips
    assert_near(bank.lookup(EVERY), exact()[:, 0], FLOAT32)


@pytest.mark.parametrize("form", ["float16", "int8"])
def test_rows_have_unit_length_however_they_are_stored(tmp_path: Path, form: str) -> None:
    bank = build(tmp_path / "b", frame(form=form), from_image(5), encode)
    assert_near(bank.lookup(EVERY).double().norm(dim=1), torch.ones(12), FLOAT32)


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_huge_and_tiny_vectors_are_normalised_too(tmp_path: Path, factor: float) -> None:
    bank = build(tmp_path / "b", frame(), from_image(5), lambda images: encode(images) * factor)
    assert_near(bank.lookup(EVERY), exact()[:, 0], HALF)


def test_the_images_are_read_once(tmp_path: Path) -> None:
    calls: list[int] = []
    seen: list[tuple[int, int]] = []

    def once(start: int) -> Iterator[Tensor]:
        for batch in from_image(5)(start):
            calls.append(len(batch))
            yield batch

    build(tmp_path / "b", frame(), once, encode, progress=lambda *done: seen.append(done))
    assert calls == [5, 5, 2]
    assert seen == [(5, 12), (10, 12), (12, 12)]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 7, 11])
def test_an_unusable_vector_names_its_image_and_leaves_nothing(
    tmp_path: Path, row: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "_SECONDS", 0)  # a note after every batch

    def spoiled(images: Tensor) -> Tensor:
        same_image = (images == pixels()[row]).flatten(1).all(1, keepdim=True)
        return torch.where(same_image, value, encode(images))

    with pytest.raises(InputError, match=f"image {row} has no usable vector: it is zero or not"):
        build(tmp_path / "b", frame(), from_image(5), spoiled)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("announced", [11, 13])
def test_the_number_of_images_must_be_right(tmp_path: Path, announced: int) -> None:
    with pytest.raises(InputError, match=f"{announced}"):
        build(tmp_path / "b", frame(announced), from_image(5), encode)
    with pytest.raises(InputError, match="has 0 images"):
        build(tmp_path / "b", frame(1), lambda _: [], encode)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bank_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        build(tmp_path / "b", frame(), from_image(5), lambda _: pytest.fail("encoded"))
    assert (tmp_path / "b").read_text() == "mine"


class Stopped(Exception):
    """What ends a build from outside."""


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_stopped_build_goes_on_where_it_was(tmp_path: Path, stop: int) -> None:
    whole = build(tmp_path / "whole", frame(), from_image(5), encode)
    left = stop

    def tired(images: Tensor) -> Tensor:
        nonlocal left
        if left == 0:
            raise Stopped
        left -= 0.5  # two calls per batch: the images and their mirror images
        return encode(images)

    starts: list[int] = []

    def noted(start: int) -> Iterator[Tensor]:
        starts.append(start)
        return from_image(5)(start)

    with pytest.raises(Stopped):
        build(tmp_path / "b", frame(), noted, tired)
    assert not (tmp_path / "b").exists()
    with pytest.raises(InputError, match="unfinished bank of other data or settings"):
        build(tmp_path / "b", frame(data="e" * 64), noted, encode)
    with pytest.raises(InputError, match="unfinished bank of other data or settings"):
        build(tmp_path / "b", frame(form="int8"), noted, encode)
    bank = build(tmp_path / "b", frame(), noted, encode)
    assert starts == [0, 5 * stop]
    assert bank.fingerprint == whole.fingerprint
    assert (tmp_path / "b").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "whole"]


def test_a_killed_build_goes_on_too(tmp_path: Path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]);"
        "from pathlib import Path; from test_bank import *; build_module._SECONDS = 0;"
        "slow = lambda images: (time.sleep(0.05), encode(images))[1];"
        "build(Path(sys.argv[2]), frame(400), from_image(5, 400), slow)"
    )
    here = str(Path(__file__).parent)
    process = subprocess.Popen([sys.executable, "-c", code, here, str(tmp_path / "b")])
    note = tmp_path / ".b.partial.json"
    deadline = time.monotonic() + 60
    while not note.exists() or json.loads(note.read_text())["done"] < 20:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = json.loads(note.read_text())["done"]
    assert 20 <= done < 400
    starts: list[int] = []

    def noted(start: int) -> Iterator[Tensor]:
        starts.append(start)
        return from_image(5, 400)(start)

    bank = build(tmp_path / "b", frame(400), noted, encode)
    assert starts == [done]
    whole = build(tmp_path / "whole", frame(400), from_image(5, 400), encode)
    assert bank.fingerprint == whole.fingerprint


def test_two_processes_do_not_build_one_bank(tmp_path: Path) -> None:
    def nested(images: Tensor) -> Tensor:
        with pytest.raises(InputError, match="another process writes"):
            build(tmp_path / "b", frame(), from_image(5), encode)
        return encode(images)

    assert build(tmp_path / "b", frame(), from_image(5), nested).num == 12
    assert build_module._SECONDS > 0


# --- the object --------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [-1, 12, 1 << 40])
def test_a_row_out_of_range_is_refused(index: int) -> None:
    with pytest.raises(InputError, match=f"no row {index} in the bank: it has 0 to 11"):
        make().lookup(torch.tensor([3, index]))


@pytest.mark.parametrize(
    "index", [torch.tensor(3), torch.tensor([[1]]), torch.tensor([1.0]), torch.tensor([True])]
)
def test_rows_are_a_list_of_integers(index: Tensor) -> None:
    with pytest.raises(InputError, match="list of integers"):
        make().lookup(index)


def test_mirrored_rows_must_exist() -> None:
    bank = make(flips=False)
    assert not bank.flips
    index = torch.arange(2)
    assert torch.equal(bank.lookup(index, torch.tensor([False, False])), bank.lookup(index))
    with pytest.raises(InputError, match="build it with flips"):
        bank.lookup(index, torch.tensor([False, True]))
    with pytest.raises(InputError, match="flip of shape"):
        make().lookup(index, torch.tensor([True]))


def test_no_rows_is_a_lookup_too() -> None:
    assert make().lookup(torch.empty(0, dtype=torch.int64)).shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nothing_mutates(dtype: torch.dtype) -> None:
    labels, held_out = torch.arange(12), torch.zeros(12, dtype=torch.bool)
    often = torch.arange(12.0).double()
    encoder = {"name": "weighted", "parts": [1, 2]}
    entry = {"edit": "none", "list": [1]}
    changes: dict[str, Any] = {"labels": labels, "held_out": held_out, "history": (entry,)}
    bank = make(dtype=dtype, encoder=encoder, frequency=often, **changes)
    before = make(dtype=dtype, labels=torch.arange(12), held_out=torch.zeros(12),
                  frequency=torch.arange(12.0),
                  history=({"edit": "none", "list": [1]},))  # fmt: skip

    labels.fill_(9)
    often.fill_(9)
    held_out.fill_(True)
    encoder["parts"].append(3)  # type: ignore[attr-defined]
    entry["list"].append(2)  # type: ignore[attr-defined]
    bank.lookup(EVERY).zero_()
    bank.lookup(EVERY, torch.ones(12, dtype=torch.bool)).zero_()
    bank.info()["encoder"]["parts"].append(4)
    bank.info()["history"][0]["list"].append(4)
    draw(bank, 5).zero_()
    with pytest.raises(dataclasses.FrozenInstanceError):
        bank.data = "other"  # type: ignore[misc]
    assert bank.fingerprint == before.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"labels": torch.zeros(11)},
        {"held_out": torch.zeros(12, 1)},
        {"ids": Ids.of(["one"])},
        {"frequency": torch.ones(11)},
        {"frequency": torch.zeros(12)},
        {"frequency": torch.tensor([1.0] * 11 + [-1.0])},
        {"frequency": torch.tensor([1.0] * 11 + [float("nan")])},
    ],
)
def test_columns_must_fit(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="bank"):
        dataclasses.replace(make(), **change)


@pytest.mark.parametrize("shape", [(12, 16), (0, 1, 16), (12, 3, 16)])
def test_vectors_must_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="not \\(N, F, D\\)"):
        hold(torch.ones(shape))
    with pytest.raises(InputError, match="use float16 or float32"):
        hold(torch.ones(12, 1, 16, dtype=torch.float64))


def test_a_bank_belongs_to_its_data() -> None:
    make().check("f" * 64)
    with pytest.raises(InputError, match="from data set ffffffffffff, not from this one"):
        make().check("e" * 64)
    edited = make(data="", history=({"edit": "add"}, {"edit": "remove"}))
    with pytest.raises(InputError, match=r"not the images of a data set \(add, remove\)"):
        edited.check("f" * 64)


@pytest.mark.parametrize("flips", [False, True])
def test_a_saved_bank_is_the_same_bank(tmp_path: Path, flips: bool) -> None:
    bank = make(flips=flips, frequency=torch.arange(12.0), history=({"edit": "x", "n": [1]},))
    seen: list[tuple[int, int]] = []
    manifest = bank.save(tmp_path / "b.bank", progress=lambda *done: seen.append(done))
    assert seen == [(12, 12)]
    loaded = MemoryBank.load(tmp_path / "b.bank")
    assert manifest.fingerprint == bank.fingerprint == loaded.fingerprint
    assert dataclasses.replace(loaded).fingerprint == bank.fingerprint  # computed anew
    assert vars(loaded)["fingerprint"] == bank.fingerprint  # known, the content is not read for it
    assert torch.equal(loaded.lookup(EVERY), bank.lookup(EVERY))
    assert loaded.labels.tolist() == bank.labels.tolist()
    assert loaded.held_out.tolist() == bank.held_out.tolist()
    assert [loaded.ids[row] for row in range(12)] == [bank.ids[row] for row in range(12)]
    assert torch.equal(loaded.frequency, torch.arange(12.0))  # type: ignore[arg-type]
    assert (loaded.encoder, loaded.data, loaded.shape) == (bank.encoder, bank.data, bank.shape)
    assert loaded.history == bank.history


def test_a_bank_without_names_or_history_is_read(tmp_path: Path) -> None:
    """As files were before banks had them."""
    tensors = {"vectors": exact().half(), "labels": EVERY, "held_out": EVERY > 9}
    write_tensors(tmp_path / "b", KIND, tensors, {"encoder": ENCODER, "data": "f"})
    bank = MemoryBank.load(tmp_path / "b")
    assert bank.ids[7] == "7"
    assert (bank.history, bank.shape, bank.frequency) == ((), None, None)
    assert_near(bank.lookup(EVERY), exact()[:, 0], HALF)


def test_saving_refuses_and_loading_checks(tmp_path: Path) -> None:
    make().save(tmp_path / "b.bank")
    with pytest.raises(InputError, match="already exists"):
        make().save(tmp_path / "b.bank")
    make(flips=False).save(tmp_path / "b.bank", replace=True)
    with pytest.raises(InputError, match="no bank at"):
        MemoryBank.load(tmp_path / "c.bank")
    data = bytearray((tmp_path / "b.bank").read_bytes())
    data[-5] ^= 1
    (tmp_path / "b.bank").write_bytes(data)
    with pytest.raises(DamagedArtifact, match="altered"):
        MemoryBank.load(tmp_path / "b.bank")
    assert MemoryBank.load(tmp_path / "b.bank", verify=False).num == 12


def test_different_content_has_another_fingerprint() -> None:
    bank = make()
    vectors = exact().half()
    vectors[3, 1, 2] += 0.01
    changes: list[dict[str, Any]] = [
        {"store": hold(vectors)},
        {"labels": bank.labels + 1},
        {"held_out": ~bank.held_out},
        {"encoder": {"name": "other"}},
        {"data": "e" * 64},
        {"ids": Ids.of("abcdefghijkl")},
        {"frequency": torch.ones(12)},
        {"shape": (1, 2, 8)},
        {"history": ({"edit": "x"},)},
    ]
    others = [dataclasses.replace(bank, **change) for change in changes]
    assert len({bank.fingerprint, *(other.fingerprint for other in others)}) == 10


def test_info_counts() -> None:
    info = make().info()
    assert (info["num"], info["dim"], info["flips"]) == (12, 16, True)
    assert info["format"] == "float16"
    assert info["bytes"] == 12 * 2 * 16 * 2
    assert info["held_out"] == 3
    assert info["labels"] == {-1: 4, 0: 4, 1: 4}
    assert info["encoder"] == ENCODER
    assert info["data"] == "f" * 64
    assert info["frequencies"] is False
    json.dumps(info)


def test_mean_cosine_is_that_of_different_rows() -> None:
    axes = MemoryBank(hold(torch.eye(4)[:, None]), torch.zeros(4), torch.zeros(4), {}, "")
    assert axes.info()["mean_cosine"] == 0  # a row paired with itself would count 1
    one = MemoryBank(hold(torch.ones(1, 1, 4) / 2), torch.zeros(1), torch.zeros(1), {}, "")
    assert one.info()["mean_cosine"] is None
    bank = make()
    rows = bank.lookup(EVERY)
    mean = ((rows @ rows.T).sum() - 12) / (12 * 11)
    assert bank.info()["mean_cosine"] == pytest.approx(float(mean), abs=0.02)


# --- stores and codecs -------------------------------------------------------------------------


def low_rank(dtype: torch.dtype = torch.float32) -> LowRank:
    basis, _ = torch.linalg.qr(normal((16, 5), 4, "basis"))
    return LowRank(basis, normal((16,), 5, "mean") / 9, dtype)


@pytest.mark.parametrize(
    ("codec", "bound"),
    [(Plain(16, torch.float32), 0.0), (Plain(16, torch.float16), HALF), (Int8(16), 0.5 / 127)],
)
def test_a_codec_returns_what_it_got(codec: Codec, bound: float) -> None:
    rows = exact().float().flatten(0, 1)
    back = codec.decode(codec.encode(rows))
    assert bool(((back - rows).abs() <= bound * rows.abs().amax(1, keepdim=True) + 1e-7).all())
    assert codec.constants() == {}


def test_low_rank_is_the_orthogonal_projection() -> None:
    codec, rows = low_rank(), exact().float().flatten(0, 1)
    back = codec.decode(codec.encode(rows))
    assert_near((rows - back) @ codec.basis, torch.zeros(24, 5), FLOAT32)  # the rest is orthogonal
    assert_near(codec.decode(codec.encode(back)), back, FLOAT32)  # a projection
    assert set(codec.constants()) == {"basis", "mean"}
    assert low_rank(torch.float16).encode(rows)["codes"].dtype == torch.float16


def test_codecs_that_read_each_other_are_the_same() -> None:
    other = LowRank(low_rank().basis, low_rank().mean + 1)
    codecs = [Plain(16, torch.float32), Plain(16, torch.float16), Plain(8, torch.float16),
              Int8(16), low_rank(), low_rank(torch.float16), other]  # fmt: skip
    for i, first in enumerate(codecs):
        assert [same(first, second) for second in codecs] == [i == j for j in range(len(codecs))]
    assert same(low_rank(), low_rank())
    assert not same(low_rank(), LowRank(low_rank().basis[:, :4], low_rank().mean, torch.float32))
    assert codec_of("int8", 4).format == "int8"
    with pytest.raises(InputError, match="unknown format 'low-rank'"):
        codec_of("low-rank", 4)


def columns(store: Store) -> Columns:
    """All stored numbers of a store, from its blocks."""
    parts = [block for _, block in store.blocks()]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("num", [3, 2048, 5000])
def test_blocks_are_all_rows_in_order(num: int) -> None:
    vectors = normal((num, 2, 4), 0, "test")
    store = hold(vectors)
    assert torch.equal(columns(store)["vectors"], vectors)
    assert store.layout() == {"vectors": (torch.float32, (num, 2, 4))}
    assert max(len(block["vectors"]) for _, block in store.blocks()) <= 2048


def test_composed_stores_are_the_composed_rows() -> None:
    vectors = normal((30, 2, 16), 0, "test")
    parts = [hold(vectors[:7]), hold(vectors[7:8]), hold(vectors[8:])]
    joined = Joined(parts)
    assert torch.equal(columns(joined)["vectors"], vectors)
    index = torch.tensor([29, 0, 7, 7, 8, 6])
    side = torch.tensor([0, 1, 0, 1, 1, 0])
    assert torch.equal(joined.rows(index, side), vectors[index, side])
    chosen = Selected(joined, torch.tensor([9, 2, 2]))
    assert torch.equal(columns(chosen)["vectors"], vectors[[9, 2, 2]])
    again = columns(Recoded(chosen, Int8(16)))
    eight = Int8(16).encode(unit(vectors[[9, 2, 2]].flatten(0, 1)))
    assert torch.equal(again["vectors"].flatten(0, 1), eight["vectors"])
    assert torch.equal(again["scales"].flatten(), eight["scales"])
    with pytest.raises(AssertionError):
        Joined([parts[0], Recoded(parts[1], Int8(16))])


@pytest.mark.parametrize("codec", [Int8(16), low_rank(), low_rank(torch.float16)])
def test_every_format_is_read_back_from_its_file(tmp_path: Path, codec: Codec) -> None:
    bank = make(store=Recoded(make(dtype=torch.float32).store, codec))
    bank.save(tmp_path / "b")
    tensors, _ = read_tensors(tmp_path / "b", KIND)
    store = store_of(tensors)
    assert isinstance(store, Held)
    assert same(store.codec, codec)
    loaded = MemoryBank.load(tmp_path / "b")
    assert loaded.fingerprint == bank.fingerprint
    assert torch.equal(loaded.lookup(EVERY), bank.lookup(EVERY))
    assert loaded.nbytes == bank.nbytes == sum(
        tensor.nbytes for name, tensor in tensors.items()
        if name in {"vectors", "scales", "codes", "basis", "mean"}
    )  # fmt: skip


def test_a_loaded_bank_is_mapped_and_not_read(tmp_path: Path) -> None:
    make(num=400).save(tmp_path / "b")
    bank = MemoryBank.load(tmp_path / "b", verify=False)
    with (tmp_path / "b").open("r+b") as file:  # the names end it, for they have one byte each
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    assert not bank.ids.block[-4:].any()


# --- names -------------------------------------------------------------------------------------

NAMES = ["a.png", "", "ordner/größe.png", "a.png", "日本.png", "b"]


def test_names_are_packed_taken_joined_and_found() -> None:
    ids = Ids.of(NAMES)
    assert [ids[row] for row in range(len(ids))] == NAMES
    for index in ([5, 0, 0, 4, 1], [], [2]):
        taken = ids.take(torch.tensor(index, dtype=torch.int64))
        assert [taken[row] for row in range(len(taken))] == [NAMES[row] for row in index]
    both = ids.join(Ids.of(["x", "日本.png"]))
    assert [both[row] for row in range(len(both))] == [*NAMES, "x", "日本.png"]
    assert both.find({"a.png", "日本.png", "none"}).tolist() == [0, 3, 4, 7]
    assert len(Ids.of([])) == 0


# --- searching ---------------------------------------------------------------------------------


def test_nearest_is_the_exhaustive_search() -> None:
    bank = flat(5000, noise=0.3)
    queries = normal((7, 24), 9, "query")
    cosines, rows = nearest(bank, queries, 5)
    table = unit(queries) @ bank.lookup(torch.arange(5000)).T
    best = table.topk(5)
    assert torch.equal(rows, best.indices)
    assert_near(cosines, best.values, FLOAT32)


def test_nearest_may_be_limited() -> None:
    bank = flat(300, noise=0.3)
    index = torch.tensor([4, 77, 120])
    queries = bank.lookup(index)
    assert nearest(bank, queries, 1)[1].flatten().tolist() == index.tolist()
    _, others = nearest(bank, queries, 299, exclude=index)
    assert all(int(own) not in row for own, row in zip(index, others.tolist(), strict=True))
    allowed = torch.arange(0, 300, 7)
    assert set(nearest(bank, queries, 9, rows=allowed)[1].flatten().tolist()) <= set(
        allowed.tolist()
    )


def test_impossible_searches_are_refused() -> None:
    bank = flat(30)
    for queries in (torch.ones(2, 23), torch.ones(24), torch.ones(0, 24)):
        with pytest.raises(InputError, match="24 numbers"):
            nearest(bank, queries, 1)
    with pytest.raises(InputError, match="query 1 has no usable vector"):
        nearest(bank, torch.tensor([[1.0] * 24, [0.0] * 24]), 1)
    for num in (0, 31):
        with pytest.raises(InputError, match="there are 30"):
            nearest(bank, torch.ones(1, 24), num)
    with pytest.raises(InputError, match="no row 30"):
        nearest(bank, torch.ones(1, 24), 1, rows=torch.tensor([30]))
    with pytest.raises(InputError, match="between -1 and 1"):
        rows_near(bank, torch.ones(1, 24), 1.5)


def test_rows_near_are_those_above_the_cosine() -> None:
    bank = flat(5000, noise=0.3)
    queries = normal((3, 24), 9, "query")
    table = (unit(queries) @ bank.lookup(torch.arange(5000)).T).amax(0)
    near = (table >= 0.2).nonzero().flatten().tolist()
    assert 100 < len(near) < 4000
    assert rows_near(bank, queries, 0.2).tolist() == near
    assert len(rows_near(bank, queries, -1)) == 5000


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_cosine_of_one_finds_equal_images(dtype: torch.dtype) -> None:
    bank = make(dtype=dtype)
    assert rows_near(bank, encode(pixels()), 1.0).tolist() == list(range(12))


def test_helpers_are_what_they_say() -> None:
    assert_near(banks.make().lookup(EVERY), exact()[:, 0], HALF)
    assert torch.linalg.matrix_rank(flat().lookup(torch.arange(200))) == 5
