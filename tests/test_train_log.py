"""What a run tells as it trains: lines without gaps or doubles, pictures that disturb nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stratagem.assemble import Parts, assemble, open_run
from stratagem.checkpoint import SNAPSHOTS, list_steps, load
from stratagem.config import MemoryConfig, ModelConfig, RunConfig, StagesConfig, dump, parse
from stratagem.data.shards import DataSet
from stratagem.distributed import World
from stratagem.errors import InputError, MissingExtra
from stratagem.memory.bank import MemoryBank
from stratagem.memory.store import hold
from stratagem.programs.sample import SampleConfig, sample_run
from stratagem.programs.train import train
from stratagem.programs.train_log import MetricsLog, open_log, read_log
from stratagem.programs.train_samples import SamplePictures, picture_of
from stratagem.train import TrainState
from stratagem.train_config import Log, TrainConfig
from tolerances import FLOAT32


@pytest.fixture(scope="module")
def config(blobs: DataSet, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Memory with held-out rows, and two stages whose decoders part at step 5."""
    folder = tmp_path_factory.mktemp("parts")
    images = blobs.images(torch.arange(blobs.num))
    store = hold(torch.stack([s.float().flatten(1) + 1 for s in (images, images.flip(-1))], 1))
    bank = MemoryBank(store, blobs.labels, blobs.held_out, {"name": "test"}, blobs.fingerprint)
    bank.save(folder / "bank")
    return RunConfig(
        data=str(blobs.path),
        seed=5,
        model=ModelConfig(width=16, depth=3, heads=2, patch=2, labels=True),
        memory=MemoryConfig(str(folder / "bank"), dropout=0.2),
        stages=StagesConfig(edges=(0.0,), shared=1, depths=(2, 1), warm_steps=5),
        train=TrainConfig(
            steps=8,
            batch_size=8,
            learning_rate=1e-3,
            ema_decay=0.9,
            checkpoint_every=3,
            keep_checkpoints=0,
            log_every=1,
            threads=1,
        ),
    )


def with_train(config: RunConfig, **settings: Any) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **settings))


class Killed(Exception):
    """Stands for a process that ends without a word."""


def killed_at(step: int, config: RunConfig, run: Path) -> None:
    def progress(done: int, total: int) -> None:
        if done == step:
            raise Killed

    with pytest.raises(Killed):
        train(config, run, progress=progress)


def told(run: Path) -> list[dict[str, Any]]:
    measured = {"images_per_second", "peak_memory_mib"}
    lines = read_log(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in measured} for line in lines]


# --- lines ---------------------------------------------------------------------------------------


def test_lines_say_rate_and_memory(config: RunConfig, tmp_path: Path) -> None:
    train(with_train(config, log_every=3), tmp_path / "run")
    lines = read_log(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 8]
    for line in lines:
        assert line["images_per_second"] > 0
        assert 50 < line["peak_memory_mib"] < 100_000  # torch alone is larger than 50
    rises = [line["peak_memory_mib"] for line in lines]
    assert rises == sorted(rises)


