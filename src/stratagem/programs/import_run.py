"""`stratagem import`: an official checkpoint becomes a run like any other.

    checkpoint.pt  ->  RUN/config.yaml, RUN/run.json, RUN/checkpoints/step-00000000/

The file is never changed, and nothing is written before all of its weights have found their place.
What it does not say (the data set, which encoder made the snippets) the run does not claim to know.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from stratagem import checkpoint
from stratagem.artifact import write_bytes, write_record
from stratagem.checkpoint import Checkpoint
from stratagem.config import (
    DiffusionConfig,
    MemoryConfig,
    ModelConfig,
    RunConfig,
    StagesConfig,
    UNetModelConfig,
    dump,
)
from stratagem.data.latents import Statistics
from stratagem.data.official import read_statistics
from stratagem.errors import InputError
from stratagem.interop.dit import Official, Project, convert, inspect
from stratagem.interop.state_dict import Weights, read
from stratagem.interop.unet import convert_unet
from stratagem.interop.unet_shapes import FAMILIES, OfficialUNet, UNetSource, inspect_unet
from stratagem.memory.bank import MemoryBank
from stratagem.nets.multi_decoder import MultiDecoder
from stratagem.nets.transformer import TransformerConfig
from stratagem.nets.unet import UNetConfig
from stratagem.nets.unet_style import STYLES
from stratagem.networks import make_backbone
from stratagem.schedule import VP, SqrtLinear

__all__ = ["Imported", "Source", "Told", "import_run"]

Source = Project | UNetSource


@dataclass(frozen=True)
class Told:
    """What the weights of some networks do not tell.

    Attributes:
        heads: Attention heads of a transformer, where neither the weights nor a published width
            tell.
        image_size: Side of the images or latents, where the file has no table of positions and
            no sides in its names.
        rope: Whether attention rotates by position, where the weights leave it open.
        norm_groups: Most groups of a U-Net's group norms, if not the published ones.
        head_width: Width of a U-Net's attention heads, if not the published one.
        cuts: Where a multistage U-Net cuts the noise axis, if not where the published one does:
            EDM's sigma, NCSN++'s t, LDM's number of a step.
        latent_stats: latents_stats.pt of the latents that a transformer learned from, without
            which `sample` cannot decode.
        latent_multiplier: What these latents were multiplied with; 0.18215 of SD-VAE's, which SiT
            and REPA learned from, without statistics.
    """

    heads: int | None = None
    image_size: int | None = None
    rope: Literal["yes", "no"] | None = None
    norm_groups: int | None = None
    head_width: int | None = None
    cuts: tuple[float, ...] = ()
    latent_stats: Path | None = None
    latent_multiplier: float | None = None


@dataclass(frozen=True)
class Imported:
    """What was imported.

    Attributes:
        title: Whose network it is.
        about: Its sizes.
        parameters: Numbers in it.
        left_out: What the file holds besides.
        bank: Where `sample` looks for the memory bank, or None for a network without memory.
    """

    title: str
    about: str
    parameters: int
    left_out: tuple[str, ...]
    bank: Path | None


def import_run(
    file: Path, source: Source, out: Path, *, told: Told = Told(), bank: Path | None = None
) -> Imported:
    """Makes a run of an official checkpoint.

    Args:
        file: A .safetensors, .pt or .pth file.
        source: Whose checkpoint it is.
        out: The run's folder; must not hold anything.
        told: What its weights do not tell.
        bank: Memory bank of a network with memory; None leaves its place open.

    Raises:
        InputError: If the file is no such checkpoint, sizes cannot be told or have no effect, the
            bank does not fit, or the folder is not empty.
        DamagedArtifact: If the file is truncated or altered.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} already exists: remove it or choose another --out")
    found = read(file)
    if source in FAMILIES:
        return _import_unet(file, cast(UNetSource, source), out, found, told, bank)
    return _import_transformer(file, cast(Project, source), out, found, told, bank)


def _import_transformer(
    file: Path, project: Project, out: Path, found: Weights, told: Told, bank: Path | None
) -> Imported:
    _refuse(told, project, ("norm_groups", "head_width", "cuts"))
    rope = None if told.rope is None else told.rope == "yes"
    official = inspect(
        found.tensors, project, heads=told.heads, image_size=told.image_size, rope=rope
    )
    held = None if bank is None else MemoryBank.load(bank)
    _check_bank(official, held)
    place = bank if bank is not None else out / "bank.safetensors"
    cfg, config = official.cfg, _config(official, place)
    made = _description(cfg, official.family.title, file, held)
    if told.latent_stats is not None or told.latent_multiplier is not None:
        made["latents"] = _latents(told, cfg.channels)
    weights = convert(found.tensors, official, _shapes(config, made))
    head = official.family.projector
    about = (
        f"width {cfg.width}, depth {official.depth}, {cfg.heads} heads, images "
        f"{_by(made['shape'])} in patches of {cfg.patch}"
    )
    left_out = (*found.left_out, *(("the projector",) if _has_head(found.tensors, head) else ()))
    return _write(out, config, made, weights, about, left_out, place if cfg.memory_dim else None)


