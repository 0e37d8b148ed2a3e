"""encoders/dino.py: transformers' networks against straight ones, and banks made with them."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from stratagem.artifact import read_tensor_file
from stratagem.assemble import align_encoder, assemble
from stratagem.cli import main
from stratagem.config import AlignConfig, ModelConfig, RunConfig
from stratagem.data.images import load_image
from stratagem.data.shards import DataSet
from stratagem.encoders import EncoderName, Preprocessing, build_encoder, load_dino
from stratagem.encoders.dino import DINO, resample_positions
from stratagem.errors import InputError, MissingExtra
from stratagem.interop.banks import GMEM_ENCODER, GMEM_SIZE
from stratagem.memory.bank import MemoryBank
from stratagem.programs.snippets import choose
from stratagem.randomness import normal
from tolerances import FLOAT32, FLOAT64, NETWORK, assert_near

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")

SMALL = {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6}
CONFIGS: dict[str, Any] = {
    "dinov2-s": lambda: transformers.Dinov2Config(**SMALL, mlp_ratio=1, image_size=518),
    "dinov2-s-reg": lambda: transformers.Dinov2WithRegistersConfig(
        **SMALL, mlp_ratio=1, image_size=518, patch_size=14, num_register_tokens=3
    ),
    "dinov3-s": lambda: transformers.DINOv3ViTConfig(
        **SMALL, intermediate_size=384, num_register_tokens=4
    ),
    "dinov2-b": lambda: transformers.Dinov2Config(
        hidden_size=768, num_hidden_layers=1, num_attention_heads=12, mlp_ratio=1, image_size=518
    ),
}
REGISTERS = {"dinov2-s": 0, "dinov2-s-reg": 3, "dinov3-s": 4}


def pixels(*shape: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small networks, every weight of which is random: norms and scales too."""
    root, places = tmp_path_factory.mktemp("dino"), {}
    for name, config in CONFIGS.items():
        model = transformers.AutoModel.from_config(config())
        random = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.data = noise * scale + (parameter.ndim == 1)
        model.save_pretrained(root / name)
        places[name] = str(root / name)
    return places


# --- the networks --------------------------------------------------------------------------------


def straight(weights: dict[str, Tensor], x: Tensor, table: Tensor | None, heads: int) -> Tensor:
    """The network from its papers' equations, in the precision of x; a table of DINOv2 alone.

    DINOv2 adds positions to the class token and the patches; DINOv3 turns queries and keys of the
    patches by angles 2 pi c / 100^(4 j / d), c the centre of the patch in (-1, 1), first its row.
    """
    w = {name: tensor.to(x) for name, tensor in weights.items()}
    rotary = table is None
    part = "embeddings.patch_embeddings" + ("" if rotary else ".projection")
    kernel = w[f"{part}.weight"]
    maps = functional.conv2d(x, kernel, w[f"{part}.bias"], stride=kernel.shape[-1])
    grid, batch = maps.shape[-1], len(x)
    y = torch.cat([w["embeddings.cls_token"].expand(batch, -1, -1), maps.flatten(2).mT], 1)
    if table is not None:
        y = y + table.to(x)
    if "embeddings.register_tokens" in w:
        extra = w["embeddings.register_tokens"].expand(batch, -1, -1)
        y = torch.cat([y[:, :1], extra, y[:, 1:]], 1)
    width, head = y.shape[-1], y.shape[-1] // heads
    centre = (torch.arange(grid).to(x) + 0.5) / grid * 2 - 1
    speed = 2 * math.pi * 100.0 ** (-4 * torch.arange(head // 4).to(x) / head)
    rows, columns = centre.repeat_interleave(grid), centre.repeat(grid)
    turn = torch.cat([rows[:, None] * speed, columns[:, None] * speed], 1)
    turn = functional.pad(turn, (0, 0, y.shape[1] - grid**2, 0))
    eps = 1e-5 if rotary else 1e-6

    def norm(y: Tensor, name: str) -> Tensor:
        centred = y - y.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(y: Tensor, name: str) -> Tensor:
        return y @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()).to(x))

    def split(y: Tensor, name: str) -> Tensor:
        return linear(y, name).unflatten(2, (heads, head)).transpose(1, 2)

    def turned(y: Tensor) -> Tensor:
        z = torch.complex(*y.chunk(2, -1)) * torch.polar(torch.ones_like(turn), turn)
        return torch.cat([z.real, z.imag], -1)

    style = (
        ("layer", "attention.{}_proj", ("q", "k", "v"), "attention.o_proj", "up_proj", "down_proj")
        if rotary
        else (
            *("encoder.layer", "attention.attention.{}", ("query", "key", "value")),
            *("attention.output.dense", "fc1", "fc2"),
        )
    )
    stack, pattern, names, out, up, down = style
    for number in range(2):
        at = f"{stack}.{number}."
        z = norm(y, at + "norm1")
        q, k, v = (split(z, at + pattern.format(name)) for name in names)
        q, k = (turned(q), turned(k)) if rotary else (q, k)
        z = (q @ k.mT / head**0.5).softmax(-1) @ v
        z = linear(z.transpose(1, 2).reshape(batch, -1, width), at + out)
        y = y + z * w[at + "layer_scale1.lambda1"]
        z = functional.gelu(linear(norm(y, at + "norm2"), f"{at}mlp.{up}"))
        y = y + linear(z, f"{at}mlp.{down}") * w[at + "layer_scale2.lambda1"]
    return norm(y, "norm" if rotary else "layernorm")


