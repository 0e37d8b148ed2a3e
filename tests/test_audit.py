"""The audit flags samplers that copy, clears those that do not, and says what it cannot judge."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stratagem.cli import main
from stratagem.data.shards import DataSet
from stratagem.data.writing import Sample, Source, write_dataset
from stratagem.errors import InputError
from stratagem.metrics.diversity import Diversity, diversity
from stratagem.metrics.memorisation import Memorisation
from stratagem.programs.audit import Audit, Judge, verdict
from stratagem.programs.audit_page import audit_page
from stratagem.programs.audited import Audited
from stratagem.randomness import normal, permutation, uniform

CPU = torch.device("cpu")


def shapes(num: int, seed: int) -> Tensor:
    """Pictures of three coloured spots anywhere, uint8 (num, 3, 16, 16)."""
    draws = uniform((num, 3, 6), seed, "shapes")
    place, width, colour = 15 * draws[..., :2], 1 + 2.5 * draws[..., 2], draws[..., 3:]
    grid = torch.arange(16.0)
    x, y = ((grid - place[..., i, None]) ** 2 / width[..., None] ** 2 for i in (0, 1))
    spots = torch.exp(-(x[..., None, :] + y[..., :, None]) / 2)  # (num, 3, 16, 16)
    pictures = (spots[:, :, None] * colour[..., None, None]).sum(1)
    return (255 * pictures).clamp(0, 255).round().to(torch.uint8)


def dataset(path: Path, num: int, holdout: float, *, flip: bool = True) -> DataSet:
    samples = [Sample(image, 0, f"{k}") for k, image in enumerate(shapes(num, 0))]
    return write_dataset(path, Source("shapes", ["a"], samples), flip=flip, holdout=holdout)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return dataset(tmp_path_factory.mktemp("shapes") / "data", 700, 0.4)


def audit(images: Tensor, data: DataSet, scratch: Path) -> Audit:
    judge = Judge(data, (), device=CPU, scratch=scratch)
    return judge.audit(Audited(images, {"samples": "test"}))


def some_of(data: DataSet, num: int, seed: int = 0) -> Tensor:
    rows = data.train_indices
    return data.images(rows[permutation(len(rows), seed, "test")[:num]])


def noisy(images: Tensor, size: float) -> Tensor:
    return (images + (size * normal(images.shape, 1, "test")).round()).clamp(0, 255).byte()


COPIES = {
    "as they are": lambda images: images,
    "with noise": lambda images: noisy(images, 4),
    "mirrored": lambda images: noisy(images.flip(-1), 4),
    "moved": lambda images: noisy(images.roll(1, -1), 4),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_in_part_of_the_samples_are_found(how: str, data: DataSet, tmp_path: Path) -> None:
    copied = COPIES[how](some_of(data, 40))
    found = audit(torch.cat([shapes(260, 1), copied]), data, tmp_path)
    assert found.verdict.kind == "copies", found.verdict
    samples, images = found.pairs("pixels", 30)
    true = set(permutation(len(data.train_indices), 0, "test")[:40].tolist())
    hits = [int(i) for i in samples if i >= 260]
    assert len(hits) >= (15 if how == "moved" else 28)
    named = {int((data.train_indices == i).nonzero()) for i in images[samples >= 260]}
    assert len(named & true) >= (13 if how == "moved" else 26)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_a_mirror_image_is_no_copy_where_mirroring_is_forbidden(tmp_path: Path) -> None:
    plain = dataset(tmp_path / "data", 700, 0.4, flip=False)
    mirrored = torch.cat([shapes(260, 1), some_of(plain, 40).flip(-1)])
    assert audit(mirrored, plain, tmp_path).verdict.kind == "clear"


@pytest.mark.parametrize("seed", range(1, 5))
def test_new_real_images_are_cleared(seed: int, data: DataSet, tmp_path: Path) -> None:
    found = audit(shapes(300, seed), data, tmp_path)
    assert found.verdict.kind == "clear", found.verdict
    space = found.spaces["pixels"]
    assert abs(space.score) < 3
    assert 0.9 < space.ratio < 1.1


def test_a_model_that_does_not_copy_is_cleared(data: DataSet, tmp_path: Path) -> None:
    """Draws from the Gaussian of the training images."""
    rows = data.images(data.train_indices).flatten(1).double()
    values, vectors = torch.linalg.eigh(rows.T.cov())
    factor = vectors * values.clamp(min=0).sqrt()
    drawn = rows.mean(0) + normal((300, len(factor)), 3, "test").double() @ factor.T
    images = drawn.clamp(0, 255).round().byte().view(-1, 3, 16, 16)
    found = audit(images, data, tmp_path)
    assert found.verdict.kind == "clear"
    below = [float(v) for v in re.findall(r"<span>([\d.]+)</span>", audit_page(found))]
    assert len(below) == 20
    assert below == sorted(below)  # what the pairs are ordered by
    assert below[0] == pytest.approx(float(found.spaces["pixels"].relative.min()), abs=1e-3)


def test_plain_images_are_near_but_no_copies(data: DataSet, tmp_path: Path) -> None:
    """Means of new images: as near to held-out images as to training images."""
    images = shapes(2400, 5).view(300, 8, 3, 16, 16).float().mean(1).round().byte()
    found = audit(images, data, tmp_path)
    assert found.spaces["pixels"].score < -3  # the distance alone would accuse them
    assert found.verdict.kind == "near", found.verdict
    assert "No copies were found" in found.verdict.sentence


@pytest.mark.slow
def test_features_find_copies_and_clear_new_images(data: DataSet, tmp_path: Path) -> None:
    copied = noisy(some_of(data, 40).flip(-1), 3)
    judge = Judge(data, ("effnet",), device=CPU, scratch=tmp_path)
    found = judge.audit(Audited(torch.cat([shapes(260, 1), copied]), {"samples": "test"}))
    assert set(found.spaces) == {"pixels", "effnet"}
    assert found.spaces["effnet"].copied.p_value < 1e-3
    assert found.quality["samples"]["fd_effnet64"] > 0
    honest = judge.audit(Audited(shapes(300, 2), {"samples": "test"}))
    assert honest.verdict.kind == "clear"
    assert "effnet" in audit_page(honest)


def test_without_held_out_images_nothing_is_judged(tmp_path: Path) -> None:
    alone = dataset(tmp_path / "data", 60, 0.0)
    found = audit(some_of(alone, 20), alone, tmp_path)
    assert found.verdict.kind == "unknown"
    assert "--holdout" in found.verdict.sentence
    record = found.record()
    assert record["spaces"]["pixels"]["median"] == 0
    assert record["spaces"]["pixels"]["distance_ratio"] is None
    assert len(record["spaces"]["pixels"]["pairs"]) == 20
    assert "cannot be judged" in audit_page(found)


def test_too_few_to_tell_is_said() -> None:
    few = torch.linspace(1, 2, 3).double()
    found = Memorisation(few, torch.zeros(3).long(), few, 1.0, few, few)
    assert verdict({"pixels": found}).kind == "unknown"
    assert "too few" in verdict({"pixels": found}).sentence


def test_one_space_that_shows_copies_is_enough() -> None:
    real = torch.linspace(1, 2, 300).double()
    honest = Memorisation(real, torch.zeros(300).long(), real, 1.0, real, real)
    copied = real.where(real > 1.1, 0.1)
    copying = Memorisation(copied, torch.zeros(300).long(), real, 1.0, copied, real)
    assert verdict({"pixels": honest}).kind == "clear"
    found = verdict({"pixels": honest, "effnet": copying})
    assert found.kind == "copies"
    assert "in effnet, p below 1e-6" in found.sentence
    assert "30 of 300 samples (10.0 %)" in found.sentence


def test_spaces_share_the_level_of_the_test(data: DataSet, tmp_path: Path) -> None:
    """What one space alone would accuse is by chance in one of several."""
    real = torch.linspace(1, 2, 300).double()
    alone = Memorisation(real, torch.zeros(300).long(), real, 1.0, real, real)
    rank = alone.copied.limit
    some = torch.cat([torch.zeros(rank), torch.full((300 - rank,), 1.5)]).double()
    shared = {
        name: Memorisation(some, torch.zeros(300).long(), real, 1.0, some, real, level=level)
        for name, level in (("alone", 1e-3), ("shared", 5e-4))
    }
    assert 5e-4 < shared["alone"].copied.p_value < 1e-3
    assert shared["shared"].copied.limit > shared["alone"].copied.limit
    assert verdict({"pixels": shared["alone"]}).kind == "copies"
    assert verdict({"pixels": shared["shared"], "effnet": shared["shared"]}).kind != "copies"
    judge = Judge(data, ("effnet",), device=CPU, scratch=tmp_path)
    record = judge.audit(Audited(shapes(40, 1), {"samples": "test"})).record()
    assert {space["level"] for space in record["spaces"].values()} == {5e-4}
    assert record["protocol"]["level"] == 1e-3


def test_sizes_that_differ_are_refused(data: DataSet, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be compared"):
        audit(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), data, tmp_path)
    with pytest.raises(InputError, match="in any case"):
        Judge(data, ("pixels",), device=CPU, scratch=tmp_path)


def test_large_images_are_compared_by_means_of_areas(tmp_path: Path) -> None:
    images = shapes(60, 0).repeat_interleave(8, -1).repeat_interleave(8, -2)  # 128 x 128
    samples = [Sample(image, 0, f"{k}") for k, image in enumerate(images)]
    source = Source("large", ["a"], samples)
    large = write_dataset(tmp_path / "data", source, flip=False, holdout=0.5)
    found = audit(noisy(some_of(large, 9), 2), large, tmp_path).spaces["pixels"]
    assert 0 < found.distances.max() < 2 / 255
    assert found.authentic == 0


def test_diversity_is_of_images_of_one_snippet() -> None:
    centres = 10 * normal((6, 4), 0, "test")
    snippets = torch.arange(6).repeat_interleave(5)
    rows = centres[snippets] + normal((30, 4), 1, "test")
    found = diversity(rows, snippets)
    table = (rows[:, None].double() - rows[None].double()).norm(dim=2)
    same = (snippets[:, None] == snippets) & ~torch.eye(30, dtype=torch.bool)
    assert isinstance(found, Diversity)
    assert found.within == pytest.approx(float(table[same].mean()))
    assert found.between == pytest.approx(float(table[snippets[:, None] != snippets].mean()))
    assert 0 < found.error < found.within
    assert found.snippets == 6
    assert diversity(rows, torch.arange(30)) is None


# --- the command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(blobs_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a memory, and samples on disk."""
    folder = tmp_path_factory.mktemp("work")
    train = "{steps: 3, batch_size: 8, threads: 1}"
    (folder / "run.yaml").write_text(
        f"data: {blobs_path}\nmodel: {{width: 32, depth: 2, heads: 2, patch: 4}}\n"
        f"memory: {{bank: {folder}/bank.safetensors}}\ntrain: {train}\n"
    )
    for line in [
        f"bank build {blobs_path} --out {folder}/bank.safetensors --encoder pixels",
        f"train {folder}/run.yaml --out {folder}/run",
        f"sample {folder}/run --num 40 --steps 2 --out {folder}/samples",
    ]:
        assert main(line.split()) == 0, line
    return folder


