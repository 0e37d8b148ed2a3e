"""data/official.py: latents of LightningDiT and GMem where they are, and to and from ours."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from autoencoder_weights import Means
from stratagem.batches import Batches
from stratagem.cli import main
from stratagem.data.datasets import prepare
from stratagem.data.official import (
    convert_official,
    is_official,
    official_files,
    open_data,
    open_official,
    read_statistics,
    write_official,
)
from stratagem.data.shards import DataSet
from stratagem.data.writing import Sample, Source, write_dataset
from stratagem.density import Uniform
from stratagem.errors import DamagedArtifact, InputError
from stratagem.memory.bank import MemoryBank
from tolerances import FLOAT32, assert_near

SHAPE = (4, 3, 3)
COUNTS = {(0, 0): 5, (0, 1): 2, (1, 0): 5, (1, 1): 1}  # rank, shard -> images


def official(folder: Path, *, features: bool = False) -> dict[str, Tensor]:
    """Writes made-up shards in the official layout, and returns all of their tensors in a row."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(0)
    shards = []
    for (rank, shard), num in COUNTS.items():
        tensors = {
            "latents": 3 * torch.randn(num, *SHAPE, generator=random) + 1,
            "latents_flip": 3 * torch.randn(num, *SHAPE, generator=random) + 1,
            "labels": torch.randint(0, 7, (num,), generator=random),
        }
        if features:
            tensors["cls_tokens"] = torch.randn(num, 6, generator=random)
            tensors["cls_tokens_flip"] = torch.randn(num, 6, generator=random)
        name = f"latents_rank{rank:02d}_shard{shard:03d}.safetensors"
        meta = {"total_size": str(num), "dtype": "torch.float32", "device": "cpu"}
        save_file(tensors, folder / name, metadata=meta)
        shards.append(tensors)
    whole = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    mean = whole["latents"].mean((0, 2, 3), keepdim=True)
    std = whole["latents"].std((0, 2, 3), keepdim=True)
    torch.save({"mean": mean, "std": std}, folder / "latents_stats.pt")
    return {**whole, "mean": mean, "std": std}


def no_noise() -> Tensor:
    raise AssertionError


@pytest.mark.parametrize("features", [False, True])
def test_official_latents_are_read_in_place(tmp_path: Path, features: bool) -> None:
    whole = official(tmp_path / "o", features=features)
    data = open_data(tmp_path / "o")
    assert (data.num, data.shape, data.kind, data.flip) == (13, SHAPE, "latents", True)
    assert torch.equal(data.labels, whole["labels"])
    assert data.autoencoder == {}
    assert data.names[5] == "latents_rank00_shard001/0"
    assert len(data.classes) == int(whole["labels"].max()) + 1
    assert len(data.train_indices) == 13
    ids = torch.tensor([12, 0, 6, 7, 6])
    flip = torch.tensor([True, False, False, True, True])
    raw = torch.where(flip[:, None, None, None], whole["latents_flip"][ids], whole["latents"][ids])
    assert torch.equal(data.latents(ids, flip, no_noise), raw)
    assert_near(data.sample(ids, flip, no_noise), (raw - whole["mean"]) / whole["std"], FLOAT32)
    assert Batches(data, Uniform(), 6, seed=0)(0).x.shape == (6, *SHAPE)
    with pytest.raises(InputError, match="holds latents, not images"):
        data.images(ids)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_no_file_is_opened_per_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    official(tmp_path / "o")
    before = len(os.listdir("/proc/self/fd"))
    data = open_official(tmp_path / "o")
    assert len(os.listdir("/proc/self/fd")) == before
    for file in (tmp_path / "o").iterdir():
        file.unlink()  # mapped: what is open stays readable
    assert data.latents(torch.arange(13), torch.ones(13).bool(), no_noise).isfinite().all()


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    official(tmp_path / "o")
    first = open_official(tmp_path / "o")
    (tmp_path / "o").rename(tmp_path / "sub")
    (tmp_path / "sub").rename(tmp_path / "o")
    assert open_official(tmp_path / "o").fingerprint == first.fingerprint
    assert pickle.loads(pickle.dumps(first)).fingerprint == first.fingerprint
    torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, tmp_path / "s.pt")
    (tmp_path / "s.pt").rename(tmp_path / "o" / "latents_stats.pt")
    assert open_official(tmp_path / "o").fingerprint != first.fingerprint