@pytest.mark.parametrize(
    ("name", "size"),
    [("dinov2-s", 224), ("dinov2-s", 504), ("dinov2-s-reg", 224), ("dinov3-s", 224)],
)
def test_the_network_is_the_straight_one(folders: dict[str, str], name: str, size: int) -> None:
    """In float64, but for the angles of DINOv3, which transformers rounds to float32."""
    weights = read_tensor_file(Path(folders[name]) / "model.safetensors")
    encoder = load_dino(name, folders[name], size=size)
    x, table = normal((1, 3, size, size), 0, "images").double(), None
    if name != "dinov3-s":
        known = weights["embeddings.position_embeddings"]
        table = resample_positions(known, size // 14, antialias=name.endswith("reg"))
    with torch.no_grad():
        found = encoder._module.double()(x)
    expected = straight(weights, x, table, heads=6)
    assert found.shape == (
        1,
        1 + REGISTERS[name] + (size // (16 if table is None else 14)) ** 2,
        384,
    )
    assert_near(found, expected, FLOAT32 if table is None else FLOAT64)


@pytest.mark.parametrize("name", ["dinov2-s", "dinov2-s-reg", "dinov3-s"])
def test_vectors_are_tokens_pooled(folders: dict[str, str], name: str) -> None:
    images = pixels(2, 1, 40, 40)
    size, prefix = (64 if name == "dinov3-s" else 56), 1 + REGISTERS[name]
    made = {
        pool: load_dino(name, folders[name], size=size, pool=pool)
        for pool in ("cls", "patch-mean", "cls-patch-mean")
    }
    with torch.no_grad():
        tokens = made["cls"]._module(Preprocessing(size)(images))
    first, mean = tokens[:, 0], tokens[:, prefix:].mean(1)
    assert_near(made["cls"](images), first, NETWORK)
    assert_near(made["patch-mean"](images), mean, NETWORK)
    assert_near(made["cls-patch-mean"](images), torch.cat([first, mean], 1), NETWORK)
    assert [encoder.dim for encoder in made.values()] == [384, 384, 768]
    assert_near(made["cls"].tokens(images, 4), tokens[:, prefix:], NETWORK)
    assert made["cls"].tokens(images, 3).shape == (2, 9, made["cls"].token_dim)


# --- positions -----------------------------------------------------------------------------------


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel (1981): 1 at 0, 0 at every other integer."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def matrix(grid: int, known: int, antialias: bool) -> np.ndarray:
    """W of P' = W P W^T, (grid, known)."""
    weights = np.zeros((grid, known))
    for i in range(grid):
        if antialias:
            wide = max(known / grid, 1.0)
            places = np.arange(known)
            weights[i] = cubic((places - ((i + 0.5) * known / grid - 0.5)) / wide, -0.5)
            weights[i] /= weights[i].sum()
            continue
        at = (i + 0.5) * known / (grid + 0.1) - 0.5
        for place in range(math.floor(at) - 1, math.floor(at) + 3):
            weight = cubic(np.array(place - at), -0.75)
            weights[i, min(max(place, 0), known - 1)] += weight  # the border is repeated
    return weights


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("grid", [4, 16, 36, 37, 40])
def test_positions_are_resampled_by_the_rules(grid: int, antialias: bool) -> None:
    table = normal((1, 1 + 37**2, 5), 0, "table").double()
    found = resample_positions(table, grid, antialias=antialias)
    assert torch.equal(found[:, 0], table[:, 0])
    square = table[0, 1:].reshape(37, 37, 5)
    weights = torch.from_numpy(np.eye(37) if grid == 37 else matrix(grid, 37, antialias))
    expected = torch.einsum("ip,jq,pqd->ijd", weights, weights, square).flatten(0, 1)
    assert_near(found[0, 1:], expected, FLOAT64)


def test_where_transformers_resamples_otherwise(folders: dict[str, str]) -> None:
    """With registers, and at the size of training, it does the same; without, nearly."""
    distance = {}
    for name, size in (("dinov2-s-reg", 224), ("dinov2-s", 518), ("dinov2-s", 224)):
        x = normal((1, 3, size, size), 0, "images")
        with torch.no_grad():
            theirs = transformers.AutoModel.from_pretrained(folders[name])(x).last_hidden_state
            ours = load_dino(name, folders[name], size=size)._module(x)
        distance[name, size] = float((ours - theirs).norm() / theirs.norm())
    assert distance["dinov2-s-reg", 224] < FLOAT32
    assert distance["dinov2-s", 518] < FLOAT32
    assert 1e-3 < distance["dinov2-s", 224] < 0.5


# --- what is said and refused --------------------------------------------------------------------


def test_the_description_holds_what_makes_the_vectors(
    folders: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def told(place: str = folders["dinov2-s"], **settings: Any) -> dict[str, Any]:
        return load_dino("dinov2-s", place, **{"size": 28, **settings}).description()

    capfd.readouterr()
    body = told()
    assert capfd.readouterr() == ("", "")  # transformers would show a bar
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert body == told()
    assert json.loads(json.dumps(body)) == body
    assert (body["name"], body["dim"], body["size"], body["pool"]) == ("dinov2-s", 384, 28, "cls")
    changed = tmp_path / "changed"
    shutil.copytree(folders["dinov2-s"], changed)
    model = transformers.AutoModel.from_pretrained(changed)
    model.layernorm.bias.data[3] += 1e-3
    model.save_pretrained(changed)
    others = [
        told(str(changed)),
        told(size=42),
        told(pool="patch-mean"),
        told(gmem=True),
    ]
    differing = [{key for key in body if body[key] != other[key]} for other in others]
    assert differing == [{"weights"}, {"size"}, {"pool"}, {"preprocessing", "positions"}]


def test_a_vector_depends_on_its_image_alone(folders: dict[str, str]) -> None:
    state = torch.random.get_rng_state()
    encoder = load_dino("dinov2-s", folders["dinov2-s"], size=28)
    assert torch.equal(torch.random.get_rng_state(), state)
    images = pixels(40, 3, 20, 20)
    together = encoder(images)
    assert (together.dtype, together.requires_grad) == (torch.float32, False)
    assert_near(torch.cat([encoder(part) for part in images.split(7)]), together, FLOAT32)


def test_names_and_table_agree() -> None:
    assert set(get_args(EncoderName)) == {"pixels", "effnet", *DINO}
    assert all(kind.hub.startswith(f"facebook/{name[:6]}") for name, kind in DINO.items())


def test_a_wrong_choice_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    place, shape = folders["dinov2-s"], (3, 32, 32)
    with pytest.raises(InputError, match=r"needs its weights.*facebook/dinov2-small"):
        build_encoder("dinov2-s", shape)
    with pytest.raises(InputError, match=r"patches of 14 pixels, take 504 or 518"):
        build_encoder("dinov2-s", shape, weights=place, size=512)
    with pytest.raises(InputError, match="take 14 or 28"):
        build_encoder("dinov2-s", shape, weights=place, size=8)
    with pytest.raises(
        InputError, match="holds a dinov2 of width 384, and dinov2-b is a dinov2 of"
    ):
        build_encoder("dinov2-b", shape, weights=place)
    with pytest.raises(InputError, match="and dinov2-s-reg is a dinov2_with_registers"):
        build_encoder("dinov2-s-reg", shape, weights=place)
    with pytest.raises(InputError, match="no weights at nowhere"):
        build_encoder("dinov2-s", shape, weights="nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no dinov2-s as transformers saves it"):
        build_encoder("dinov2-s", shape, weights=str(tmp_path / "empty"))
    with pytest.raises(InputError, match="effnet has no weights"):
        build_encoder("effnet", shape, weights=place)
    with pytest.raises(InputError, match="pixels has no pool"):
        build_encoder("pixels", shape, pool="cls")


def test_a_lacking_weight_is_named(folders: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders["dinov2-s"], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["layernorm.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights of dinov2-s, such as layernorm.bias"):
        load_dino("dinov2-s", str(tmp_path))


def test_without_transformers_the_extra_is_named(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"stratagem\[hf\]"):
        load_dino("dinov2-s", folders["dinov2-s"])


def test_only_a_repository_name_asks_the_hub(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def fetch(name: str, **_: Any) -> str:
        asked.append(name)
        if name != "facebook/dinov2-small":
            raise FileNotFoundError("no such\nrepository")
        return folders["dinov2-s"]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    local = load_dino("dinov2-s", folders["dinov2-s"], size=28).description()
    assert not asked
    assert load_dino("dinov2-s", "facebook/dinov2-small", size=28).description() == local
    assert asked == ["facebook/dinov2-small"]
    with pytest.raises(InputError, match=r"neither a folder here nor .* no such repository"):
        load_dino("dinov2-s", "some/where")


# --- banks and training --------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path: Path, blobs: DataSet, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").symlink_to(blobs.path)
    (tmp_path / "new").mkdir()
    Image.fromarray(blobs.images(torch.tensor([25]))[0, 0].numpy()).save(tmp_path / "new/25.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_bank_is_built_and_images_are_added(
    work: Path, folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = f"--encoder-weights {folders['dinov2-s']}"
    build = f"bank build data --encoder dinov2-s {given} --encoder-size 28 --device auto"
    assert main(f"{build} --pool cls --out bank".split()) == 0
    assert main(f"{build} --pool patch-mean --out other".split()) == 0
    assert main(f"bank add bank new {given} --out added".split()) == 0
    bank = MemoryBank.load(Path("added"))
    assert (bank.num, bank.dim, bank.encoder["pool"]) == (41, 384, "cls")
    row = torch.tensor([40]), torch.tensor([25])
    for flip in (torch.tensor([False]), torch.tensor([True])):
        assert_near(bank.lookup(row[0], flip), bank.lookup(row[1], flip), FLOAT32)
    capsys.readouterr()
    for name in ("bank", "other"):
        assert main(f"bank nearest {name} new --num 1 {given}".split()) == 0
        assert "row 25  cosine 1.0000" in capsys.readouterr().out
    assert main(f"bank remove bank --like new --cosine 0.9999 {given} --out less".split()) == 0
    near = {"seed": 0, "label": None, "noise": lambda _: torch.zeros(())}
    like = {"like": "new", "weights": folders["dinov2-s"]}
    chosen = choose(MemoryBank.load(Path("bank")), 1, "near", **near, **like)
    assert (chosen.rows.tolist(), bank.held_out[25]) == ([25], False)
    with pytest.raises(InputError, match="--like-weights has no effect without"):
        choose(bank, 1, "train", **near, **{**like, "like": None})
    refused = {
        "bank nearest bank new --num 1": "dinov2-s needs its weights",
        f"bank nearest bank new --encoder-weights {folders['dinov2-b']}": "of width 768",
        "bank merge bank other --out x": "merge banks of one encoder",
        f"bank remove bank --ids 03 {given} --out x": "no effect with no --like",
        f"bank build data --encoder pixels {given} --out x": "pixels has no weights",
    }
    for line, reason in refused.items():
        capsys.readouterr()
        assert main(line.split()) == 2, line
        assert reason in capsys.readouterr().err.splitlines()[-1]


def test_images_join_an_official_bank(
    work: Path, folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The new row is GMem's: crop to 256, plain bicubic to 224, antialiased positions, token 0."""
    torch.save(normal((9, 768), 0, "official"), work / "official.pth")
    line = "bank import official.pth --out official --format float32"
    assert main(line.split()) == 0
    photo = pixels(310, 270, 3)
    Image.fromarray(photo.numpy()).save(work / "new/25.png")
    assert MemoryBank.load(Path("official")).encoder == {**GMEM_ENCODER, "dim": 768}
    line = "bank add official new --out more"
    assert main(line.split()) == 2
    assert "--encoder-weights facebook/dinov2-base" in capsys.readouterr().err
    assert main(f"{line} --encoder-weights {folders['dinov2-b']}".split()) == 0

    x = load_image(work / "new/25.png", GMEM_SIZE, 3)[None].double() / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    x = functional.interpolate((x - mean) / std, size=(224, 224), mode="bicubic")
    model = transformers.AutoModel.from_pretrained(folders["dinov2-b"]).double()
    known = model.embeddings.position_embeddings.data[0]
    weights = torch.from_numpy(matrix(16, 37, antialias=True))
    square = known[1:].reshape(37, 37, -1)
    table = torch.einsum("ip,jq,pqd->ijd", weights, weights, square).flatten(0, 1)
    model.embeddings.position_embeddings.data = torch.cat([known[:1], table])[None]
    with torch.no_grad():
        expected = functional.normalize(model(x).last_hidden_state[:, 0])
    row = MemoryBank.load(Path("more")).lookup(torch.tensor([9]))
    assert_near(row, expected, NETWORK)
    plain = load_dino("dinov2-b", folders["dinov2-b"])
    other = functional.normalize(plain(load_image(work / "new/25.png", GMEM_SIZE, 3)[None]))
    assert (other - expected).abs().max() > 100 * NETWORK  # the two ways are told apart


def test_training_aligns_with_a_dino(blobs: DataSet, folders: dict[str, str]) -> None:
    align = AlignConfig(encoder="dinov2-s", weights=folders["dinov2-s"], size=56, block=1, hidden=8)
    model = ModelConfig(patch=2, width=32, depth=2, heads=2)
    parts = assemble(RunConfig(data=str(blobs.path), model=model, align=align))
    batch = parts.batches(0)
    images = ((batch.x + 1) * 127.5).round().to(torch.uint8)
    expected = load_dino("dinov2-s", folders["dinov2-s"], size=56).tokens(images, 4)
    assert expected.shape[1:] == (16, 384)
    assert_near(batch.condition["align"], expected, 2.0**-10)  # kept in float16
    assert align_encoder(align).token_dim == 384
    with pytest.raises(InputError, match=r"align\.weights"):
        align_encoder(replace(align, weights=None))
