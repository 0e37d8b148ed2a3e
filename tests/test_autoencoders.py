"""autoencoders.py, interop/vavae.py: the official VA-VAE's numbers, strict weights, a whole run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

pytest.importorskip("diffusers")

from autoencoder_weights import module, save_file
from stratagem.artifact import read_tensor_file
from stratagem.assemble import assemble, open_run
from stratagem.autoencoders import (
    AutoencoderName,
    Finish,
    KLAutoencoder,
    build_autoencoder,
    finish_of,
    load_kl,
)
from stratagem.cli import main
from stratagem.config import ModelConfig, RunConfig
from stratagem.data.images import to_float
from stratagem.data.latents import Statistics
from stratagem.data.shards import DataSet
from stratagem.data.writing import Sample, Source, write_dataset
from stratagem.errors import InputError, MissingExtra
from stratagem.interop.vavae import layout, rename
from stratagem.programs.sample import SampleConfig, sample_run
from stratagem.programs.train import train
from stratagem.train import TrainConfig
from tolerances import NETWORK, assert_near

GOLDEN = Path(__file__).parent / "golden" / "vavae.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return read_tensor_file(GOLDEN)


@pytest.fixture(scope="module")
def vavae_file(golden: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden network's file as its project leaves it: LDM's names, beside training's parts."""
    weights = {n.removeprefix("weights/"): t for n, t in golden.items() if n.startswith("weights/")}
    extra = {"loss.discriminator.main.0.weight": torch.ones(3), "linear_proj.weight": torch.ones(2)}
    path = tmp_path_factory.mktemp("vavae") / "vavae.pt"
    torch.save({"state_dict": {**weights, **extra}, "epoch": 3}, path)
    return path


@pytest.fixture(scope="module")
def sd_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_file(tmp_path_factory.mktemp("sd") / "sd.pt")


def pixels(num: int = 3, side: int = 32) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 3, side, side), dtype=torch.uint8, generator=random)


# --- the official network ----------------------------------------------------------------------


@torch.no_grad()
def test_the_official_vavae_is_reproduced(golden: dict[str, Tensor], vavae_file: Path) -> None:
    net: Any = load_kl(str(vavae_file)).eval()
    posterior = net.encode(golden["inputs/x"]).latent_dist
    found = {
        "moments": posterior.parameters,
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "std": posterior.std,
        "kl": posterior.kl(),
        "decode": net.decode(golden["inputs/z"]).sample,
        "reconstruct_mode": net.decode(posterior.mode()).sample,
    }
    assert {f"outputs/{name}" for name in found} == {n for n in golden if n.startswith("outputs/")}
    for name, tensor in found.items():
        assert_near(tensor, golden[f"outputs/{name}"], NETWORK)


