"""memory/bank.py, memory/draw.py: unit rows, nothing mutates, draw j depends on j alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stratagem.errors import DamagedArtifact, InputError
from stratagem.memory.bank import MemoryBank, build
from stratagem.memory.draw import Policy, draw
from tolerances import FLOAT32, assert_near

ENCODER = {"name": "weighted", "parts": [1, 2]}


def pixels(num: int = 12) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 1, 4, 4), dtype=torch.uint8, generator=random)


def encode(images: Tensor) -> Tensor:
    return images.float().flatten(1) * torch.arange(1.0, 17.0) - 300.0


def make(num: int = 12, size: int = 5, **options: Any) -> MemoryBank:
    defaults: dict[str, Any] = {
        "num": num, "flips": True, "encoder": ENCODER, "data": "f" * 64,
        "labels": torch.arange(num) % 3 - 1, "held_out": torch.arange(num) % 4 == 3,
    }  # fmt: skip
    return build(pixels(num).split(size), encode, **{**defaults, **options})


# --- building ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1, 5, 12, 50])
def test_rows_are_the_unit_vectors_of_the_images(size: int, dtype: torch.dtype) -> None:
    bank = make(size=size, dtype=dtype)
    assert (bank.num, bank.dim, bank.flips) == (12, 16, True)
    assert bank.vectors.dtype == dtype
    straight = functional.normalize(encode(pixels()).double(), dim=1)
    mirrored = functional.normalize(encode(pixels().flip(-1)).double(), dim=1)
    bound = 2.0**-11 if dtype == torch.float16 else FLOAT32
    every = torch.arange(12)
    assert_near(bank.lookup(every), straight, bound)
    assert_near(bank.lookup(every, every % 2 == 1)[0::2], straight[0::2], bound)
    assert_near(bank.lookup(every, every % 2 == 1)[1::2], mirrored[1::2], bound)


def test_rows_have_unit_length_in_spite_of_float16() -> None:
    lengths = make().lookup(torch.arange(12)).double().norm(dim=1)
    assert_near(lengths, torch.ones(12), FLOAT32)


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_huge_and_tiny_vectors_are_normalised_too(factor: float) -> None:
    bank = build(
        pixels().split(5), lambda images: encode(images) * factor,
        num=12, flips=True, labels=torch.zeros(12), held_out=torch.zeros(12), encoder={}, data="",
    )  # fmt: skip
    assert_near(bank.lookup(torch.arange(12)), make().lookup(torch.arange(12)), 2.0**-10)


def test_the_images_are_read_once() -> None:
    calls: list[int] = []

    def once() -> Iterator[Tensor]:
        for batch in pixels().split(5):
            calls.append(len(batch))
            yield batch

    seen: list[int] = []
    common: dict[str, Any] = {"labels": torch.zeros(12), "held_out": torch.zeros(12)}
    build(once(), encode, num=12, flips=True, encoder={}, data="", progress=seen.append, **common)
    assert calls == [5, 5, 2]
    assert seen == [5, 10, 12]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 7, 11])
def test_an_unusable_vector_names_its_image(row: int, value: float) -> None:
    broken = pixels()
    broken[row] = 0
    broken[:, 0, 0, 0].clamp_(min=1)
    broken[row, 0, 0, 0] = 0

    def spoiled(images: Tensor) -> Tensor:
        vectors = images.float().flatten(1)
        return torch.where((vectors == 0).all(1, keepdim=True), value, vectors)

    common: dict[str, Any] = {"labels": torch.zeros(12), "held_out": torch.zeros(12)}
    with pytest.raises(InputError, match=f"image {row}: it is zero or not finite"):
        build(broken.split(5), spoiled, num=12, flips=False, encoder={}, data="", **common)


@pytest.mark.parametrize("announced", [11, 13])
def test_the_number_of_images_must_be_right(announced: int) -> None:
    def announce(num: int, batches: Iterable[Tensor]) -> None:
        build(batches, encode, num=num, flips=False, labels=torch.zeros(num),
              held_out=torch.zeros(num), encoder={}, data="")  # fmt: skip

    announce(12, pixels().split(5))
    with pytest.raises(InputError, match=f"the {announced} it announced"):
        announce(announced, pixels().split(5))
    with pytest.raises(InputError, match="has 0 images"):
        announce(1, [])


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
    encoder = {"name": "weighted", "parts": [1, 2]}
    bank = make(dtype=dtype, labels=labels, held_out=held_out, encoder=encoder)
    before = MemoryBank(bank.vectors.clone(), labels.clone(), held_out.clone(), ENCODER, bank.data)

    labels.fill_(9)
    held_out.fill_(True)
    encoder["parts"].append(3)  # type: ignore[attr-defined]
    bank.lookup(torch.arange(12)).zero_()
    bank.lookup(torch.arange(12), torch.ones(12, dtype=torch.bool)).zero_()
    bank.info()["encoder"]["parts"].append(4)
    draw(bank, 5).zero_()
    with pytest.raises(dataclasses.FrozenInstanceError):
        bank.data = "other"  # type: ignore[misc]

    assert torch.equal(bank.vectors, before.vectors)
    assert torch.equal(bank.labels, before.labels)
    assert torch.equal(bank.held_out, before.held_out)
    assert bank.encoder == ENCODER
    assert bank.fingerprint == before.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"vectors": torch.ones(12, 16)},
        {"vectors": torch.ones(0, 1, 16)},
        {"vectors": torch.ones(12, 3, 16)},
        {"vectors": torch.ones(12, 1, 16, dtype=torch.int8)},
        {"labels": torch.zeros(11)},
        {"held_out": torch.zeros(12, 1)},
    ],
)
def test_shapes_must_fit(change: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match="bank"):
        dataclasses.replace(make(), **change)


def test_a_bank_belongs_to_its_data() -> None:
    make().check("f" * 64)
    with pytest.raises(InputError, match="from data set ffffffffffff, not from this one"):
        make().check("e" * 64)


@pytest.mark.parametrize("flips", [False, True])
def test_a_saved_bank_is_the_same_bank(tmp_path: Path, flips: bool) -> None:
    bank = make(flips=flips)
    manifest = bank.save(tmp_path / "b.bank")
    loaded = MemoryBank.load(tmp_path / "b.bank")
    assert manifest.fingerprint == bank.fingerprint == loaded.fingerprint
    assert torch.equal(loaded.vectors, bank.vectors)
    assert loaded.labels.tolist() == bank.labels.tolist()
    assert loaded.held_out.tolist() == bank.held_out.tolist()
    assert (loaded.encoder, loaded.data) == (bank.encoder, bank.data)


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


def test_different_content_has_another_fingerprint() -> None:
    bank = make()
    vectors = bank.vectors.clone()
    vectors[3, 1, 2] += 0.01
    others = [
        dataclasses.replace(bank, vectors=vectors),
        dataclasses.replace(bank, labels=bank.labels + 1),
        dataclasses.replace(bank, held_out=~bank.held_out),
        dataclasses.replace(bank, encoder={"name": "other"}),
        dataclasses.replace(bank, data="e" * 64),
    ]
    assert len({bank.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_info_counts() -> None:
    info = make().info()
    assert info["num"] == 12
    assert info["dim"] == 16
    assert info["flips"] is True
    assert info["dtype"] == "float16"
    assert info["bytes"] == 12 * 2 * 16 * 2
    assert info["held_out"] == 3
    assert info["labels"] == {-1: 4, 0: 4, 1: 4}
    assert info["encoder"] == ENCODER
    assert info["data"] == "f" * 64


def test_mean_cosine_is_that_of_different_rows() -> None:
    axes = MemoryBank(torch.eye(4)[:, None], torch.zeros(4), torch.zeros(4), {}, "")
    assert axes.info()["mean_cosine"] == 0  # a row paired with itself would count 1
    one = MemoryBank(torch.ones(1, 1, 4) / 2, torch.zeros(1), torch.zeros(1), {}, "")
    assert one.info()["mean_cosine"] is None
    bank = make()
    rows = bank.lookup(torch.arange(12))
    exact = ((rows @ rows.T).sum() - 12) / (12 * 11)
    assert bank.info()["mean_cosine"] == pytest.approx(float(exact), abs=0.02)


# --- drawing -----------------------------------------------------------------------------------

ALL = get_args(Policy)


def draws(bank: MemoryBank, num: int, policy: Any, seed: int = 0) -> Tensor:
    return draw(bank, num, policy, seed, label=1 if policy == "label" else None)


def allowed(policy: str) -> set[int]:
    rows = range(12)
    return {
        "uniform": set(rows),
        "train": {row for row in rows if row % 4 != 3},
        "stratified": {row for row in rows if row % 4 != 3},
        "held-out": {row for row in rows if row % 4 == 3},
        "label": {row for row in rows if row % 4 != 3 and row % 3 == 2},
    }[policy]


@pytest.mark.parametrize("policy", ALL)
def test_every_eligible_row_is_drawn_and_no_other(policy: str) -> None:
    rows = draws(make(), 400, policy)
    assert rows.dtype == torch.int64
    assert set(rows.tolist()) == allowed(policy)


@pytest.mark.parametrize("policy", ALL)
def test_draw_j_does_not_depend_on_how_many(policy: str) -> None:
    bank = make()
    many = draws(bank, 100, policy, seed=5)
    for num in (0, 1, 7, 99):
        assert torch.equal(draws(bank, num, policy, seed=5), many[:num])
    assert not torch.equal(draws(bank, 100, policy, seed=6), many)


def test_draws_with_replacement_are_even() -> None:
    counts = torch.bincount(draw(make(), 12000, "uniform"), minlength=12).double()
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 31.3  # 11 degrees of freedom, one in a thousand


@pytest.mark.parametrize("num", [4, 9, 22, 90])
def test_stratified_draws_differ_by_one_at_most(num: int) -> None:
    counts = torch.bincount(draw(make(), num, "stratified"), minlength=12)
    counts = counts[sorted(allowed("stratified"))]
    assert int(counts.max() - counts.min()) <= 1
    assert int(counts.sum()) == num


def test_each_pass_has_its_own_order() -> None:
    first, second = draw(make(), 18, "stratified").split(9)
    assert first.tolist() != second.tolist()
    assert sorted(first.tolist()) == sorted(second.tolist())


def test_training_rows_are_the_default() -> None:
    assert torch.equal(draw(make(), 50), draw(make(), 50, "train", 0))


def test_impossible_draws_are_refused() -> None:
    bank = make()
    with pytest.raises(InputError, match="no training image of label 7"):
        draw(bank, 3, "label", label=7)
    with pytest.raises(InputError, match="no training image of label 2"):
        draw(make(labels=torch.arange(12) % 4 - 1), 3, "label", label=2)  # all of it is held out
    with pytest.raises(InputError, match="give a label with 'label' only"):
        draw(bank, 3, "label")
    with pytest.raises(InputError, match="give a label with 'label' only"):
        draw(bank, 3, "train", label=1)
    with pytest.raises(InputError, match="unknown draw policy 'best'"):
        draw(bank, 3, "best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="prepare the data with a holdout"):
        draw(make(held_out=torch.zeros(12)), 3, "held-out")
    with pytest.raises(InputError, match="all are held out"):
        draw(make(held_out=torch.ones(12)), 3)
