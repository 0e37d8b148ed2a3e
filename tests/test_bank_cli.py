"""`stratagem bank ...`: every verb once in order, as a user types it; then all that is wrong."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from stratagem.cli import main
from stratagem.data.shards import DataSet
from stratagem.memory.bank import MemoryBank
from stratagem.memory.draw import draw
from stratagem.memory.interpolate import blend
from stratagem.programs import bank as bank_programs
from stratagem.randomness import normal
from tolerances import FLOAT32, assert_near

Run = Callable[[str], tuple[int, str, str]]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, blobs: DataSet) -> Path:
    """A folder with a data set, its bank, and files to add."""
    folder = tmp_path_factory.mktemp("bank")
    (folder / "data").symlink_to(blobs.path)
    (folder / "new").mkdir()
    for row in (3, 17, 30):
        pixels = blobs.images(torch.tensor([row]))[0, 0].numpy()
        Image.fromarray(pixels).save(folder / "new" / f"{row}.png")
    Image.fromarray(255 - pixels).save(folder / "negative.png")
    (folder / "new" / "broken.png").write_bytes(b"no picture")
    (folder / "empty").mkdir()
    torch.save(normal((5, 2, 64), 0, "rows"), folder / "rows.pth")
    torch.save(normal((5, 2, 63), 0, "rows"), folder / "narrow.pth")
    torch.save(normal((50, 64), 0, "official"), folder / "official.pth")
    torch.save({"what": 1}, folder / "other.pth")
    here = Path.cwd()
    os.chdir(folder)
    try:
        for line in [
            "bank build data --out bank --encoder pixels",
            "bank compress bank --out small --format low-rank --rank 9",
            "bank import official.pth --out official",
        ]:
            assert main(line.split()) == 0, line
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def run(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(work)

    def call(line: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["bank", *shlex.split(line)])
        return code, *capsys.readouterr()

    return call


def test_the_bank_knows_its_images(run: Run, blobs: DataSet) -> None:
    bank = MemoryBank.load(Path("bank"))
    assert (bank.num, bank.dim, bank.flips, bank.format) == (40, 64, True, "float16")
    assert [bank.ids[row] for row in range(40)] == list(blobs.names)
    assert bank.shape == (1, 8, 8)
    bank.check(blobs.fingerprint)
    code, out, _ = run("info bank --json")
    assert code == 0
    facts = json.loads(out)
    assert facts["num"] == 40
    assert facts["fingerprint"] == bank.fingerprint
    code, out, _ = run("info small")
    assert "low-rank" in out
    assert "edit" in out


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_a_bank_is_built_in_the_format_asked_for(run: Run, form: str) -> None:
    code, out, _ = run(f"build data --out {form} --encoder pixels --format {form} --batch-size 7")
    assert code == 0
    assert form in out
    index = torch.arange(40)
    rows = MemoryBank.load(Path(form)).lookup(index)
    assert_near(rows, MemoryBank.load(Path("bank")).lookup(index), 0.01)


def test_a_stopped_build_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    build_encoder = bank_programs.build_encoder

    class Stopping:
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            self.real = build_encoder(*arguments, **keywords)
            self.dim, self.description = self.real.dim, self.real.description

        def __call__(self, batch: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 5:
                raise KeyboardInterrupt
            return self.real(batch)

    monkeypatch.setattr(bank_programs, "build_encoder", Stopping)
    line = "build data --out again --encoder pixels --batch-size 8"
    code, _, err = run(line)
    assert code == 130
    assert "goes on" in err
    note = json.loads(Path(".again.partial.json").read_text())
    assert note["done"] == 16
    code, _, err = run(line.replace("pixels", "effnet"))
    assert code == 2
    code, _, _ = run(line)
    assert code == 0
    assert calls == 5 + 2 * 3  # both sides of the last three batches
    assert MemoryBank.load(Path("again")).fingerprint == MemoryBank.load(Path("bank")).fingerprint
    assert not list(Path().glob(".again*"))


def test_compress_tells_what_is_lost(run: Run) -> None:
    code, out, _ = run("compress bank --out eight")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("eight: 40 images and mirror images, 64 numbers each, int8, 5.44 kB")
    assert [line.split()[0] for line in lines[1:]] == ["energy", "cosine", "recall@10"]
    code, out, _ = run("compress bank --out near --format low-rank --cosine 0.97 --json")
    facts = json.loads(out)
    assert facts["cosines"]["0.05"] >= 0.969
    assert 1 <= facts["edit"]["rank"] < 64
    assert 0 < facts["recall"] <= 1
    assert 0 < facts["energy"] < 1


def test_images_are_added_the_way_they_were_built(run: Run) -> None:
    """The same pixels make the same rows."""
    code, out, _ = run("add bank new --out added --label 5")
    assert code == 0
    assert "3 added" in out
    assert "left out: broken.png" in out
    bank = MemoryBank.load(Path("added"))
    originals = torch.tensor([17, 3, 30])  # by name: 17.png, 3.png, 30.png
    for flip in (False, True):
        side = torch.full((3,), flip)
        assert_near(bank.lookup(torch.arange(40, 43), side), bank.lookup(originals, side), FLOAT32)
    assert [bank.ids[row] for row in (40, 41, 42)] == ["17.png", "3.png", "30.png"]
    assert bank.labels[40:].tolist() == [5, 5, 5]
    assert set(draw(bank, 90, "held-out", label=5).tolist()) == {40, 41, 42}
    assert bank.history[-1]["source"] == "new"


def test_a_low_rank_bank_tells_how_well_new_rows_fit(run: Run) -> None:
    code, out, _ = run("add small rows.pth --out larger")
    assert code == 0
    assert "5 added; of their length 1 the bank's directions miss" in out
    code, out, _ = run("add small negative.png --out one --json")
    facts = json.loads(out)
    assert (facts["added"], facts["num"]) == (1, 41)
    assert facts["residuals"][0] > 0.05
    assert facts["rejected"] == []


def test_rows_are_removed_by_name_label_or_likeness(run: Run) -> None:
    for number, (options, left) in enumerate(
        {"--ids 03 17": 38, "--label 1": 20, "--like new/17.png --cosine 0.99999": 39}.items()
    ):
        code, out, _ = run(f"remove bank --out less{number} {options}")
        assert code == 0
        assert f"{left} images" in out
        assert f"{40 - left} removed" in out
        bank = MemoryBank.load(Path(f"less{number}"))
        assert bank.num == left
        assert "17" not in {bank.ids[row] for row in range(left)}


def test_banks_are_merged_and_rows_interpolated(run: Run) -> None:
    assert run("merge small bank --out both")[0] == 0
    assert MemoryBank.load(Path("both")).num == 80
    code, out, _ = run("interpolate bank --rows 3 17 --weights 0.5 0.75 --out longer")
    assert code == 0
    assert "2 added, rows 40 to 41" in out
    bank = MemoryBank.load(Path("longer"))
    ends = [bank.lookup(torch.tensor([row] * 2)) for row in (3, 17)]
    middle = blend(*ends, torch.tensor([0.5, 0.75]))
    assert_near(bank.lookup(torch.tensor([40, 41])), middle, 2.0**-10)
    assert run("interpolate bank --rows 3 17 --way masked --out mask --label 4")[0] == 0
    assert MemoryBank.load(Path("mask")).labels[-1] == 4


def test_the_nearest_rows_of_an_image_begin_with_itself(run: Run) -> None:
    code, out, _ = run("nearest bank new/17.png --num 3")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("17.png  row 17  cosine 1.0000  17")
    code, out, _ = run("nearest bank new --num 2 --json")
    assert [line["image"] for line in json.loads(out)] == ["17.png", "3.png", "30.png"]
    assert [line["rows"][0]["row"] for line in json.loads(out)] == [17, 3, 30]


def test_an_official_bank_becomes_one_of_ours(run: Run) -> None:
    bank = MemoryBank.load(Path("official"))
    rows = normal((50, 64), 0, "official").double()
    reference = rows / rows.norm(dim=1, keepdim=True)
    assert_near(bank.lookup(torch.arange(50)), reference, 2.0**-11)
    code, out, _ = run("import official.pth --out wide --format float32")
    assert code == 0
    assert out.startswith("wide: 50 images, 64 numbers each, float32")


WRONG = {
    "build data --out bank": "already exists",
    "build data --out x --encoder pixels --format low-rank": "low-rank",
    "compress bank --out x --format low-rank --rank 65": "between 1 and the width, 64",
    "compress bank --out x --format low-rank": "needs a rank or a cosine",
    "compress bank --out x --rank 4": "no effect on format int8",
    "compress bank --out small": "already exists",
    "compress data --out x": "no bank at data",
    "add bank nowhere --out x": "nowhere",
    "add bank empty --out x": "no image",
    "add bank new/broken.png --out x": "broken.png",
    "add bank narrow.pth --out x": "(n, 2, 64)",
    "add bank other.pth --out x": "not hold one tensor",
    "add official new --out x": "give vectors",
    "add bank new --out small": "already exists",
    "remove bank --out x": "remove by one of",
    "remove bank --out x --ids 03 --label 1": "remove by one of",
    "remove bank --out x --like new": "remove by one of",
    "remove bank --out x --label 1 --cosine 0.5": "remove by one of",
    "remove bank --out x --label 9": "no image of label 9",
    "remove bank --out x --ids none": "no image named 'none'",
    "remove bank --out x --like new --cosine -1": "remove some, not all",
    "remove bank --out x --like new/17.png --cosine 2": "between -1 and 1",
    "merge bank official --out x": "merge banks of one encoder",
    "merge bank nowhere --out x": "no bank at nowhere",
    "interpolate bank --rows 3 40 --weights 0.5 --out x": "no row 40 in the bank: it has 0 to 39",
    "interpolate bank --rows 3 4 --out x": "linear and spherical take one",
    "interpolate bank --rows 3 4 --weights 2 --out x": "between 0 and 1",
    "interpolate bank --rows 3 4 --weights 0.5 --way masked --out x": "concatenated none",
    "nearest bank new --num 41": "there are 40",
    "nearest bank nowhere": "nowhere",
    "import other.pth --out x": "holds no bank of GMem",
    "import nowhere.pth --out x": "does not exist",
    "fly bank": "unknown verb 'bank fly'",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_gets_one_line_and_writes_nothing(run: Run, line: str) -> None:
    before = sorted(p.name for p in Path().iterdir())
    code, out, err = run(line)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("stratagem: ")
    assert WRONG[line] in last
    assert "Traceback" not in err
    assert out == ""
    assert sorted(p.name for p in Path().iterdir()) == before


def test_another_version_of_the_encoder_is_refused(run: Run) -> None:
    bank = MemoryBank.load(Path("bank"))
    old = {**bank.encoder, "preprocessing": "otherwise"}
    MemoryBank(bank.store, bank.labels, bank.held_out, old, "", shape=bank.shape).save(Path("old"))
    code, _, err = run("add old new --out x")
    assert code == 2
    assert "another version of encoder pixels" in err


def test_damage_is_code_3(run: Run) -> None:
    body = bytearray(Path("bank").read_bytes())
    body[-2000] ^= 1
    Path("damaged").write_bytes(body)
    for line in ("info damaged", "compress damaged --out x", "merge bank damaged --out x"):
        code, _, err = run(line)
        assert code == 3
        assert "damaged" in err
    assert not Path("x").exists()
