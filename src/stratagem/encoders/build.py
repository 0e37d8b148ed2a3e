"""Encoders by name, as the command line and the configuration know them.

A setting that an encoder does not have is refused, and so is one that it needs and was not given.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from stratagem.encoders.base import Encoder, TokenEncoder
from stratagem.encoders.dino import DINO, load_dino
from stratagem.encoders.effnet import EfficientNetLite0
from stratagem.encoders.module import ModuleEncoder, Pool
from stratagem.encoders.pixels import PixelEncoder
from stratagem.errors import InputError

__all__ = ["EncoderName", "build_encoder", "build_token_encoder"]

EncoderName = Literal[
    "pixels",
    "effnet",
    "dinov2-s",
    "dinov2-b",
    "dinov2-l",
    "dinov2-s-reg",
    "dinov2-b-reg",
    "dinov2-l-reg",
    "dinov3-s",
    "dinov3-b",
    "dinov3-l",
]


def build_encoder(
    name: str,
    shape: tuple[int, int, int],
    *,
    size: int | None = None,
    pool: Pool | None = None,
    weights: str | None = None,
    device: torch.device | str = "cpu",
) -> Encoder:
    """Returns the encoder of a name for images of a shape (C, H, W).

    Args:
        name: One of `EncoderName`.
        shape: (C, H, W) of the images.
        size: Side to which images are scaled: 64 for effnet, 224 for dino, by default; pixels has
            no such setting.
        pool: Of dino: how its tokens become one vector, "cls" by default.
        weights: Of dino, which needs them: a folder, or a repository of the hub.
        device: Where it runs; pixels are averaged where the images are.

    Raises:
        InputError: If the name is unknown, a setting does not fit it, or there are no such weights.
        MissingExtra: If the encoder's weights, or transformers, are not installed.
    """
    if name == "pixels":
        _refuse(name, size=size, pool=pool, weights=weights)
        return PixelEncoder(shape)
    return _network(name, size, pool, weights, device)


def build_token_encoder(
    name: str,
    *,
    size: int | None = None,
    weights: str | None = None,
    device: torch.device | str = "cpu",
) -> TokenEncoder:
    """Returns the encoder of a name, for its tokens; arguments as of `build_encoder`.

    Raises:
        InputError: If there is none of that name that has tokens, or a setting does not fit it.
        MissingExtra: If its weights, or transformers, are not installed.
    """
    if name == "pixels":
        raise InputError("encoder 'pixels' has no tokens to align with: use effnet or dinov2-b")
    return _network(name, size, None, weights, device)


def _network(
    name: str, size: int | None, pool: Pool | None, weights: str | None, device: torch.device | str
) -> EfficientNetLite0 | ModuleEncoder:
    if name == "effnet":
        _refuse(name, pool=pool, weights=weights)
        return EfficientNetLite0(64 if size is None else size, device)
    if name not in DINO:
        raise InputError(f"unknown encoder {name!r}: use one of {', '.join(get_args(EncoderName))}")
    if weights is None:
        raise InputError(
            f"encoder {name} needs its weights: give the folder that holds them, or "
            f"{DINO[name].hub} to fetch them (--encoder-weights; --like-weights in sampling; "
            "align.weights)"
        )
    size = 224 if size is None else size
    return load_dino(name, weights, size=size, pool=pool or "cls", device=device)


def _refuse(name: str, **settings: Any) -> None:
    for key, value in settings.items():
        if value is not None:
            raise InputError(f"encoder {name} has no {key}: leave it out")
