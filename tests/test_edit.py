"""memory/{edit,interpolate}.py: what an edit returns, what it leaves alone, what it remembers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from banks import encode, exact, flat, make, pixels
from stratagem.errors import InputError
from stratagem.memory.bank import MemoryBank
from stratagem.memory.compress import compress, fidelity
from stratagem.memory.edit import (
    add,
    interpolate,
    merge,
    remove,
    residuals,
    rows_of_ids,
    rows_of_label,
)
from stratagem.memory.interpolate import Way, blend
from stratagem.memory.search import rows_near
from stratagem.memory.store import hold
from stratagem.randomness import normal
from tolerances import FLOAT32, NETWORK, assert_near

GOLDEN = Path(__file__).parent / "golden"
HALF = 2.0**-11


def rows_of(bank: MemoryBank) -> Tensor:
    """All snippets, sides one after another: shape (F N, D)."""
    index = torch.arange(bank.num)
    sides = [bank.lookup(index, torch.full((bank.num,), bool(f))) for f in range(bank.store.sides)]
    return torch.cat(sides)


def new_rows(num: int = 3) -> Tensor:
    """Vectors of images that are in no bank, straight and mirrored, of any length."""
    images = pixels(40)[-num:]
    return torch.stack([encode(images), encode(images.flip(-1))], dim=1)


def saved(bank: MemoryBank, path: Path) -> MemoryBank:
    bank.save(path)
    return MemoryBank.load(path)


EDITS: dict[str, Callable[[MemoryBank], MemoryBank]] = {
    "add": lambda bank: add(bank, new_rows(), ["x", "y", "z"]),
    "remove": lambda bank: remove(bank, torch.tensor([3, 0])),
    "merge": lambda bank: merge(bank, make(5)),
    "interpolate": lambda bank: interpolate(bank, torch.tensor([[1, 2]]), [0.5]),
    "compress": lambda bank: compress(bank, "int8"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_returns_a_new_bank_and_says_so(name: str, tmp_path: Path) -> None:
    bank = make(dtype=torch.float32, history=({"edit": "earlier"},))
    before, fingerprint = rows_of(bank), bank.fingerprint
    other = EDITS[name](bank)
    assert (bank.num, bank.history) == (12, ({"edit": "earlier"},))
    assert torch.equal(rows_of(bank), before)
    assert other.history[0] == {"edit": "earlier"}
    entry = other.history[1]
    assert entry["edit"] == name
    assert entry["of"] == fingerprint
    assert other.fingerprint != fingerprint
    assert other.encoder == bank.encoder
    if name == "compress":
        other.check("f" * 64)
    else:
        with pytest.raises(InputError, match=rf"not the images of a data set \(earlier, {name}\)"):
            other.check("f" * 64)
    again = saved(other, tmp_path / "b")
    assert again.fingerprint == other.fingerprint
    assert torch.equal(rows_of(again), rows_of(other))


def test_edits_may_follow_each_other_without_a_file(tmp_path: Path) -> None:
    """The lazy composition is the same as one that was written after every step."""
    lazy = kept = make(dtype=torch.float32)
    for number, edit in enumerate(EDITS.values()):
        lazy = edit(lazy)
        kept = saved(edit(kept), tmp_path / str(number))
    assert lazy.fingerprint == kept.fingerprint
    assert lazy.num == 12 + 3 - 2 + 5 + 1


# --- adding ------------------------------------------------------------------------------------


def test_added_rows_come_last_and_count_as_held_out() -> None:
    bank = make(frequency=torch.arange(12.0))
    labels = torch.tensor([7, -1, 7])
    larger = add(bank, new_rows(), ["x", "y", "z"], labels=labels, entry={"source": "s"})
    assert larger.num == 15
    for flip in (False, True):
        index, side = torch.arange(15), torch.full((15,), flip)
        wanted = torch.cat([exact()[:, int(flip)], exact(40)[-3:, int(flip)]])
        assert_near(larger.lookup(index, side), wanted, HALF)
    assert larger.labels.tolist() == [*bank.labels.tolist(), 7, -1, 7]
    assert larger.held_out.tolist() == [*bank.held_out.tolist(), True, True, True]
    assert [larger.ids[row] for row in (11, 12, 14)] == ["img/11.png", "x", "z"]
    assert larger.frequency.tolist() == [*range(12), 5.5, 5.5, 5.5]  # type: ignore[union-attr]
    assert larger.history == ({"edit": "add", "rows": 3, "source": "s", "of": bank.fingerprint},)


def test_rows_of_a_bank_without_mirror_images_may_be_flat() -> None:
    bank = make(flips=False)
    one = add(bank, new_rows()[:, 0], ["x", "y", "z"])
    two = add(bank, new_rows()[:, :1], ["x", "y", "z"])
    assert one.fingerprint == two.fingerprint


def test_unusable_rows_are_refused() -> None:
    bank, names = make(), ["x", "y", "z"]
    for rows in (new_rows()[:, 0], new_rows()[:, :1], new_rows()[..., 1:], new_rows()[:0]):
        with pytest.raises(InputError, match=r"the bank takes \(n, 2, 16\)"):
            add(bank, rows, names)
    with pytest.raises(InputError, match="3 rows with 2 names"):
        add(bank, new_rows(), names[:2])
    for value in (float("nan"), float("inf")):
        broken = new_rows()
        broken[1, 1, 4] = value
        with pytest.raises(InputError, match="row 3 has no usable vector"):
            add(bank, broken, names)


def test_residuals_are_what_projection_loses() -> None:
    """Rows of the plane lose nothing, orthogonal ones all, a mixture its sine."""
    full = flat(rank=5)
    centre = rows_of(full).mean(0)
    small = compress(full, "low-rank", rank=5)
    codec = small.store.codec
    inside = rows_of(full)[:4]
    assert residuals(small, inside).shape == (4, 1)
    assert residuals(small, inside).max() < 2e-3  # codes are of float16
    plane = torch.linalg.svd(rows_of(full)).Vh[:5]
    aside = normal((24,), 8, "aside")
    aside = functional.normalize(aside - aside @ plane.T @ plane, dim=0)
    mixed = 0.8 * plane[0] + 0.6 * aside
    assert residuals(small, mixed[None]).item() == pytest.approx(0.6, abs=2e-3)
    assert residuals(full, mixed[None]).item() < 1e-6
    assert float(centre.norm()) < 1
    added = add(small, mixed[None], ["m"])
    assert_near(added.lookup(torch.tensor([200]))[0], plane[0], 2e-3)
    assert added.store.codec is codec
    with pytest.raises(InputError, match=r"row 0 \(a\) is orthogonal to all"):
        add(compress(centred(full), "low-rank", rank=5), aside[None], ["a"])


def centred(bank: MemoryBank) -> MemoryBank:
    """The bank and its mirror about zero: its mean is zero."""
    rows = rows_of(bank)
    return make(400, store=hold(torch.cat([rows, -rows])[:, None]))


# --- removing ----------------------------------------------------------------------------------


def test_removed_rows_are_gone_and_the_rest_stays() -> None:
    bank = make(dtype=torch.float32, frequency=torch.arange(12.0))
    fewer = remove(bank, torch.tensor([4, 0, 4]), entry={"why": "test"})
    kept = [row for row in range(12) if row not in (0, 4)]
    index = torch.arange(10)
    assert torch.equal(fewer.lookup(index), bank.lookup(torch.tensor(kept)))
    assert fewer.labels.tolist() == bank.labels[kept].tolist()
    assert fewer.held_out.tolist() == bank.held_out[kept].tolist()
    assert [fewer.ids[row] for row in range(10)] == [f"img/{row}.png" for row in kept]
    assert fewer.frequency.tolist() == kept  # type: ignore[union-attr]
    assert fewer.history[-1] == {"edit": "remove", "rows": 2, "why": "test", "of": bank.fingerprint}


def test_rows_are_found_by_name_label_and_likeness() -> None:
    bank = make()
    assert rows_of_ids(bank, ["img/11.png", "img/3.png"]).tolist() == [3, 11]
    assert rows_of_label(bank, -1).tolist() == [0, 3, 6, 9]
    near = rows_near(bank, encode(pixels()[5:6]), 0.999)
    assert near.tolist() == [5]
    assert remove(bank, near).num == 11


def test_impossible_removals_are_refused() -> None:
    bank = make()
    with pytest.raises(InputError, match="no image named 'none'"):
        rows_of_ids(bank, ["img/3.png", "none"])
    with pytest.raises(InputError, match="no image of label 5"):
        rows_of_label(bank, 5)
    with pytest.raises(InputError, match="no row 12"):
        remove(bank, torch.tensor([12]))
    for rows in (torch.arange(12), torch.empty(0, dtype=torch.int64)):
        with pytest.raises(InputError, match="remove some, not all"):
            remove(bank, rows)


# --- merging -----------------------------------------------------------------------------------


def test_merged_banks_are_one_after_the_other() -> None:
    first, second = make(dtype=torch.float32), make(5, dtype=torch.float16, shape=(1, 2, 8))
    both = merge(first, second)
    assert (both.num, both.format, both.shape) == (17, "float32", None)
    index = torch.arange(5)
    assert torch.equal(both.lookup(torch.arange(12)), first.lookup(torch.arange(12)))
    assert_near(both.lookup(12 + index), second.lookup(index), FLOAT32)
    assert both.labels.tolist() == [*first.labels.tolist(), *second.labels.tolist()]
    assert [both.ids[row] for row in (11, 12)] == ["img/11.png", "img/0.png"]
    assert both.frequency is None
    assert both.history[-1]["with"] == second.fingerprint
    weighted = merge(make(frequency=torch.full((12,), 3.0)), second)
    assert weighted.frequency.tolist() == [3.0] * 17  # type: ignore[union-attr]


def test_a_low_rank_bank_takes_the_rows_of_a_full_one() -> None:
    """And of one with the same directions, whose numbers are taken over as they are."""
    full = flat(rank=5)
    small = compress(full, "low-rank", rank=5)
    both = merge(small, full)
    assert both.format == "low-rank"
    assert_near(rows_of(both), torch.cat([rows_of(full)] * 2), 2e-3)
    assert torch.equal(rows_of(merge(small, small)), torch.cat([rows_of(small)] * 2))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"encoder": {"name": "other"}}, "encoder weighted and by other"),
        ({"encoder": {"name": "weighted", "parts": [2]}}, "or with other settings"),
        ({"store": hold(torch.ones(12, 2, 15))}, "16 and 15 numbers"),
        ({"flips": False}, "mirrored ones True and False"),
    ],
)
def test_banks_of_two_kinds_are_not_merged(other: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        merge(make(), make(**other))


# --- between -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "gmem_interpolation.safetensors")


@pytest.mark.parametrize("way", ["linear", "spherical", "concatenated"])
def test_gmem_interpolation_is_reproduced(golden: dict[str, Tensor], way: Way) -> None:
    first, second = (golden[f"inputs/{name}"].expand(6, -1) for name in "ab")
    weight = None if way == "concatenated" else torch.linspace(0, 1, 6)
    reference = golden[f"outputs/{'concat' if weight is None else way}"]
    assert_near(blend(first, second, weight, way), reference, FLOAT32)


def pairs_of(num: int, dim: int = 12) -> tuple[Tensor, Tensor]:
    first, second = (functional.normalize(normal((num, dim), s, "test"), dim=1) for s in (0, 1))
    return first, second


@pytest.mark.parametrize("way", ["linear", "spherical"])
def test_the_weight_belongs_to_the_second(way: Way) -> None:
    first, second = pairs_of(50)
    assert_near(blend(first, second, 0.0, way), first, FLOAT32)
    assert_near(blend(first, second, 1.0, way), second, FLOAT32)
    weight = torch.linspace(0, 1, 50)
    mixed = blend(first, second, weight, way)
    assert_near(mixed.norm(dim=1), torch.ones(50), FLOAT32)
    assert_near(mixed, blend(second, first, 1 - weight, way), FLOAT32)
    assert_near(mixed[7:9], blend(first[7:9], second[7:9], weight[7:9], way), FLOAT32)


def test_spherical_turns_at_an_even_rate() -> None:
    first, second = pairs_of(40)
    whole = (first * second).sum(1).acos()
    for weight in (0.25, 0.5, 0.9):
        mixed = blend(first, second, weight)
        assert_near((first * mixed).sum(1).acos(), weight * whole, 1e-4)
        assert_near((mixed * second).sum(1).acos(), (1 - weight) * whole, 1e-4)


@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("sign", [1, -1])
def test_equal_and_opposite_vectors_have_a_path(gap: float, sign: int) -> None:
    """Equal: the vector itself. Opposite: half a turn, and no jump on the way."""
    first, other = pairs_of(30)
    second = functional.normalize(sign * first.double() + gap * other, dim=1).float()
    steps = [blend(first, second, weight) for weight in torch.linspace(0, 1, 33).tolist()]
    for step in steps:
        assert_near(step.norm(dim=1), torch.ones(30), FLOAT32)
    assert_near(steps[0], first, FLOAT32)
    assert_near(steps[-1], second, FLOAT32)
    turn = 0 if sign == 1 else torch.pi / 32
    for a, b in itertools.pairwise(steps):
        assert float((a - b).norm(dim=1).max()) < turn + gap + 1e-5
    if sign == -1:
        assert float((steps[16] * first).sum(1).abs().max()) < 1e-2  # a right angle half way
        assert torch.equal(steps[16], blend(first, second, 0.5))


def test_a_mask_takes_half_of_each() -> None:
    first, second = torch.full((3, 12), 12**-0.5), -torch.full((3, 12), 12**-0.5)
    mixed = blend(first, second, way="masked", seed=3)
    assert int((mixed[0] < 0).sum()) == 6
    assert torch.equal(mixed[0], mixed[2])  # one mask for all rows: batches may be cut anywhere
    others = {tuple((blend(first, second, way="masked", seed=s)[0] < 0).tolist()) for s in range(9)}
    assert len(others) > 5


def test_impossible_interpolations_are_refused() -> None:
    first, second = pairs_of(2)
    with pytest.raises(InputError, match="cannot be interpolated"):
        blend(first, second[:, 1:], 0.5)
    with pytest.raises(InputError, match="unknown interpolation 'cubic'"):
        blend(first, second, 0.5, "cubic")  # type: ignore[arg-type]
    for way, weight in [
        ("linear", None),
        ("spherical", None),
        ("masked", 0.5),
        ("concatenated", 0.5),
    ]:
        with pytest.raises(InputError, match="linear and spherical take one"):
            blend(first, second, weight, way)  # type: ignore[arg-type]
    for odd in (float("nan"), torch.linspace(0, 1, 3)):
        with pytest.raises(InputError, match="must be finite, one in all or one for each row"):
            blend(first[:1], second[:1], odd)
    with pytest.raises(InputError, match="cancel each other"):
        blend(first, -first, 0.5, "linear")


def test_interpolated_rows_are_added_for_both_sides() -> None:
    bank = make(dtype=torch.float32)
    pairs = torch.tensor([[1, 4], [2, 3]])
    longer = interpolate(bank, pairs, [0.25, 0.5])
    assert longer.num == 16
    for flip in (False, True):
        side = torch.full((4,), flip)
        ends = [bank.lookup(rows.repeat_interleave(2), side) for rows in pairs.T]
        wanted = blend(*ends, torch.tensor([0.25, 0.5, 0.25, 0.5]))
        assert_near(longer.lookup(torch.arange(12, 16), side), wanted, NETWORK)
    assert longer.labels[12:].tolist() == [0, 0, -1, -1]
    assert longer.held_out[12:].all()
    assert longer.ids[12] == "img/1.png~img/4.png@0.25"
    entry = {"edit": "interpolate", "rows": 4, "way": "spherical", "pairs": pairs.tolist(),
             "weights": [0.25, 0.5], "of": bank.fingerprint}  # fmt: skip
    assert longer.history == (entry,)
    masked = interpolate(bank, pairs, way="masked", seed=3, label=8)
    assert masked.labels[12:].tolist() == [8, 8]
    assert masked.ids[13] == "img/2.png~img/3.png"
    assert masked.history[-1]["seed"] == 3
    for bad, weights, message in [
        (torch.tensor([[1, 12]]), [0.5], "no row 12"),
        (torch.tensor([1, 2]), [0.5], r"not \(P, 2\)"),
        (pairs, [], "give some between 0 and 1"),
        (pairs, [1.5], "give some between 0 and 1"),
        (pairs, None, "take one"),
    ]:
        with pytest.raises(InputError, match=message):
            interpolate(bank, bad, weights)


def test_edits_of_a_compressed_bank_keep_its_format() -> None:
    full = flat(rank=5)
    small = compress(full, "low-rank", rank=5)
    longer = interpolate(small, torch.tensor([[3, 9]]), [0.5])
    assert longer.format == "low-rank"
    ends = [rows_of(full)[row : row + 1] for row in (3, 9)]
    assert_near(longer.lookup(torch.tensor([200])), blend(*ends, 0.5), 2e-3)
    assert fidelity(small, remove(longer, torch.tensor([200]))).energy == pytest.approx(1)
