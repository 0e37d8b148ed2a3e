"""Official memory banks: GMem's files of snippets (arXiv 2412.08781) as banks of ours.

    tensor (n, D)                       full bank, raw vectors of the encoder
    {C, M, S, mean, ...}                decomposed bank: row i is C_i M^T + mean
    {memorybank, memoryfreq, network}   version 1: full bank and how often each row is drawn

Official rows are not scaled to length 1 until they are used; ours always are. A scaled row of a
decomposed bank lies in the span of M and the mean, so the orthonormal directions of these, one more
than M has, hold it exactly: nothing is lost, and new rows are projected at the right length. S is
not needed, and directions with singular value 0 fall away.

The files say nothing of images, labels or the encoder. GMem's is the class token of DINOv2
ViT-B/14, of images cropped to 256 pixels and scaled to 224.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratagem.artifact import read_tensor_file
from stratagem.errors import InputError
from stratagem.interop.state_dict import load_foreign
from stratagem.memory.bank import MemoryBank
from stratagem.memory.store import Codec, Held, LowRank, Plain, Recoded, Store, codec_of, hold

__all__ = ["GMEM_ENCODER", "GMEM_SIZE", "read_bank", "read_vectors"]

GMEM_ENCODER = {
    "name": "dinov2-b",
    "preprocessing": "ADM crop to 256, bicubic to 224, ImageNet mean and deviation",
    "weights": "dinov2_vitb14, class token",
}
GMEM_SIZE = 256  # of the images, before they are scaled for the encoder

_TINY = 1e-6  # share of the largest singular value below which a direction is rounding


def read_bank(path: Path, form: str | None = None) -> MemoryBank:
    """Reads an official bank; its rows stay in the file until they are used or saved.

    Args:
        path: A .pt or .pth file.
        form: How vectors are to be stored: float32, float16 or int8; by default float16, and of a
            decomposed bank low-rank with float32 coordinates.

    Raises:
        InputError: If there is no such file, or no bank in it.
        DamagedArtifact: If it is truncated or altered.
    """
    if not path.is_file():
        raise InputError(f"no bank at {path}: the file does not exist")
    body, frequency = load_foreign(path), None
    if isinstance(body, Mapping) and {"memorybank", "memoryfreq"} <= set(body):
        body, frequency = body["memorybank"], torch.as_tensor(body["memoryfreq"])
    if isinstance(body, Mapping) and {"C", "M", "mean"} <= set(body):
        source, codec = _decomposed(body, path)
    elif isinstance(body, Tensor) and body.ndim == 2:
        source = hold(body.detach()[:, None])
        codec = Plain(source.codec.dim, torch.float16)
    else:
        raise InputError(
            f"{path} holds no bank of GMem: expected a tensor (n, D), or a dict with C, M and mean"
        )
    store = Recoded(source, codec if form is None else codec_of(form, source.codec.dim))
    return MemoryBank(
        store,
        torch.full((store.num,), -1),
        torch.zeros(store.num, dtype=torch.bool),
        encoder={**GMEM_ENCODER, "dim": store.codec.dim},
        data="",
        frequency=None if frequency is None else frequency.flatten().float(),
        history=({"edit": "import", "file": path.name},),
    )


def read_vectors(path: Path) -> Tensor:
    """Reads rows to be added to a bank: the one tensor of a .safetensors, .pt or .pth file.

    Raises:
        InputError: If there is no such file, or not one tensor in it.
        DamagedArtifact: If it is truncated or altered.
    """
    if not path.is_file():
        raise InputError(f"no rows at {path}: the file does not exist")
    body: Any = read_tensor_file(path) if path.suffix == ".safetensors" else load_foreign(path)
    if isinstance(body, Mapping) and len(body) == 1:
        body = next(iter(body.values()))
    if not isinstance(body, Tensor) or not body.is_floating_point():
        raise InputError(f"{path} does not hold one tensor of vectors: save rows (n, D) alone")
    return body.detach()


def _decomposed(body: Mapping[str, Any], path: Path) -> tuple[Store, Codec]:
    """Returns the rows of a decomposed bank as they are, and the codec that holds them scaled."""
    parts = [torch.as_tensor(body[name]).detach() for name in ("C", "M", "mean")]
    codes, factor, mean = parts[0], parts[1].float(), parts[2].float().flatten()
    if codes.ndim != 2 or factor.shape != (len(mean), codes.shape[1]):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise InputError(f"{path} holds no bank: C, M and mean have shapes {shapes}")
    source = Held(LowRank(factor, mean, codes.dtype), {"codes": codes[:, None]})
    span = torch.cat([factor, mean[:, None]], dim=1).double()
    span = span / span.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    basis, size, _ = torch.linalg.svd(span, full_matrices=False)
    basis = basis[:, size > _TINY * size[0]].float().contiguous()
    return source, LowRank(basis, torch.zeros_like(mean), torch.float32)