def test_a_log_goes_on_behind_a_line_that_was_cut_off(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n{"step": 3}\n7\n{"step": 4, "lo'
    path.write_text(text)
    assert [line["step"] for line in read_log(path)] == [1, 2, 3]
    assert read_log(tmp_path / "none") == []
    log = MetricsLog(path, config.train, 2)
    assert path.read_text() == text.partition('{"step": 3')[0]
    state = TrainState(assemble(config).objective, config.train)
    state.step, state.sums = 4, {"loss": torch.tensor(3.0)}
    log(state)
    log(state)  # nothing new
    assert [line["step"] for line in read_log(path)] == [1, 2, 4]
    assert read_log(path)[-1]["loss"] == 1.5  # a mean over steps 3 and 4


def test_lines_of_a_continued_run_have_their_keys_in_the_same_order(
    config: RunConfig, tmp_path: Path
) -> None:
    weighty = with_train(config, cosine_weight=0.5, log_every=2)
    killed_at(4, weighty, tmp_path / "run")  # the line of step 4 is begun before the checkpoint
    train(weighty, tmp_path / "run")
    orders = [list(line) for line in read_log(tmp_path / "run" / "metrics.jsonl")]
    assert orders == [orders[0]] * 4


def test_tensorboard_has_each_step_once(config: RunConfig, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging = with_train(config, log=("tensorboard",))
    run = tmp_path / "run"
    killed_at(2, logging, run)  # before the first checkpoint
    killed_at(5, logging, run)  # after that of step 3
    train(logging, run)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    lines = read_log(run / "metrics.jsonl")
    assert len(lines) == 8
    assert set(events.Tags()["scalars"]) == lines[0].keys() - {"step"}
    for name in ("loss", "grad_norm", "peak_memory_mib"):
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [line["step"] for line in lines]
        values = [scalar.value for scalar in scalars]
        assert values == pytest.approx([line[name] for line in lines], rel=FLOAT32)
    train(config, tmp_path / "plain")
    assert told(tmp_path / "plain") == told(run)
    assert not (tmp_path / "plain" / "tensorboard").exists()


class FakeWandb(types.ModuleType):
    """As much of wandb as is used; its service keeps what was logged, as the real one does."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[dict[str, Any]] = []
        self.kept: dict[str, dict[int, Any]] = {}
        self.finished = 0
        self.refusal: str | None = None

    def init(self, **settings: Any) -> Any:
        if self.refusal is not None:
            raise self.Error(self.refusal)
        self.calls.append(settings)
        name = settings["id"] or f"id{len(self.kept)}"
        rows = self.kept.setdefault(name, {})
        run = types.SimpleNamespace(id=name, step=max(rows, default=-1) + 1)

        def log(line: dict[str, Any], step: int, commit: bool) -> None:
            assert commit
            assert step not in rows, "wandb warns of steps that it knows"
            rows[step], run.step = line, step + 1

        def finish() -> None:
            self.finished += 1

        run.log, run.finish = log, finish
        return run


def test_wandb_has_one_run_with_each_step_once(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    logging = with_train(config, log=("wandb",))
    killed_at(5, logging, tmp_path / "one")
    train(logging, tmp_path / "one")
    train(logging, tmp_path / "two")
    assert list(fake.kept) == ["id0", "id1"]
    assert fake.finished == 3
    lines = read_log(tmp_path / "one" / "metrics.jsonl")
    assert list(fake.kept["id0"]) == [line["step"] for line in lines] == list(range(1, 9))
    losses = [line["loss"] for line in fake.kept["id0"].values()]
    assert losses == [line["loss"] for line in lines]
    assert [call["id"] for call in fake.calls] == [None, "id0", None]
    first = fake.calls[0]
    assert (first["project"], first["name"], first["resume"]) == ("stratagem", "one", "allow")
    assert first["config"]["train"]["batch_size"] == 8
    fake.refusal = "no key"
    with pytest.raises(InputError, match="no key; run  wandb login") as refused:
        train(logging, tmp_path / "three")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", Log.__args__)
def test_what_is_not_installed_is_named(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Log
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    opened = open_log(tmp_path, with_train(config, log=(name,)), 0)
    with pytest.raises(MissingExtra, match=rf"{name} .*stratagem\[log\]"), opened:
        pass


# --- pictures ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictured(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("pictured") / "run"
    train(with_train(config, samples_every=3), run)
    return run


def pictures(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((run / "samples").iterdir())}


def test_pictures_do_not_disturb_the_training(
    config: RunConfig, pictured: Path, tmp_path: Path
) -> None:
    train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "samples").exists()
    assert told(tmp_path / "run") == told(pictured)
    for step in list_steps(pictured):
        one, other = load(pictured, step), load(tmp_path / "run", step)
        assert one.state == other.state
        for group, named in one.tensors.items():
            assert all(torch.equal(named[n], other.tensors[group][n]) for n in named)


def test_pictures_are_those_of_the_averages(config: RunConfig, pictured: Path) -> None:
    """As `sample` draws them from the checkpoint: before and after the decoders part."""
    assert list(pictures(pictured)) == [f"step-{step:08d}.png" for step in (3, 6, 8)]
    for step in (3, 6, 8):
        model = open_run(pictured, step=step)
        cfg = SampleConfig(num=16, seed=5, sampler="dpm++2m", steps=10, batch_size=16)
        blocks = [
            sample_run(model, dataclasses.replace(cfg, snippets=policy)).images
            for policy in ("train", "held-out")
        ]
        drawn = Image.open(pictured / "samples" / f"step-{step:08d}.png")
        assert np.array_equal(np.array(drawn), np.array(picture_of(blocks)))
    assert len(set(pictures(pictured).values())) == 3


def test_a_run_that_goes_on_draws_the_same_pictures(
    config: RunConfig, pictured: Path, tmp_path: Path
) -> None:
    drawing = with_train(config, samples_every=3)
    killed_at(7, drawing, tmp_path / "run")
    (tmp_path / "run" / "samples" / "step-00000006.png").write_bytes(b"half")
    (tmp_path / "run" / "checkpoints" / "step-00000006" / "manifest.json").unlink()
    train(drawing, tmp_path / "run")
    assert pictures(tmp_path / "run") == pictures(pictured)


def test_a_picture_is_its_tiles() -> None:
    images = torch.arange(32, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 64, 96)
    pixels = np.array(picture_of([images[:16], images[16:]]))
    assert pixels.shape == (4 * 68 + 4, 8 * 100, 3)
    for number in range(32):
        row, column = divmod(number, 8)
        top = 68 * row + 2 + 4 * (row > 1)
        tile = pixels[top : top + 64, 100 * column + 2 :][:, :96]
        assert (tile == number).all()
    assert (pixels[136:140] == 255).all()
    small = picture_of([torch.zeros(8, 1, 20, 20, dtype=torch.uint8)])
    assert (small.mode, small.size) == ("L", (8 * 64, 64))


def test_runs_of_latents_need_an_autoencoder(config: RunConfig, tmp_path: Path) -> None:
    parts = assemble(config)
    made = parts.description | {
        "shape": [4, 8, 8],
        "latents": {"autoencoder": {}, "mean": [0.0] * 4, "std": [1.0] * 4},
    }
    latent = Parts(parts.objective, parts.batches, parts.stages, made)
    with pytest.raises(InputError, match=r"give train\.samples_autoencoder"):
        SamplePictures(tmp_path, config, latent, World())
    given = with_train(config, samples_every=2, samples_autoencoder="weights")
    with pytest.raises(InputError, match=r"^train\.samples_autoencoder: .*no effect"):
        SamplePictures(tmp_path, given, parts, World())
    with pytest.raises(InputError, match=r"without train\.samples_every"):
        parse({"data": "x", "train": {"samples_autoencoder": "weights"}})


# --- several processes ---------------------------------------------------------------------------


def together(config: RunConfig, run: Path, size: int) -> None:
    """Trains by the command line, in several processes."""
    run.parent.mkdir(exist_ok=True)
    file = run.with_suffix(".yaml")
    file.write_text(dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "stratagem", "train", str(file), "--out", str(run)]
    processes = [
        subprocess.Popen(
            line,
            env={**os.environ, **place, "RANK": str(r), "WORLD_SIZE": str(size)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(size)
    ]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_draw_and_keep_what_one_does(
    config: RunConfig, tmp_path: Path, parallel: str
) -> None:
    config = with_train(
        config, samples_every=4, ema_stds=(0.05, 0.1), ema_snapshot_every=4, log=("tensorboard",)
    )
    one, two = tmp_path / "one", tmp_path / "two"
    train(config, one)
    sharded = parallel == "fsdp"
    together(with_train(config, parallel=parallel, sharded_checkpoints=sharded), two, 2)
    for name in pictures(one):
        a, b = (np.array(Image.open(run / "samples" / name)).astype(int) for run in (one, two))
        assert np.abs(a - b).max() <= 2
    assert len(list((two / "tensorboard").iterdir())) == 1  # process 0 alone
    assert [line["step"] for line in told(two)] == list(range(1, 9))
    assert list_steps(two, SNAPSHOTS) == [4, 8]
    for step in (4, 8):
        kept = [load(run, step, place=SNAPSHOTS).tensors for run in (one, two)]
        assert kept[0].keys() == kept[1].keys() == {"ema-0.05", "ema-0.1"}
        for group, named in kept[0].items():
            assert set(named) == set(kept[1][group])
            for name, average in named.items():
                torch.testing.assert_close(kept[1][group][name], average, rtol=0, atol=1e-4)
    weights = (
        dict(open_run(run, ema_std=0.07).denoiser.backbone.named_parameters()) for run in (one, two)
    )
    a, b = weights
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-4
    assert json.loads((two / "checkpoints" / "step-00000008" / "state.json").read_text())