def test_a_run_is_audited(work: Path, blobs_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figures = work / "new" / "audit.html", work / "audit.json"
    line = f"audit {work}/run --data {blobs_path} --out {out} --num 40 --steps 2 --json {figures}"
    assert main([*line.split(), "--cache", str(work / "cache")]) == 0
    found = json.loads(figures.read_text())
    assert found["sentence"] in capsys.readouterr().out
    assert set(found["spaces"]) == {"pixels", "effnet"}
    assert set(found["quality"]) == {"samples", "held-out snippets", "held-out real images"}
    assert found["diversity"]["pixels"]["snippets"] == 16
    assert 0 < found["diversity"]["pixels"]["between"] < 1  # RMS of pixels in [0, 1]
    told = found["protocol"]
    assert told["sampling"]["steps"] == 2
    assert told["training_images"] == 32
    assert told["held_out_images"] == 8
    assert told["mirrored"] is True
    assert told["features"][0]["encoder"]["weights"]
    html = out.read_text()
    parts = ("Diversity per snippet", "held-out snippets", "The memory bank", "cannot tell")
    assert all(part in html for part in parts)
    assert html.count("<img") == 2 * 20 * 2  # pairs of pictures, in two spaces
    assert [p.name for p in out.parent.iterdir()] == ["audit.html"]


def test_samples_are_audited_and_snippets_known(work: Path, blobs_path: Path) -> None:
    figures = work / "samples.json"
    line = f"audit {work}/samples --data {blobs_path} --out {work}/s.html --num 30 --features"
    assert main([*line.split(), "--json", str(figures)]) == 0
    found = json.loads(figures.read_text())
    assert found["protocol"]["samples_used"] == 30
    assert found["diversity"]["pixels"]["snippets"] > 2
    assert found["quality"] == {}


def test_training_images_as_samples_are_copies(work: Path, tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", 200, 0.3)
    np.savez(tmp_path / "copies.npz", arr_0=some_of(data, 50).permute(0, 2, 3, 1).numpy())
    line = f"audit {tmp_path}/copies.npz --data {data.path} --out {tmp_path}/a.html --features"
    assert main([*line.split(), "--json", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["verdict"] == "copies"


WRONG = {
    "audit nowhere --data {data} --out {out} --steps 3": "nothing at nowhere",
    "audit {work}/samples --data nowhere --out {out}": "nowhere",
    "audit {work}/samples --data {data} --out {out} --num 0": "at least 1",
    "audit {work}/samples --data {data} --out {out} --steps 3": "no run to sample",
    "audit {work}/samples --data {other} --out {out}": "cannot be compared",
    "audit {work}/run --data {other} --out {out}": "cannot be compared",
    "audit {work}/run --data {twin} --out {out}": "was trained on data set",
    "audit {work}/run --data {data} --out {out} --features dinov2-b": "weights",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_gets_one_line(
    line: str, work: Path, data: DataSet, blobs_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = work / "twin"
    if not twin.exists():
        gray = [Sample(torch.full((1, 8, 8), 20 * k).byte(), 0, f"{k}") for k in range(9)]
        write_dataset(twin, Source("twin", ["a"], gray), flip=False, holdout=0.3)
    places = {"work": work, "data": blobs_path, "other": data.path, "twin": twin}
    capsys.readouterr()
    assert main(line.format(**places, out=work / "wrong.html").split()) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert WRONG[line] in err[-1]
    assert not (work / "wrong.html").exists()
