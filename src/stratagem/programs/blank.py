"""Parts of a run whose data and bank are not there: noise of the same sizes stands for them.

What a step costs depends on shapes alone, so the speed of a configuration can be measured, of
published ones too, without their data. It lies in memory, as data that was read before does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratagem.assemble import Inputs, Parts, join, open_inputs
from stratagem.config import RunConfig
from stratagem.data.shards import DataSet, Rows
from stratagem.errors import InputError
from stratagem.memory.bank import MemoryBank
from stratagem.memory.ids import Ids
from stratagem.memory.store import hold
from stratagem.stages import Stages

__all__ = ["Blank", "blank_parts", "sized_inputs"]

_NUM = 1024  # images, each with its mirror image


@dataclass(frozen=True)
class Blank:
    """Sizes of what is not there.

    Attributes:
        shape: Channels, height and width of an image, or of a latent: more than 3 channels.
        memory_dim: Length of a snippet.
        classes: Number of classes.
        token_dim: Width of the tokens that are aligned with.
    """

    shape: tuple[int, int, int] | None = None
    memory_dim: int = 768
    classes: int = 1000
    token_dim: int = 768


def blank_parts(run: RunConfig, blank: Blank) -> Parts:
    """Makes the objects of a run; its frozen encoder, if it aligns, is noise in any case.

    Raises:
        InputError: As `sized_inputs`.
    """
    tokens = None
    if run.align is not None:
        inputs = sized_inputs(run, blank)
        side = inputs.data.shape[1] // run.model.patch
        tokens = _Tokens(blank.token_dim, torch.randn(1, side * side, blank.token_dim))
        return join(run, inputs, tokens)
    return join(run, sized_inputs(run, blank))


def sized_inputs(run: RunConfig, blank: Blank) -> Inputs:
    """Returns the artifacts of a run, or noise of their sizes where there is no data.

    Raises:
        InputError: If there is no data and no size is given, or stages are in a file that is not
            there, or still to be made.
    """
    if Path(run.data).exists():
        return open_inputs(run, verify=False)
    if blank.shape is None:
        raise InputError(
            f"there is no data at {run.data}: give the size that it would have, such as "
            "--shape 32 16 16 for latents of VA-VAE, or --shape 3 32 32 for images"
        )
    staged = run.stages
    if staged is not None and staged.edges is None:
        raise InputError(
            f"stages.file {staged.file} goes with data that is not there: give "
            "--set stages.file=null --set 'stages.edges=[2, -2]'"
        )
    data = _data(blank.shape, blank.classes if run.labels else 0)
    bank = None
    if run.memory is not None:
        vectors = torch.randn(_NUM, 2, blank.memory_dim).half()
        bank = MemoryBank(hold(vectors), data.labels, data.held_out, {}, data.fingerprint)
    parts = None if staged is None else Stages(staged.edges or ())
    description: dict[str, Any] = {
        "shape": list(data.shape),
        "num_classes": len(data.classes),
        "memory_dim": 0 if bank is None else bank.dim,
        "data": data.fingerprint,
        "stages": None if parts is None else list(parts.edges),
    }
    return Inputs(data, bank, parts, {}, description)


def _data(shape: tuple[int, int, int], classes: int) -> DataSet:
    """Returns a data set of noise, with mirror images: pixels, or posteriors of latents."""
    labels = torch.arange(_NUM) % classes if classes else torch.full((_NUM,), -1)
    rows = Rows(labels, torch.zeros(_NUM, dtype=torch.bool), Ids.of(map(str, range(_NUM))))
    columns: dict[str, tuple[Tensor, ...]]
    if shape[0] <= 3:
        kind, columns = "images", {"images": (torch.randint(256, (_NUM, *shape)).byte(),)}
    else:
        sides = torch.randn(_NUM, 2, *shape).half().unbind(1)
        kind, columns = "latents", {"mean": sides, "std": sides}
    meta = {
        "num": _NUM,
        "kind": kind,
        "shape": list(shape),
        "classes": [str(k) for k in range(classes)],
        "flip": True,
        "source": "noise",
        "mean": [0.0] * shape[0],
        "std": [1.0] * shape[0],
        "shards": [_NUM],
    }
    return DataSet(Path("noise"), "noise", meta, rows, lambda _: columns, DataSet.open)


@dataclass(frozen=True)
class _Tokens:
    """Alignment targets that are the same for all images."""

    dim: int
    one: Tensor

    def __call__(self, ids: Tensor, flip: Tensor) -> Tensor:  # noqa: ARG002
        return self.one.expand(len(ids), -1, -1)
