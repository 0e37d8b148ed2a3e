"""Sampling into a folder: stopped, shared, gone on with."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stratagem import artifact
from stratagem.assemble import Model
from stratagem.autoencoders import Finish
from stratagem.cli import main
from stratagem.config import RunConfig
from stratagem.denoiser import Denoiser
from stratagem.errors import DamagedArtifact, InputError
from stratagem.programs.sample import SampleConfig, sample_into, sample_run, save_samples
from stratagem.programs.sources import open_source
from stratagem.schedule import Linear

CFG = SampleConfig(num=11, steps=2, sampler="euler", batch_size=3)


class Halves(nn.Module):
    """A network without a sum over anything, so that no batch rounds otherwise than another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5]), requires_grad=False)

    def forward(self, x_t: Tensor, time: Tensor, **_: Any) -> Tensor:
        return self.weight * x_t


def model(channels: int = 1, weight: float = 0.5) -> Model:
    network = Halves()
    network.weight.fill_(weight)
    return Model(
        denoiser=Denoiser(network, Linear(), "v"),
        config=RunConfig(data="data"),
        made={"shape": (channels, 4, 4), "num_classes": 0, "data": ""},
        bank=None,
        step=7,
        path=Path("run"),
        finish=Finish((channels, 4, 4)),
    )


def load_images(path: Path, channels: int) -> Tensor:
    return open_source(path, channels).all()


class Stop(Exception):
    """Stands for a signal."""


