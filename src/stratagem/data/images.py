"""Images of a folder as tensors, and pixels as the numbers that networks see.

Every file goes the way of `data.decoding`, so that the bank, the network and the metrics see the
same pixels. Networks see x = u / 127.5 - 1 in [-1, 1]; files hold u = 0 .. 255.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from stratagem.data.decoding import BadImage, cause_of, center_crop, decode
from stratagem.data.sources import NO_IMAGE, folder_files, image_records
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


@dataclass(frozen=True)
class Listing:
    """The images of a folder, in the order of their names.

    Attributes:
        root: The folder.
        paths: Every image below it.
    """

    root: Path
    paths: list[Path]

    def name(self, index: int) -> str:
        """Returns the path of an image below the root, with slashes, as valid Unicode."""
        relative = self.paths[index].relative_to(self.root).as_posix()
        return os.fsencode(relative).decode("utf-8", "replace")


def find_images(folder: Path) -> Listing:
    """Lists the images below a folder, recursively; hidden files are left out.

    Raises:
        InputError: If the folder does not exist, cannot be read, or holds no image.
    """
    loads = (record.load for record in image_records(folder_files(folder)))
    paths = [Path(load.args[0]) for load in loads if isinstance(load, functools.partial)]
    if not paths:
        raise InputError(f"no images in {folder}: of each file {NO_IMAGE}")
    return Listing(folder, paths)


def load_image(path: Path, size: int, channels: Literal[1, 3] = 3) -> Tensor:
    """Reads one image file as a square, shape (channels, size, size), uint8.

    Raises:
        BadImage: If it is broken, too large, or its pixels have no known range.
    """
    try:
        with path.open("rb") as stream:
            return torch.from_numpy(decode(stream, size, channels))
    except Exception as error:  # decoders raise anything on broken bytes
        raise BadImage(cause_of(error)) from error


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
