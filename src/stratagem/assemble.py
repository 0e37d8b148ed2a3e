"""Configuration -> objects. The only module that knows all classes.

    assemble(config)  -> Parts     what `train` needs: data, bank, stages, denoiser, batches
    open_run(folder)  -> Model     what `sample` and `evaluate` need: a denoiser, trained

Whatever does not belong together (a bank or stages made from other data, more decoders than stages)
is refused here, in one line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stratagem import checkpoint, config
from stratagem.artifact import read_record
from stratagem.batches import AlignTokens, Batches, Conditions, Snippets
from stratagem.config import DiffusionConfig, MemoryConfig, RunConfig, StagesConfig
from stratagem.data.shards import DataSet
from stratagem.denoiser import Denoiser
from stratagem.density import LogitNormal, LogNormalSigma, TimeDensity, Uniform
from stratagem.encoders import build_token_encoder
from stratagem.errors import InputError
from stratagem.memory.bank import MemoryBank
from stratagem.nets.multi_decoder import MultiDecoder
from stratagem.nets.transformer import TransformerConfig, TransformerDecoder, TransformerEncoder
from stratagem.objective import AlignmentHead, Objective
from stratagem.schedule import EDM, VP, Cosine, Linear, NoiseSchedule
from stratagem.stages import Stages

__all__ = [
    "Model",
    "Parts",
    "assemble",
    "make_backbone",
    "make_density",
    "make_schedule",
    "open_run",
]


@dataclass(frozen=True)
class Parts:
    """The objects of a run in training.

    Attributes:
        objective: Losses around the denoiser.
        batches: The batch of each step.
        stages: The stages, or None for one.
        description: What the run is made from, JSON-able; kept in run.json.
    """

    objective: Objective
    batches: Batches
    stages: Stages | None
    description: dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A trained run, ready to sample.

    Attributes:
        denoiser: With the weights of one checkpoint, in eval mode.
        config: The run's configuration.
        shape: (C, H, W) of an image.
        num_classes: Classes of the label condition, 0 without.
        bank: Its memory bank, or None.
        step: Of the checkpoint.
        data: Fingerprint of the data set it was trained on.
        path: The run's folder.
    """

    denoiser: Denoiser
    config: RunConfig
    shape: tuple[int, int, int]
    num_classes: int
    bank: MemoryBank | None
    step: int
    data: str
    path: Path


def assemble(run: RunConfig) -> Parts:
    """Makes the objects of a run from its configuration.

    Raises:
        InputError: If an artifact is missing or made from other data, or sizes do not fit.
        DamagedArtifact: If an artifact is truncated or altered.
    """
    data = DataSet.open(Path(run.data))
    bank = None
    if run.memory is not None:
        bank = MemoryBank.load(Path(run.memory.bank))
        bank.check(data.fingerprint)
    parts = None
    if run.stages is not None:
        parts, record = Stages.load(Path(run.stages.file))
        _check_stages(run.stages, parts, record, data.fingerprint)
    num_classes = len(data.classes) if run.model.labels else 0
    if run.model.labels and not num_classes:
        raise InputError(f"model.labels is true, but {run.data} has no labels: set it to false")
    description = {
        "shape": list(data.shape),
        "num_classes": num_classes,
        "memory_dim": bank.dim if bank is not None else 0,
        "data": data.fingerprint,
        "encoder": bank.encoder if bank is not None else None,
        "stages": list(parts.edges) if parts is not None else None,
    }
    denoiser = _denoiser(run, description, parts)
    density = make_density(run.diffusion, denoiser.schedule)
    tokens = _align_tokens(run, data)
    told = Conditions(_snippets(run, bank), num_classes, run.train.condition_dropout, tokens)
    batches = Batches(data, density, run.train.batch_size, run.seed, told)
    return Parts(_objective(run, denoiser, tokens), batches, parts, description)


def open_run(path: Path, *, step: int | None = None, bank: Path | None = None) -> Model:
    """Opens a run with the averaged weights of its newest intact checkpoint, or of a given step.

    Args:
        path: The run's folder.
        step: Which checkpoint; None for the newest.
        bank: The memory bank, if it has moved since the training or was edited.

    Raises:
        InputError: If there is no such run or checkpoint, or the bank does not fit.
        DamagedArtifact: If the checkpoint is truncated or altered.
    """
    if not (path / "config.yaml").is_file():
        raise InputError(f"{path} is not a run: it has no config.yaml")
    run = config.load(path / "config.yaml")
    made = read_record(path / "run.json", "run").meta
    saved = checkpoint.load_latest(path) if step is None else checkpoint.load(path, step)
    if saved is None:
        raise InputError(f"{path} has no checkpoint yet: train it first")
    parts = None if made["stages"] is None else Stages(tuple(made["stages"]))
    denoiser = _denoiser(run, made, parts)
    denoiser.backbone.load_state_dict({**saved.tensors["model"], **saved.tensors["ema"]})
    return Model(
        denoiser.eval().requires_grad_(False),
        run,
        tuple(made["shape"]),
        made["num_classes"],
        _bank_of(run, made, bank),
        saved.step,
        made["data"],
        path,
    )