def test_the_layout_is_read_off_the_weights(golden: dict[str, Tensor]) -> None:
    with safe_open(GOLDEN, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    weights = {n.removeprefix("weights/"): t for n, t in golden.items() if n.startswith("weights/")}
    found = layout(rename(weights))
    assert found["block_out_channels"] == tuple(config["ch"] * m for m in config["ch_mult"])
    assert found["latent_channels"] == config["embed_dim"]
    assert found["layers_per_block"] == config["num_res_blocks"]
    assert found["down_block_types"] == ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
    assert found["up_block_types"] == ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")
    assert rename(rename(weights)).keys() == rename(weights).keys()


def test_the_published_sizes_are_f16_d32_and_f8_d4() -> None:
    """Parameter counts of the real networks, without their weights."""
    from diffusers import AutoencoderKL

    down, up = "DownEncoderBlock2D", "UpDecoderBlock2D"
    published = {
        69_836_067: {
            "down_block_types": (*[down] * 4, f"Attn{down}"),
            "up_block_types": (f"Attn{up}", *[up] * 4),
            "block_out_channels": (128, 128, 256, 256, 512),
            "latent_channels": 32,
        },
        83_653_863: {
            "down_block_types": (down,) * 4,
            "up_block_types": (up,) * 4,
            "block_out_channels": (128, 256, 512, 512),
            "latent_channels": 4,
        },
    }
    for num, arguments in published.items():
        with torch.device("meta"):
            net = AutoencoderKL(layers_per_block=2, **arguments)
        assert sum(p.numel() for p in net.parameters()) == num
        found = layout(net.state_dict())
        assert {name: found[name] for name in arguments} == arguments
        assert found["layers_per_block"] == 2


# --- weights, wherever they are ----------------------------------------------------------------


@pytest.mark.parametrize(("name", "channels", "factor"), [("sd-vae", 4, 8), ("va-vae", 32, 16)])
def test_folder_and_file_give_the_same(
    tmp_path: Path, name: AutoencoderName, channels: int, factor: int
) -> None:
    module(channels).save_pretrained(tmp_path / "folder")
    save_file(tmp_path / "file.pt", channels)
    folder = build_autoencoder(name, str(tmp_path / "folder"))
    file = build_autoencoder(name, str(tmp_path / "file.pt"))
    assert folder.description() == file.description()
    assert (file.name, file.channels, file.factor) == (name, channels, factor)
    posterior = file.encode(pixels())
    assert posterior.mean.shape == posterior.std.shape == (3, channels, 32 // factor, 32 // factor)
    assert posterior.mean.dtype == posterior.std.dtype == torch.float16
    assert torch.equal(folder.encode(pixels()).mean, posterior.mean)
    with torch.no_grad():
        exact = module(channels).encode(to_float(pixels())).latent_dist
    assert torch.equal(posterior.mean, exact.mean.half())
    assert torch.equal(posterior.std, exact.std.half())
    images = file.decode(posterior.mean.float())
    assert (images.shape, images.dtype) == ((3, 3, 32, 32), torch.uint8)


def test_other_weights_are_another_autoencoder(sd_file: Path, tmp_path: Path) -> None:
    other = save_file(tmp_path / "other.pt", seed=1)
    ours, theirs = (build_autoencoder("sd-vae", str(f)).description() for f in (sd_file, other))
    assert ours["weights"] != theirs["weights"]
    assert {**ours, "weights": 0} == {**theirs, "weights": 0}


def test_how_many_are_encoded_at_once_does_not_matter(sd_file: Path) -> None:
    autoencoder = build_autoencoder("sd-vae", str(sd_file))
    whole = autoencoder.encode(pixels(20))
    one = autoencoder.encode(pixels(20)[17:18])
    assert_near(whole.mean[17:18], one.mean, 1e-3)  # a step of float16


def test_weights_must_fit_to_the_last_tensor(
    vavae_file: Path, sd_file: Path, tmp_path: Path
) -> None:
    body = torch.load(vavae_file, weights_only=True)["state_dict"]
    wrong = tmp_path / "wrong.pt"

    def refused(change: dict[str, Tensor | None], match: str) -> None:
        changed = {n: t for n, t in {**body, **change}.items() if t is not None}
        torch.save(changed, wrong)
        with pytest.raises(InputError, match=match):
            load_kl(str(wrong))

    refused({"decoder.conv_in.bias": None}, r"missing \(decoder.conv_in.bias\)")
    refused({"decoder.norm_out.bias": torch.ones(5)}, "mis-shaped")
    refused({"decoder.extra": torch.ones(1)}, r"unexpected \(decoder.extra\)")
    refused({"blocks.0.weight": torch.ones(1)}, "they have blocks.0.weight")
    refused({"encoder.conv_in.weight": None}, "encoder.conv_in.weight")
    with pytest.raises(InputError, match="is no va-vae: it makes 4 channels at 1/8 of the side"):
        build_autoencoder("va-vae", str(sd_file))
    for place in ("nowhere", "no/where/at/all"):
        with pytest.raises(InputError, match="no weights at"):
            build_autoencoder("sd-vae", place)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no autoencoder of diffusers at"):
        load_kl(str(tmp_path / "empty"))


def test_a_folder_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file as save_safetensors

    module().save_pretrained(tmp_path / "f")
    file = tmp_path / "f" / "diffusion_pytorch_model.safetensors"
    weights = {n: t.clone() for n, t in read_tensor_file(file).items()}
    del weights["decoder.conv_in.bias"]
    save_safetensors(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="does not hold the weights of its network: 1 missing"):
        load_kl(str(tmp_path / "f"))


def test_missing_diffusers_is_named(monkeypatch: pytest.MonkeyPatch, sd_file: Path) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r"diffusers is not installed.*stratagem\[hf\]"):
        build_autoencoder("sd-vae", str(sd_file))


# --- the end of sampling -----------------------------------------------------------------------


def test_samples_end_as_pixels_latents_or_images(sd_file: Path, tmp_path: Path) -> None:
    x = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    statistics = Statistics([1.0, 0.0, 2.0, 0.0], [2.0, 1.0, 1.0, 3.0])
    autoencoder = build_autoencoder("sd-vae", str(sd_file))
    assert Finish((3, 2, 2))(x[:, :3]).dtype == torch.uint8
    assert torch.equal(Finish((4, 2, 2))(x), x)  # an imported network says nothing of its latents
    assert torch.equal(Finish((4, 2, 2), statistics)(x), statistics.undo(x))
    made = {
        "shape": [4, 2, 2],
        "latents": {
            "autoencoder": autoencoder.description(),
            "mean": statistics.mean,
            "std": statistics.std,
        },
    }
    finish = finish_of(made, str(sd_file))
    assert finish.shape == (3, 16, 16)
    assert torch.equal(finish(x), autoencoder.decode(statistics.undo(x)))
    assert finish.description() == autoencoder.description()
    assert finish_of(made).shape == (4, 2, 2)
    assert finish_of(made).description() is None
    official = {**made, "latents": {**made["latents"], "autoencoder": {}}}
    assert finish_of(official, str(sd_file)).shape == (3, 16, 16)
    other = save_file(tmp_path / "other.pt", seed=1)
    with pytest.raises(InputError, match="is not the sd-vae that made the latents of this run"):
        finish_of(made, str(other))
    with pytest.raises(InputError, match="--autoencoder has no effect"):
        finish_of({"shape": [3, 8, 8]}, str(sd_file))


def test_from_photographs_to_images_through_latents(
    tmp_path: Path, sd_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [Sample(image, -1, f"{n}") for n, image in enumerate(pixels(24, 16))]
    write_dataset(tmp_path / "images", Source("t", [], samples), flip=True, holdout=0.25)
    images, latents, out = (str(tmp_path / name) for name in ("images", "latents", "out"))
    encoder = ["--autoencoder", "sd-vae", "--weights", str(sd_file), "--device", "cpu"]
    assert main(["prepare", images, "--out", latents, *encoder]) == 0
    assert "24 latents of 4x2x2, 6 held out" in capsys.readouterr().out
    bank = str(tmp_path / "bank.safetensors")
    assert main(["bank", "build", latents, "--out", bank, "--encoder", "pixels"]) == 2
    assert "give the data set of images" in capsys.readouterr().err
    assert main(["bank", "build", images, "--out", bank, "--encoder", "pixels"]) == 0
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {latents}\nmemory: {{bank: {bank}}}\nmodel: {{width: 16, depth: 2, heads: 2, "
        "patch: 1}\ntrain: {steps: 2, batch_size: 4, threads: 1}\n"
    )
    run = str(tmp_path / "run")
    assert main(["train", str(config), "--out", run]) == 0
    few = ["--num", "3", "--steps", "2"]
    assert main(["sample", run, "--out", out, *few]) == 0
    raw = read_tensor_file(tmp_path / "out" / "latents.safetensors")["latents"]
    decoded = ["--autoencoder", str(sd_file)]
    assert main(["sample", run, "--out", out + "2", *few, *decoded, "--format", "npz"]) == 0
    import numpy as np

    pictures = torch.from_numpy(np.load(tmp_path / "out2" / "samples.npz")["arr_0"])
    expected = build_autoencoder("sd-vae", str(sd_file)).decode(raw)
    assert torch.equal(pictures.permute(0, 3, 1, 2), expected)
    assert main(["evaluate", run, "--reference", latents, "--features", "pixels"]) == 2
    evaluate = ["evaluate", run, "--reference", images, "--features", "pixels", "--allow-few"]
    capsys.readouterr()
    assert main([*evaluate, "--num", "8", "--steps", "2"]) == 2
    assert "samples of shape (4, 2, 2)" in capsys.readouterr().err
    assert main([*evaluate, "--num", "8", "--steps", "2", *decoded]) == 0
    capsys.readouterr()


def test_a_run_says_what_its_latents_are(tmp_path: Path, sd_file: Path) -> None:
    samples = [Sample(image, -1, f"{n}") for n, image in enumerate(pixels(8, 16))]
    write_dataset(tmp_path / "images", Source("t", [], samples), flip=False)
    from stratagem.data.datasets import prepare

    autoencoder = KLAutoencoder(module(), "sd-vae")
    data = prepare(tmp_path / "images", tmp_path / "latents", autoencoder=autoencoder)
    config = RunConfig(
        data=str(tmp_path / "latents"),
        model=ModelConfig(width=16, depth=2, heads=2, patch=1),
        train=TrainConfig(steps=1, batch_size=2, threads=1),
    )
    made = assemble(config).description
    assert made["latents"] == {
        "autoencoder": autoencoder.description(),
        "mean": data.statistics.mean,
        "std": data.statistics.std,
    }
    train(config, tmp_path / "run")
    model = open_run(tmp_path / "run")
    assert model.finish == Finish((4, 2, 2), data.statistics)
    assert sample_run(model, SampleConfig(num=2, steps=2)).images.dtype == torch.float32
    assert DataSet.open(tmp_path / "images").autoencoder is None
