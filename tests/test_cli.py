"""The command line, as a user types it: the whole way on real images, then all that is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stratagem.cli import VERBS, main
from stratagem.cli.console import _Lines, _rate, _time
from stratagem.data.shards import DataSet

CONFIG = """
data: data
model: {width: 32, depth: 3, heads: 2, patch: 4, style: sit}
memory: {bank: bank.safetensors}
stages: {file: stages.json, shared: 1, depths: [2, 1, 1]}
train: {steps: 6, batch_size: 16, learning_rate: 1e-3, checkpoint_every: 3, threads: 1}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every verb has been run once, in order, on the digits."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "run.yaml").write_text(CONFIG)
    (folder / "plain.yaml").write_text("\n".join(CONFIG.splitlines()[:3] + CONFIG.splitlines()[5:]))
    here = Path.cwd()
    os.chdir(folder)
    try:
        for line in [
            "prepare digits --out data --holdout 0.2",
            "bank build data --out bank.safetensors --encoder pixels",
            "stages data --out stages.json --num 3",
            "train run.yaml --out runs/both",
            "train plain.yaml --out runs/plain --set train.steps=3",
            "sample runs/both --num 5 --out samples --steps 3",
            "evaluate runs/both --reference data --features pixels --num 60 --steps 3 --json e.js",
            "evaluate runs/plain --reference data --features pixels --num 60 --steps 3",
            "compare runs/plain runs/both --out report.html",
        ]:
            assert main(line.split()) == 0, line
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(work)
    return work


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(line.split())
    out, err = capsys.readouterr()
    return code, out, err


def test_samples_are_images_and_say_what_made_them(inside: Path) -> None:
    names = sorted(p.name for p in (inside / "samples").glob("*.png"))
    assert names == [f"{j:06d}.png" for j in range(5)]
    assert Image.open(inside / "samples" / names[0]).size == (8, 8)
    made = json.loads((inside / "samples" / "made_from.json").read_text())
    assert len(made["snippets"]) == 5


