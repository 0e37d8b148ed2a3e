"""The Inception-v3 of FID: 2048 features of the last pooling, with the user's weights file.

Images are resized to 299 x 299 bilinearly, in one of two ways, which the description names:

    tensorflow    row i reads at i H / 299, as the graph did; (u - 128) / 128. The default: it is
                  how ADM's reference statistics and the distances of most papers were made
    pytorch-fid   half-pixel centres; u / 127.5 - 1

Other outputs of the same pass: the first 7 channels of the first branch of Mixed_6d, 17 x 17, in
the order of the graph (row, column, channel), which sFID compares; and p(class | image) without the
bias of the last layer, for the Inception Score.

Two files hold these weights: pytorch-fid's state dict, and NVIDIA's TorchScript, which resizes by
itself like TensorFlow. A file is known by its SHA-256, which goes into the description. Others are
refused unless trusted, and then the features bear another name, so that no other number is called
FID. A state dict is read by torch's restricted unpickler. TorchScript is a program: loading it runs
no Python and unpickles no objects, but torch's interpreter is no sandbox. Trust what you would run.

Reference: Heusel et al. 2017, arXiv:1706.08500.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor, nn
from torch.nn import functional

from stratagem.errors import InputError
from stratagem.nets.inception import InceptionNet, Outputs

__all__ = ["Inception", "Resize", "fetch_inception", "load_inception"]

_FILE = "pt_inception-2015-12-05-6726825d.pth"
_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{_FILE}"
_STATE_DICT = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_TORCHSCRIPT = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
_KNOWN = {_STATE_DICT, _TORCHSCRIPT}
_SIDE = 299

Resize = Literal["tensorflow", "pytorch-fid"]


class Inception:
    """The Inception-v3 of FID as a feature net: uint8 (B, C, H, W), C 1 or 3 -> float32 (B, 2048).

    Args:
        net: The network with weights loaded, or NVIDIA's TorchScript.
        digest: SHA-256 of the weights file. If it is not that of a known file, the features are
            called "inception-<first digits>" and their distance is not called FID.
        resize: How images are brought to 299 x 299; TorchScript does it by itself, so None.
        device: Where it runs.
    """

    dim = 2048

    def __init__(
        self,
        net: nn.Module,
        digest: str,
        resize: Resize | None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.net = net.to(device).eval()
        for parameter in self.net.parameters():
            parameter.requires_grad_(False)
        self.digest, self.resize, self.device = digest, resize, device
        self.known = digest in _KNOWN
        self.name = "inception" if self.known else f"inception-{digest[:8]}"

    @property
    def spatial(self) -> bool:
        """Whether there are features for sFID: TorchScript does not give them."""
        return isinstance(self.net, InceptionNet)

    def description(self) -> dict[str, Any]:
        """Name, preprocessing and the weights file's SHA-256."""
        how = {
            "tensorflow": f"bilinear {_SIDE} like TensorFlow 1, no antialias, (u - 128) / 128",
            "pytorch-fid": f"bilinear {_SIDE}, half-pixel centres, no antialias, u / 127.5 - 1",
            None: f"TorchScript's own: bilinear {_SIDE} like TensorFlow 1",
        }
        return {
            "name": self.name,
            "weights": self.digest,
            "known_weights": self.known,
            "preprocessing": how[self.resize],
        }

    def __call__(self, images: Tensor) -> Tensor:
        """Computes the features of FID, float32 (B, 2048)."""
        return self.outputs(images).pooled

    @torch.inference_mode()
    def outputs(self, images: Tensor, classes: bool = False) -> Outputs:
        """Computes all outputs on the device of the network, float32.

        Args:
            images: uint8 (B, C, H, W).
            classes: Whether p(class | image) is wanted; TorchScript needs a second pass for it.

        Raises:
            InputError: If the images have neither one nor three channels.
        """
        if images.shape[1] not in {1, 3}:
            raise InputError(f"Inception-v3 sees 1 or 3 channels, not {images.shape[1]}")
        x = images.to(self.device).expand(-1, 3, -1, -1)
        if self.resize is None:
            told = self.net(x, no_output_bias=True).float() if classes else None
            return Outputs(self.net(x, return_features=True).float(), None, told)
        if self.resize == "tensorflow":
            return self.net((_like_tensorflow(x.float()) - 128) / 128)
        size = (_SIDE, _SIDE)
        x = functional.interpolate(x.float(), size, mode="bilinear", align_corners=False)
        return self.net(x / 127.5 - 1)


