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

__all__ = ["KIND", "Form", "write_samples"]

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
