"""Configuration -> objects. The only module that knows all classes.

    assemble(config)  -> Parts     what `train` needs: data, bank, stages, denoiser, batches
    open_run(folder)  -> Model     what `sample` and `evaluate` need: a denoiser, trained

Whatever does not belong together (a bank or stages made from other data, more decoders than stages)
is refused here, in one line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stratagem import checkpoint, config
from stratagem.artifact import read_record
from stratagem.autoencoders import Finish, finish_of
from stratagem.batches import AlignTokens, Batches, Conditions, Snippets, Tokens
from stratagem.config import AlignConfig, DiffusionConfig, RunConfig, StagesConfig
from stratagem.config.checks import check_decoders
from stratagem.data.official import open_data
from stratagem.data.order import draw_weights
from stratagem.data.shards import DataSet
from stratagem.denoiser import Denoiser
from stratagem.density import LogitNormal, LogNormalSigma, TimeDensity, Uniform
from stratagem.encoders import TokenEncoder, build_token_encoder
from stratagem.errors import InputError
from stratagem.memory.bank import MemoryBank
from stratagem.nets.multi_decoder import MultiDecoder
from stratagem.nets.warm_start import part_decoders
from stratagem.networks import condition_width, make_backbone
from stratagem.objective import AlignmentHead, Objective
from stratagem.post_hoc import average_of
from stratagem.schedule import EDM, VP, Cosine, Linear, NoiseSchedule, SqrtLinear
from stratagem.stage_draw import StageDraw
from stratagem.stages import Stages

__all__ = [
    "Inputs",
    "Model",
    "Parts",
    "align_encoder",
    "assemble",
    "join",
    "make_backbone",
    "make_density",
    "make_objective",
    "make_schedule",
    "open_inputs",
    "open_run",
]


@dataclass(frozen=True)
class Inputs:
    """The artifacts of a run, which belong together.

    Attributes:
        data: The data set.
        bank: The memory bank, or None.
        stages: The stages, or None for one.
        record: How the stages were found.
        description: What the run is made from, as in `Parts`.
    """

    data: DataSet
    bank: MemoryBank | None
    stages: Stages | None
    record: dict[str, Any]
    description: dict[str, Any]


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
        made: What it was made from, `Parts.description`.
        bank: Its memory bank, or None.
        step: Of the checkpoint.
        path: The run's folder.
        finish: Makes samples of what the network gives.
        ema_std: Of the average that the weights are; None for the exponential one.
    """

    denoiser: Denoiser
    config: RunConfig
    made: dict[str, Any]
    bank: MemoryBank | None
    step: int
    path: Path
    finish: Finish
    ema_std: float | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image, or of a latent."""
        channels, height, width = self.made["shape"]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """Classes of the label condition, 0 without."""
        return self.made["num_classes"]

    @property
    def data(self) -> str:
        """Fingerprint of the data set it was trained on; empty where that is not known."""
        return self.made["data"]


def assemble(run: RunConfig) -> Parts:
    """Makes the objects of a run from its configuration.

    Raises:
        InputError: If an artifact is missing or made from other data, or sizes do not fit.
        DamagedArtifact: If an artifact is truncated or altered.
    """
    if run.stages is not None and run.stages.budget is not None:
        raise InputError("stages.budget is not spent yet: see stratagem.programs.plan.tailored")
    inputs = open_inputs(run)
    return join(run, inputs, _align_tokens(run, inputs.data))


def join(run: RunConfig, inputs: Inputs, tokens: Tokens | None = None) -> Parts:
    """Makes the objects of a run from its artifacts.

    Args:
        run: The configuration.
        inputs: The artifacts.
        tokens: The targets, where the configuration aligns.
    """
    data, made = inputs.data, inputs.description
    objective = make_objective(run, made, inputs.stages, tokens.dim if tokens is not None else 0)
    density = make_density(run.diffusion, objective.denoiser.schedule)
    snippets = _snippets(run, inputs.bank)
    told = Conditions(snippets, made["num_classes"], run.train.condition_dropout, tokens)
    draw = _stage_draw(run, density, objective.denoiser)
    file = None if run.train.weights is None else Path(run.train.weights)
    weights = draw_weights(data, run.train.sampling, file)
    batches = Batches(data, density, run.train.batch_size, run.seed, told, draw, weights)
    return Parts(objective, batches, inputs.stages, made)


def open_inputs(run: RunConfig, *, verify: bool = True) -> Inputs:
    """Opens the artifacts of a run; without `verify`, pixels and snippets are not read.

    Raises:
        InputError: If an artifact is missing or made from other data, or sizes do not fit.
        DamagedArtifact: If an artifact is truncated or altered.
    """
    data = open_data(Path(run.data), verify)
    bank = None
    if run.memory is not None:
        build = f"stratagem bank build {run.data} --out {run.memory.bank}"
        _present(run.memory.bank, "memory bank", build)
        bank = MemoryBank.load(Path(run.memory.bank), verify=verify)
        bank.check(data.origin)
    parts: Stages | None = None
    record: dict[str, Any] = {}
    if run.stages is not None:
        parts, record = _stages(run.stages, data.fingerprint)
    num_classes = len(data.classes) if run.labels else 0
    if run.labels and not num_classes:
        raise InputError(f"labels is true, but {run.data} has no labels: set it to false")
    description = {
        "shape": list(data.shape),
        "num_classes": num_classes,
        "memory_dim": bank.dim if bank is not None else 0,
        "data": data.fingerprint,
        "encoder": bank.encoder if bank is not None else None,
        "stages": list(parts.edges) if parts is not None else None,
    }
    if data.autoencoder is not None:
        description["latents"] = {
            "autoencoder": data.autoencoder,
            "mean": data.statistics.mean,
            "std": data.statistics.std,
        }
    return Inputs(data, bank, parts, record, description)


def open_run(
    path: Path,
    *,
    step: int | None = None,
    bank: Path | None = None,
    autoencoder: str | None = None,
    ema_std: float | None = None,
) -> Model:
    """Opens a run with the averaged weights of its newest intact checkpoint, or of a given step.

    Args:
        path: The run's folder.
        step: Which checkpoint; None for the newest.
        bank: The memory bank, if it has moved since the training or was edited.
        autoencoder: Weights that make images of a run's latents; without, samples are latents.
        ema_std: Relative standard deviation of a power-function average to take in place of the
            exponential one: a tracked one, or one mixed of those and the snapshots.

    Raises:
        InputError: If there is no such run or checkpoint, the bank or autoencoder does not fit, or
            what was tracked does not make that average.
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
    warm = 0 if run.stages is None else run.stages.warm_steps
    averages = saved.tensors["ema"]
    if ema_std is not None:
        stds = run.train.ema_stds
        averages = average_of(path, saved, stds, ema_std, denoiser.backbone, warm)
    denoiser.backbone.load_state_dict({**saved.tensors["model"], **averages})
    if saved.step < warm:  # one still serves all stages
        assert isinstance(denoiser.backbone, MultiDecoder)
        part_decoders(denoiser.backbone)
    held, finish = _bank_of(run, made, bank), finish_of(made, autoencoder)
    denoiser.eval().requires_grad_(False)
    return Model(denoiser, run, made, held, saved.step, path, finish, ema_std)


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
        case "sqrt-linear":
            return SqrtLinear()
    raise InputError(
        f"unknown schedule {name!r}: choose one of linear, cosine, vp, edm, sqrt-linear"
    )


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