def _like_tensorflow(x: Tensor) -> Tensor:
    """Resizes (B, C, H, W) as TensorFlow 1 did: row i is read at i H / 299, between two rows."""
    for dim in (-1, -2):
        num = x.shape[dim]
        at = torch.arange(_SIDE, device=x.device, dtype=torch.float64) * (num / _SIDE)
        low = at.floor().long().clamp(max=num - 1)
        share = (at - low).to(x).view(-1, *[1] * (-1 - dim))
        near, next_ = (x.index_select(dim, i) for i in (low, (low + 1).clamp(max=num - 1)))
        x = near + (next_ - near) * share
    return x


def load_inception(
    path: Path,
    device: torch.device | str = "cpu",
    *,
    resize: Resize | None = None,
    trust: bool = False,
) -> Inception:
    """Reads a weights file: a state dict of pytorch-fid's layout, or NVIDIA's TorchScript.

    Args:
        path: The file.
        device: Where the network runs.
        resize: How a state dict's images are resized, "tensorflow" by default.
        trust: Whether a file of unknown SHA-256 is taken.

    Raises:
        InputError: If there is no such file, it is not known and not trusted, it is neither a plain
            state dict nor TorchScript, or its names or shapes are not those of the FID
            Inception-v3; the first differing names are given.
    """
    if not path.is_file():
        raise InputError(f"no Inception weights at {path}: give the file {_FILE}, or --fetch")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest not in _KNOWN and not trust:
        raise InputError(
            f"{path} has the SHA-256 {digest[:8]}..., which is not that of a known Inception file "
            f"({_STATE_DICT[:8]}..., {_TORCHSCRIPT[:8]}...): get one of those, or --trust it"
        )
    if is_zipfile(path) and any("/code/" in name for name in ZipFile(path).namelist()):
        if resize is not None:
            raise InputError(f"{path} is TorchScript, which resizes by itself: leave out --resize")
        return Inception(_load_script(path, device), digest, None, device)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever foreign bytes lead it to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is not a plain state dict ({reason})") from error
    net = InceptionNet()
    _load_strictly(net, state, path)
    return Inception(net, digest, resize or "tensorflow", device)


def _load_script(path: Path, device: torch.device | str) -> nn.Module:
    """Reads TorchScript and tries it on one image, for it may be any program."""
    try:
        script = torch.jit.load(path, map_location=device).eval()
        with torch.inference_mode():
            blank = torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device=device)
            shape = tuple(script(blank, return_features=True).shape)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise InputError(f"{path} is not the TorchScript of the Inception-v3: {reason}") from error
    if shape != (1, Inception.dim):
        raise InputError(f"{path} gives features of shape {shape}, not (1, {Inception.dim})")
    return script


def fetch_inception() -> Path:
    """Downloads pytorch-fid's weights file once, to torch's hub folder, and returns its path.

    Raises:
        InputError: If it cannot be had, or what comes is not that file.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / _FILE
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(_URL, str(path), _STATE_DICT, progress=False)
        except (URLError, OSError, RuntimeError) as error:
            raise InputError(f"cannot fetch {_URL}: {error}; give a file with --weights") from error
    return path


def _load_strictly(net: InceptionNet, state: object, path: Path) -> None:
    """Loads a state dict without its counters of batches, which old files lack and nobody uses."""
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path} is not a state dict: it must map names to tensors")
    counters = {k for k in net.state_dict() if k.endswith("num_batches_tracked")}
    wanted = {k: v.shape for k, v in net.state_dict().items() if k not in counters}
    found = {k: v.shape for k, v in state.items() if k not in counters}
    for problem, names in (
        ("lacks", wanted.keys() - found.keys()),
        ("has unexpected", found.keys() - wanted.keys()),
        ("has other shapes of", {k for k in wanted if found.get(k, wanted[k]) != wanted[k]}),
    ):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise InputError(
                f"{path} is not the FID Inception-v3: it {problem} {some} ({len(names)} in all)"
            )
    net.load_state_dict({k: state[k] for k in wanted}, strict=False)