def _import_unet(
    file: Path, source: UNetSource, out: Path, found: Weights, told: Told, bank: Path | None
) -> Imported:
    _refuse(told, source, ("heads", "rope", "latent_stats", "latent_multiplier"))
    if bank is not None:
        raise InputError("--bank has no effect: this network has no memory")
    official = inspect_unet(
        found.tensors,
        source,
        image_size=told.image_size,
        norm_groups=told.norm_groups,
        head_width=told.head_width,
        cuts=told.cuts,
    )
    cfg, config = official.cfg, _unet_config(official)
    made = _description(cfg, official.family.title, file, None)
    if config.stages is not None:
        made["stages"] = list(config.stages.edges or ())
    if official.family.project == "ldm":  # of an autoencoder that no file names, unscaled
        mean, std = [0.0] * cfg.channels, [1.0] * cfg.channels
        made["latents"] = {"autoencoder": {}, "mean": mean, "std": std}
    net = _shapes(config, made)
    weights = convert_unet(found.tensors, official.family.project, cfg, net)
    decoders = ", ".join(map(str, official.widths))
    about = f"width {cfg.width}, decoders {decoders}, images {_by(made['shape'])}"
    return _write(out, config, made, weights, about, found.left_out)


def _shapes(config: RunConfig, made: dict[str, Any]) -> MultiDecoder:
    """Returns the network of a run, whose numbers take no memory."""
    with torch.device("meta"):
        return make_backbone(config, made)


def _by(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def _latents(told: Told, channels: int) -> dict[str, Any]:
    """Returns mean and std of x = (z - mean) / std from (z - m) / s multiplier, or z multiplier."""
    multiplier = 1.0 if told.latent_multiplier is None else told.latent_multiplier
    if not 0 < multiplier < math.inf:
        raise InputError(f"--latent-multiplier is {multiplier}: it must be greater than 0")
    found = Statistics([0.0] * channels, [1.0] * channels)
    if told.latent_stats is not None:
        found = read_statistics(told.latent_stats)
    if len(found.mean) != channels or len(found.std) != channels:
        raise InputError(
            f"{told.latent_stats} is of latents of {len(found.mean)} channels, the network's have "
            f"{channels}"
        )
    return {"autoencoder": {}, "mean": found.mean, "std": [std / multiplier for std in found.std]}


def _refuse(told: Told, source: Source, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(told, name) != getattr(Told, name):
            raise InputError(f"--{name.replace('_', '-')} has no effect with --from {source}")


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


_PATHS = {  # what the networks were trained to say, and on which path
    "edm": DiffusionConfig("edm", "edm", "log-normal", -1.2, 1.2),
    "ncsnpp": DiffusionConfig("vp", "eps", "uniform"),
    "ldm": DiffusionConfig("sqrt-linear", "eps", "uniform"),
}


def _unet_config(official: OfficialUNet) -> RunConfig:
    cfg, like = official.cfg, STYLES[official.style]
    own = ("time", "modulation", "norm_groups", "head_width")
    unet = UNetModelConfig(
        style=official.style,
        width=cfg.width,
        mults=cfg.mults,
        blocks=cfg.blocks,
        attention=cfg.attention,
        labels=cfg.num_classes > 0,
        condition_mult=cfg.condition_mult,
        **{name: v for name in own if (v := getattr(cfg.style, name)) != getattr(like, name)},
    )
    stages = None
    if len(official.widths) > 1:
        stages = StagesConfig(
            edges=_edges(official),
            widths=official.widths,
            attention=official.attention,
            shared_middle=cfg.shared_middle,
        )
    diffusion = _PATHS[official.family.project]
    return RunConfig(data="unknown", unet=unet, diffusion=diffusion, stages=stages)


def _edges(official: OfficialUNet) -> tuple[float, ...]:
    """Returns the original's cuts as log-SNRs."""
    cuts = torch.tensor(official.cuts, dtype=torch.float64)
    match official.family.project:
        case "edm":
            found = -2 * cuts.log()
        case "ncsnpp":
            found = VP().log_snr(cuts)
        case "ldm":  # a whole step belongs to the stage that it begins, whatever its rounding
            found = SqrtLinear().log_snr((cuts - 1e-3) / 999)
    return tuple(found.tolist())


def _description(
    cfg: TransformerConfig | UNetConfig, title: str, file: Path, bank: MemoryBank | None
) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "shape": [cfg.channels, cfg.image_size, cfg.image_size],
        "num_classes": cfg.num_classes,
        "memory_dim": cfg.memory_dim,
        "data": "",
        "encoder": None if bank is None else dict(bank.encoder),
        "stages": None,
        "imported": {"from": title, "file": file.name, "sha256": digest},
    }


def _write(
    out: Path,
    config: RunConfig,
    made: dict[str, Any],
    weights: dict[str, Tensor],
    about: str,
    left_out: tuple[str, ...],
    bank: Path | None = None,
) -> Imported:
    """Writes the run, its config, which makes the folder a run, last; says what was imported."""
    state = {"step": 0, "sums": {}, "threads": torch.get_num_threads()}
    empty: dict[str, dict[str, Tensor]] = {group: {} for group in checkpoint.GROUPS}
    groups = empty | {"model": weights, "ema": weights}
    with checkpoint.lock(out):
        checkpoint.save(out, Checkpoint(0, groups, state))
        write_record(out / "run.json", "run", made)
        write_bytes(out / "config.yaml", dump(config).encode())
    num = sum(tensor.numel() for tensor in weights.values())
    return Imported(made["imported"]["from"], about, num, left_out, bank)
