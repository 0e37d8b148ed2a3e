"""Official checkpoints, imported as a user does it, compute what the official code computed."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from official import FROM_NOISE, HEADS, PROJECTS, State, build, condition_of, golden
from stratagem.artifact import read_tensor_file
from stratagem.assemble import Model, open_run
from stratagem.autoencoders import finish_of
from stratagem.cli import main
from stratagem.denoiser import Predictor
from stratagem.errors import InputError
from stratagem.guidance import ClassifierFree, Interval
from stratagem.interop.dit import convert, inspect
from stratagem.memory.bank import MemoryBank
from stratagem.memory.store import hold
from stratagem.programs.sample import SampleConfig, sample_run
from stratagem.schedule import Linear
from tolerances import FLOAT32, NETWORK, assert_near


def wrapped(name: str, weights: State, folder: Path) -> Path:
    """Writes a checkpoint the way the project (or one like it) does."""
    junk = {f"module.{k}": torch.zeros_like(v) for k, v in weights.items()}
    in_ddp = {f"module.{k}": v for k, v in weights.items()}
    options = argparse.Namespace(model="SiT", epochs=80)
    bodies: dict[str, Any] = {
        "gmem_lightningdit_a": {"model": junk, "ema": weights, "config": {"train": {"lr": 2e-4}}},
        "lightningdit_class": {"state_dict": in_ddp},
        "sit_class": {"model": junk, "ema": weights, "opt": {"state": {}}, "args": options},
        "sit_repa": weights,
    }
    path = folder / f"{name}.pt"
    if name in bodies:
        torch.save(bodies[name], path)
    else:
        path = folder / f"{name}.safetensors"
        save_file(weights, path)
    return path


def bank(path: Path, dim: int = 768) -> Path:
    vectors = normalize(torch.randn(5, 1, dim, generator=torch.Generator().manual_seed(0)), dim=2)
    rows = torch.zeros(5, dtype=torch.int64)
    MemoryBank(hold(vectors), rows, rows.bool(), {"name": "dinov2-b"}, data="").save(path)
    return path


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Imports each golden network once, through the command line, and opens the run."""
    folder, runs = tmp_path_factory.mktemp("imported"), dict[str, Model]()
    banks = ["--bank", str(bank(folder / "bank.safetensors"))]

    def get(name: str) -> Model:
        if name not in runs:
            file = wrapped(name, golden(name)[1], folder)
            words = ["--from", PROJECTS[name], "--out", str(folder / name), *HEADS.get(name, [])]
            words += banks if PROJECTS[name] == "gmem" else []
            assert main(["import", str(file), *words]) == 0
            runs[name] = open_run(folder / name)
        return runs[name]

    return get


