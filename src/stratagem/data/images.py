"""Finding and reading images: whatever lies in a folder becomes square uint8 tensors.

One path for every file, so that the bank, the network and the metrics see the same pixels:

    open -> turn by EXIF -> RGB or gray, transparency over white -> centre crop -> uint8 (C, H, W)

The crop is ADM's (Dhariwal & Nichol 2021, arXiv 2105.05233): halve by area mean while the short
side is at least twice the target, scale the short side to the target by bicubic interpolation, cut
the centre. Small images are scaled up. Of an animation the first frame is taken.

A real folder holds broken files. Each raises `BadImage` with its cause; the caller skips, counts
and names it. A cause holds no path, so the list of rejected images does not depend on where it was
made.

Networks see x = u / 127.5 - 1 in [-1, 1]; files hold u = 0 .. 255.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from stratagem.errors import InputError

__all__ = [
    "BadImage",
    "Listing",
    "center_crop",
    "find_images",
    "load_image",
    "to_float",
    "to_uint8",
]

_PLAIN = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SUFFIXES = frozenset((*_PLAIN, ".avif", ".pbm", ".pgm", ".ppm"))


class BadImage(Exception):
    """One image cannot be used; the message is the cause, in one line and without its path."""


@dataclass(frozen=True)
class Listing:
    """The images of a folder, in the order of their names.

    Attributes:
        root: The folder.
        paths: Every image below it.
        labels: Index into `classes` per image, -1 for an image that lies in no sub-folder.
        classes: Sorted names of the first-level sub-folders that hold images.
    """

    root: Path
    paths: list[Path]
    labels: list[int]
    classes: list[str]

    def name(self, index: int) -> str:
        """Returns the path of an image below the root, with slashes, as valid Unicode."""
        relative = self.paths[index].relative_to(self.root).as_posix()
        return os.fsencode(relative).decode("utf-8", "replace")


def find_images(folder: Path) -> Listing:
    """Lists the images below a folder, recursively; hidden files are left out.

    Raises:
        InputError: If the folder does not exist, cannot be read, or holds no image.
    """
    if not folder.exists():
        raise InputError(f"no images at {folder}: the folder does not exist")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: give the folder that holds the images")
    try:
        paths = sorted(_walk(folder, ()), key=lambda path: path.relative_to(folder).parts)
    except OSError as error:
        raise InputError(f"cannot list {error.filename}: {error.strerror}") from error
    if not paths:
        raise InputError(f"no images in {folder}: none of its files ends in {_known_suffixes()}")
    parts = [path.relative_to(folder).parts for path in paths]
    classes = sorted({part[0] for part in parts if len(part) > 1})
    number = {name: index for index, name in enumerate(classes)}
    labels = [number[part[0]] if len(part) > 1 else -1 for part in parts]
    return Listing(folder, paths, labels, classes)


def load_image(path: Path, size: int, channels: Literal[1, 3] = 3) -> Tensor:
    """Reads one image file as a square, shape (channels, size, size), uint8.

    Raises:
        BadImage: If it is broken, too large, or its pixels have no known range.
    """
    try:
        with Image.open(path) as opened:
            _refuse_bomb(opened.width * opened.height)
            # width and height were read from the header: nothing was decoded before this line
            upright = ImageOps.exif_transpose(opened)
            square = center_crop(_convert(upright, "L" if channels == 1 else "RGB"), size)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage("not an image of a kind that Pillow can read") from error
    except OSError as error:
        raise BadImage(_one_line(error.strerror or str(error))) from error
    except Exception as error:  # decoders raise anything on broken bytes: struct.error, SyntaxError
        raise BadImage(_one_line(f"{type(error).__name__}: {error}")) from error
    pixels = torch.from_numpy(np.array(square))
    return pixels.reshape(size, size, channels).permute(2, 0, 1).contiguous()


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Scales the short side to `size` and cuts the centre, (size, size) pixels (ADM, 2105.05233).

    Raises:
        BadImage: If the image is so narrow that scaling it up would take unreasonable memory.
    """
    while min(image.size) >= 2 * size:
        halves = (image.width // 2, image.height // 2)
        image = image.resize(halves, Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    _refuse_bomb(width * height)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_float(image: Tensor) -> Tensor:
    """Maps uint8 pixels to float32 in [-1, 1]: x = u / 127.5 - 1, any shape.

    Raises:
        ValueError: If the pixels are not uint8, for they may have been mapped already.

    Example:
        >>> to_float(torch.tensor([0, 255], dtype=torch.uint8))
        tensor([-1.,  1.])
    """
    if image.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8, not {image.dtype}")
    return image.float() / 127.5 - 1


def to_uint8(image: Tensor) -> Tensor:
    """Maps floats in [-1, 1] to the nearest uint8 pixels, the inverse of `to_float`, any shape.

    Example:
        >>> to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]))
        tensor([  0,   0, 128, 255, 255], dtype=torch.uint8)
    """
    return (image * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """Yields the images below a folder; a link back to a folder above it is not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, (*above, real))
        elif path.suffix.lower() in SUFFIXES:
            yield path


def _convert(image: Image.Image, mode: Literal["L", "RGB"]) -> Image.Image:
    """Converts any pixel format to 8-bit gray or RGB; transparency is laid over white."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit gray to 8 bits; Pillow's own conversion cuts off at 255 in some versions."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise BadImage("pixels are 32-bit numbers of unknown range: save it with 8 or 16 bits")
    return Image.fromarray((values / 257).round().astype(np.uint8))


def _refuse_bomb(pixels: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise BadImage(f"too large: {pixels} pixels, the limit is {limit}")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def _known_suffixes() -> str:
    return ", ".join(sorted(SUFFIXES))