def test_what_is_no_official_folder_is_refused(tmp_path: Path) -> None:
    official(tmp_path / "o")
    (tmp_path / "o" / "latents_stats.pt").write_bytes(b"nothing")
    with pytest.raises(DamagedArtifact, match="no file of tensors"):
        open_official(tmp_path / "o")
    torch.save({"mean": torch.zeros(4)}, tmp_path / "o" / "latents_stats.pt")
    with pytest.raises(InputError, match="holds no statistics"):
        open_official(tmp_path / "o")
    (tmp_path / "o" / "latents_stats.pt").unlink()
    with pytest.raises(InputError, match=r"latents_stats\.pt is missing"):
        open_data(tmp_path / "o")
    broken = tmp_path / "o" / "latents_rank00_shard000.safetensors"
    save_file({"latents": torch.zeros(2, *SHAPE), "labels": torch.zeros(2).long()}, broken)
    with pytest.raises(InputError, match="it lacks latents_flip"):
        open_official(tmp_path / "o")
    both = {"latents": torch.zeros(2, *SHAPE), "latents_flip": torch.zeros(3, *SHAPE)}
    save_file({**both, "labels": torch.zeros(2).long()}, broken)
    with pytest.raises(InputError, match="do not go together"):
        open_official(tmp_path / "o")
    with pytest.raises(InputError, match="no latents in"):
        open_official(tmp_path)
    assert not is_official(tmp_path)
    with pytest.raises(InputError, match="not a finished dataset"):
        open_data(tmp_path)


# --- to ours -----------------------------------------------------------------------------------


def test_theirs_becomes_ours(tmp_path: Path) -> None:
    whole = official(tmp_path / "o")
    seen: list[tuple[int, int]] = []
    ours = convert_official(tmp_path / "o", tmp_path / "d", progress=lambda *at: seen.append(at))
    assert seen[-1] == (13, 13)
    assert isinstance(ours, DataSet)
    assert not is_official(tmp_path / "d")
    assert torch.equal(ours.labels, whole["labels"])
    assert ours.flip
    ids = torch.arange(13)
    for flip, name in ((ids < 0, "latents"), (ids >= 0, "latents_flip")):
        assert torch.equal(ours.latents(ids, flip, no_noise), whole[name].half().float())
    both = torch.cat([whole["latents"], whole["latents_flip"]]).half().double()
    mean = both.mean((0, 2, 3)).tolist()
    assert ours.statistics.mean == pytest.approx(mean, abs=1e-9)
    assert ours.statistics.std == pytest.approx(
        both.std((0, 2, 3), correction=0).tolist(), abs=1e-9
    )
    again = prepare(tmp_path / "o", tmp_path / "e")
    assert again.fingerprint == ours.fingerprint
    with pytest.raises(InputError, match="holds finished latents: nothing can be chosen"):
        prepare(tmp_path / "o", tmp_path / "f", flip=True)


# --- from ours ---------------------------------------------------------------------------------


def latents(path: Path, *, flip: bool = True, holdout: float = 0.0) -> DataSet:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8, generator=random)
    source = Source("t", ["a", "b"], [Sample(x, n % 2, f"{n}") for n, x in enumerate(images)])
    write_dataset(path / "images", source, flip=flip, holdout=holdout)
    return prepare(path / "images", path / "latents", autoencoder=Means())


