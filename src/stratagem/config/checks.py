"""Which values no run could use, and which settings would have no effect: both are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stratagem.ema import WIDEST
from stratagem.errors import InputError
from stratagem.stages import Stages
from stratagem.train import TrainConfig

if TYPE_CHECKING:
    from stratagem.config.sections import RunConfig, StagesConfig

__all__ = ["check", "check_decoders"]

_ABOVE_ZERO = (
    *("train.steps", "train.batch_size", "train.learning_rate", "train.grad_clip"),
    *("train.checkpoint_every", "train.log_every", "diffusion.density_std"),
    *("train.accumulate", "train.nonfinite_limit"),
    *("model.width", "model.depth", "model.heads", "model.patch", "align.block", "align.hidden"),
    *("unet.norm_groups", "unet.head_width"),
)
_NOT_NEGATIVE = (
    *("train.warmup_steps", "train.weight_decay", "train.keep_checkpoints", "train.threads"),
    "train.keep_every",
    *("train.cosine_weight", "train.align_weight", "stages.shared", "memory.jitter"),
    *("stages.warm_steps", "train.ema_snapshot_every", "train.samples_every"),
)
_RATES = (
    *("train.ema_decay", "train.beta1", "train.beta2", "train.condition_dropout"),
    *("memory.dropout", "stages.tie"),
)


def check(config: RunConfig) -> None:
    """Refuses values that no run could use, and settings that would have no effect."""
    _bound(config, _ABOVE_ZERO, lambda v: v > 0, "must be above 0")
    _bound(config, _NOT_NEGATIVE, lambda v: v >= 0, "must not be negative")
    _bound(config, _RATES, lambda v: 0 <= v < 1, "must be at least 0 and below 1")
    diffusion, stages = config.diffusion, config.stages
    _check_network(config)
    if stages is not None:
        _check_stages(config, stages)
        _check_draw(stages, config.train.steps)
        _check_budget(stages)
    if config.train.condition_dropout and config.memory is None and not config.labels:
        raise InputError("train.condition_dropout has no effect without memory and model.labels")
    if config.align is None and config.train.align_weight != TrainConfig.align_weight:
        raise InputError("train.align_weight has no effect without a section align")
    _check_engine(config.train)
    _check_averages(config.train)
    if (diffusion.parameterization == "edm") != (diffusion.schedule == "edm"):
        raise InputError(
            f"diffusion.parameterization {diffusion.parameterization} does not go with "
            f"diffusion.schedule {diffusion.schedule}: edm needs edm"
        )
    if diffusion.parameterization == "eps" and diffusion.schedule in {"linear", "cosine"}:
        raise InputError(
            "diffusion.parameterization eps does not go with diffusion.schedule "
            f"{diffusion.schedule}: it ends in pure noise, where sampling begins and noise tells "
            "nothing of the image; give parameterization v or x, or schedule vp"
        )
    shape = (diffusion.density_mean, diffusion.density_std)
    if diffusion.density == "uniform" and shape != (0.0, 1.0):
        raise InputError("diffusion.density_mean and density_std have no effect on density uniform")


def _check_averages(train: TrainConfig) -> None:
    for std in train.ema_stds:
        if not 0 < std <= WIDEST:
            raise InputError(f"train.ema_stds has {std}: give numbers in (0, {WIDEST:.3f}]")
    if len(set(train.ema_stds)) < len(train.ema_stds):
        raise InputError(f"train.ema_stds names one twice: {list(train.ema_stds)}")
    if train.ema_snapshot_every and not train.ema_stds:
        raise InputError("train.ema_snapshot_every has no effect without train.ema_stds")
    if train.samples_autoencoder is not None and not train.samples_every:
        raise InputError("train.samples_autoencoder has no effect without train.samples_every")


def _check_engine(train: TrainConfig) -> None:
    if (train.sampling == "weighted") != (train.weights is not None):
        raise InputError("train.sampling weighted and train.weights need each other: give both")
    if train.nonfinite == "stop" and train.nonfinite_limit != TrainConfig.nonfinite_limit:
        raise InputError("train.nonfinite_limit has no effect without train.nonfinite skip")
    if train.sharded_checkpoints and train.parallel != "fsdp":
        raise InputError("train.sharded_checkpoints has no effect without train.parallel fsdp")
    every = train.checkpoint_every
    if train.keep_every and (not train.keep_checkpoints or train.keep_every % every):
        raise InputError(
            "train.keep_every must be a multiple of train.checkpoint_every, and has no effect "
            "where train.keep_checkpoints 0 keeps all"
        )
    if train.optimizer == "muon" and train.parallel == "fsdp":
        raise InputError(
            "train.optimizer muon does not go with train.parallel fsdp, where no process has a "
            "whole matrix: choose adamw, or ddp"
        )


def _check_network(config: RunConfig) -> None:
    model, stages, align = config.model, config.stages, config.align
    if config.unet is not None:
        if model != type(model)():
            raise InputError("model has no effect beside unet: leave out one of the two sections")
        if align is not None:
            raise InputError("align has no effect with a unet: it aligns tokens of a transformer")
        return
    if model.width % model.heads:
        raise InputError(
            f"model.width {model.width} is not a multiple of model.heads {model.heads}"
        )
    if align is not None and stages is not None and stages.form == "separate":
        raise InputError("align needs blocks that all stages share: stages.form separate has none")
    most = model.depth if stages is None or stages.shared is None else stages.shared
    if align is not None and align.block > most:
        raise InputError(f"align.block is {align.block}: it can be at most {most} here")


def _check_stages(config: RunConfig, stages: StagesConfig) -> None:
    if (stages.file is None) == (stages.edges is None):
        raise InputError("stages needs either file or edges: give one of the two")
    if stages.edges is not None:
        check_decoders(stages, Stages(stages.edges).num)
    kind, idle = "transformer", ("attention", "shared_middle")
    if config.unet is not None:
        kind, idle = "unet", ("shared", "depths")
    for name in idle:
        if getattr(stages, name) != getattr(type(stages), name):
            raise InputError(f"stages.{name} has no effect with a {kind}: leave it out")
    if config.unet is not None:
        return
    depth, shared = config.model.depth, stages.shared
    if shared is None:
        raise InputError("stages.shared is missing: give the number of blocks of the encoder")
    depths = stages.depths if stages.depths is not None else (depth - shared,)
    if min(depths, default=0) < 1:
        raise InputError(f"stages.depths is {list(depths)}: each stage needs at least 1 block")
    if shared + max(depths) != depth:
        raise InputError(
            f"model.depth is {depth}, but the deepest stage has {shared} shared and "
            f"{max(depths)} own blocks: make model.depth {shared + max(depths)}"
        )


def _check_draw(stages: StagesConfig, steps: int) -> None:
    if stages.unbiased and stages.policy == "density":
        raise InputError("stages.unbiased has no effect with stages.policy density")
    if stages.warm_steps and stages.form == "unified":
        raise InputError("stages.warm_steps has no effect with stages.form unified: one decoder")
    if not stages.warm_steps and stages.tie != type(stages).tie:
        raise InputError("stages.tie has no effect without stages.warm_steps")
    if stages.warm_steps >= steps:
        raise InputError(
            f"stages.warm_steps is {stages.warm_steps}: the decoders part after it, so it must be "
            f"below train.steps, {steps}"
        )


def check_decoders(stages: StagesConfig, num: int) -> None:
    """Refuses lists of decoders that are not as many as the stages.

    Raises:
        InputError: Naming the list.
    """
    for name in ("depths", "widths", "attention"):
        sizes = getattr(stages, name)
        if sizes is not None and len(sizes) != num:
            raise InputError(
                f"stages.{name} has {len(sizes)} decoders, but there are {num} stages: give one "
                "entry per stage"
            )


def _check_budget(stages: StagesConfig) -> None:
    if stages.budget is None and stages.measure != "draws":
        raise InputError("stages.measure has no effect without stages.budget")
    if stages.budget is not None and not stages.budget > 0:
        raise InputError(f"stages.budget is {stages.budget}: it must be above 0")
    if stages.budget is not None and stages.form in {"equal", "unified"}:
        raise InputError(
            f"stages.budget has no effect with stages.form {stages.form}: set it to null"
        )
    if stages.budget is not None and stages.attention is not None:
        raise InputError(
            "stages.budget weighs decoders that differ in width alone: leave out stages.attention"
        )
    for name in ("depths", "widths"):
        if stages.budget is not None and getattr(stages, name) is not None:
            raise InputError(
                f"stages.budget would choose what stages.{name} gives by hand: leave one out"
            )


def _bound(
    config: RunConfig, names: Sequence[str], holds: Callable[[float], bool], rule: str
) -> None:
    for name in names:
        section, key = name.split(".")
        owner = getattr(config, section)
        value = None if owner is None else getattr(owner, key)
        if value is not None and not holds(value):
            raise InputError(f"{name} is {value}: it {rule}")
