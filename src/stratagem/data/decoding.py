"""One encoded image, or raw pixels, becomes a square of uint8: the same path for every source.

    open -> turn by EXIF -> RGB or gray, transparency over white -> centre crop -> (C, H, W)

The crop is ADM's (Dhariwal & Nichol 2021, arXiv 2105.05233): halve by area mean while the short
side is at least twice the target, scale the short side to the target by bicubic interpolation, cut
the centre. Small images are scaled up. Of an animation the first frame is taken.

What cannot be used raises `BadImage` with its cause. A cause holds no path, so the list of rejected
images does not depend on where it was made. docs/data.md has a table of every such case.

Torch is not imported here: processes that decode start in a fraction of a second.
"""

from __future__ import annotations

from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["BadImage", "cause_of", "center_crop", "decode"]


class BadImage(Exception):
    """One image cannot be used; the message is the cause, in one line and without its path."""


def decode(source: BinaryIO | np.ndarray, size: int, channels: Literal[1, 3]) -> np.ndarray:
    """Makes a square of an image file or of pixels (H, W) or (H, W, C), as (channels, size, size).

    Raises:
        BadImage: If it is broken, too large, too small, or its pixels have no known range.
    """
    if isinstance(source, np.ndarray):
        image = Image.fromarray(source)
    elif not source.read(1):
        raise BadImage("empty file")
    else:
        source.seek(0)
        image = Image.open(source)
    with image:
        # width and height were read from the header: nothing was decoded before this line
        _refuse_bomb(image.width * image.height)
        if min(image.size) < 2:
            raise BadImage(f"too small: {image.width} x {image.height} pixels")
        ImageOps.exif_transpose(image, in_place=True)
        square = center_crop(_convert(image, "L" if channels == 1 else "RGB"), size)
    pixels = np.asarray(square).reshape(size, size, channels)
    return np.array(pixels.transpose(2, 0, 1), order="C")


def cause_of(error: Exception) -> str:
    """Returns why an image cannot be used, in one line, of what reading or decoding it raised."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a kind that Pillow can read"
    if isinstance(error, Image.DecompressionBombError):  # at twice the limit Pillow itself refuses
        limit = Image.MAX_IMAGE_PIXELS
        return f"too large: more than {limit and 2 * limit} pixels, the limit is {limit}"
    if isinstance(error, BadImage | OSError):
        text = getattr(error, "strerror", None) or str(error)
    else:  # decoders raise anything on broken bytes: struct.error, SyntaxError, zlib.error
        text = f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:200]


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
