"""DINOv2 and DINOv3 as encoders: transformers' networks with the weights that a user has.

    dinov2-s|b|l       ViT-S/B/L with patches of 14 pixels (Oquab et al. 2023, arXiv 2304.07193)
    dinov2-s|b|l-reg   the same with 4 registers (Darcet et al. 2023, arXiv 2309.16588)
    dinov3-s|b|l       patches of 16 pixels, rotary positions, 4 registers (Simeoni et al. 2025,
                       arXiv 2508.10104), of web images: satellite images need another mean

Weights are a folder as transformers saves it, or the name of a repository on the Hugging Face hub.

DINOv2 has learned positions of a 37 x 37 grid. For another size they are resampled by one of two
rules, P' = W P W^T with cubic weights W, and the class token's stays:

    plain         a = -3/4, at (i + 1/2) G / (g + 0.1) - 1/2: the authors' without registers
    antialiased   a = -1/2, kernel widened by G / g where g < G: the authors' with registers, and
                  what GMem (and REPA) do to the network without

transformers' own rule without registers is the first with G / g, so the positions are set here,
once, and its network takes them as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from stratagem.artifact import fingerprint
from stratagem.artifact.manifest import sum_of
from stratagem.encoders.base import Preprocessing
from stratagem.encoders.module import ModuleEncoder, Pool
from stratagem.errors import InputError, MissingExtra

__all__ = ["DINO", "load_dino", "resample_positions"]


class Kind(NamedTuple):
    """What tells one DINO from another: transformers' type, the width, the place on the hub."""

    type: str
    width: int
    hub: str


_V2, _REG, _V3 = "dinov2", "dinov2_with_registers", "dinov3_vit"
DINO = {
    "dinov2-s": Kind(_V2, 384, "facebook/dinov2-small"),
    "dinov2-b": Kind(_V2, 768, "facebook/dinov2-base"),
    "dinov2-l": Kind(_V2, 1024, "facebook/dinov2-large"),
    "dinov2-s-reg": Kind(_REG, 384, "facebook/dinov2-with-registers-small"),
    "dinov2-b-reg": Kind(_REG, 768, "facebook/dinov2-with-registers-base"),
    "dinov2-l-reg": Kind(_REG, 1024, "facebook/dinov2-with-registers-large"),
    "dinov3-s": Kind(_V3, 384, "facebook/dinov3-vits16-pretrain-lvd1689m"),
    "dinov3-b": Kind(_V3, 768, "facebook/dinov3-vitb16-pretrain-lvd1689m"),
    "dinov3-l": Kind(_V3, 1024, "facebook/dinov3-vitl16-pretrain-lvd1689m"),
}


def load_dino(
    name: str,
    weights: str,
    *,
    size: int = 224,
    pool: Pool = "cls",
    gmem: bool = False,
    device: torch.device | str = "cpu",
) -> ModuleEncoder:
    """Returns a DINO with the weights at a place.

    Args:
        name: A key of `DINO`.
        weights: A folder, or a repository of the hub.
        size: Side to which images are scaled, a multiple of the patch.
        pool: How its tokens become one vector.
        gmem: Whether images and positions are resampled as for GMem's banks (images of 256 pixels
            plainly, positions antialiased), and not as the network's authors do.
        device: Where it runs.

    Raises:
        InputError: If there are no such weights, or the size is no multiple of the patch.
        MissingExtra: If transformers is not installed.
    """
    folder = _folder(weights)
    model = _model(name, folder)
    patch: int = model.config.patch_size
    if size < patch or size % patch:
        near = max(size // patch, 1) * patch
        raise InputError(
            f"encoder size is {size}: {name} cuts images into patches of {patch} pixels, take "
            f"{near} or {near + patch}"
        )
    files = sorted(folder.glob("model*.safetensors"))
    facts = {"weights": fingerprint([sum_of(file) for file in files])}
    kind = DINO[name].type
    if kind != _V3:
        smooth = gmem or kind == _REG
        table = resample_positions(
            model.embeddings.position_embeddings.detach(), size // patch, antialias=smooth
        )
        model.embeddings.position_embeddings = nn.Parameter(table)
        facts["positions"] = "bicubic antialiased" if smooth else "bicubic, offset 0.1"
    registers = 0 if kind == _V2 else model.config.num_register_tokens
    preprocessing = Preprocessing(size, antialias=not gmem)
    return ModuleEncoder(
        _Tokens(model), name, preprocessing, pool=pool, prefix=1 + registers, facts=facts,
        device=device,
    )  # fmt: skip


def resample_positions(table: Tensor, grid: int, *, antialias: bool) -> Tensor:
    """Resamples learned positions (1, 1 + G^2, D), the class token's first, to (1, 1 + grid^2, D).

    Args:
        table: The positions.
        grid: Patches along one side.
        antialias: Which of the rules above.
    """
    first, rest = table[:, :1], table[:, 1:]
    known = round(rest.shape[1] ** 0.5)
    if known == grid:
        return table
    maps = rest.mT.unflatten(2, (known, known))
    if antialias:
        maps = functional.interpolate(maps, size=(grid, grid), mode="bicubic", antialias=True)
    else:
        factor = (grid + 0.1) / known
        maps = functional.interpolate(maps, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([first, maps.flatten(2).mT], dim=1)


class _Tokens(nn.Module):
    """All tokens behind the last norm, (B, L, D)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (B, 3, S, S)."""
        return cast(Tensor, self.model(pixel_values=x).last_hidden_state)


def _folder(place: str) -> Path:
    """Returns the folder of weights, fetched from the hub if it is not a path."""
    path = Path(place)
    if path.is_dir():
        return path
    if path.exists() or place.count("/") != 1:
        raise InputError(f"no weights at {place}: give a folder, or a repository of the hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtra("huggingface-hub", "hf") from error
    try:
        return Path(snapshot_download(place, allow_patterns=["config.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{place} is neither a folder here nor to be had from the hub: {reason}"
        ) from error


def _model(name: str, folder: Path) -> Any:
    """Returns transformers' network of a folder, if it is the one of this name."""
    try:
        from transformers import AutoConfig, AutoModel
        from transformers.utils import logging
    except ImportError as error:
        raise MissingExtra("transformers", "hf") from error
    loud = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        found, wanted = (config.model_type, getattr(config, "hidden_size", 0)), DINO[name][:2]
        if found != wanted:
            raise InputError(
                f"{folder} holds a {found[0]} of width {found[1]}, and {name} is a {wanted[0]} of "
                f"width {wanted[1]}: choose the encoder that it is"
            )
        model, report = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"no {name} as transformers saves it in {folder}: {reason}") from error
    finally:
        if loud:
            logging.enable_progress_bar()
    lacking = [*report["missing_keys"], *report["mismatched_keys"]]
    if lacking:
        raise InputError(f"{folder} lacks {len(lacking)} weights of {name}, such as {lacking[0]}")
    return model.float()
