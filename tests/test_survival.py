"""What is on the disk survives: kills, damage, a full disk. docs/reliability.md has the figures."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem import checkpoint
from stratagem.checkpoint import Checkpoint, list_steps, load, load_latest, save, set_aside
from stratagem.config import ModelConfig, RunConfig, parse
from stratagem.data.shards import DataSet
from stratagem.errors import DamagedArtifact, InputError, StratagemError
from stratagem.memory.bank import MemoryBank
from stratagem.memory.store import hold
from stratagem.programs.train import train
from stratagem.stages import Stages
from stratagem.train_config import TrainConfig


def content(step: int, numbers: int = 200) -> Checkpoint:
    torch.manual_seed(step)
    tensors = {group: {"w": torch.randn(numbers)} for group in checkpoint.GROUPS}
    return Checkpoint(step, tensors, {"step": step, "rate": 0.1 * step})


def attempted(call: Callable[..., Any], *args: Any) -> tuple[Any, StratagemError | None]:
    try:
        return call(*args), None
    except StratagemError as error:
        return None, error


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


# --- kill -9 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path: Path, kills: int) -> None:
    script = [sys.executable, str(Path(__file__).with_name("killed.py"))]
    done = subprocess.run(
        [*script, str(tmp_path), str(kills), "7"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    print(f"\n{counts}")
    assert counts["kills"] == kills
    assert counts["restarts"] > 0.5 * kills
    assert counts["kills in a save"] > 0.5 * kills
    assert counts["left a draft or half a removal"] > 0.2 * kills  # or it shows nothing
    assert counts["intervals lost"] <= 1
    assert counts["orphans after the next start"] == 0


def config_of(blobs: DataSet, **settings: Any) -> RunConfig:
    return RunConfig(
        data=str(blobs.path),
        model=ModelConfig(width=16, depth=2, heads=2, patch=4),
        train=TrainConfig(**{"steps": 4, "batch_size": 8, "threads": 1, **settings}),
    )


@pytest.mark.parametrize("there", [(), ("run.json",), ("run.json", "stages.json")])
def test_a_first_start_that_was_killed_is_no_obstacle(
    blobs: DataSet, tmp_path: Path, there: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in there:
        (run / name).write_text("{")
    (run / ".config.yaml.99.tmp").write_text("half")
    assert train(config_of(blobs), run).step == 4
    assert not list(run.glob(".*"))


# --- damage --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifacts(
    blobs: DataSet, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
    """One of each kind that training depends on, and how it is read."""
    folder = tmp_path_factory.mktemp("artifacts")
    save(folder / "run", content(3))
    store = hold(torch.randn(blobs.num, 2, 8))
    bank = MemoryBank(store, blobs.labels, blobs.held_out, {"name": "t"}, blobs.fingerprint)
    bank.save(folder / "bank")
    Stages((2.0, -2.0)).save(folder / "stages", {"data": blobs.fingerprint})
    shutil.copytree(blobs.path, folder / "data")
    return {
        "checkpoint": (folder / "run" / "checkpoints" / "step-00000003", read_checkpoint),
        "bank": (folder / "bank", lambda path: MemoryBank.load(path).fingerprint),
        "data": (folder / "data", lambda path: DataSet.open(path).fingerprint),
        "stages": (folder / "stages", Stages.load),
    }


def read_checkpoint(path: Path) -> Any:
    saved = load(path.parents[1], 3)
    return {g: {n: t.tolist() for n, t in named.items()} for g, named in saved.tensors.items()}


def damages(data: bytes, flips: int, draw: random.Random) -> Iterator[bytes]:
    """Cut to nothing, to half, by one byte; and one flipped bit at a time."""
    yield from (data[:0], data[: len(data) // 2], data[:-1])
    for _ in range(flips):
        place, bit = draw.randrange(len(data)), draw.randrange(8)
        yield data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


@pytest.mark.parametrize("flips", [25, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["checkpoint", "bank", "data", "stages"])
def test_every_damage_is_refused(artifacts: Any, kind: str, flips: int) -> None:
    path, read = artifacts[kind]
    whole, draw = read(path), random.Random(1)
    tried = same = 0
    for file in files_of(path):
        data = file.read_bytes()
        for damaged in damages(data, flips, draw):
            file.write_bytes(damaged)
            tried += 1
            found, error = attempted(read, path)
            if error is None:
                assert found == whole, (file.name, "read as something else")
                same += 1
                continue
            assert str(path) in str(error), error
            assert "\n" not in str(error)
            assert isinstance(error, DamagedArtifact | InputError)
        file.write_bytes(data)
    assert read(path) == whole
    print(f"\n{kind}: {tried} damages, {tried - same} refused, {same} that change no value")
    assert same <= 0.005 * tried


def test_damage_ends_the_program_with_code_3(
    artifacts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from stratagem.cli import main

    data = tmp_path / "data"
    shutil.copytree(artifacts["data"][0], data)
    (tmp_path / "c.yaml").write_text(f"data: {data}\ntrain: {{steps: 1}}\n")
    file = data / "labels.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["train", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 3
    said = capsys.readouterr().err
    assert str(file) in said
    assert said.count("\n") == 1


def test_damaged_checkpoints_are_set_aside_and_do_not_count(blobs: DataSet, tmp_path: Path) -> None:
    """Were they counted, "keep the last two" would remove what is intact."""
    run = tmp_path / "run"
    cfg = {"checkpoint_every": 2, "keep_checkpoints": 2}
    train(config_of(blobs, steps=8, **cfg), run)
    assert list_steps(run) == [6, 8]
    file = run / "checkpoints" / "step-00000008" / "ema.safetensors"
    file.write_bytes(b"")
    train(config_of(blobs, steps=9, **cfg), run)  # from 6
    assert list_steps(run) == [8, 9]
    assert [load(run, step).step for step in (8, 9)] == [8, 9]
    assert (run / "checkpoints" / "damaged-00000008").is_dir()
    set_aside(run, after=8)
    assert list_steps(run) == [8]


# --- what is kept --------------------------------------------------------------------------------


def test_the_last_ones_and_every_so_many_steps_are_kept(tmp_path: Path) -> None:
    for step in range(1, 24):
        save(tmp_path, content(step), keep_last=2, keep_every=10)
    assert list_steps(tmp_path) == [10, 20, 22, 23]
    save(tmp_path, content(21), keep_last=1)  # later ones count for nothing: who knows of them
    assert list_steps(tmp_path) == [21, 22, 23]
    train_section = {"checkpoint_every": 10, "keep_every": 15}
    with pytest.raises(InputError, match=r"keep_every must be a multiple"):
        parse({"data": "d", "train": train_section})
    with pytest.raises(InputError, match=r"no effect where train.keep_checkpoints 0"):
        parse({"data": "d", "train": {**train_section, "keep_every": 20, "keep_checkpoints": 0}})


def test_nothing_is_removed_before_the_new_one_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that returns other bits than it was given."""
    for step in (1, 2):
        save(tmp_path, content(step), keep_last=2)
    stands = checkpoint.write_folder

    def spoilt(path: Path, *args: Any, **keywords: Any) -> Any:
        import contextlib

        @contextlib.contextmanager
        def writing() -> Iterator[Path]:
            with stands(path, *args, **keywords) as draft:
                yield draft
            file = path / "model.safetensors"
            file.write_bytes(file.read_bytes()[:-1] + b"x")

        return writing()

    monkeypatch.setattr(checkpoint, "write_folder", spoilt)
    with pytest.raises(DamagedArtifact, match=r"model\.safetensors"):
        save(tmp_path, content(3), keep_last=2)
    assert list_steps(tmp_path) == [1, 2, 3]
    saved = load_latest(tmp_path)
    assert saved is not None
    assert saved.step == 2


