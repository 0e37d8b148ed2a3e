"""memory/compress.py, interop/banks.py: against the SVD, brute force, and GMem's own banks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from banks import exact, flat, make
from stratagem.artifact import raw_bytes, write_tensor_file
from stratagem.errors import DamagedArtifact, InputError
from stratagem.interop.banks import read_bank, read_vectors
from stratagem.interop.state_dict import load_foreign
from stratagem.memory.bank import MemoryBank
from stratagem.memory.compress import (
    Axes,
    Fidelity,
    Format,
    compress,
    fidelity,
    least_rank,
    principal_axes,
)
from stratagem.memory.store import LowRank, hold
from stratagem.randomness import normal, permutation
from tolerances import FLOAT32, FLOAT64, NETWORK, assert_near

GOLDEN = Path(__file__).parent / "golden"


def rows_of(bank: MemoryBank) -> Tensor:
    return bank.lookup(torch.arange(bank.num))


# --- directions --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 60])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_directions_are_those_of_the_svd(size: int, offset: float) -> None:
    vectors = normal((60, 9), 0, "test").double() * torch.arange(1.0, 10) + offset
    mean = vectors.mean(0)
    _, singular, v = torch.linalg.svd(vectors - mean, full_matrices=False)
    axes = principal_axes(vectors.split(size))
    assert isinstance(axes, Axes)
    assert_near(axes.mean, mean, FLOAT64)
    assert_near(axes.singular, singular, FLOAT64)
    assert_near((axes.basis * v.T).sum(0).abs(), torch.ones(9), FLOAT64)
    assert_near(axes.basis.T @ axes.basis, torch.eye(9), FLOAT64)


def test_directions_of_a_plane_end_with_it() -> None:
    axes = principal_axes([rows_of(flat(rank=5))])
    assert axes.singular[5:].max() < 1e-5  # the rows are of float32
    assert axes.singular[4] > 0.1
    with pytest.raises(InputError, match="no vectors"):
        principal_axes([])


@pytest.mark.parametrize("cosine", [0.5, 0.8, 0.95, 0.9999])
def test_the_rank_is_the_least_that_reaches_the_cosine(cosine: float) -> None:
    rows = rows_of(flat(noise=0.3)) + 0.2
    rows = functional.normalize(rows, dim=1)
    axes = principal_axes([rows])
    reached = []
    for rank in range(1, 25):
        basis = axes.basis[:, :rank].float()
        back = (rows - axes.mean.float()) @ basis @ basis.T + axes.mean.float()
        share = (functional.cosine_similarity(rows, back) >= cosine).double().mean()
        reached += [rank] if share >= 0.95 else []
    assert least_rank(rows.split(33), axes, cosine) == reached[0]


def test_an_impossible_cosine_is_refused() -> None:
    axes = principal_axes([rows_of(flat())])
    for cosine in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(InputError, match="between 0 and 1"):
            least_rank([rows_of(flat())], axes, cosine)
    broken = Axes(axes.mean, torch.zeros_like(axes.basis), axes.singular)
    with pytest.raises(InputError, match=r"no rank reaches cosine 0\.99"):
        least_rank([rows_of(flat())], broken, 0.99)


# --- compressed banks --------------------------------------------------------------------------


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_low_rank_keeps_the_nearest_rows(tmp_path: Path, rank: int, flips: bool) -> None:
    """No other mean and directions of this rank lose less: Eckart and Young."""
    full = make(40, flips=flips, dtype=torch.float32)
    small = compress(full, "low-rank", rank=rank)
    small.save(tmp_path / "b")
    small = MemoryBank.load(tmp_path / "b")
    assert small.format == "low-rank"
    assert isinstance(small.store.codec, LowRank)
    assert small.store.codec.rank == rank
    vectors = exact(40)[:, : 2 if flips else 1].flatten(0, 1)
    mean = vectors.mean(0)
    u, s, v = torch.linalg.svd(vectors - mean, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank] + mean
    index = torch.arange(40)
    sides = [small.lookup(index, torch.full((40,), bool(f))) for f in range(full.store.sides)]
    ours = torch.stack(sides, 1).flatten(0, 1)
    assert_near(ours, functional.normalize(best, dim=1), 2.0**-10)  # codes are of float16
    found = fidelity(full, small)
    assert found.energy == pytest.approx(
        float(s[:rank].square().sum() / s.square().sum()), abs=1e-4
    )


def test_compressing_changes_the_format_and_nothing_else(tmp_path: Path) -> None:
    full = make(frequency=torch.arange(12.0))
    for form, options in [("int8", {}), ("float32", {}), ("low-rank", {"rank": 3})]:
        small = compress(full, form, **options)  # type: ignore[arg-type]
        assert small.format == form
        assert (small.num, small.dim, small.flips, small.data) == (12, 16, True, full.data)
        assert torch.equal(small.labels, full.labels)
        assert torch.equal(small.held_out, full.held_out)
        assert [small.ids[row] for row in range(12)] == [full.ids[row] for row in range(12)]
        entry = {"edit": "compress", "of": full.fingerprint, "format": form, **options}
        assert small.history == (entry,)
        assert full.history == ()
    again = compress(compress(full, "float32"), "float16")
    assert torch.equal(rows_of(again), rows_of(full))
    assert [entry["format"] for entry in again.history] == ["float32", "float16"]


def test_the_cosine_that_was_asked_for_is_reached() -> None:
    full = flat(400, noise=0.3)
    seen: list[tuple[int, int]] = []
    for cosine in (0.7, 0.9, 0.99):
        small = compress(full, "low-rank", cosine=cosine, progress=lambda *done: seen.append(done))
        rank = small.history[-1]["rank"]
        assert small.history[-1]["cosine"] == cosine
        assert fidelity(full, small).cosines[0.05] >= cosine - 1e-4
        less = compress(full, "low-rank", rank=rank - 1)
        assert fidelity(full, less).cosines[0.05] < cosine
        assert seen[-1] == (400, 400)


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("low-rank", {"rank": 0}, "between 1 and the width, 16"),
        ("low-rank", {"rank": 17}, "between 1 and the width, 16"),
        ("low-rank", {}, "needs a rank or a cosine"),
        ("low-rank", {"rank": 3, "cosine": 0.9}, "not both"),
        ("low-rank", {"cosine": 1.5}, "between 0 and 1"),
        ("int8", {"rank": 3}, "no effect on format int8"),
        ("float32", {"cosine": 0.9}, "no effect on format float32"),
        ("float16", {}, "has format float16 already"),
        ("int4", {}, "unknown format 'int4'"),
    ],
)
def test_impossible_settings_are_refused(
    form: Format, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compress(make(), form, **options)


# --- fidelity ----------------------------------------------------------------------------------


def test_fidelity_is_that_of_brute_force() -> None:
    full, num = flat(2500, noise=0.1), 2500
    small = compress(full, "low-rank", rank=5)
    seen: list[tuple[int, int]] = []
    found = fidelity(full, small, seed=4, progress=lambda *done: seen.append(done))
    assert isinstance(found, Fidelity)
    assert seen == [(2048, 2500), (2500, 2500)]
    rows, back = rows_of(full).double(), rows_of(small).double()
    cosines = (rows * back).sum(1).sort().values
    for share, value in found.cosines.items():
        assert value == pytest.approx(float(cosines[int(share * (num - 1))]), abs=1e-5)
    chosen = permutation(num, 4, "recall")[:256]
    there, here = (
        (rows[chosen] @ table.T).index_put_(
            (torch.arange(256), chosen), torch.tensor(-2.0).double()
        )
        for table in (rows, back)
    )
    shares = [
        len(set(a.tolist()) & set(b.tolist())) / 10
        for a, b in zip(there.topk(10).indices, here.topk(10).indices, strict=True)
    ]
    assert found.recall == pytest.approx(sum(shares) / 256, abs=2e-3)
    assert 0.2 < sum(shares) / 256 < 0.99


def test_fidelity_of_one_row_and_of_a_row_that_is_lost() -> None:
    one = flat(1)
    assert fidelity(one, compress(one, "int8")).energy == 1  # there is no variance to lose
    axis, other = torch.eye(3)[:2]
    rows = torch.stack([axis, -axis, axis, -axis, other, -other])
    full = make(6, store=hold(rows[:, None]))
    found = fidelity(full, compress(full, "low-rank", rank=1))
    assert found.cosines == pytest.approx({0.0: 0, 0.01: 0, 0.05: 0, 0.5: 1})
    assert found.energy == pytest.approx(2 / 3)


def test_a_bank_stands_for_itself() -> None:
    found = fidelity(flat(noise=0.3), flat(noise=0.3))
    assert found.energy == pytest.approx(1, abs=1e-6)
    assert min(found.cosines.values()) == pytest.approx(1, abs=1e-6)
    assert found.recall == 1
    assert fidelity(flat(8), flat(8)).recall is None  # ten others are needed
    with pytest.raises(InputError, match="different sizes"):
        fidelity(flat(8), flat(9))


# --- official banks ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "dmd_bank.safetensors")


def test_gmem_decomposition_is_reproduced(golden: dict[str, Tensor]) -> None:
    bank, rank = golden["inputs/bank"], 16
    axes = principal_axes(bank.split(64))
    assert_near(axes.mean.float(), golden["outputs/mean"], NETWORK)
    assert_near(axes.singular[:rank], golden["outputs/singular_values"], NETWORK)
    for name in ("outputs/column_norms_C", "outputs/column_norms_M"):
        assert_near(axes.singular[:rank].sqrt(), golden[name], NETWORK)
    codec = LowRank(axes.basis[:, :rank].float(), axes.mean.float(), torch.float32)
    back = codec.decode(codec.encode(bank))
    assert_near(back[golden["inputs/rows"]], golden["outputs/reconstruction"], NETWORK)
    product = codec.encode(bank)["codes"] @ codec.basis.T
    assert_near(product[golden["inputs/rows"]], golden["outputs/component_C_times_Mt"], NETWORK)
    rms = (back - bank).square().mean().sqrt()[None]
    assert_near(rms, golden["outputs/all_reconstruction_rms"], NETWORK)
    new = codec.decode(codec.encode(golden["inputs/new_snippets"]))
    assert_near(new, golden["outputs/add_exact"], NETWORK)
    alpha = golden["inputs/interp_alpha"][:, None]  # theirs weighs the first row
    first, second = golden["inputs/interp_ij"].T
    between = alpha * codec.encode(bank[first])["codes"]
    between = between + (1 - alpha) * codec.encode(bank[second])["codes"]
    assert_near(codec.decode({"codes": between}), golden["outputs/add_interpolated"], NETWORK)
    plain = alpha * bank[first] + (1 - alpha) * bank[second]
    assert_near(plain, golden["outputs/full_bank_interpolated"], NETWORK)


def decomposed(bank: Tensor, rank: int) -> dict[str, Any]:
    """A bank as GMem saves it decomposed."""
    mean = bank.mean(0, keepdim=True)
    u, s, v = torch.linalg.svd(bank - mean, full_matrices=False)
    root = s[:rank].sqrt()
    return {"C": u[:, :rank] * root, "M": v[:rank].T * root, "S": s[:rank], "mean": mean,
            "latent_dim": rank, "feature_dim": bank.shape[1]}  # fmt: skip


@pytest.mark.parametrize("rank", [16, 48])
def test_a_decomposed_bank_is_imported_without_loss(
    golden: dict[str, Tensor], tmp_path: Path, rank: int
) -> None:
    vectors = golden["inputs/bank"]
    body = decomposed(vectors, rank)
    torch.save(body, tmp_path / "dmd.pth")
    read_bank(tmp_path / "dmd.pth").save(tmp_path / "b")
    bank = MemoryBank.load(tmp_path / "b")
    assert (bank.num, bank.dim, bank.format, bank.flips) == (300, 48, "low-rank", False)
    assert isinstance(bank.store.codec, LowRank)
    assert bank.store.codec.rank == min(rank + 1, 48)
    official = body["C"] @ body["M"].T + body["mean"]
    assert_near(rows_of(bank), functional.normalize(official, dim=1), NETWORK)
    if rank == 16:
        reference = functional.normalize(golden["outputs/reconstruction"], dim=1)
        assert_near(bank.lookup(golden["inputs/rows"]), reference, NETWORK)
    basis = bank.store.codec.basis
    assert_near(basis.T @ basis, torch.eye(basis.shape[1]), FLOAT32)
    assert bank.history == ({"edit": "import", "file": "dmd.pth"},)
    assert read_bank(tmp_path / "dmd.pth", "int8").format == "int8"


def test_a_decomposed_bank_with_a_zero_singular_value_is_sound(tmp_path: Path) -> None:
    """The official projection divides by it."""
    plane = normal((50, 3), 0, "test") @ normal((3, 20), 1, "test")
    body = decomposed(plane, 6)
    body["C"][:, 3:], body["M"][:, 3:], body["S"][3:] = 0, 0, 0
    torch.save(body, tmp_path / "dmd.pth")
    bank = read_bank(tmp_path / "dmd.pth")
    assert isinstance(bank.store.codec, LowRank)
    assert bank.store.codec.rank == 3  # the mean of the plane lies in it
    assert_near(rows_of(bank), functional.normalize(plane, dim=1), NETWORK)


def test_full_banks_are_imported(golden: dict[str, Tensor], tmp_path: Path) -> None:
    vectors = golden["inputs/bank"]
    unit = functional.normalize(vectors, dim=1)
    torch.save(vectors, tmp_path / "full.pth")
    full = read_bank(tmp_path / "full.pth")
    assert full.format == "float16"
    assert_near(rows_of(full), unit, 2.0**-11)
    assert_near(rows_of(read_bank(tmp_path / "full.pth", "float32")), unit, FLOAT32)
    assert full.labels.unique().tolist() == [-1]
    assert not full.held_out.any()
    assert full.encoder["name"] == "dinov2-b"
    with pytest.raises(InputError, match=r"not the images of a data set \(import\)"):
        full.check("f" * 64)
    often = torch.arange(300) % 5
    torch.save({"network": {}, "memorybank": vectors, "memoryfreq": often}, tmp_path / "v1.pth")
    first = read_bank(tmp_path / "v1.pth")
    assert torch.equal(rows_of(first), rows_of(full))
    assert torch.equal(first.frequency, often.float())  # type: ignore[arg-type]


def test_an_official_bank_stays_in_its_file(tmp_path: Path) -> None:
    """What is written there after it was opened is seen: nothing was read before it was used."""
    path, vectors = tmp_path / "full.pth", normal((40, 8), 0, "test")
    torch.save(vectors, path)
    bank, body = read_bank(path), load_foreign(path)
    place = path.read_bytes().index(bytes(raw_bytes(vectors)))
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes(raw_bytes(vectors[7])))
    assert torch.equal(body[0], vectors[7])
    assert torch.equal(*bank.lookup(torch.tensor([0, 7])))


def test_what_is_no_bank_is_refused(tmp_path: Path) -> None:
    bad = torch.ones(5000, 4)
    bad[4321, 2] = float("nan")
    zero = torch.ones(5, 4)
    zero[2] = 0
    cases: dict[str, tuple[Any, str]] = {
        "dict": ({"a": torch.ones(2, 2)}, "holds no bank of GMem"),
        "flat": (torch.ones(4), "holds no bank of GMem"),
        "shape": ({"C": torch.ones(5, 2), "M": torch.ones(4, 3), "mean": torch.ones(4)}, "shapes"),
        "nan": (bad, "row 4321 has no usable vector"),
        "zero": (zero, "row 2 has no usable vector"),
    }
    for name, (body, message) in cases.items():
        torch.save(body, tmp_path / f"{name}.pth")
        with pytest.raises(InputError, match=message):
            read_bank(tmp_path / f"{name}.pth").save(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="does not exist"):
        read_bank(tmp_path / "none.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "nan.pth").read_bytes()[:100])
    with pytest.raises((DamagedArtifact, InputError)):
        read_bank(tmp_path / "cut.pth")
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".pth"] * 6


def test_vectors_are_read_from_either_kind_of_file(tmp_path: Path) -> None:
    vectors = normal((3, 4), 0, "test")
    torch.save(vectors, tmp_path / "a.pth")
    torch.save({"rows": vectors}, tmp_path / "b.pt")
    write_tensor_file(tmp_path / "c.safetensors", {"rows": vectors})
    for name in ("a.pth", "b.pt", "c.safetensors"):
        assert torch.equal(read_vectors(tmp_path / name), vectors)
    write_tensor_file(tmp_path / "d.safetensors", {"a": vectors, "b": vectors + 1})
    torch.save(torch.arange(4), tmp_path / "e.pth")
    for name in ("d.safetensors", "e.pth"):
        with pytest.raises(InputError, match="does not hold one tensor of vectors"):
            read_vectors(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        read_vectors(tmp_path / "none.pth")


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_bank(tmp_path: Path) -> None:
    """60,000 rows of 768 float16 numbers, 92 MB; of float32 vectors it would be 184."""
    script = Path(__file__).parents[1] / "benchmarks" / "bank_memory.py"
    line = [sys.executable, str(script), "--rows", "60000", "--folder", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # each thread has work space of its own
    out = subprocess.run(line, check=True, capture_output=True, text=True, env=env).stdout
    steps = [json.loads(text) for text in out.splitlines() if "step" in text]
    grown = {step["step"]: step["anonymous MB"] for step in steps}
    assert set(grown) >= {"build", "use", "int8", "low_rank", "compare", "search", "edits"}
    assert max(grown.values()) < 150, grown


def test_the_smallest_bank_can_be_compressed() -> None:
    one = make(1, store=hold(torch.ones(1, 1, 16)))
    assert fidelity(one, compress(one, "int8")).energy == 1
