"""Frozen autoencoders: diffusers' AutoencoderKL with the weights that a user has.

    sd-vae   f8 d4, Stable Diffusion's (Rombach et al. 2022, arXiv 2112.10752): a latent of
             (4, H / 8, W / 8)
    va-vae   f16 d32, LightningDiT's and GMem's (Yao et al. 2025, arXiv 2501.01423), with attention
             at the lowest level: (32, H / 16, W / 16)

Weights are a folder as diffusers saves it, a file in diffusers' or in LDM's layout, or the name of
a repository on the Hugging Face hub. Every weight must have its place and every place its weight.
Images enter as u / 127.5 - 1 and leave by the inverse. Latents are those of the network itself: the
scaling factors that go with some weights are not applied, since a data set has its own statistics.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from stratagem.artifact import raw_bytes
from stratagem.data.images import to_float, to_uint8
from stratagem.data.latents import Autoencoder, Posterior, Statistics
from stratagem.errors import InputError, MissingExtra
from stratagem.interop.state_dict import read, require_match
from stratagem.interop.vavae import layout, rename

__all__ = [
    "AutoencoderName",
    "Finish",
    "KLAutoencoder",
    "build_autoencoder",
    "finish_of",
    "load_kl",
]

AutoencoderName = Literal["sd-vae", "va-vae"]
_SIZES = {"sd-vae": (8, 4), "va-vae": (16, 32)}  # factor and channels
_HUB = {
    "sd-vae": "stabilityai/sd-vae-ft-mse",
    "va-vae": "hustvl/vavae-imagenet256-f16d32-dinov2/vavae-imagenet256-f16d32-dinov2.pt",
}
_CHUNK = 16  # images at once: activations at full resolution are large


class KLAutoencoder:
    """An AutoencoderKL, frozen.

    Args:
        module: diffusers' AutoencoderKL.
        name: As on the command line.
        device: Where it encodes; posteriors come back to the CPU.
    """

    def __init__(self, module: nn.Module, name: str, device: torch.device | str = "cpu") -> None:
        config: Any = module.config
        self.name = name
        self.channels: int = config.latent_channels
        self.factor: int = 2 ** (len(config.block_out_channels) - 1)
        digest = hashlib.sha256()
        for key, tensor in sorted(module.state_dict().items()):
            digest.update(key.encode() + raw_bytes(tensor.cpu().float()))
        self._sum = digest.hexdigest()
        self._device = torch.device(device)
        self._module: Any = module.eval().requires_grad_(False)

    def description(self) -> dict[str, Any]:
        """Returns all that makes the latents."""
        return {
            "name": self.name,
            "factor": self.factor,
            "channels": self.channels,
            "preprocessing": "u / 127.5 - 1",
            "weights": self._sum,
        }

    @torch.no_grad()
    def encode(self, images: Tensor) -> Posterior:
        """Maps images, shape (B, 3, H, W), uint8, to posteriors of (B, c, H / f, W / f)."""
        module, parts = self._module.to(self._device), []
        for batch in images.split(_CHUNK):
            found = module.encode(to_float(batch.to(self._device))).latent_dist
            parts.append(torch.stack([found.mean, found.std]).half().cpu())
        mean, std = torch.cat(parts, dim=1)
        return Posterior(mean, std)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Maps latents z, shape (B, c, h, w), float32, to images (B, 3, f h, f w), uint8."""
        module = self._module.to(latents.device)
        return torch.cat([to_uint8(module.decode(z).sample) for z in latents.split(_CHUNK)])


def build_autoencoder(
    name: AutoencoderName, weights: str | None = None, device: torch.device | str = "cpu"
) -> KLAutoencoder:
    """Returns the autoencoder of a name.

    Args:
        name: "sd-vae" or "va-vae".
        weights: A folder, a file, or a repository of the hub; by default the authors' on the hub.
        device: Where it runs.

    Raises:
        InputError: If there are no such weights, or they are another network's.
        DamagedArtifact: If a file of weights is truncated or altered.
        MissingExtra: If diffusers is not installed.
    """
    found = KLAutoencoder(load_kl(weights or _HUB[name]), name, device)
    factor, channels = _SIZES[name]
    if (found.factor, found.channels) != (factor, channels):
        raise InputError(
            f"{weights} is no {name}: it makes {found.channels} channels at 1/{found.factor} of "
            f"the side, not {channels} at 1/{factor}"
        )
    return found


