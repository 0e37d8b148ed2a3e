"""Samples on disk: numbered PNGs, one npz in ADM's layout, or latents.

PNGs and npz are written batch by batch: only the disk bounds the number of images.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stratagem import artifact
from stratagem.errors import InputError

__all__ = ["KIND", "Form", "load_images", "write_samples"]

KIND = "samples"
Form = Literal["png", "npz"]


def write_samples(
    out: Path,
    batches: Iterable[Tensor],
    shape: Sequence[int],
    made_from: dict[str, Any],
    meta: dict[str, Any],
    form: Form,
) -> None:
    """Writes samples as numbered PNGs, or as one npz in ADM's layout (arr_0, uint8, N x H x W x 3).

    Latents go to latents.safetensors.

    Args:
        out: The folder to make.
        batches: uint8 images, or float32 latents, each (B, C, H, W), in order.
        shape: (N, C, H, W) of all of them.
        made_from: What made which image.
        meta: Metadata of the artifact.
        form: Of images.

    Raises:
        InputError: If `out` exists.
    """
    with artifact.write_folder(out, KIND, meta) as folder:
        stream = iter(batches)
        first = next(stream)
        batches = chain([first], stream)
        if first.is_floating_point():
            latents = torch.cat(list(batches))
            artifact.write_tensor_file(folder / "latents.safetensors", {"latents": latents})
        elif form == "npz":
            _write_npz(folder / "samples.npz", batches, shape)
        else:
            pictures = (picture for batch in batches for picture in batch.permute(0, 2, 3, 1))
            for number, picture in enumerate(pictures):
                flat = picture[..., 0] if shape[1] == 1 else picture
                Image.fromarray(flat.numpy()).save(folder / f"{number:06d}.png")
        (folder / "made_from.json").write_text(json.dumps(made_from))


def _write_npz(path: Path, batches: Iterable[Tensor], shape: Sequence[int]) -> None:
    """Writes what numpy.savez(arr_0=...) would, without holding all of it."""
    num, channels, height, width = shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (num, height, width, 3)}
    entry = zipfile.ZipInfo("arr_0.npy")  # of no date: equal samples are equal files
    with zipfile.ZipFile(path, "w") as archive, archive.open(entry, "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for batch in batches:
            pictures = batch.permute(0, 2, 3, 1).numpy()
            file.write(np.repeat(pictures, 3 // channels, -1).tobytes())


def load_images(path: Path, channels: int) -> Tensor:
    """Reads the images of a samples artifact, a folder of PNGs or an ADM npz, uint8 (N, C, H, W).

    Args:
        path: Folder or npz file.
        channels: 1 or 3, those of the images to compare with.

    Raises:
        InputError: If there are no images, or of several sizes.
    """
    if path.is_dir() and (path / artifact.MANIFEST).is_file():
        artifact.read_folder(path, KIND)
    files = [path] if path.suffix == ".npz" else sorted(path.glob("*.npz"))
    if files:
        return _from_npz(files[0], channels)
    names = sorted(path.glob("*.png"))
    if not names:
        raise InputError(f"{path} holds no samples: expected PNG files or an npz with arr_0")
    mode = "L" if channels == 1 else "RGB"
    arrays = [np.array(Image.open(name).convert(mode)) for name in names]
    if len({a.shape for a in arrays}) > 1:
        raise InputError(f"the images in {path} have several sizes: use images of one size")
    stack = torch.from_numpy(np.stack(arrays))
    return stack[:, None] if channels == 1 else stack.permute(0, 3, 1, 2).contiguous()


def _from_npz(path: Path, channels: int) -> Tensor:
    try:
        pictures = np.load(path)["arr_0"]
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} is no npz of images with arr_0: {error}") from error
    if pictures.ndim != 4 or pictures.dtype != np.uint8 or pictures.shape[-1] != 3:
        raise InputError(f"{path}: arr_0 is {pictures.dtype} {pictures.shape}, not uint8 N,H,W,3")
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)[:, :channels].contiguous()
