"""How much room a data set takes, and whether the disk has it: said before the work, not after."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from stratagem.data.codecs import Codec
from stratagem.errors import InputError

__all__ = ["amount", "disk_bytes", "require_room"]

_ROW_BYTES = 128  # label, name, and place in the name block of one image, generously


def amount(num: float) -> str:
    """Writes a number of bytes for people.

    Example:
        >>> [amount(num) for num in (17, 345_000, 25_060_000, 42_000_000_000)]
        ['17 bytes', '345 kB', '25.1 MB', '42 GB']
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if num < 999.5:
            return f"{num:.3g} {unit}"
        num /= 1000
    return f"{num:.3g} TB"


def disk_bytes(num: int, codec: Codec, shape: Sequence[int]) -> int:
    """Returns about how many bytes a data set of num images of a shape (C, H, W) takes.

    Example:
        >>> from stratagem.data.codecs import PixelCodec
        >>> disk_bytes(1000, PixelCodec(), (3, 256, 256))
        196736000
    """
    return num * (codec.nbytes(shape) + _ROW_BYTES)


def require_room(path: Path, needed: int) -> None:
    """Raises InputError if the disk of a file or folder to be has not so many bytes free."""
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise InputError(
            f"{path} would take {amount(needed)}, and the disk has {amount(free)} free: choose "
            "another disk, or smaller images"
        )
