"""`stratagem import`: an official checkpoint becomes a run like any other.

    checkpoint.pt  ->  RUN/config.yaml, RUN/run.json, RUN/checkpoints/step-00000000/

The file is never changed, and nothing is written before all of its weights have found their place.
What it does not say (the data set, which encoder made the snippets) the run does not claim to know.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratagem import checkpoint
from stratagem.artifact import write_record
from stratagem.assemble import make_backbone
from stratagem.checkpoint import Checkpoint
from stratagem.config import MemoryConfig, ModelConfig, RunConfig, dump
from stratagem.errors import InputError
from stratagem.interop.dit import Official, Project, convert, inspect
from stratagem.interop.state_dict import read
from stratagem.memory.bank import MemoryBank

__all__ = ["Imported", "import_run"]


@dataclass(frozen=True)
class Imported:
    """What was imported.

    Attributes:
        official: The network.
        parameters: Numbers in it.
        left_out: What the file holds besides.
        bank: Where `sample` looks for the memory bank, or None for a network without memory.
    """

    official: Official
    parameters: int
    left_out: tuple[str, ...]
    bank: Path | None


def import_run(
    file: Path,
    project: Project,
    out: Path,
    *,
    heads: int | None = None,
    image_size: int | None = None,
    rope: bool | None = None,
    bank: Path | None = None,
) -> Imported:
    """Makes a run of an official checkpoint.

    Args:
        file: A .safetensors, .pt or .pth file.
        project: Whose checkpoint it is.
        out: The run's folder; must not hold anything.
        heads: Number of heads, where the weights do not tell.
        image_size: Side of x_t, where the weights do not tell.
        rope: Whether attention rotates, where the weights do not tell.
        bank: Memory bank of a network with memory; None leaves its place open.

    Raises:
        InputError: If the file is no such checkpoint, sizes cannot be told, the bank does not fit,
            or the folder is not empty.
        DamagedArtifact: If the file is truncated or altered.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} already exists: remove it or choose another --out")
    found = read(file)
    official = inspect(found.tensors, project, heads=heads, image_size=image_size, rope=rope)
    held = None if bank is None else MemoryBank.load(bank)
    _check_bank(official, held)
    place = bank if bank is not None else out / "bank.safetensors"
    config = _config(official, place)
    made = _description(official, file, held)
    with torch.device("meta"):  # only its shapes are needed
        net = make_backbone(config, made)
    weights = convert(found.tensors, official, net)
    _write(out, config, made, weights)
    used = sum(tensor.numel() for tensor in weights.values())
    head = official.family.projector
    left = (*found.left_out, *(("the projector",) if _has_head(found.tensors, head) else ()))
    return Imported(official, used, left, place if official.cfg.memory_dim else None)


def _has_head(weights: dict[str, Tensor], prefix: str | None) -> bool:
    return prefix is not None and any(name.startswith(f"{prefix}.") for name in weights)


def _check_bank(official: Official, bank: MemoryBank | None) -> None:
    if bank is None:
        return
    if not official.cfg.memory_dim:
        raise InputError("--bank has no effect: this network has no memory")
    bank.check_dim(official.cfg.memory_dim)


def _config(official: Official, bank: Path) -> RunConfig:
    cfg = official.cfg
    sit = (cfg.norm, cfg.mlp, cfg.rope) == ("layer", "gelu", False)
    lightningdit = (cfg.norm, cfg.mlp, cfg.rope) == ("rms", "swiglu", True)
    own: dict[str, Any] = {"norm": cfg.norm, "mlp": cfg.mlp, "rope": cfg.rope}
    model = ModelConfig(
        width=cfg.width,
        depth=official.depth,
        heads=cfg.heads,
        patch=cfg.patch,
        style="sit" if sit else "lightningdit",
        labels=cfg.num_classes > 0,
        qk_norm=cfg.qk_norm,
        shift=cfg.shift,
        **({} if sit or lightningdit else own),
    )
    memory = MemoryConfig(str(bank), scale="unit-norm") if cfg.memory_dim else None
    return RunConfig(data="unknown", model=model, memory=memory)


def _description(official: Official, file: Path, bank: MemoryBank | None) -> dict[str, Any]:
    cfg = official.cfg
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "shape": [cfg.channels, cfg.image_size, cfg.image_size],
        "num_classes": cfg.num_classes,
        "memory_dim": cfg.memory_dim,
        "data": "",
        "encoder": None if bank is None else dict(bank.encoder),
        "stages": None,
        "imported": {"from": official.family.title, "file": file.name, "sha256": digest},
    }


def _write(out: Path, config: RunConfig, made: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Writes the run; its config, which makes the folder a run, last."""
    state = {"step": 0, "sums": {}, "threads": torch.get_num_threads()}
    empty: dict[str, dict[str, Tensor]] = {group: {} for group in checkpoint.GROUPS}
    groups = empty | {"model": weights, "ema": weights}
    with checkpoint.lock(out):
        checkpoint.save(out, Checkpoint(0, groups, state))
        write_record(out / "run.json", "run", made)
        (out / "config.yaml").write_text(dump(config))