def test_ours_becomes_theirs_and_comes_back(tmp_path: Path) -> None:
    data = latents(tmp_path)
    write_official(data, tmp_path / "o", shard_size=4)
    names = sorted(file.name for file in (tmp_path / "o").glob("*.safetensors"))
    assert names == [f"latents_rank00_shard{n:03d}.safetensors" for n in range(3)]
    stats = torch.load(tmp_path / "o" / "latents_stats.pt", weights_only=True)
    assert stats["mean"].shape == stats["std"].shape == (1, 3, 1, 1)
    back = open_data(tmp_path / "o")
    assert torch.equal(back.labels, data.labels)
    assert back.statistics.mean == pytest.approx(data.statistics.mean, abs=FLOAT32)
    ids, zero = torch.arange(9), torch.zeros(9, *data.shape)
    for flip in (ids < 0, ids >= 0):
        mean = data.latents(ids, flip, lambda: zero)
        std = data.latents(ids, flip, lambda: zero + 1) - mean
        noise = (back.latents(ids, flip, no_noise) - mean) / std
        assert 0.7 < float(noise.std()) < 1.3  # a draw, not the mean
        assert noise.abs().max() < 6
    write_official(data, tmp_path / "again", shard_size=4)
    write_official(data, tmp_path / "other", shard_size=4, seed=1)
    drawn = [open_data(tmp_path / n).latents(ids, ids < 0, no_noise) for n in ("again", "other")]
    first = back.latents(ids, ids < 0, no_noise)
    assert torch.equal(drawn[0], first)
    assert not torch.equal(drawn[1], first)


def test_held_out_and_unmirrored_images_stay_so(tmp_path: Path) -> None:
    data = latents(tmp_path, flip=False, holdout=0.34)
    seen: list[tuple[int, int]] = []
    write_official(data, tmp_path / "o", shard_size=4, progress=lambda *at: seen.append(at))
    assert seen == [(4, 6), (6, 6)]
    back = open_data(tmp_path / "o")
    assert torch.equal(back.labels, data.labels[data.train_indices])
    ids = torch.arange(6)
    plain, mirrored = (back.latents(ids, flip, no_noise) for flip in (ids < 0, ids >= 0))
    assert torch.equal(plain, mirrored)


def test_the_command_line_goes_both_ways(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents(tmp_path)
    paths: dict[str, Any] = {n: str(tmp_path / n) for n in ("images", "latents", "o", "d")}
    there = ["--out", paths["o"], "--layout", "lightningdit"]
    assert main(["prepare", paths["images"], *there]) == 2
    assert "holds images: make latents of them" in capsys.readouterr().err
    assert main(["prepare", paths["latents"], *there, "--flip"]) == 2
    assert "only --seed" in capsys.readouterr().err
    assert main(["prepare", paths["latents"], *there, "--seed", "3"]) == 0
    assert main(["prepare", paths["o"], "--out", paths["d"]]) == 0
    assert "9 latents of 3x2x2" in capsys.readouterr().out
    assert main(["prepare", paths["images"], "--out", paths["d"], "--weights", "x"]) == 2
    assert "no effect without --autoencoder" in capsys.readouterr().err


# --- banks of feature shards -------------------------------------------------------------------


def test_class_tokens_become_the_bank_of_their_latents(tmp_path: Path) -> None:
    whole = official(tmp_path / "f", features=True)
    assert main(["bank", "import", str(tmp_path / "f"), "--out", str(tmp_path / "b")]) == 0
    bank, data = MemoryBank.load(tmp_path / "b"), open_data(tmp_path / "f")
    assert (bank.data, bank.encoder["name"]) == (data.origin, "dinov2-b")
    assert torch.equal(bank.labels, whole["labels"])
    rows = torch.tensor([12, 0, 6, 7])
    flip = torch.tensor([False, True, True, False])
    raw = torch.where(flip[:, None], whole["cls_tokens_flip"][rows], whole["cls_tokens"][rows])
    unit = torch.nn.functional.normalize(raw, dim=1)
    assert (bank.lookup(rows, flip) - unit).abs().max() < 2**-10  # stored in float16


def test_shards_without_features_are_no_bank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official(tmp_path / "f")
    assert main(["bank", "import", str(tmp_path / "f"), "--out", str(tmp_path / "b")]) == 2
    first = official_files(tmp_path / "f")[0]
    assert f"{first} has no features: expected cls_tokens" in capsys.readouterr().err
    assert read_statistics(tmp_path / "f" / "latents_stats.pt").mean
