"""Where data sets come from: a folder of images, or the digits that scikit-learn ships.

`prepare` is the one way in. A folder becomes RGB, whatever its files are; `gray` asks for one
channel instead. It is not guessed from the files, for one colour image more would change them all.
The digits are 1,797 real scans of 8 x 8 pixels with 17 gray levels: u = round(255 v / 16).

Files are decoded by a pool of threads (Pillow works outside Python's lock) and leave it in order.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stratagem.data.images import BadImage, Listing, center_crop, find_images, load_image
from stratagem.data.shards import DataSet, Sample, write_dataset
from stratagem.errors import InputError, MissingExtra

__all__ = ["digits", "image_folder", "prepare"]

A = TypeVar("A")
B = TypeVar("B")


def prepare(
    source: str | Path,
    out: Path,
    *,
    size: int | None = None,
    gray: bool = False,
    flip: bool = False,
    holdout: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> DataSet:
    """Makes a data set of a folder of images, or of the digits.

    Args:
        source: A folder, or the word "digits" (write "./digits" for a folder of that name).
        out: The data set to make.
        size: Side of the square images; by default 32, and 8 for the digits, which is their own.
        gray: One channel instead of RGB; the digits are gray anyway.
        flip: Whether training may use mirror images; refused for the digits.
        holdout: Fraction of the images that training never sees.
        seed: Seed of the choice of held-out images.
        progress: Called after each image with (files done, all files).

    Raises:
        InputError: If the folder is missing, holds no usable image, or a setting is impossible.
        MissingExtra: If the digits are asked for and scikit-learn is not installed.
    """
    if size is not None and size < 1:
        raise InputError(f"size is {size}: it must be at least 1 pixel")
    rejected: list[tuple[str, str]] = []
    if source == "digits":
        if flip:
            raise InputError("digits cannot be mirrored: leave out flip")
        samples: Iterator[Sample] = digits(size or 8)
        name, classes, total = "digits", [str(digit) for digit in range(10)], 1797
    else:
        listing = find_images(Path(source))
        samples = image_folder(listing, size or 32, 1 if gray else 3, rejected)
        name, classes, total = listing.root.resolve().name, listing.classes, len(listing.paths)
    with warnings.catch_warnings():
        # Pillow warns of large images; we refuse them and say so in the list of rejected ones
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return write_dataset(
            Path(out),
            samples,
            classes=classes,
            source=name,
            flip=flip,
            holdout=holdout,
            seed=seed,
            rejected=rejected,
            progress=progress and (lambda written: progress(written + len(rejected), total)),
        )


def digits(size: int = 8) -> Iterator[Sample]:
    """Yields the 1,797 handwritten digits of scikit-learn, shape (1, size, size), labels 0 to 9.

    Raises:
        MissingExtra: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("scikit-learn", "demo") from error
    data = load_digits()
    for index, (values, label) in enumerate(zip(data.images, data.target, strict=True)):
        image = Image.fromarray((values * 255 / 16).round().astype(np.uint8))
        if size != image.width:
            image = center_crop(image, size)
        pixels = torch.from_numpy(np.array(image))[None]
        yield Sample(pixels, int(label), f"digits/{index:04d}")


def image_folder(
    listing: Listing, size: int, channels: Literal[1, 3], rejected: list[tuple[str, str]]
) -> Iterator[Sample]:
    """Yields the usable images of a folder in order, shape (channels, size, size).

    Args:
        listing: What `find_images` found.
        size: Side of the square images.
        channels: 3 for RGB, 1 for gray.
        rejected: Gets (name, cause) of each image that cannot be used, in order.
    """

    def load(path: Path) -> Tensor | BadImage:
        try:
            return load_image(path, size, channels)
        except BadImage as error:
            return error

    for index, image in enumerate(_ordered_map(load, listing.paths)):
        if isinstance(image, BadImage):
            rejected.append((listing.name(index), str(image)))
        else:
            yield Sample(image, listing.labels[index], listing.name(index))


def _ordered_map(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """Applies a function in threads, results in order; only a few are ever waiting.

    `Executor.map` would start all at once and hold every result that is not yet asked for.
    """
    workers = min(16, os.cpu_count() or 1)
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