def stop_after(num: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= num:
            raise Stop

    return progress


def test_a_stopped_call_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    """With another batch size, and the same bytes as if it had never stopped."""
    with pytest.raises(Stop):
        sample_into(model(), CFG, tmp_path / "out", progress=stop_after(6))
    assert not (tmp_path / "out").exists()
    made: list[tuple[int, int]] = []
    smaller = replace(CFG, batch_size=2)
    there = sample_into(
        model(), smaller, tmp_path / "out", progress=lambda *state: made.append(state)
    )
    assert there == 11
    assert made == [(8, 11), (10, 11), (11, 11)]
    sample_into(model(), CFG, tmp_path / "at-once")
    ours, reference = (
        artifact.read_folder(tmp_path / name, "samples") for name in ("out", "at-once")
    )
    assert len(ours.files) == 12
    assert ours == reference
    assert torch.equal(load_images(tmp_path / "out", 1), sample_run(model(), CFG).images)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["at-once", "out"]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_processes_share_the_images_in_any_order(tmp_path: Path, order: tuple[int, ...]) -> None:
    counts = [sample_into(model(), CFG, tmp_path / "out", rank=r, world=3) for r in order]
    assert counts[-1] == 11
    assert counts == sorted(set(counts))
    assert torch.equal(load_images(tmp_path / "out", 1), sample_run(model(), CFG).images)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_another_number_of_processes_goes_on(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        sample_into(model(), CFG, tmp_path / "out", rank=1, world=2, progress=stop_after(3))
    assert sample_into(model(), CFG, tmp_path / "out", rank=0, world=4) == 6
    assert sample_into(model(), replace(CFG, batch_size=100), tmp_path / "out") == 11
    assert torch.equal(load_images(tmp_path / "out", 1), sample_run(model(), CFG).images)


def test_parts_that_overlap_give_each_image_once(tmp_path: Path) -> None:
    """As two calls at the same time, by other numbers of processes, leave them."""
    sample_into(model(), CFG, tmp_path / "out", world=2)
    sample_into(model(), CFG, tmp_path / "other", rank=1, world=5)
    for part in (tmp_path / "other.part").glob("0*"):
        part.rename(tmp_path / "out.part" / part.name)
    sample_into(model(), CFG, tmp_path / "out")
    assert torch.equal(load_images(tmp_path / "out", 1), sample_run(model(), CFG).images)


def test_processes_make_the_batches_of_one(tmp_path: Path) -> None:
    """A batch of other rows would round its sums in another way."""
    for rank in (0, 2):
        sample_into(model(), CFG, tmp_path / "out", rank=rank, world=3)
    parts = sorted(part.stem for part in (tmp_path / "out.part").glob("0*"))
    assert parts == ["000000000-000000003", "000000006-000000009", "000000009-000000011"]


def test_more_processes_than_images(tmp_path: Path) -> None:
    cfg = replace(CFG, num=2)
    for rank in range(5):
        there = sample_into(model(), cfg, tmp_path / "out", rank=rank, world=5)
    assert there == 2
    assert len(load_images(tmp_path / "out", 1)) == 2


def test_a_finished_call_is_left_as_it_is(tmp_path: Path) -> None:
    sample_into(model(), CFG, tmp_path / "out")
    before = (tmp_path / "out" / artifact.MANIFEST).stat().st_mtime_ns
    assert sample_into(model(), CFG, tmp_path / "out", rank=3, world=4) == 11
    assert (tmp_path / "out" / artifact.MANIFEST).stat().st_mtime_ns == before
    for other in (replace(CFG, seed=1), replace(CFG, num=12)):
        with pytest.raises(InputError, match="already exists"):
            sample_into(model(), other, tmp_path / "out")
    with pytest.raises(InputError, match="already exists"):
        sample_into(model(weight=0.4), CFG, tmp_path / "out")


def test_other_settings_do_not_go_on(tmp_path: Path) -> None:
    sample_into(model(), CFG, tmp_path / "out", world=2)
    for other, name in (
        ((model(), replace(CFG, steps=3)), "steps"),
        ((model(weight=0.4), CFG), "weights"),
    ):
        with pytest.raises(InputError, match=f"other settings \\({name}\\)"):
            sample_into(*other, tmp_path / "out", rank=1, world=2)
    with pytest.raises(InputError, match="format"):
        sample_into(model(), CFG, tmp_path / "out", form="npz")
    with pytest.raises(InputError, match="steps"):
        sample_into(model(), replace(CFG, steps=0), tmp_path / "none")
    assert not (tmp_path / "none.part").exists()


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    sample_into(model(), CFG, tmp_path / "out", world=2)
    part = next((tmp_path / "out.part").glob("0*"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(DamagedArtifact, match=part.name):
        sample_into(model(), CFG, tmp_path / "out")
    part.unlink()
    assert sample_into(model(), CFG, tmp_path / "out") == 11


def _slowly(out: Path, rank: int, world: int, pause: float) -> None:
    cfg = replace(CFG, num=60, batch_size=1)
    sample_into(model(), cfg, out, rank=rank, world=world, progress=lambda *_: time.sleep(pause))


def test_killed_processes_leave_nothing_that_hinders(tmp_path: Path) -> None:
    """Three at once, two killed: the third ends; together with new ones all is there."""
    out, fork = tmp_path / "out", multiprocessing.get_context("fork")
    for attempt in range(3):
        pauses = (0.05, 0.05, 0.0) if attempt < 2 else (0.0, 0.0, 0.0)
        workers = [fork.Process(target=_slowly, args=(out, r, 3, p)) for r, p in enumerate(pauses)]
        for worker in workers:
            worker.start()
        if attempt < 2:
            time.sleep(0.25)
            for worker in workers[:2]:
                os.kill(worker.pid or 0, signal.SIGKILL)
        for worker in workers:
            worker.join(30)
        codes = [worker.exitcode for worker in workers]
        assert codes == ([-9, -9, 0] if attempt < 2 else [0, 0, 0])
        assert out.exists() == (attempt == 2)
    whole = sample_run(model(), replace(CFG, num=60)).images
    assert torch.equal(load_images(out, 1), whole)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_process_killed_while_assembling_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample_into(model(), CFG, tmp_path / "out", world=2)
    (tmp_path / ".out.99999.tmp").mkdir()
    (tmp_path / ".out.99999.tmp" / "000000.png").write_bytes(b"half")
    sample_into(model(), CFG, tmp_path / "out", rank=1, world=2)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "out.part").mkdir()  # killed before the parts were taken away
    sample_into(model(), CFG, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_while_one_assembles_the_others_end(tmp_path: Path) -> None:
    import fcntl

    sample_into(model(), CFG, tmp_path / "out", world=2)
    with (tmp_path / "out.part" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert sample_into(model(), CFG, tmp_path / "out", rank=1, world=2) == 11
        assert not (tmp_path / "out").exists()
    sample_into(model(), CFG, tmp_path / "out")
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("channels", [1, 3])
def test_an_npz_is_adms(tmp_path: Path, channels: int) -> None:
    for name in ("one", "two"):
        sample_into(model(channels), CFG, tmp_path / name, form="npz")
    with np.load(tmp_path / "one" / "samples.npz") as file:
        pictures = file["arr_0"]
    images = sample_run(model(channels), CFG).images
    assert pictures.dtype == np.uint8
    assert pictures.shape == (11, 4, 4, 3)
    assert np.array_equal(pictures[..., 0], images[:, 0].numpy())
    assert torch.equal(load_images(tmp_path / "one", channels), images)
    first, second = ((tmp_path / name / "samples.npz").read_bytes() for name in ("one", "two"))
    assert first == second  # no date inside


def test_latents_are_kept_as_they_are(tmp_path: Path) -> None:
    sample_into(model(4), CFG, tmp_path / "out")
    latents = artifact.read_tensor_file(tmp_path / "out" / "latents.safetensors")["latents"]
    assert torch.equal(latents, sample_run(model(4), CFG).images)
    save_samples(sample_run(model(4), CFG), tmp_path / "again", {})
    again = artifact.read_tensor_file(tmp_path / "again" / "latents.safetensors")["latents"]
    assert torch.equal(again, latents)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 of 2"),
        ({"RANK": "1"}, "RANK is 1 of 1"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "torchrun"),
    ],
)
def test_an_environment_that_is_not_torchruns_is_refused(
    variables: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["sample", "nowhere", "--out", "x"]) == 2
    assert message in capsys.readouterr().err
