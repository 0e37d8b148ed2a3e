"""Official memory banks: GMem's files of snippets (arXiv 2412.08781) as banks of ours.

    tensor (n, D)                       full bank, raw vectors of the encoder
    {C, M, S, mean, ...}                decomposed bank: row i is C_i M^T + mean
    {memorybank, memoryfreq, network}   version 1: full bank and how often each row is drawn
    folder of latents_*.safetensors     feature shards: "cls_tokens", "cls_tokens_flip" (n, D)
                                        beside the latents, whose rows they are

Official rows are not scaled to length 1 until they are used; ours always are. A scaled row of a
decomposed bank lies in the span of M and the mean, so the orthonormal directions of these, one more
than M has, hold it exactly: nothing is lost, and new rows are projected at the right length. S is
not needed, and directions with singular value 0 fall away.

The banks say nothing of images, labels or the encoder; the shards have labels. GMem's is the class
token of DINOv2 ViT-B/14, of images cropped to 256 pixels and scaled to 224.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratagem.artifact import read_tensor_file
from stratagem.data.official import is_official, official_files, open_official
from stratagem.errors import InputError
from stratagem.interop.state_dict import load_foreign
from stratagem.memory.bank import MemoryBank
from stratagem.memory.store import (
    Codec,
    Held,
    Joined,
    LowRank,
    Plain,
    Recoded,
    Store,
    codec_of,
    hold,
)

__all__ = ["GMEM_ENCODER", "GMEM_SIZE", "read_bank", "read_vectors"]

GMEM_ENCODER = {
    "name": "dinov2-b",
    "preprocessing": "ADM crop to 256, bicubic to 224, ImageNet mean and deviation",
    "weights": "dinov2_vitb14, class token",
}
GMEM_SIZE = 256  # of the images, before they are scaled for the encoder

_TOKENS = ("cls_tokens", "cls_tokens_flip")
_TINY = 1e-6  # share of the largest singular value below which a direction is rounding


def read_bank(path: Path, form: str | None = None) -> MemoryBank:
    """Reads an official bank; its rows stay in the file until they are used or saved.

    Args:
        path: A .pt or .pth file, or a folder of feature shards.
        form: How vectors are to be stored: float32, float16 or int8; by default float16, and of a
            decomposed bank low-rank with float32 coordinates.

    Raises:
        InputError: If there is no such file, or no bank in it.
        DamagedArtifact: If it is truncated or altered.
    """
    if is_official(path):
        return _of_shards(path, form)
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


class _Sides(Store):
    """Rows of images and of their mirror images, in two tensors mapped from a file."""

    def __init__(self, sides: Sequence[Tensor]) -> None:
        self.codec = Plain(sides[0].shape[1], sides[0].dtype)
        self.num, self.sides, self._rows = len(sides[0]), len(sides), sides

    def take(self, index: Tensor, side: Tensor) -> dict[str, Tensor]:
        """Gathers."""
        out = self._rows[0].new_empty((len(index), self.codec.dim))
        for number, rows in enumerate(self._rows):
            out[side == number] = rows[index[side == number]]
        return {"vectors": out}


def _of_shards(path: Path, form: str | None) -> MemoryBank:
    """Makes a bank of the class tokens beside official latents, bound to these latents."""
    data, parts = open_official(path), list[Store]()
    for file in official_files(path):
        tensors = read_tensor_file(file)
        sides = [tensors[name] for name in _TOKENS if name in tensors]
        if not sides or any(
            side.shape != (len(tensors["labels"]), sides[0].shape[-1]) for side in sides
        ):
            raise InputError(
                f"{file} has no features: expected {_TOKENS[0]} (n, D), as GMem extracts them"
            )
        parts.append(_Sides(sides))
    store = Recoded(Joined(parts), codec_of(form or "float16", parts[0].codec.dim))
    encoder = {**GMEM_ENCODER, "dim": store.codec.dim}
    return MemoryBank(store, data.labels, data.held_out, encoder, data.origin, data.names)


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