def test_files_are_for_the_group_too(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = save(tmp_path / "run", content(1))
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in files_of(path)}
    assert modes == {0o640}
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


# --- a full disk ---------------------------------------------------------------------------------

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk in memory of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def free_pages(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize // PAGE


def test_a_full_disk_leaves_the_checkpoint_before(small_disk: Path) -> None:
    """With every number of free pages: in a shard, in the state, in the manifest."""
    run, filler = small_disk / "run", small_disk / "filler"
    save(run, content(1, 2000), keep_last=1)
    before, needed = free_pages(small_disk), 0
    for pages in range(40):
        filler.write_bytes(b"x" * PAGE * max(0, free_pages(small_disk) - pages))
        _, error = attempted(lambda: save(run, content(2, 2000), keep_last=1))
        if error is None:
            needed = pages
            break
        assert isinstance(error.__cause__, OSError)
        assert error.__cause__.errno == errno.ENOSPC
        assert "step-00000002 cannot be written (No space left" in str(error)
        assert "\n" not in str(error)
        assert error.exit_code == 2
        assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000001"]
        assert load(run, 1).step == 1
        filler.unlink()
        assert free_pages(small_disk) == before
    print(f"\n{needed} sizes of a full disk, each refused; with {needed} pages it is written")
    assert needed > 5
    assert list_steps(run) == [2]


def test_a_rename_that_fails_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk may be full for a name, too."""
    save(tmp_path, content(1))
    replace, names = os.replace, list[str]()

    def full(source: Any, target: Any) -> None:
        names.append(Path(target).name)
        if Path(target).name == "step-00000002":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"step-00000002 cannot be written \(No space left"):
        save(tmp_path, content(2))
    assert names == ["step-00000002"]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert load(tmp_path, 1).step == 1


def test_a_run_on_a_full_disk_ends_with_one_line(
    blobs: DataSet, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from stratagem.cli import main
    from stratagem.config import dump

    (tmp_path / "c.yaml").write_text(dump(config_of(blobs, steps=30, checkpoint_every=1)))
    command = ["train", str(tmp_path / "c.yaml"), "--out", str(small_disk / "run")]
    assert main([*command, "--set", "train.keep_checkpoints=0"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be written (No space left on device): make room" in said
    kept = list_steps(small_disk / "run")
    assert 1 <= len(kept) < 30
    assert load(small_disk / "run", kept[-1]).step == kept[-1]
    shutil.rmtree(small_disk / "run" / "checkpoints" / "step-00000001")
    assert main([*command, "--set", "train.keep_checkpoints=1"]) == 0  # with room, it goes on
