"""Small autoencoders with random weights, for tests; the layouts of real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratagem.data.latents import Posterior

WIDTHS = {4: (32, 32, 32, 32), 32: (32, 32, 32, 32, 32)}


def module(channels: int = 4, seed: int = 0) -> Any:
    """diffusers' AutoencoderKL: f8 d4, or of 32 channels f16 d32, with attention."""
    from diffusers import AutoencoderKL

    widths = WIDTHS[channels]
    lowest = "" if channels == 4 else "Attn"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * (len(widths) - 1)
            + (f"{lowest}DownEncoderBlock2D",),
            up_block_types=(f"{lowest}UpDecoderBlock2D",)
            + ("UpDecoderBlock2D",) * (len(widths) - 1),
            block_out_channels=widths,
            layers_per_block=1,
            latent_channels=channels,
        )
    return net.eval()


def save_file(path: Path, channels: int = 4, seed: int = 0) -> Path:
    """Weights in one file, under diffusers' names, as a training script leaves them."""
    torch.save({"state_dict": module(channels, seed).state_dict()}, path)
    return path


class Means:
    """An autoencoder without weights: area means, and a spread that grows with them."""

    name = "means"
    factor = 4
    channels = 3

    def __init__(self, fault: float = 0.0) -> None:
        self.fault = fault
        self.encoded = 0

    def description(self) -> dict[str, Any]:
        return {"name": self.name, "fault": self.fault}

    def encode(self, images: Tensor) -> Posterior:
        self.encoded += len(images)
        # uneven, so that the code of a mirrored image is not the mirrored code
        ramp = torch.arange(1.0, images.shape[-1] + 1) / images.shape[-1]
        mean = torch.nn.functional.avg_pool2d(images.float() / 255 * ramp, self.factor)
        return Posterior((mean + self.fault).half(), (mean / 3).half())

    def decode(self, latents: Tensor) -> Tensor:
        wide = latents.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)
        return (255 * wide).clamp(0, 255).to(torch.uint8)
