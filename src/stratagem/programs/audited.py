"""What `stratagem audit` looks at: the samples of a run, or samples on disk.

A run with a memory is sampled twice more: with snippets of held-out images, which training never
saw, and several times with the same few snippets, to see what noise adds to them.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratagem.assemble import Model
from stratagem.data.shards import DataSet
from stratagem.errors import InputError
from stratagem.memory.bank import MemoryBank
from stratagem.memory.draw import draw
from stratagem.memory.edit import remove
from stratagem.programs import Progress, share_of, silent
from stratagem.programs.sample import SampleConfig, sample_run
from stratagem.programs.sources import open_source

__all__ = ["Audited", "audited_run", "audited_samples"]

_SNIPPETS, _IMAGES = 16, 8  # for diversity: so many snippets, and images of each
_REPEATS = 2000  # of samples on disk: all their pairs are compared


@dataclass(frozen=True)
class Audited:
    """The images of a sampler.

    Attributes:
        images: uint8, shape (M, C, H, W).
        protocol: What made them, JSON-able.
        repeats: Images of which several have the same snippet, and its number: (B, C, H, W), (B,).
        held_out_snippets: Images of snippets that training never saw, or None.
        bank: The memory bank behind them, or None.
    """

    images: Tensor
    protocol: dict[str, Any]
    repeats: tuple[Tensor, Tensor] | None = None
    held_out_snippets: Tensor | None = None
    bank: MemoryBank | None = None


def audited_run(
    model: Model, data: DataSet, cfg: SampleConfig, *, progress: Progress = silent
) -> Audited:
    """Samples what an audit needs of a run: its images, and with a memory two sets more.

    Args:
        model: The run.
        data: The images that it learned from.
        cfg: How to sample; with snippets of training images.
        progress: Called while sampling.

    Raises:
        InputError: If a setting is impossible, or the run learned from other images.
    """
    pixels = model.finish.statistics is None  # a run of latents does not know of what images
    if pixels and model.data not in {"", data.fingerprint}:
        raise InputError(
            f"{model.path} was trained on data set {model.data[:12]}, not on {data.path} "
            f"({data.fingerprint[:12]}): give the data set that it was trained on"
        )
    bank, few = model.bank, torch.empty(0, dtype=torch.int64)
    if bank is not None:
        few = draw(bank, min(_SNIPPETS, int((~bank.held_out).sum())), "stratified", cfg.seed)
    parts = [
        cfg.num,
        cfg.num * (bank is not None and bool(bank.held_out.any())),
        len(few) * _IMAGES,
    ]
    images = sample_run(model, cfg, progress=share_of(progress, parts, 0)).images
    told = {"run": str(model.path), "step": model.step, "ema_std": model.ema_std}
    told["sampling"] = dataclasses.asdict(cfg)
    if bank is None:
        return Audited(images, told)
    told |= {"bank": bank.fingerprint, "diversity": {"snippets": _SNIPPETS, "images": _IMAGES}}
    second = None
    if bank.held_out.any():
        others = dataclasses.replace(cfg, snippets="held-out", like=None)
        second = sample_run(model, others, progress=share_of(progress, parts, 1)).images
    rest = torch.ones(bank.num, dtype=torch.bool)
    rest[few] = False
    small = remove(bank, rest.nonzero().flatten()) if rest.any() else bank
    again = dataclasses.replace(cfg, num=parts[2], snippets="stratified", label=None, like=None)
    small_model = dataclasses.replace(model, bank=small)
    made = sample_run(small_model, again, progress=share_of(progress, parts, 2))
    assert made.snippets is not None
    return Audited(images, told, (made.images, made.snippets.rows), second, bank)


def audited_samples(path: Path, data: DataSet, num: int) -> Audited:
    """Reads samples: a folder of images, an npz, or what `sample` made.

    Args:
        path: Where they are.
        data: What they are compared with.
        num: At most so many, the first ones.

    Raises:
        InputError: If there are no images.
    """
    source = open_source(path, data.image_shape[0])
    images = source.read(0, min(num, source.num))
    told = {"samples": str(path), "images": source.num, "fingerprint": source.fingerprint()}
    record = path / "made_from.json"
    rows = json.loads(record.read_text())["snippets"] if record.is_file() else None
    repeats = None
    if rows and isinstance(rows[0], int):
        repeats = images[:_REPEATS], torch.tensor(rows[: min(len(images), _REPEATS)])
    return Audited(images, told, repeats)
