"""The demonstration: whole, stopped and continued, and on a folder of the user's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from stratagem.checkpoint import list_steps
from stratagem.cli import main
from stratagem.errors import InputError
from stratagem.programs.compare import (
    RunResult,
    images_to_reach,
    result_sections,
    speed_sentence,
)
from stratagem.programs.cost import Cost, call_times
from stratagem.programs.demo import choose_encoder
from stratagem.programs.evaluate import Evaluation
from stratagem.programs.sample import SampleConfig
from stratagem.schedule import Linear

RUNS = ["plain", "memory-pixels", "memory-effnet", "stages", "memory+stages"]


class Reader(HTMLParser):
    """Collects what a page shows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def run_demo(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "stratagem", "demo", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "demo"
    assert main(["demo", "--out", str(out), "--steps", "10", "--num", "70"]) == 0
    return out


@pytest.mark.slow
def test_the_report_shows_everything(whole: Path) -> None:
    page = Reader((whole / "report.html").read_text())
    assert page.tags.count("polyline") >= 5 + 2
    for part in [*RUNS, "effnet64", "held-out snippets", "MACs", "edge 1", "edge 2", "of held-out"]:
        assert part in page.text or part in (whole / "report.html").read_text(), part
    assert page.tags.count("img") == 24 + 5 * 2 * 20
    assert "not finite" not in page.text
    assert "nan" not in page.text.lower().split()


@pytest.mark.slow
def test_all_runs_saw_the_same_images(whole: Path) -> None:
    steps = {name: list_steps(whole / "runs" / name) for name in RUNS}
    assert set(map(tuple, steps.values())) == {(2, 4, 6, 8, 10)}


@pytest.mark.slow
def test_again_does_nothing_and_other_settings_are_refused(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*.safetensors")}
    assert main(["demo", "--out", str(whole), "--steps", "10", "--num", "70"]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in whole.rglob("*.safetensors")}
    capsys.readouterr()
    assert main(["demo", "--out", str(whole), "--steps", "11", "--num", "70"]) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """84 small colour pictures; so few and so different that the paper's thresholds find no cut."""
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for k in range(84):
        noise = torch.randint(0, 256, (16, 16, 3), generator=generator).to(torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{k}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.mark.slow
def test_a_folder_of_ones_own_stopped_and_continued(photos: Path, tmp_path: Path) -> None:
    words = ["--data", str(photos), "--steps", "5", "--num", "70"]
    out = tmp_path / "demo"
    process = run_demo("--out", str(out), *words)
    target = out / "runs" / "memory-pixels" / "checkpoints"
    deadline = time.monotonic() + 120
    while not target.is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "goes on" in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    assert not (out / "report.html").exists()
    assert main(["demo", "--out", str(out), *words]) == 0
    page = Reader((out / "report.html").read_text())
    assert "70 real images of 32 x 32" in page.text
    assert "dynamic programme" in page.text
    assert "files that could not be used: 1, such as broken.png" in page.text


# --- the arithmetic of the report --------------------------------------------------------------


def result(name: str, curve: dict[int, float], p_value: float = 1.0) -> RunResult:
    memorisation = {"median": 0.1, "held_out_median": 0.1, "copy_rate": 0.0, "p_value": p_value}
    protocol = {
        "sampling": {"num": 9, "sampler": "heun", "steps": 2},
        "reference": "r",
        "held_out_real": None,
        "held_out_images": 3,
    }
    evaluations = [
        Evaluation(k, images, 9, {"fd_x": distance}, None, memorisation, protocol)
        for k, (images, distance) in enumerate(curve.items())
    ]
    picture = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    preview = {"samples": picture, "neighbours": picture, "distances": torch.zeros(2)}
    return RunResult(
        name, evaluations, Cost(10, (3,), (5,), 5.0, (10,), (1.0,), 5.0), 100.0, preview
    )


PLAIN = result("plain", {100: 0.9, 200: 0.5})


def test_images_to_reach_is_linear_between_checkpoints() -> None:
    run = result("memory", {100: 0.6, 200: 0.2})
    assert images_to_reach(run, "fd_x", 0.5) == pytest.approx(125)
    assert images_to_reach(run, "fd_x", 0.2) == pytest.approx(200)
    assert images_to_reach(run, "fd_x", 0.7) == 100
    assert images_to_reach(run, "fd_x", 0.1) is None


def test_the_sentence_tells_who_is_faster_and_who_never_gets_there() -> None:
    fast, never = result("memory", {100: 0.4, 200: 0.2}), result("stages", {100: 1.0, 200: 0.6})
    sentence = speed_sentence([PLAIN, fast, never])
    assert "plain ends at fd_x 0.500 after 200 images" in sentence
    assert "memory reaches it after 100 (50 %)" in sentence
    assert "stages does not reach it (0.600)" in sentence


def test_the_faster_encoder_is_taken_unless_it_copies() -> None:
    fast, slow = result("a", {100: 0.4, 200: 0.3}), result("b", {100: 0.6, 200: 0.2})
    assert choose_encoder(PLAIN, {"a": fast, "b": slow}) == "a"
    copier = result("a", {100: 0.4, 200: 0.3}, p_value=1e-6)
    assert choose_encoder(PLAIN, {"a": copier, "b": slow}) == "b"


def test_figures_of_two_protocols_do_not_stand_side_by_side() -> None:
    assert result_sections([PLAIN, result("memory", {100: 0.4, 200: 0.2})])
    other = result("memory", {100: 0.4, 200: 0.2})
    changed = replace(other.last, protocol={**other.last.protocol, "reference": "q"})
    with pytest.raises(InputError, match="different reference"):
        result_sections([PLAIN, replace(other, evaluations=[changed])])


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("fd_pixels32", "of the first 32 principal components of the pixels"),
        ("fd_effnet64", "EfficientNet-Lite0's features, of which the first 64"),
        ("fid", "of Inception-v3's features"),
        ("fd_dinov2-l", "of the features dinov2-l"),
    ],
)
def test_the_page_says_what_a_distance_is_of(metric: str, words: str) -> None:
    evaluations = [replace(e, distances={metric: 0.5}) for e in PLAIN.evaluations]
    section, *_ = result_sections([replace(PLAIN, evaluations=evaluations)])
    assert words in section.text


def test_network_calls_are_counted_by_the_solver_itself() -> None:
    assert call_times(SampleConfig(sampler="euler", steps=4), Linear()) == [1.0, 0.75, 0.5, 0.25]
    heun = call_times(SampleConfig(sampler="heun", steps=2), Linear())
    assert heun == [1.0, 0.5, 0.5]  # the last step, to no noise, is first order
    assert len(call_times(SampleConfig(sampler="dpm++2m", steps=10), Linear())) == 10


def test_gmems_samplers_call_the_network_once_per_drift() -> None:
    """The original calls it twice: 198 times for Heun's 49 steps and last one, and 99 for Euler."""
    heun = SampleConfig(sampler="heun-sde", steps=50, last_step=0.004)
    assert len(call_times(heun, Linear())) == 49 * 2 + 1
    euler = SampleConfig(sampler="euler-maruyama", steps=50, last_step=0.004)
    assert len(call_times(euler, Linear())) == 50
    shifted = call_times(SampleConfig(sampler="euler", steps=49, shift=1 / 0.3), Linear())
    assert len(shifted) == 49
    assert shifted[0] - shifted[1] == pytest.approx(0.0062, abs=1e-4)  # gmem: first dt 0.0062
    assert shifted[-1] == pytest.approx(0.065, abs=1e-3)  # and last dt 0.065
