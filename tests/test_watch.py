"""The chart shows the curve, the words the figures, and half a line disturbs neither."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from stratagem.cli import main
from stratagem.cli.watch import watch
from stratagem.config import RunConfig, dump
from stratagem.errors import InputError
from stratagem.programs.watch import Watched, chart, follow
from stratagem.train_config import TrainConfig


def make_run(path: Path, losses: list[float], total: int = 100, rate: float = 64.0) -> Path:
    """A run that logs every 10 steps of 8 images."""
    (path / "samples").mkdir(parents=True)
    (path / "config.yaml").write_text(dump(RunConfig("data", train=TrainConfig(steps=total))))
    lines = [
        {"step": 10 * k, "images": 80 * k, "loss": loss, "grad_norm": 2.0}
        | {"images_per_second": rate, "peak_memory_mib": 512.4}
        for k, loss in enumerate(losses, 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_what_a_folder_says(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [4.0, 2.0, 1.0])
    for step in (10, 30):
        (run / "samples" / f"step-{step:08d}.png").write_bytes(b"")
    os.utime(run / "metrics.jsonl", (time.time() - 65,) * 2)
    found = follow(run)
    assert (found.steps, found.values) == ([10, 20, 30], [4.0, 2.0, 1.0])
    assert (found.step, found.total, found.rate, found.memory) == (30, 100, 64.0, 512.4)
    assert found.seconds_left == pytest.approx(70 * 8 / 64)
    assert not found.done
    first, second = found.lines()
    assert "step 30 of 100 (30%), loss 1, 64 images/s, 512 MiB, 0:00:09 left" in first
    assert "last line 0:01:05 ago" in first
    assert second.endswith("step-00000030.png")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "images": 320, "lo')
    assert follow(run).step == 30
    whole = make_run(tmp_path / "whole", [1.0] * 10)
    assert follow(whole).done
    assert follow(whole).lines()[0].endswith("512 MiB, done")


def test_a_run_without_lines_and_what_is_no_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    found = follow(run)
    assert (found.step, found.rate, found.seconds_left, found.done) == (0, None, None, False)
    assert found.lines() == [f"{run}: no line in its log yet"]
    assert chart([found], 60, 8) == []
    with pytest.raises(InputError, match="is not a run"):
        follow(tmp_path)
    with (run / "metrics.jsonl").open("w") as file:
        file.write('{"step": 10, "images": 80, "loss": NaN, "images_per_second": 1.0}\n')
    assert follow(run).values == []
    with pytest.raises(InputError, match="no 'los': choose one of images, images_per_second, loss"):
        follow(run, "los")


def test_values_are_smoothed_over_a_fortieth(tmp_path: Path) -> None:
    zigzag = [3.0 + (-1) ** k for k in range(120)]
    values = follow(make_run(tmp_path / "run", zigzag, 1200)).values
    assert values[:4] == [4.0, 3.0, 10 / 3, 3.0]  # means of 1, 2, 3 and then 4 values
    assert set(values[3:]) == {3.0}


def curve(values: list[float], name: str = "run") -> Watched:
    steps = list(range(1, len(values) + 1))
    last = len(values)
    return Watched(name, "loss", steps, values, last, last, None, None, None, None, None)


def dots(lines: list[list[tuple[str, int | None]]], margin: int) -> dict[int, set[int]]:
    """Rows of the dots of each column of a chart, counted from above."""
    bits = {0x01: (0, 0), 0x08: (0, 1), 0x02: (1, 0), 0x10: (1, 1)}
    bits |= {0x04: (2, 0), 0x20: (2, 1), 0x40: (3, 0), 0x80: (3, 1)}
    found: dict[int, set[int]] = {}
    for row, line in enumerate(lines[:-2]):
        text = "".join(piece for piece, _ in line)[margin:]
        for column, character in enumerate(text):
            for bit, (down, right) in bits.items():
                if character != " " and (ord(character) - 0x2800) & bit:
                    found.setdefault(2 * column + right, set()).add(4 * row + down)
    return found


def test_the_chart_is_the_curve() -> None:
    """An exponential decay is a straight line from corner to corner, without a gap."""
    lines = chart([curve([math.exp(-k / 20) for k in range(100)])], 61, 10)
    texts = ["".join(piece for piece, _ in line) for line in lines]
    assert len(lines) == 12
    assert all(len(text) == 61 for text in texts)
    margin = texts[0].index("│") + 1
    assert texts[0].split()[0] == "1"
    assert texts[9].split()[0] == f"{math.exp(-99 / 20):.4g}".rstrip("0")
    assert texts[11].endswith("step 100")
    found = dots(lines, margin)
    columns = 2 * (61 - margin)
    assert set(found) >= set(range(3, columns))
    for column in range(3, columns):
        straight = (column / (columns - 1) * 100 - 1) / 99 * 39
        assert any(abs(row - straight) <= 1 for row in found[column]), column
        assert min(found[column]) <= max(found[column - 1]) + 1 if column > 3 else True
    fall = dots(chart([curve([4.0] * 50 + [1.0] * 50)], 61, 10), 61 - columns // 2)
    assert set().union(*fall.values()) == set(range(40))  # a jump has no gap either
    plain = chart([curve([1.0, 2.0])], 40, 6, plain=True)
    assert all("".join(piece for piece, _ in line).isascii() for line in plain)
    assert any("*" in piece for line in plain for piece, _ in line)


def test_runs_are_told_apart_and_values_below_zero_are_drawn() -> None:
    lines = chart([curve([1.0] * 9), curve([-1.0] * 9)], 40, 6)
    owners = [{number for _, number in line if number is not None} for line in lines[:6]]
    drawn = [{n for piece, n in line if piece.strip() and n is not None} for line in lines[:6]]
    assert drawn[0] == {0}
    assert drawn[5] == {1}
    assert owners[0] <= {0, 1}
    assert chart([curve([0.5] * 3)], 30, 6)  # a flat one has no height


def test_once_prints_the_chart_and_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / name, [4.0, 2.0, 1.0]) for name in ("one", "two")]
    assert main(["watch", *map(str, runs), "--once"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out  # no terminal, no colours
    assert any(0x2800 < ord(character) < 0x2900 for character in out)
    assert all(f"{run}: step 30 of 100" in out for run in runs)
    for line in (["watch"], ["watch", str(tmp_path)], ["watch", str(runs[0]), "--metric", "x"]):
        assert main([*line, "--once"]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_without_a_terminal_a_line_for_each_step_until_all_are_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, done = make_run(tmp_path / "run", [4.0]), make_run(tmp_path / "done", [1.0] * 10)

    def go_on() -> None:
        time.sleep(0.3)
        text = (done / "metrics.jsonl").read_text()
        (run / "new").write_text(text)
        (run / "new").replace(run / "metrics.jsonl")

    thread = threading.Thread(target=go_on)
    thread.start()
    watch((run, done), every=0.05)
    thread.join()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"{run}: step 10 of 100 (10%)",
        f"{done}: step 100 of 100 (100%)",
        f"{run}: step 100 of 100 (100%)",
    ]


def test_on_a_terminal_the_chart_is_drawn_live_until_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", [4.0, 2.0])

    def terminal() -> Console:
        return Console(force_terminal=True, width=70, height=24, color_system="standard")

    naps = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("stratagem.cli.watch.Console", terminal)
    monkeypatch.setattr("stratagem.cli.watch.time.sleep", nap)
    watch((run,), every=7.0)
    assert naps == [7.0] * 3
    out = capsys.readouterr().out
    assert "step 20 of 100" in " ".join(out.replace("\x1b[36m", "").split())
    assert out.count("└") >= 3  # drawn each time
    assert "\x1b[36m" in out