def load_kl(place: str) -> nn.Module:
    """Returns diffusers' AutoencoderKL with the weights at a place, see `build_autoencoder`.

    Raises:
        InputError: If there are no such weights, or they are another network's.
        DamagedArtifact: If a file of weights is truncated or altered.
        MissingExtra: If diffusers is not installed.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise MissingExtra("diffusers", "hf") from error
    path = Path(place)
    if not path.exists() and place.count("/") == 2:
        path = _from_hub(place)
    if path.is_file():
        weights = rename(read(path).tensors)
        module: Any = AutoencoderKL(**layout(weights))
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        require_match(weights, shapes, "this autoencoder")
        module.load_state_dict(weights)
        return cast(nn.Module, module)
    if not path.exists() and place.count("/") != 1:
        raise InputError(f"no weights at {place}: give a folder, a file or a hub repository")
    try:
        module, report = AutoencoderKL.from_pretrained(
            place,
            local_files_only=path.exists(),
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"no autoencoder of diffusers at {place}: {reason}") from error
    faults = [f"{len(names)} {fault.replace('_', ' ')}" for fault, names in report.items() if names]
    if faults:
        raise InputError(f"{place} does not hold the weights of its network: {', '.join(faults)}")
    return cast(nn.Module, module)


@dataclass(frozen=True)
class Finish:
    """What becomes of a network's x at the end of sampling.

    Attributes:
        shape: (C, H, W) of the result.
        statistics: Of the latents that the network learned from, or None.
        autoencoder: What makes images of latents, or None to leave them latents.
        floor: Whether pixels are rounded down, not to the nearest; a decoder rounds by itself.
    """

    shape: tuple[int, int, int]
    statistics: Statistics | None = None
    autoencoder: Autoencoder | None = None
    floor: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Returns uint8 images, or latents z, float32, of x (B, C, H, W)."""
        if self.statistics is None and self.floor:
            return (127.5 * x + 127.5).clamp(0, 255).to(torch.uint8)
        if self.statistics is None:
            return to_uint8(x) if self.shape[0] in {1, 3} else x
        z = self.statistics.undo(x)
        return z if self.autoencoder is None else self.autoencoder.decode(z)

    def description(self) -> dict[str, Any] | None:
        """Returns what the autoencoder says of itself, or None."""
        return None if self.autoencoder is None else self.autoencoder.description()


def finish_of(made: Mapping[str, Any], weights: str | None = None) -> Finish:
    """Returns how the samples of a run end.

    Args:
        made: What the run is made from: its "shape" and, of latents, "latents".
        weights: Those of the autoencoder, see `build_autoencoder`.

    Raises:
        InputError: If the weights are not those that made the latents, or have no effect.
    """
    channels, height, width = made["shape"]
    latents = made.get("latents")
    if latents is None:
        if weights is not None:
            raise InputError(
                "--autoencoder has no effect: the run does not come from latents"
                if "imported" not in made
                else "the statistics of the latents are missing: import the network again with "
                "--latent-stats latents_stats.pt, or of SiT with --latent-multiplier 0.18215"
            )
        return Finish((channels, height, width))
    statistics = Statistics(latents["mean"], latents["std"])
    if weights is None:
        return Finish((channels, height, width), statistics)
    known = latents["autoencoder"]  # empty for official latents
    guess = next((n for n, (_, c) in _SIZES.items() if c == channels), "va-vae")
    found = build_autoencoder(cast(AutoencoderName, known.get("name", guess)), weights)
    if known and found.description() != known:
        raise InputError(
            f"{weights} is not the {found.name} that made the latents of this run: its weights "
            "differ, so that its images would be wrong"
        )
    sides = found.factor * height, found.factor * width
    return Finish((3, *sides), statistics, found)


def _from_hub(place: str) -> Path:
    """Fetches one file, named owner/repository/file."""
    from huggingface_hub import hf_hub_download

    owner, repository, file = place.split("/")
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file))
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot fetch {place}: {reason}; give the file with --weights") from error
