"""The runner of experiments: a table of runs, stopped, continued, measured alike, told honestly."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from stratagem.config import dump
from stratagem.errors import InputError
from stratagem.programs.results import RunResult
from test_demo import result

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import runner  # noqa: E402
import runner_report  # noqa: E402


def body(data: Path, **train: Any) -> dict[str, Any]:
    """A table of two tiny runs, the second with labels."""
    settings = {"steps": 2, "batch_size": 4, "checkpoint_every": 1, "keep_checkpoints": 0}
    model = {"width": 8, "depth": 1, "heads": 1, "patch": 4}
    return {
        "artifacts": {},
        "base": {"data": str(data), "model": model, "train": {**settings, **train}},
        "runs": {"plain": {}, "class": {"model": {"labels": True}}},
        "seeds": [0, 1],
        "features": ["pixels"],
        "sampling": {"num": 40, "sampler": "euler", "steps": 1},
    }


def written(table: dict[str, Any], folder: Path) -> Path:
    file = folder / "table.yaml"
    file.write_text(yaml.safe_dump(table, sort_keys=False))
    return file


def states(file: Path, out: Path) -> dict[str, str]:
    return {pair.id: pair.state() for pair in runner.read_table(file, out).pairs}


def test_every_table_of_ours_is_read(tmp_path: Path) -> None:
    files = sorted(EXPERIMENTS.glob("*.yaml"))
    assert {"digits", "fashion-mnist"} <= {file.stem for file in files}
    for file in files:
        found = runner.read_table(file, tmp_path)
        assert isinstance(found, runner.Table)
        num = len(found.pairs) // 3
        assert [pair.config.seed for pair in found.pairs] == [0] * num + [1] * num + [2] * num
        told = "".join(dump(pair.config) for pair in found.pairs)
        assert all(str(tmp_path / name) in told for name in found.artifacts)


def test_a_run_differs_from_the_base_by_its_changes_and_seed_alone(tmp_path: Path) -> None:
    table = body(tmp_path, warmup_steps=1)
    table["runs"]["longer"] = {"train": {"steps": 5, "checkpoint_every": 2}}
    pairs = {p.id: p for p in runner.read_table(written(table, tmp_path), tmp_path).pairs}
    plain, longer = pairs["plain/1"].config, pairs["longer/1"].config
    train = dataclasses.replace(plain.train, steps=5, checkpoint_every=2)
    assert longer == dataclasses.replace(plain, train=train)
    assert pairs["plain/0"].config == dataclasses.replace(plain, seed=0)
    assert plain.train.threads == 1
    assert pairs["plain/1"].sampling.seed == 1
    assert pairs["longer/0"].left() == [2, 4, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": [0]}, "exactly the sections artifacts"),
        ({"seeds": 3}, r"seeds \(list\)"),
        ({"seeds": []}, "there are no runs"),
        ({"sampling": {"number": 3}}, "sampling: .*number"),
        ({"sampling": {"sampler": "heum"}}, "heum is neither"),
        ({"features": ["pixel"]}, "pixel is neither"),
        ({"runs": {"plain": {"train": {"step": 3}}}}, "table.yaml: plain: unknown key train.step"),
        ({"runs": {"plain": {"train": {"keep_checkpoints": 3}}}}, "must be 0"),
    ],
)
def test_a_mistake_in_a_table_is_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = written({**body(tmp_path), **change}, tmp_path)
    with pytest.raises(InputError, match=message):
        runner.read_table(file, tmp_path)


def test_runs_are_measured_once_and_by_one_protocol(
    blobs_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    file = written(body(blobs_path), tmp_path)
    assert set(states(file, out).values()) == {"waiting"}
    for name in ("plain/0", "plain/1", "class/0"):
        assert runner.main([str(file), str(out), "--run", name]) == 0
    assert runner.main([str(file), str(out), "--report"]) == 1  # class/1 is left
    assert "class/1: waiting" in capsys.readouterr().err

    record = json.loads((out / "results.json").read_text())
    assert {name: len(rows) for name, rows in record["runs"].items()} == {"plain": 2, "class": 1}
    assert record["left"] == {"class/1": "waiting"}
    row = record["runs"]["plain"][1]
    assert row["seed"] == 1
    assert row["training images"] == 8
    assert row["training seconds"] > 0
    assert row["baseline reached after, % of its images"] <= 100  # itself
    assert "class/1 (waiting)" in (out / "results.md").read_text()
    assert "<h2>The table</h2>" in (out / "report.html").read_text()

    newest = out / "runs" / "plain" / "seed-0" / "checkpoints" / "step-00000002" / "manifest.json"
    trained, other = newest.stat().st_mtime_ns, body(blobs_path)
    other["sampling"]["steps"] = 2
    assert states(written(other, tmp_path), out)["plain/0"] == "trained, 2 evaluations left"
    assert runner.main([str(file), str(out), "--run", "plain/0"]) == 0
    assert states(file, out)["plain/0"] == "done"
    told = out / "runs" / "plain" / "seed-0.yaml"  # as written before a setting came
    told.write_text(told.read_text().replace("  nonfinite_limit: 10\n", ""))
    assert states(file, out)["plain/0"] == "done"
    more = {**other, "features": ["pixels", "effnet"]}
    assert states(written(more, tmp_path), out)["plain/0"] == "trained, 2 evaluations left"
    assert newest.stat().st_mtime_ns == trained

    other["base"]["train"]["learning_rate"] = 1e-3  # another run altogether
    assert states(written(other, tmp_path), out)["plain/0"] != "done"
    assert runner.main([str(file), str(out), "--run", "plain/0"]) == 2
    assert "learning_rate is 0.001" in capsys.readouterr().err


def test_no_baseline_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(body(tmp_path), tmp_path)
    assert runner.main([str(file), str(tmp_path), "--report"]) == 2
    assert "no run of the baseline plain is done" in capsys.readouterr().err
    assert runner.main([str(file), str(tmp_path), "--run", "plain/7"]) == 2
    assert runner.main([str(file), str(tmp_path), "--jobs", "0"]) == 2


def test_an_artifact_that_is_not_made_ends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = body(tmp_path)
    table["artifacts"] = {"data": "no-such-verb here"}
    assert runner.main([str(written(table, tmp_path)), str(tmp_path / "out")]) == 1
    assert "data was not made: stratagem no-such-verb here" in capsys.readouterr().err


def test_ranges_that_overlap_decide_nothing() -> None:
    assert runner_report.verdict([1.0, 2.0], [2.1, 3.0]) == "better"
    assert runner_report.verdict([2.1, 3.0], [1.0, 2.0]) == "worse"
    assert runner_report.verdict([1.0, 2.0], [2.0, 3.0]) == "inconclusive"


def test_the_table_tells_spread_verdict_and_how_soon(tmp_path: Path) -> None:
    def runs(name: str, *ends: float) -> list[RunResult]:
        found = []
        for seed, end in enumerate(ends):
            run = result(f"{name} {seed}", {100: 2.0, 200: end})
            evaluations = [
                dataclasses.replace(e, protocol={**e.protocol, "run": str(tmp_path)})
                for e in run.evaluations
            ]
            found.append(dataclasses.replace(run, evaluations=evaluations, setting=name))
        return found

    groups = {"plain": runs("plain", 1.0, 1.2), "memory": runs("memory", 0.5, 0.6)}
    file = written(body(tmp_path), tmp_path)
    text = runner_report.write_report(file, tmp_path, groups, {})
    assert "| memory (2) | 0.55 (0.5 to 0.6), better |" in text
    reached = [r["baseline reached after, % of its images"] for r in _rows(tmp_path, "memory")]
    assert reached == pytest.approx([100 * (1 + 1 / 1.5) / 2, 100 * (1 + 0.8 / 1.4) / 2])
    groups["memory"] = runs("memory", 0.5, 1.3)
    text = runner_report.write_report(file, tmp_path, groups, {})
    assert "| memory (2) | 0.9 (0.5 to 1.3), inconclusive | 83.3 in 1 of 2 |" in text


def _rows(out: Path, name: str) -> list[dict[str, float]]:
    return json.loads((out / "results.json").read_text())["runs"][name]


@pytest.mark.slow
def test_a_run_that_fails_ends_no_other(blobs_path: Path, tmp_path: Path) -> None:
    table = body(blobs_path)
    table["runs"] = {"plain": {}, "broken": {"memory": {"bank": "$OUT/no-bank"}}}
    table["seeds"] = [0]
    file, out = written(table, tmp_path), tmp_path / "out"
    assert runner.main([str(file), str(out), "--jobs", "2"]) == 1
    found = states(file, out)
    assert found["plain/0"] == "done"
    assert found["broken/0"].startswith("failed with exit code 2: ")
    assert "no-bank" in found["broken/0"]
    assert (out / "report.html").exists()


@pytest.mark.slow
def test_stopped_it_goes_on_where_it_was(blobs_path: Path, tmp_path: Path) -> None:
    table = body(blobs_path, steps=100_000, checkpoint_every=50_000, log_every=10)
    table["runs"], table["seeds"] = {"plain": {}}, [0]
    file, out = written(table, tmp_path), tmp_path / "out"
    words = [sys.executable, str(EXPERIMENTS / "runner.py"), str(file), str(out)]
    log = out / "runs" / "plain" / "seed-0" / "metrics.jsonl"
    stops = []
    for _ in range(2):
        before = log.stat().st_size if log.exists() else 0
        process = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"})
        until = time.monotonic() + 60
        while (log.stat().st_size if log.exists() else 0) <= before:
            assert time.monotonic() < until
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
        steps = sorted(p.name for p in (log.parent / "checkpoints").glob("step-*"))
        stops.append(steps[-1])
    assert 0 < int(stops[0].removeprefix("step-")) < int(stops[1].removeprefix("step-")) < 100_000
    assert states(file, out)["plain/0"].startswith("step ")
