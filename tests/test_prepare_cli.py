"""`stratagem prepare` as people use it: bad input, kills, counts, and the table of treatments."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stratagem.cli import main
from stratagem.data.shards import DataSet

DOCS = (Path(__file__).parents[1] / "docs" / "data.md").read_text()


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["prepare", *shlex.split(line)])
    out, err = capsys.readouterr()
    return code, out, err


def pixels(side: int = 12) -> np.ndarray:
    return np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)


def encoded(kind: str = "png", pixel: np.ndarray | None = None, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels() if pixel is None else pixel).save(stream, kind, **options)
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes; only its head is true."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0" * 99))


def put(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def animation() -> bytes:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(stream, "gif", save_all=True, append_images=frames[1:])
    return stream.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("jpeg", exif=exif)


# as in the table of docs/data.md: (case, kept, how to make it); named by the file
CASES: dict[str, tuple[str, bool, Callable[[Path], object]]] = {
    "cut.jpg": ("truncated", False, put(encoded("jpeg", pixels(99))[:900])),
    "empty.png": ("zero bytes", False, put(b"")),
    "page.jpg": ("not an image inside", False, put(b"<html>404</html>")),
    "notes.txt": ("not an image by name", False, put(b"notes")),
    "bomb.png": ("decompression bomb", False, put(bomb())),
    "dot.png": ("1 pixel high or wide", False, put(encoded(pixel=pixels(1)))),
    "float.tiff": (
        *("32-bit or floating point", False),
        put(encoded("tiff", np.ones((9, 9), np.float32))),
    ),
    "loop.png": ("link to itself or to nowhere", False, lambda path: path.symlink_to(path.name)),
    "up": ("link to a folder above", False, lambda path: path.symlink_to(path.parent)),
    "pipe.png": ("pipe, socket, device", False, os.mkfifo),
    "ok.png": ("8-bit RGB", True, put(encoded())),
    "cmyk.jpg": (
        *("CMYK", True),
        lambda path: Image.fromarray(pixels()).convert("CMYK").save(path),
    ),
    "deep.png": ("16-bit", True, put(encoded(pixel=np.full((9, 9), 40_000, np.uint16)))),
    "palette.png": (
        *("palette", True),
        lambda path: Image.fromarray(pixels()).convert("P").save(path),
    ),
    "alpha.png": ("transparency", True, put(encoded(pixel=np.zeros((9, 9, 4), np.uint8)))),
    "turned.jpg": ("turned by EXIF", True, put(turned())),
    "moves.gif": ("animation", True, put(animation())),
    "small.png": ("smaller than asked for", True, put(encoded(pixel=pixels(3)))),
}


def bad_folder(folder: Path) -> Path:
    folder.mkdir()
    for name, (_, _, make) in CASES.items():
        make(folder / name)
    return folder


def test_everything_is_kept_or_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = bad_folder(tmp_path / "photos"), tmp_path / "out"
    code, said, _ = run(f"{folder} --out {out} --size 8", capsys)
    assert code == 0
    data = DataSet.open(out)
    left_out = [name for name, (_, kept, _) in CASES.items() if not kept]
    assert sorted(data.names) == sorted(set(CASES) - set(left_out))
    assert sorted(name for name, _ in data.rejected) == sorted(left_out)
    assert "10 files left out of 18 that were read" in said
    assert data.num + len(data.rejected) == len(CASES)
    named = json.loads((out / "rejected.json").read_text())
    assert sorted(row[1] for row in named) == sorted(left_out)
    assert all(row[2] and str(tmp_path) not in row[2] for row in named)
    for name in left_out:
        assert f"left out {name}: " in said


def test_causes_are_counted_and_json_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (folder / name).write_bytes(b"notes")
    (folder / "0.png").write_bytes(encoded(pixel=pixels(9)))
    (folder / "1.png").write_bytes(encoded(pixel=pixels(15)))  # above twice the limit
    _, said, _ = run(f"{folder} --out {tmp_path / 'a'} --size 8", capsys)
    assert said.index("left out a.txt (and 2 more): its name") < said.index("left out 1.png: too")
    assert "1.png: too large: more than 200 pixels, the limit is 100\n" in said
    code, said, _ = run(f"{folder} --out {tmp_path / 'b'} --size 8 --json", capsys)
    facts = json.loads(said)
    data = DataSet.open(tmp_path / "b")
    assert (code, facts["num"], facts["fingerprint"]) == (0, 1, data.fingerprint)
    assert sorted(facts["left_out"].values()) == [1, 3]


def test_the_table_of_treatments_is_that_of_the_tests() -> None:
    rows = re.findall(r"^\| ([^|]+) \| (kept|left out)\b", DOCS, re.MULTILINE)
    assert {(case, kept == "kept") for case, kept in rows} == {
        (case, kept) for case, kept, _ in CASES.values()
    } | {("unreadable file or folder", False), ("kills its decoder", False)}


def test_strict_is_exit_2_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bad_folder(tmp_path / "photos")
    code, said, error = run(f"{folder} --out {tmp_path / 'out'} --size 8 --strict", capsys)
    assert code == 2
    assert "images of" not in said
    assert "bomb.png: " in error
    assert "leave out --strict" in error
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nowhere --out x", "no such file or folder"),
        ("ok.png --out x", "ok.png is a file: give the folder"),
        ("fashion-mnist --out x --from nowhere", "apt-get install dataset-fashion-mnist"),
        ("emoji --out x", "npm install emoji-datasource-google"),
        (". --out x --from .", "--from has no effect"),
        (". --out x --workers 0", "workers is 0"),
        ("digits --out x --layout lightningdit --strict", "only --seed"),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ok.png").write_bytes(encoded())
    code, _, error = run(line, capsys)
    assert code == 2
    assert message in error
    assert error.startswith("stratagem: ")
    assert error.count("\n") == 1
    assert not Path("x").exists()


def test_help_names_every_source(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    said = capsys.readouterr().out
    for word in ("zip", "tar", "idx", "npz", "Hugging Face", "fashion-mnist", "--from", "--strict"):
        assert word in said


# --- kill -9 -----------------------------------------------------------------------------------

COMMAND = """
import sys
import stratagem.data.writing
from stratagem.cli import main
stratagem.data.writing._SHARD_BYTES = 8 * 8 * 3 * 16
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_killed_prepare_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stratagem.data.writing._SHARD_BYTES", 8 * 8 * 3 * 16)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(300):
        (folder / f"{number:03d}.png").write_bytes(encoded(pixel=pixels(8 + number % 5)))
    (folder / "007.png").write_bytes(b"")

    words = ["prepare", "photos", "--size", "8", "--holdout", "0.1"]
    assert main([*words, "--out", "whole", "--workers", "1"]) == 0
    command = [sys.executable, "-c", COMMAND, *words, "--out", "out", "--workers", "2"]
    draft = tmp_path / ".out.partial"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as killed:
        limit = time.monotonic() + 60
        while len(list(draft.glob(".rows-*"))) < 3:
            assert killed.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.001)
        killed.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    first = draft / "images-00000.safetensors"
    kept = first.stat().st_ino, first.stat().st_mtime_ns
    done = subprocess.run(command, check=True, capture_output=True)
    assert b"1 file left out of 300 that were read" in done.stdout
    file = tmp_path / "out" / first.name
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == kept
    both = [
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("whole", "out")
    ]
    assert both[0] == both[1]