def _stage_draw(run: RunConfig, density: TimeDensity, denoiser: Denoiser) -> StageDraw | None:
    stages, staged, net = denoiser.stages, run.stages, denoiser.backbone
    if stages is None or staged is None or not isinstance(net, MultiDecoder):
        return None
    intervals = tuple(stages.time_interval(k, denoiser.schedule) for k in range(stages.num))
    how = (staged.policy, staged.batch, staged.unbiased, staged.warm_steps)
    tie = staged.tie if staged.warm_steps else 0.0
    return StageDraw(density, intervals, *how, warm_decoder=net.largest, tie=tie)


def _snippets(run: RunConfig, bank: MemoryBank | None) -> Snippets | None:
    if bank is None or run.memory is None:
        return None
    memory = run.memory
    return Snippets(bank, memory.dropout, memory.place, memory.jitter, condition_width(run))


def _align_tokens(run: RunConfig, data: DataSet) -> AlignTokens | None:
    if run.align is None:
        return None
    encoder = align_encoder(run.align, run.train.device)
    grid = data.shape[1] // run.model.patch
    return AlignTokens(_align_images(run.align, data), encoder, grid, cache=run.align.cache)


def align_encoder(align: AlignConfig, device: str = "cpu") -> TokenEncoder:
    """Returns the frozen encoder of an alignment, on a GPU where there is one if not on "cpu"."""
    gpu = device != "cpu" and torch.cuda.is_available()
    return build_token_encoder(
        align.encoder, size=align.size, weights=align.weights, device="cuda" if gpu else "cpu"
    )


def _align_images(align: AlignConfig, data: DataSet) -> DataSet:
    """Returns the data set whose images are encoded: the run's, or that of its latents' images."""
    if align.images is None:
        data.require_images()
        return data
    images = DataSet.open(Path(align.images))
    if data.kind == "images" or images.fingerprint != data.origin:
        raise InputError(f"align.images: {align.images} is not what {data.path} was encoded from")
    return images


def make_objective(
    run: RunConfig, made: dict[str, Any], parts: Stages | None, token_dim: int = 0
) -> Objective:
    """Builds what is trained: network and losses, initialised from the run's seed.

    Args:
        run: The configuration.
        made: What the run is made from, `Parts.description`.
        parts: The stages, or None for one.
        token_dim: Width of the tokens to align with, where the configuration aligns.
    """
    denoiser, cosine = _denoiser(run, made, parts), run.train.cosine_weight > 0
    if run.align is None:
        return Objective(denoiser, cosine=cosine)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        head = AlignmentHead(run.model.width, token_dim, run.align.hidden)
    tap = f"encoder.stack.blocks.{run.align.block - 1}"
    return Objective(denoiser, cosine=cosine, head=head, tap=tap)


def _present(path: str, what: str, command: str) -> None:
    if not Path(path).exists():
        raise InputError(f"no {what} at {path}: make it with  {command}")


def _stages(staged: StagesConfig, fingerprint: str) -> tuple[Stages, dict[str, Any]]:
    """Returns the stages and the record of how they were found, empty for edges given by hand."""
    if staged.file is None:
        return Stages(staged.edges or ()), {}
    _present(staged.file, "stages", f"stratagem stages DATA --out {staged.file}")
    parts, record = Stages.load(Path(staged.file))
    if record.get("data") != fingerprint:
        raise InputError(
            f"the stages in {staged.file} were found in other data: run  stratagem stages  again"
        )
    check_decoders(staged, parts.num)
    return parts, record


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