def make_schedule(name: str) -> NoiseSchedule:
    """Returns the noise schedule of a configuration's name."""
    match name:
        case "linear":
            return Linear()
        case "cosine":
            return Cosine()
        case "vp":
            return VP()
        case "edm":
            return EDM()
    raise InputError(f"unknown schedule {name!r}: choose one of linear, cosine, vp, edm")


def make_density(diffusion: DiffusionConfig, schedule: NoiseSchedule) -> TimeDensity:
    """Returns the density of training times of a configuration."""
    mean, std = diffusion.density_mean, diffusion.density_std
    match diffusion.density:
        case "uniform":
            return Uniform()
        case "logit-normal":
            return LogitNormal(mean, std)
        case "log-normal":
            return LogNormalSigma(schedule, mean, std)


def _denoiser(run: RunConfig, made: dict[str, Any], parts: Stages | None) -> Denoiser:
    """Builds the network, initialised from the run's seed, and its denoiser."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        backbone = make_backbone(run, made)
    schedule = make_schedule(run.diffusion.schedule)
    return Denoiser(backbone, schedule, run.diffusion.parameterization, parts)


def make_backbone(run: RunConfig, made: dict[str, Any]) -> MultiDecoder:
    """Builds the network of a configuration for what it is made from, `Parts.description`."""
    model, staged = run.model, run.stages
    channels, height, width = made["shape"]
    if height != width:
        raise InputError(f"images of {height}x{width} are not square: prepare them with --size")
    sit = model.style == "sit"
    cfg = TransformerConfig(
        image_size=height,
        channels=channels,
        patch=model.patch,
        width=model.width,
        heads=model.heads,
        num_classes=made["num_classes"],
        memory_dim=made["memory_dim"],
        null_memory=run.memory is not None and run.train.condition_dropout > 0,
        memory_scale=_memory_scale(run.memory, made["memory_dim"]),
        norm=model.norm or ("layer" if sit else "rms"),
        mlp=model.mlp or ("gelu" if sit else "swiglu"),
        rope=not sit if model.rope is None else model.rope,
        qk_norm=model.qk_norm,
        shift=model.shift,
        init=model.init,
    )
    if staged is None:
        shared = max(model.depth // 2, run.align.block if run.align is not None else 0)
        depths: Sequence[int] = [model.depth - shared]
    else:
        shared = staged.shared
        depths = staged.depths or [model.depth - shared] * (len(made["stages"]) + 1)
    encoder = TransformerEncoder(cfg, shared)
    return MultiDecoder(encoder, [TransformerDecoder(cfg, depth) for depth in depths])


def _snippets(run: RunConfig, bank: MemoryBank | None) -> Snippets | None:
    if bank is None or run.memory is None:
        return None
    memory = run.memory
    return Snippets(bank, memory.dropout, memory.place, memory.jitter, run.model.width)


def _align_tokens(run: RunConfig, data: DataSet) -> AlignTokens | None:
    if run.align is None:
        return None
    encoder = build_token_encoder(run.align.encoder)
    return AlignTokens(data, encoder, data.shape[1] // run.model.patch, cache=run.align.cache)


def _objective(run: RunConfig, denoiser: Denoiser, tokens: AlignTokens | None) -> Objective:
    cosine = run.train.cosine_weight > 0
    if run.align is None or tokens is None:
        return Objective(denoiser, cosine=cosine)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        head = AlignmentHead(run.model.width, tokens.dim, run.align.hidden)
    tap = f"encoder.stack.blocks.{run.align.block - 1}"
    return Objective(denoiser, cosine=cosine, head=head, tap=tap)


def _memory_scale(memory: MemoryConfig | None, dim: int) -> float:
    return math.sqrt(dim) if memory is not None and memory.scale == "unit-variance" else 1.0


def _check_stages(
    staged: StagesConfig, parts: Stages, record: dict[str, Any], fingerprint: str
) -> None:
    if record.get("data") != fingerprint:
        raise InputError(
            f"the stages in {staged.file} were found in other data: run  stratagem stages  again"
        )
    if staged.depths is not None and len(staged.depths) != parts.num:
        raise InputError(
            f"stages.depths has {len(staged.depths)} decoders, but {staged.file} has "
            f"{parts.num} stages: give one depth per stage"
        )


def _bank_of(run: RunConfig, made: dict[str, Any], path: Path | None) -> MemoryBank | None:
    if run.memory is None:
        if path is not None:
            raise InputError("--bank has no effect: this run was trained without memory")
        return None
    path = Path(run.memory.bank) if path is None else path
    if not path.is_file():
        raise InputError(f"no memory bank at {path}: give its place with --bank")
    bank = MemoryBank.load(path)
    # An imported network does not say which encoder made its snippets.
    if made["encoder"] is not None and bank.encoder != made["encoder"]:
        raise InputError(
            f"{path} was made by encoder {bank.encoder.get('name')}, the run was trained with "
            f"{made['encoder'].get('name')}: build the bank with that encoder"
        )
    bank.check_dim(made["memory_dim"])
    return bank