def outputs(name: str, predictor: Predictor, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
    """What the official network says, from our prediction: velocity and time turned back."""
    if PROJECTS[name] not in FROM_NOISE:
        return Linear().velocity(*predictor(x, t, **condition), t)
    return -Linear().velocity(*predictor(x, 1 - t, **condition), 1 - t)


# --- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROJECTS)
def test_imported_network_is_the_official_one(name: str, imported: Callable[[str], Model]) -> None:
    config, _, tensors = golden(name)
    model = imported(name)
    assert model.shape == (config["in_channels"], *2 * [config["input_size"]])
    assert model.num_classes == config.get("num_classes", 0)
    assert (model.bank is not None) == ("condition_dim" in config)
    x, t = tensors["inputs/x"], tensors["inputs/t"]
    condition = condition_of(tensors)
    assert_near(outputs(name, model.denoiser, x, t, **condition), tensors["outputs/eval"], NETWORK)
    turned = PROJECTS[name] in FROM_NOISE
    raw = model.denoiser.backbone(x, 1 - t if turned else t, **condition)
    assert_near(-raw if turned else raw, tensors["outputs/eval"], NETWORK)
    if "outputs/train_x" in tensors:
        assert_near(raw, -tensors["outputs/train_x"], NETWORK)


@pytest.mark.parametrize("name", PROJECTS)
def test_imported_run_is_sampled_like_any_other(
    name: str, imported: Callable[[str], Model]
) -> None:
    model = imported(name)
    samples = sample_run(model, SampleConfig(num=2, steps=2))
    assert samples.images.shape == (2, *model.shape)
    assert (samples.snippets is not None) == (model.bank is not None)
    assert model.step == 0
    made = json.loads((model.path / "run.json").read_text())["meta"]
    assert made["imported"]["file"].startswith(name)
    assert len(made["imported"]["sha256"]) == 64


@pytest.mark.parametrize("form", ["png", "npz"])
def test_a_network_of_latents_gives_latents(
    form: str, imported: Callable[[str], Model], tmp_path: Path
) -> None:
    model = imported("sit_class")
    words = ["--num", "3", "--steps", "2", "--out", str(tmp_path / "s"), "--format", form]
    assert main(["sample", str(model.path), *words]) == 0
    latents = read_tensor_file(tmp_path / "s" / "latents.safetensors")["latents"]
    assert latents.shape == (3, *model.shape)
    assert torch.equal(latents, sample_run(model, SampleConfig(num=3, steps=2)).images)


def test_latents_end_as_the_official_projects_decode_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LightningDiT decodes x std / multiplier + mean, SiT x / 0.18215."""
    file, mean, std = wrapped("lightningdit_class", golden("lightningdit_class")[1], tmp_path), 2, 3
    line = f"import {file} --from lightningdit --latent-multiplier 0.5".split()
    assert main([*line, "--out", str(tmp_path / "a")]) == 0
    shape = open_run(tmp_path / "a").shape
    stats = {
        "mean": torch.full((1, shape[0], 1, 1), 2.0),
        "std": torch.full((1, shape[0], 1, 1), 3),
    }
    torch.save(stats, tmp_path / "stats.pt")
    line += ["--latent-stats", str(tmp_path / "stats.pt")]
    assert main([*line, "--out", str(tmp_path / "b")]) == 0
    with pytest.raises(InputError, match="import the network again with --latent-stats"):
        finish_of({"shape": list(shape), "imported": {}}, "vavae.pt")
    x = torch.randn(2, *shape)
    for run, z in (("a", x / 0.5), ("b", x * std / 0.5 + mean)):
        made = json.loads((tmp_path / run / "run.json").read_text())["meta"]
        assert_near(finish_of(made)(x), z, FLOAT32)
    torch.save({name: rows[:, :1] for name, rows in stats.items()}, tmp_path / "stats.pt")
    assert main([*line, "--out", str(tmp_path / "c")]) == 2
    assert "is of latents of 1 channels" in capsys.readouterr().err
    line = f"import {file} --from lightningdit --latent-multiplier 0 --out {tmp_path / 'c'}"
    assert main(line.split()) == 2
    assert "must be greater than 0" in capsys.readouterr().err


MIXES = [
    ("rms", "swiglu", "yes"),
    ("rms", "swiglu", "no"),
    ("layer", "swiglu", "yes"),
    ("rms", "gelu", "yes"),
]


@pytest.mark.parametrize(("norm", "mlp", "rope"), MIXES)
def test_networks_between_the_styles_keep_what_they_are(
    norm: str, mlp: str, rope: str, tmp_path: Path
) -> None:
    """The run is rebuilt from its config alone; what no published style has must be in it."""
    _, weights, tensors = golden("lightningdit_class")
    mixed = {
        name: tensor
        for name, tensor in weights.items()
        if not name.startswith("feat_rope")
        and (norm == "rms" or "norm" not in name)
        and (mlp == "swiglu" or ".mlp.w" not in name)
    }
    if mlp == "gelu":
        _, sit, _ = golden("sit_class")  # of the same width
        mixed |= {name: tensor for name, tensor in sit.items() if ".mlp.fc" in name}
    save_file(mixed, tmp_path / "w.safetensors")
    line = f"--from lightningdit --heads 4 --rope {rope} --out {tmp_path / 'run'}"
    assert main(["import", str(tmp_path / "w.safetensors"), *line.split()]) == 0
    official = inspect(mixed, "lightningdit", heads=4, rope=rope == "yes")
    cfg = official.cfg
    assert (cfg.norm, cfg.mlp, cfg.rope) == (norm, mlp, rope == "yes")
    net = build(official, 1)
    net.load_state_dict(convert(mixed, official, net))
    x, t = tensors["inputs/x"], tensors["inputs/t"]
    with torch.no_grad():
        found = open_run(tmp_path / "run").denoiser.backbone(x, t, **condition_of(tensors))
        assert torch.equal(found, net(x, t, **condition_of(tensors)))
        out = net(x, 1 - t, **condition_of(tensors))
    published = (norm, mlp, rope) == MIXES[0]
    assert torch.allclose(out, -tensors["outputs/eval"], atol=1e-4) == published


GUIDED = [
    ("gmem_lightningdit_a", None),
    ("gmem_lightningdit_b", None),
    ("lightningdit_class", 3),
    ("sit_class", 3),
]


@pytest.mark.parametrize(("name", "channels"), GUIDED)
def test_guidance_is_the_official_one(
    name: str, channels: int | None, imported: Callable[[str], Model]
) -> None:
    """Official batches hold the conditional rows, then the same images without condition."""
    config, _, tensors = golden(name)
    model = imported(name)
    free = ClassifierFree(model.denoiser, 2.5, channels, model.num_classes or None)
    x = tensors["inputs/cfg_x"][:2]
    c = tensors["inputs/cfg_y" if model.num_classes else "inputs/cfg_c"][:2]
    condition = {"label" if model.num_classes else "memory": c}
    for case, settings in config["cases"].items():
        t, theirs = tensors[f"inputs/{case}_t"][:2], tensors[f"outputs/{case}"]
        start, end = settings.get("cfg_interval_start"), settings.get("cfg_interval_end")
        guided = Interval(free, 1 - (end or 1.0), 1 - (start or 0.0))
        ours = outputs(name, guided, x, t, **condition)
        if case == "cfg_interval_past_end":  # theirs is unconditional there, ours conditional
            plain = outputs(name, model.denoiser, x, t, **condition)
            assert_near(ours, plain, FLOAT32)
            assert_near(outputs(name, model.denoiser, x, t), theirs[2:], NETWORK)
            assert_near(theirs[:2], theirs[2:], NETWORK)
            continue
        assert_near(ours, theirs[:2], NETWORK)
        if not case.endswith("below"):  # their second half is guided alike, in those channels
            assert_near(ours[:, :channels], theirs[2:, :channels], NETWORK)


def test_gmem_v1_is_told_by_its_weights(tmp_path: Path) -> None:
    """A v1 network is REPA's with a snippet for the label, and its time runs as REPA's."""
    _, weights, tensors = golden("sit_repa")
    table = weights["y_embedder.embedding_table.weight"]
    v1 = {k: v for k, v in weights.items() if not k.startswith("y_embedder.")}
    v1["condition_projection.linear.weight"] = torch.zeros(48, 6)
    v1["condition_projection.linear.weight"][:, :2] = table[:2].T - table[2][:, None]
    v1["condition_projection.linear.bias"] = table[2]
    body = {"network": v1, "memorybank": torch.ones(3, 6), "memoryfreq": torch.ones(3)}
    torch.save(body, tmp_path / "v1.pth")
    made = bank(tmp_path / "bank.safetensors", dim=6)
    words = f"--from gmem --heads 4 --out {tmp_path / 'run'} --bank {made}"
    assert main(["import", str(tmp_path / "v1.pth"), *words.split()]) == 0
    v1_run = open_run(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["meta"]["imported"]["from"] == (
        "GMem v1"
    )
    x, t = tensors["inputs/x"][:3], tensors["inputs/t"][:3]
    official = inspect(weights, "repa", heads=4)
    repa = build(official, 0)
    repa.load_state_dict(convert(weights, official, repa))
    memory = torch.eye(6)[[0, 1, 5]]
    with torch.no_grad():
        expected = repa(x, t, label=torch.tensor([0, 1, 2]))
        assert_near(v1_run.denoiser.backbone(x, t, memory=memory), expected, NETWORK)
    modern = {k: v for k, v in v1.items() if not k.startswith("projectors.")}
    with pytest.raises(InputError, match="do not tell GMem v1 from v2"):
        inspect(modern, "gmem", heads=4)


# --- the run -------------------------------------------------------------------------------------


def test_every_wrong_weight_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights, _ = golden("lightningdit_class")
    for i in (0, 1):
        del weights[f"blocks.{i}.attn.proj.bias"], weights[f"blocks.{i}.norm2.weight"]
    weights["blocks.1.attn.rel_pos"] = torch.zeros(3)
    weights["final_layer.linear.weight"] = torch.zeros(5, 47)
    save_file(weights, tmp_path / "w.safetensors")
    line = f"import {tmp_path}/w.safetensors --from lightningdit --out {tmp_path}/run"
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in [
        "LightningDiT of width 48, depth 2",
        "4 missing (",
        "blocks.0.attn.proj.bias",
        ", ...)",
        "1 unexpected (blocks.1.attn.rel_pos)",
        "1 mis-shaped (final_layer.linear.weight (5, 47), not (5, 48))",
    ]:
        assert part in error, part
    assert not (tmp_path / "run").exists()


def test_the_bank_of_an_imported_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = wrapped("gmem_lightningdit_b", golden("gmem_lightningdit_b")[1], tmp_path), "run"
    line = f"import {file} --from gmem --out {tmp_path / run}"
    small = bank(tmp_path / "small.safetensors", dim=5)
    assert main([*line.split(), "--bank", str(small)]) == 2
    assert "snippets of 5 numbers, the network takes 768" in capsys.readouterr().err
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    assert re.search(r"GMem v2, 148,396 parameters, width 36, depth 5, 3 heads, images 4x8x8", out)
    assert "left out of the run: the projector" in out
    assert "bank.safetensors or give --bank" in out
    with pytest.raises(InputError, match="no memory bank at"):
        open_run(tmp_path / run)
    with pytest.raises(InputError, match="snippets of 5 numbers"):
        open_run(tmp_path / run, bank=small)
    bank(tmp_path / run / "bank.safetensors")
    model = open_run(tmp_path / run)
    assert model.config.memory is not None
    assert model.config.memory.scale == "unit-norm"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    for taken in (run, "full"):
        assert main(line.replace(str(tmp_path / run), str(tmp_path / taken)).split()) == 2
        assert "already exists" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes.txt"]
    sit = wrapped("sit_repa", golden("sit_repa")[1], tmp_path)
    line = f"import {sit} --from repa --heads 4 --out {tmp_path}/other --bank {small}"
    assert main(line.split()) == 2
    assert "--bank has no effect" in capsys.readouterr().err