def test_image_j_is_the_same_whatever_the_batch(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, _ = run(
        "sample runs/both --num 7 --out more --steps 3 --batch-size 2 --format npz", capsys
    )
    assert code == 0
    images = np.load(inside / "more" / "samples.npz")["arr_0"]
    assert images.shape == (7, 8, 8, 3)
    assert images.dtype == np.uint8
    for j in range(5):
        first = np.array(Image.open(inside / "samples" / f"{j:06d}.png")).astype(int)
        assert np.abs(first - images[j, :, :, 0].astype(int)).max() <= 1, j


def test_evaluation_tells_its_protocol(inside: Path) -> None:
    found = json.loads((inside / "e.js").read_text())
    assert found["num"] == 60
    assert found["distances"]["fd_pixels32"] > 0
    assert found["held_out_snippets"]["fd_pixels32"] > 0
    assert found["memorisation"]["held_out_median"] > 0
    assert found["protocol"]["sampling"]["steps"] == 3
    assert found["images"] == 96


def test_samples_can_be_evaluated_alone(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "evaluate samples --reference data --features pixels --allow-few"
    code, out, _ = run(line, capsys)
    assert code == 0
    assert "fd_pixels32" in out
    code, _, err = run("evaluate samples --reference data --features pixels", capsys)
    assert code == 2
    assert "too few" in err


def test_snippets_near_between_and_from_noise(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What made which image is written down, and does not depend on how many are made."""
    data = DataSet.open(inside / "data")
    Image.fromarray(data.images(torch.tensor([7]))[0, 0].numpy()).save(inside / "seven.png")
    row = int((data.train_indices == 7).any())

    def made(name: str, words: str) -> list[Any]:
        line = f"sample runs/both --steps 2 --out {name} --sampler euler {words}"
        assert run(line, capsys)[0] == 0
        return json.loads((inside / name / "made_from.json").read_text())["snippets"]

    near = made("near", "--num 3 --snippets near --like seven.png")
    assert len(set(near)) == 3
    assert row == 0 or near[0] == 7
    for policy in ("pairs", "noise", "stratified"):
        few = made(f"few-{policy}", f"--num 2 --snippets {policy}")
        assert few == made(f"more-{policy}", f"--num 5 --snippets {policy} --batch-size 2")[:2]
    first, second, weight = made("pair", "--num 1 --snippets pairs")[0]
    assert first != second
    assert 0 <= weight < 1


def test_guided_and_stochastic_samples(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scale 1 outside the interval is no guidance; the noise of image j is its own."""
    base = "sample runs/both --num 3 --steps 4 --sampler heun-sde --last-step 0.01"
    for name, more in {
        "sde": "",
        "sde-batch": "--batch-size 1",
        "guided": "--guidance 3 --guide-to 0.5",
        "never": "--guidance 3 --guide-from 0.001 --guide-to 0.002",
    }.items():
        assert run(f"{base} --out {name} {more}", capsys)[0] == 0

    def pictures(name: str) -> np.ndarray:
        files = sorted((inside / name).glob("*.png"))
        return np.stack([np.array(Image.open(f)) for f in files]).astype(int)

    assert np.abs(pictures("sde") - pictures("sde-batch")).max() <= 1
    assert np.abs(pictures("sde") - pictures("never")).max() <= 1
    assert np.abs(pictures("sde") - pictures("guided")).max() > 1


def test_every_schedule_trains_and_samples(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """EDM has its own parameterization, density, solver variable and grid."""
    edm = "schedule=edm parameterization=edm density=log-normal density_mean=-1.2"
    for name, settings in {"edm": edm, "vp": "schedule=vp parameterization=eps"}.items():
        sets = " ".join(f"--set diffusion.{s}" for s in settings.split())
        line = f"train plain.yaml --out runs/{name} --set train.steps=3 {sets}"
        assert run(line, capsys)[0] == 0, name
        for sampler in ("heun", "dpm++2m"):
            line = (
                f"sample runs/{name} --out {name}-{sampler} --num 2 --steps 4 --sampler {sampler}"
            )
            assert run(line, capsys)[0] == 0, (name, sampler)
    code, _, err = run("sample runs/edm --out x --sampler euler-maruyama", capsys)
    assert code == 2
    assert "choose heun" in err


def test_a_run_that_cannot_be_measured_is_not_sampled_first(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ("--reference data --num 20", "--reference colour --num 60"):
        if not (inside / "colour").exists():
            (inside / "pictures").mkdir()
            for k in range(40):
                noise = np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(noise).save(inside / "pictures" / f"{k}.png")
            assert run("prepare pictures --out colour --size 8", capsys)[0] == 0
        code, _, err = run(f"evaluate runs/both {words} --features pixels", capsys)
        assert code == 2
        assert len(err.strip().splitlines()) == 1, err  # no progress of a sampling


def test_information_as_json(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("bank info bank.safetensors --json", capsys)
    assert code == 0
    assert json.loads(out)["num"] == 1797
    code, out, _ = run("stages data --out other.json --num 4 --method snr --json", capsys)
    assert code == 0
    edges = [e["log_snr"] for e in json.loads(out)["edges"]]
    assert len(edges) == 3
    assert edges == sorted(edges, reverse=True)
    code, out, _ = run("doctor --json", capsys)
    assert {f["level"] for f in json.loads(out)} <= {"ok", "note", "problem"}


def test_training_again_changes_nothing(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.read_bytes() for p in (inside / "runs" / "both").rglob("*.safetensors")}
    code, out, _ = run("train run.yaml --out runs/both", capsys)
    assert code == 0
    assert "trained to step 6" in out
    assert before == {p: p.read_bytes() for p in (inside / "runs" / "both").rglob("*.safetensors")}


def test_the_report_has_both_runs(inside: Path) -> None:
    html = (inside / "report.html").read_text()
    assert "both" in html
    assert "plain" in html
    assert html.count("<polyline") >= 1


WRONG = {
    "fly": "unknown verb 'fly'",
    "trian run.yaml": "did you mean train?",
    "bank fly": "bank",
    "prepare nowhere --out x": "nowhere",
    "prepare empty --out x": "no image",
    "prepare broken --out x": "broken",
    "prepare digits --out data": "already exists",
    "prepare digits --out x --holdout 2": "holdout",
    "bank build nowhere --out x": "does not exist",
    "bank build runs/both --out x": "not a finished dataset",
    "bank info stages.json": "stages.json",
    "stages data --out x --num 0": "ask for at least 1",
    "stages data --out stages.json": "already exists",
    "train absent.yaml --out x": "does not exist",
    "train typo.yaml --out x": "did you mean train.steps",
    "train run.yaml --out x --set train.stps=3": "did you mean train.steps",
    "train run.yaml --out x --set steps=3": "did you mean train.steps",
    "train run.yaml --out x --set seed=[1": "--set 'seed=[1'",
    "train run.yaml --out x --set data=absent": "stratagem prepare IMAGES",
    "train run.yaml --out x --set memory.bank=absent": "stratagem bank build data --out absent",
    "train run.yaml --out x --set stages.file=absent": "make it with stratagem stages",
    "stages empty --out x": "stratagem prepare IMAGES",
    "stages data --out x --device gpu": "stratagem: invalid choice 'gpu'",
    "train run.yaml --out x --set data=other": "bank was made from data set",
    "train run.yaml --out x --set model.depth=7": "make model.depth 3",
    "train run.yaml --out runs/plain": "holds another run",
    "sample nowhere --out x": "not a run",
    "sample runs/both --out samples": "already exists",
    "sample runs/both --out x --step 4": "it has 3, 6",
    "sample runs/both --out x --label 77": "give a label with",
    "sample runs/plain --out x --snippets held-out": "without memory",
    "sample runs/both --out x --snippets near": "--like",
    "sample runs/both --out x --snippets noise --label 3": "no effect",
    "sample runs/plain --out x --guidance 2": "neither memory nor classes",
    "sample runs/both --out x --guide-to 0.5": "without --guidance",
    "sample runs/both --out x --guidance 2 --guide-from 0.9 --guide-to 0.5": "guidance interval",
    "sample runs/both --out x --shift 3 --last-step 0.004": "do not go together",
    "sample runs/both --out x --bank nowhere": "--bank",
    "sample runs/both --out x --num 0": "at least 1",
    "evaluate nowhere --reference data --features pixels": "nowhere",
    "evaluate nowhere --reference data --features pixels --steps 3": "nothing at nowhere",
    "evaluate samples --reference data --features inception": "--weights",
    "evaluate samples --reference data --weights run.yaml": "inception",
    "evaluate samples --reference data --features inception --weights run.yaml": "run.yaml",
    "compare runs/plain --out x": "no evaluation",
    "demo --data nowhere --out x": "nowhere",
    "demo --out run.yaml": "run.yaml: a file is there, and a folder is to be",
    "train run.yaml --out plain.yaml": "plain.yaml: a file is there, and a folder is to be",
    "train run.yaml --out x --set seed=1 train.steps=2": "train.steps=2: repeat --set for each",
    "train run.yaml": "stratagem: Missing from",
    "sample runs/both --out .": "already exists",
    "stages data --out .": "already exists",
}


@pytest.fixture(scope="module")
def wrong_inputs(work: Path) -> None:
    (work / "empty").mkdir()
    (work / "broken").mkdir()
    (work / "broken" / "a.png").write_bytes(b"no picture")
    (work / "typo.yaml").write_text("data: data\ntrain: {step: 3}\n")
    here = Path.cwd()
    os.chdir(work)
    assert main(["prepare", "digits", "--out", "other", "--holdout", "0.3"]) == 0
    assert main(["train", "plain.yaml", "--out", "runs/unmeasured", "--set", "train.steps=3"]) == 0
    os.chdir(here)


@pytest.mark.usefixtures("wrong_inputs")
@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_gets_one_line_and_code_2(
    line: str, inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(line.replace("compare runs/plain", "compare runs/unmeasured"), capsys)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("stratagem: ")
    assert WRONG[line] in last
    assert "Traceback" not in err
    assert not (inside / "x").exists() or not any((inside / "x").glob("*.json"))


def test_wrong_options_are_code_2(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in ["sample runs/both", "sample runs/both --out x --sampler hoin", "prepare --ot x"]:
        code, _, err = run(line, capsys)
        assert code == 2, line
        assert len(err.strip().splitlines()) == 1, err
        assert err.startswith("stratagem: ")


def test_damage_is_code_3(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = inside / "runs" / "both" / "checkpoints" / "step-00000006" / "model.safetensors"
    bank = inside / "bank.safetensors"
    for file, line in [
        (model, "sample runs/both --step 6 --out x"),
        (bank, "bank info bank.safetensors"),
        (inside / "stages.json", "train run.yaml --out y"),
        (next((inside / "data").glob("*.safetensors")), "bank build data --out x --encoder pixels"),
    ]:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        code, _, err = run(line, capsys)
        file.write_bytes(whole)
        assert code == 3, (line, err)
        assert file.name in err
        assert len(err.strip().splitlines()) == 1


def test_broken_images_are_skipped_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for k in range(4):
        Image.new("RGB", (20, 16), (60 * k, 0, 0)).save(photos / f"{k}.png")
    (photos / "bad.png").write_bytes((photos / "1.png").read_bytes()[:40])
    code, out, _ = run(f"prepare {photos} --out {tmp_path / 'data'} --size 8", capsys)
    assert code == 0
    assert "4 images of 3x8x8" in out
    assert "bad.png" in out
    assert "1 file left out" in out


def test_every_verb_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        with pytest.raises(SystemExit) as stop:
            main([*verb.split(), "--help"])
        out = capsys.readouterr().out
        assert stop.value.code == 0
        assert f"Example: stratagem {verb}" in out, verb
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    assert main(["--version"]) == 0


def test_help_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    """Examples stand apart, a flag's text runs on, and there is no None to type."""
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    first, second = (line for line in out.splitlines() if line.startswith(("Example:", "On 4")))
    assert first.endswith("train.steps=2000")
    assert second.startswith("On 4 GPUs: torchrun")
    told = " ".join(out.replace("│", " ").split())
    assert "parameters, MACs, memory and disk, and stop" in told
    assert "--no-json" not in out
    assert "{None}" not in out


def test_keys_are_listed_with_what_they_mean(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("keys", capsys)
    assert code == 0
    assert 'train.schedule = "constant"  (constant, cosine)\n    "constant", or "cosine"' in out
    assert "\nstages:\n" in out
    assert max(map(len, out.splitlines())) <= 100
    code, out, _ = run("keys stages.policy --json", capsys)
    (found,) = json.loads(out)
    assert found["default"] == "density"
    assert run("keys stagse", capsys)[0] == 2


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_too_little_memory_is_one_line_that_says_what_helps(
    error: Exception,
    inside: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("stratagem.cli.train.train_run", fail)
    code, _, err = run("train plain.yaml --out more", capsys)
    assert code == 2
    assert "train.accumulate" in err
    assert err.count("\n") == 1
    error = RuntimeError("shapes")
    with pytest.raises(RuntimeError):
        run("train plain.yaml --out more", capsys)


def test_a_plan_needs_no_data_if_it_is_told_their_shape(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "train plain.yaml --out more --set data=absent --shape 1 8 8"
    code, out, _ = run(f"{line} --set stages=null --dry-run", capsys)
    assert code == 0
    assert "parameters in all" in out
    code, _, err = run(line, capsys)
    assert code == 2
    assert "--dry-run" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_run_that_goes_on(
    inside: Path, number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"runs/stopped-{code}"
    line = f"train plain.yaml --out {out} --set train.steps=100000 --set train.log_every=1"
    process = subprocess.Popen(
        [sys.executable, "-m", "stratagem", *line.split()], stderr=subprocess.PIPE, text=True
    )
    log = inside / out / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "the same command goes on" in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    steps = log.read_text().count("\n")
    finish = f"train plain.yaml --out {out} --set train.steps={steps + 2} --set train.log_every=1"
    assert run(finish, capsys)[0] == 0
    assert log.read_text().count("\n") == steps + 2


def test_slow_work_shows_a_rate_and_times_that_can_be_read() -> None:
    assert [_rate(rate) for rate in (0.0312, 0.71, 9.7, 1234.0)] == ["0.031", "0.71", "10", "1,234"]
    lines = _Lines("prepare", "images")
    lines.first, lines.before, now = 100, (1000.0, 300), 1010.0  # it went on, and read 200 again
    assert lines._line(350, 600, now) == "prepare: 350 of 600, 5 images/s, 50 s left"
    assert lines._line(300, 600, now) == "prepare: 300 of 600"
    assert [_time(seconds) for seconds in (7.0, 2820.0, 9000.0)] == ["7 s", "47 min", "2.5 h"]
