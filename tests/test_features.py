"""Feature nets: principal components, wrapped encoders, and the Inception-v3 of FID."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stratagem.data.images import to_float
from stratagem.errors import InputError
from stratagem.metrics import inception
from stratagem.metrics.features import (
    Components,
    EncoderFeatures,
    FeatureNet,
    PixelComponents,
    metric_name,
)
from stratagem.metrics.frechet import frechet_distance, moments
from stratagem.metrics.inception import Inception, Resize, fetch_inception, load_inception
from stratagem.nets.inception import InceptionNet, Outputs
from stratagem.randomness import generator, normal, uniform
from tolerances import FLOAT32, NETWORK, assert_near

GOLDEN = Path(__file__).parent / "golden" / "inception_fid.safetensors"


def _images(num: int, seed: int, side: int = 4) -> Tensor:
    light = 0.5 + 0.5 * uniform((num, 1, 1, 1), seed, "light")
    return (256 * light * uniform((num, 3, side, side), seed, "test")).to(torch.uint8)


class _Mean:
    """An encoder of two numbers: mean and deviation of the pixels."""

    name = "mean"
    dim = 2

    def description(self) -> dict[str, Any]:
        return {"name": "mean"}

    def __call__(self, images: Tensor) -> Tensor:
        x = to_float(images).flatten(1)
        return torch.stack([x.mean(1), x.std(1)], 1)


@pytest.mark.parametrize("num", [30, 200])  # fewer and more images than pixels
def test_components_are_the_leading_singular_vectors(num: int) -> None:
    rows = normal((num, 48), 0, "test") * torch.linspace(1, 5, 48)
    found = Components.fit(rows, 8)
    centred = (rows - rows.mean(0)).double()
    right = torch.linalg.svd(centred, full_matrices=False).Vh[:8].T
    torch.testing.assert_close((found.basis.double() * right).sum(0).abs(), torch.ones(8).double())
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(8), rtol=0, atol=1e-5)
    assert (found.basis.gather(0, found.basis.abs().argmax(0, keepdim=True)) > 0).all()


def test_components_of_statistics_are_those_of_the_rows() -> None:
    rows = normal((200, 48), 0, "test") * torch.linspace(1, 5, 48)
    found, expected = Components.of(moments(rows), 8), Components.fit(rows, 8)
    assert_near(found.basis, expected.basis, FLOAT32)
    assert_near(found.mean, expected.mean, FLOAT32)


def test_components_of_a_flat_set_are_refused() -> None:
    rows = normal((50, 3), 0, "test") @ normal((3, 20), 1, "test")
    assert Components.fit(rows, 3).num == 3
    with pytest.raises(InputError, match="do not span 4 components"):
        Components.fit(rows, 4)


def test_pixel_components_measure_images() -> None:
    reference = _images(300, 0)
    net: FeatureNet = PixelComponents.fit(reference, 16)
    assert (net.name, net.dim, metric_name(net)) == ("pixels16", 16, "fd_pixels16")
    features = net(reference)
    assert features.shape == (300, 16)
    assert features.dtype == torch.float32
    assert_near(features.mean(0), torch.zeros(16), 1e-5)
    variances = features.var(0)
    assert (variances[:-1] >= variances[1:]).all()
    assert (
        net.description()["components"]
        == PixelComponents.fit(reference, 16).description()["components"]
    )
    with pytest.raises(InputError, match="images of one size"):
        net(_images(2, 0, side=5))


def test_distance_grows_with_a_change_of_the_images() -> None:
    reference = _images(400, 0)
    net = PixelComponents.fit(reference, 8)
    real = moments(net(reference))
    same, darker = _images(400, 1), (_images(400, 1) * 0.7).to(torch.uint8)
    near = frechet_distance(real, moments(net(same)))
    far = frechet_distance(real, moments(net(darker)))
    assert far > 10 * near


def test_encoder_features_bear_the_encoders_name() -> None:
    net = EncoderFeatures(_Mean())
    assert (net.name, net.dim, metric_name(net)) == ("mean", 2, "fd_mean")
    assert net(_images(5, 0)).shape == (5, 2)
    small = EncoderFeatures(_Mean(), Components.fit(_Mean()(_images(50, 0)), 1))
    assert (small.name, small.dim) == ("mean1", 1)
    assert small(_images(5, 0)).shape == (5, 1)
    assert small.description() != net.description()


# --- Inception ---------------------------------------------------------------------------------


def random_state() -> dict[str, Tensor]:
    """Random weights that keep activations alive; the golden features were made with them."""
    state = OrderedDict()
    for name, like in InceptionNet().state_dict().items():
        draw = generator(0, f"inception/{name}")
        if name.endswith("num_batches_tracked"):
            continue
        if like.ndim > 1:
            scale = (2 / like[0].numel()) ** 0.5
            values = scale * draw.standard_normal(tuple(like.shape), dtype="float32")
        elif name.endswith(("running_var", "bn.weight")):
            values = 0.5 + draw.random(tuple(like.shape), dtype="float32")
        else:
            values = 0.1 * draw.standard_normal(tuple(like.shape), dtype="float32")
        state[name] = torch.from_numpy(values)
    return state


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state()


@pytest.fixture(scope="module")
def weights(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def net(weights: Path) -> Inception:
    return load_inception(weights, resize="pytorch-fid", trust=True)


def test_inception_has_the_published_size() -> None:
    """23,834,568 parameters without the auxiliary head and with 1000 classes; here 1008."""
    count = sum(p.numel() for p in InceptionNet().parameters())
    assert count == 23_834_568 + 8 * (2048 + 1)


def test_inception_names_are_those_of_the_file(state: dict[str, Tensor]) -> None:
    assert state["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
    assert state["Mixed_5b.branch1x1.conv.weight"].shape == (64, 192, 1, 1)
    assert state["Mixed_6e.branch7x7dbl_5.conv.weight"].shape == (192, 192, 1, 7)
    assert state["Mixed_7c.branch3x3dbl_3b.bn.running_var"].shape == (384,)
    assert state["fc.weight"].shape == (1008, 2048)


def test_inception_loads_what_was_saved(state: dict[str, Tensor], net: Inception) -> None:
    loaded = net.net.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert not any(p.requires_grad for p in net.net.parameters())


def test_inception_equals_pytorch_fid(net: Inception) -> None:
    """Features of the same weights and images, computed by pytorch-fid 0.3.0."""
    golden = load_file(GOLDEN)
    assert_near(net(golden["images"]), golden["features"], NETWORK)


def test_inception_takes_gray_images_as_three_equal_channels(net: Inception) -> None:
    gray = _images(2, 0, side=8)[:, :1]
    assert torch.equal(net(gray), net(gray.expand(-1, 3, -1, -1)))
    with pytest.raises(InputError, match="1 or 3 channels, not 4"):
        net(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))


def test_only_the_known_weights_make_a_fid(net: Inception, monkeypatch: pytest.MonkeyPatch) -> None:
    assert net.name == f"inception-{net.digest[:8]}"
    assert metric_name(net).startswith("fd_inception-")
    monkeypatch.setattr(inception, "_KNOWN", {net.digest})
    known = Inception(net.net, net.digest, "tensorflow")
    assert (known.name, metric_name(known)) == ("inception", "fid")
    assert metric_name(known, "sfd") == "sfid"
    assert metric_name(known, "kid") == "kid"
    assert metric_name(net, "kid") == f"kid_{net.name}"
    assert known.description()["known_weights"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fc.bias"), r"lacks fc\.bias \(1 in all\)"),
        (lambda s: s.update({"AuxLogits.fc.bias": torch.zeros(3)}), r"unexpected AuxLogits\.fc"),
        (lambda s: s.update({"fc.bias": torch.zeros(1000)}), r"other shapes of fc\.bias"),
        (lambda s: s.update({"fc.bias": 3}), "must map names to tensors"),
    ],
)
def test_other_files_are_refused_by_name(
    state: dict[str, Tensor],
    tmp_path: Path,
    change: Callable[[dict[str, Any]], Any],
    message: str,
) -> None:
    altered = dict(state)
    change(altered)
    torch.save(altered, tmp_path / "w.pth")
    with pytest.raises(InputError, match=message):
        load_inception(tmp_path / "w.pth", trust=True)


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no Inception weights"):
        load_inception(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_bytes(b"these are not weights")
    with pytest.raises(InputError, match="not a plain state dict"):
        load_inception(tmp_path / "text.pth", trust=True)
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(InputError, match="not a plain state dict"):
        load_inception(tmp_path / "empty.pth", trust=True)
    torch.save({"run": Path.cwd()}, tmp_path / "code.pth")  # an object: needs code to load
    with pytest.raises(InputError, match="not a plain state dict"):
        load_inception(tmp_path / "code.pth", trust=True)


def test_unknown_weights_are_refused_unless_trusted(weights: Path) -> None:
    with pytest.raises(InputError, match=r"not that of a known .* --trust"):
        load_inception(weights)
    assert load_inception(weights, trust=True).name.startswith("inception-")


def _read_like_tensorflow(row: Tensor, num: int) -> Tensor:
    """Pixel i is read at i n / num, between two pixels; the last one stands for those behind."""
    out = torch.zeros(num)
    for i in range(num):
        at = i * len(row) / num
        low = int(at)
        high = min(low + 1, len(row) - 1)
        out[i] = row[low] + (row[high] - row[low]) * (at - low)
    return out


@pytest.mark.parametrize("side", [8, 299, 320])
def test_resizing_like_tensorflow(side: int) -> None:
    """The network sees each pixel where TensorFlow 1 put it; its own reading is an oracle."""
    seen = list[Tensor]()

    class Spy(InceptionNet):
        def forward(self, h: Tensor) -> Outputs:
            seen.append(h)
            return Outputs(h.mean((2, 3)))

    across = (256 * uniform((1, 3, 1, side), 0, "test")).to(torch.uint8)
    images = across.expand(-1, -1, side, -1)
    for turned in (images, images.mT):
        Inception(Spy(), "0" * 64, "tensorflow")(turned)
        x = seen[-1] if turned is images else seen[-1].mT
        for channel in range(3):
            expected = (_read_like_tensorflow(across[0, channel, 0].float(), 299) - 128) / 128
            assert_near(x[0, channel, 5], expected, FLOAT32)
            assert_near(x[0, channel, 298], expected, FLOAT32)


def test_other_outputs_are_of_the_same_pass(net: Inception) -> None:
    """sFID's features are those of Mixed_6d's first branch; classes have no bias."""
    images = _images(2, 0, side=8)
    maps = list[Tensor]()
    branch = net.net.get_submodule("Mixed_6d.branch1x1")
    hook = branch.register_forward_hook(lambda *call: maps.append(call[-1]))
    found = net.outputs(images)
    hook.remove()
    assert torch.equal(maps[0], maps[-1])
    assert maps[0].shape == (2, 192, 17, 17)
    assert found.spatial is not None
    assert found.classes is not None
    assert found.spatial.shape == (2, 2023)
    at = found.spatial.view(2, 17, 17, 7)  # row, column, channel
    assert torch.equal(at[1, 3, 11], maps[0][1, :7, 3, 11])
    weight, bias = net.net.fc.weight, net.net.fc.bias
    assert_near(found.classes, (found.pooled @ weight.T).softmax(1), FLOAT32)
    assert bias.abs().max() > 0.1
    assert net.spatial


@pytest.mark.parametrize("resize", ["tensorflow", "pytorch-fid"])
def test_the_description_says_how_images_are_resized(weights: Path, resize: Resize) -> None:
    found = load_inception(weights, resize=resize, trust=True)
    said = found.description()["preprocessing"]
    assert ("TensorFlow" in said) == (resize == "tensorflow")
    default = load_inception(weights, trust=True)
    assert (default.description() == found.description()) == (resize == "tensorflow")


class Script(nn.Module):
    """Answers like NVIDIA's TorchScript."""

    def __init__(self, dim: int = 2048) -> None:
        super().__init__()
        self.dim = dim

    def forward(
        self, img: Tensor, return_features: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        mean = img.float().mean((1, 2, 3))[:, None]
        if return_features:
            return mean + torch.arange(self.dim)
        return torch.softmax(mean * torch.arange(5) + (0 if no_output_bias else 9), 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "inception.pt"
    torch.jit.script(Script()).save(str(path))
    with pytest.raises(InputError, match="--trust"):
        load_inception(path)
    found = load_inception(path, trust=True)
    images = _images(3, 0)
    assert torch.equal(found(images), Script()(images, return_features=True))
    assert not found.spatial
    assert found.outputs(images).classes is None
    told = found.outputs(images, classes=True).classes
    assert told is not None
    assert torch.equal(told, Script()(images, no_output_bias=True))
    assert "TorchScript" in found.description()["preprocessing"]
    with pytest.raises(InputError, match="resizes by itself"):
        load_inception(path, resize="tensorflow", trust=True)
    torch.jit.script(Script(7)).save(str(path))
    with pytest.raises(InputError, match=r"features of shape \(1, 7\)"):
        load_inception(path, trust=True)
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    with pytest.raises(InputError, match="not the TorchScript of the Inception"):
        load_inception(path, trust=True)


def test_weights_are_fetched_once_and_by_their_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "there.pth"
    source.write_bytes(b"weights")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(inception, "_URL", source.as_uri())
    with pytest.raises(InputError, match=r"cannot fetch .*--weights"):
        fetch_inception()
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(inception, "_STATE_DICT", digest)
    path = fetch_inception()
    assert path.read_bytes() == b"weights"
    source.unlink()
    assert fetch_inception() == path
