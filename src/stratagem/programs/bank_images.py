"""Images given by hand, on their way into a memory bank: as those went that it was built of.

    images -> the shape of the bank's own images -> the bank's own encoder -> vectors

The bank says which encoder made it and of what shape; another version of that encoder, or other
weights, are refused. An official bank of GMem says no more than that its rows are DINOv2 ViT-B/14's
of images of 256 pixels: whoever gives these weights adds rows made in the same way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from stratagem.data.images import BadImage, find_images, load_image
from stratagem.encoders import Encoder, EncoderName, build_encoder, load_dino
from stratagem.errors import InputError
from stratagem.interop.banks import GMEM_ENCODER, GMEM_SIZE, read_vectors
from stratagem.memory.bank import MemoryBank
from stratagem.programs import Progress, device_of, silent

__all__ = ["Encoded", "encode_files", "encode_images", "rows_of_file"]

_BATCH = 64  # images encoded at once


class Encoded(NamedTuple):
    """Vectors (n, F, D) of images, their names, and (name, cause) of unusable files."""

    vectors: Tensor
    names: list[str]
    rejected: list[tuple[str, str]]


def rows_of_file(source: Path) -> Encoded:
    """Reads vectors that the bank's encoder made elsewhere, see `interop.banks.read_vectors`."""
    vectors = read_vectors(source)
    names = [f"{source.stem}/{row}" for row in range(len(vectors))]
    return Encoded(vectors if vectors.ndim == 3 else vectors[:, None], names, [])


def encode_files(
    bank: MemoryBank, source: Path, weights: str | None, progress: Progress
) -> Encoded:
    """Encodes images as those of the bank were; unusable files are left out and named.

    Args:
        bank: The bank.
        source: An image or a folder of them.
        weights: Of the bank's encoder, where it needs them: a folder, or a repository of the hub.
        progress: Called with the number of images done and of all.

    Raises:
        InputError: If no image can be used, or the bank's encoder is not to be had.
    """
    encode, size, channels = _encoder(bank, weights)
    if source.is_file():
        files = [(source, source.name)]
    else:
        listing = find_images(source)
        files = [(path, listing.name(number)) for number, path in enumerate(listing.paths)]
    vectors: list[Tensor] = []
    names: list[str] = []
    rejected: list[tuple[str, str]] = []
    for start in range(0, len(files), _BATCH):
        images = []
        for path, name in files[start : start + _BATCH]:
            try:
                images.append(load_image(path, size, channels))
                names.append(name)
            except BadImage as error:
                rejected.append((name, str(error)))
        if images:
            batch = torch.stack(images)
            sides = [batch, batch.flip(-1)][: bank.store.sides]
            vectors.append(torch.stack([encode(side).cpu() for side in sides], dim=1))
        progress(min(start + _BATCH, len(files)), len(files))
    if not vectors:
        name, cause = rejected[0]
        raise InputError(f"no image in {source} can be used; {name}: {cause}")
    return Encoded(torch.cat(vectors), names, rejected)


def encode_images(
    bank: MemoryBank, source: Path, weights: str | None = None, progress: Progress = silent
) -> Tensor:
    """Returns the vectors of the images that `encode_files` encodes, as they are, (Q, D)."""
    return encode_files(bank, source, weights, progress).vectors[:, 0]


def _encoder(bank: MemoryBank, weights: str | None) -> tuple[Encoder, int, Literal[1, 3]]:
    """Returns the encoder that made a bank, and side and channels of the images it saw."""
    device, name = device_of("auto"), str(bank.encoder.get("name"))
    if weights is not None and GMEM_ENCODER.items() <= bank.encoder.items():
        return load_dino(name, weights, gmem=True, device=device), GMEM_SIZE, 3
    if bank.shape is None or name not in get_args(EncoderName):
        raise InputError(
            "the bank does not say how images become its rows (it was imported, merged from two "
            "kinds, or made by an encoder of your own): give vectors in a .pth or .safetensors "
            "file instead of images, or to a bank of GMem --encoder-weights facebook/dinov2-base"
        )
    channels, height, width = bank.shape
    if height != width or channels not in (1, 3):
        raise InputError(f"the bank was made of {channels}x{height}x{width}, not of square images")
    size, pool = bank.encoder.get("size"), bank.encoder.get("pool")
    encode = build_encoder(name, bank.shape, size=size, pool=pool, weights=weights, device=device)
    if encode.description() != bank.encoder:
        raise InputError(
            f"the bank was made by another version of encoder {name}, or with other weights, than "
            "are here: give those, or build the bank again"
        )
    return encode, height, 1 if channels == 1 else 3
