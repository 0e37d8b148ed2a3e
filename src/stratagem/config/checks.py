"""Which values no run could use, and which settings would have no effect: both are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stratagem.errors import InputError
from stratagem.train import TrainConfig

if TYPE_CHECKING:
    from stratagem.config.sections import RunConfig, StagesConfig

__all__ = ["check"]

_ABOVE_ZERO = (
    *("train.steps", "train.batch_size", "train.learning_rate", "train.grad_clip"),
    *("train.checkpoint_every", "train.log_every", "diffusion.density_std"),
    *("model.width", "model.depth", "model.heads", "model.patch", "align.block", "align.hidden"),
)
_NOT_NEGATIVE = (
    *("train.warmup_steps", "train.weight_decay", "train.keep_checkpoints", "train.threads"),
    *("train.cosine_weight", "train.align_weight", "stages.shared", "memory.jitter"),
)
_RATES = (
    *("train.ema_decay", "train.beta1", "train.beta2", "train.condition_dropout"),
    "memory.dropout",
)


def check(config: RunConfig) -> None:
    """Refuses values that no run could use, and settings that would have no effect."""
    _bound(config, _ABOVE_ZERO, lambda v: v > 0, "must be above 0")
    _bound(config, _NOT_NEGATIVE, lambda v: v >= 0, "must not be negative")
    _bound(config, _RATES, lambda v: 0 <= v < 1, "must be at least 0 and below 1")
    model, diffusion, stages = config.model, config.diffusion, config.stages
    if model.width % model.heads:
        raise InputError(
            f"model.width {model.width} is not a multiple of model.heads {model.heads}"
        )
    if stages is not None:
        _check_stages(stages, model.depth)
    most = model.depth if stages is None else stages.shared
    if config.align is not None and config.align.block > most:
        raise InputError(f"align.block is {config.align.block}: it can be at most {most} here")
    if config.train.condition_dropout and config.memory is None and not model.labels:
        raise InputError("train.condition_dropout has no effect without memory and model.labels")
    if config.align is None and config.train.align_weight != TrainConfig.align_weight:
        raise InputError("train.align_weight has no effect without a section align")
    if (diffusion.parameterization == "edm") != (diffusion.schedule == "edm"):
        raise InputError(
            f"diffusion.parameterization {diffusion.parameterization} does not go with "
            f"diffusion.schedule {diffusion.schedule}: edm needs edm"
        )
    shape = (diffusion.density_mean, diffusion.density_std)
    if diffusion.density == "uniform" and shape != (0.0, 1.0):
        raise InputError("diffusion.density_mean and density_std have no effect on density uniform")


def _check_stages(stages: StagesConfig, depth: int) -> None:
    depths = stages.depths if stages.depths is not None else (depth - stages.shared,)
    if min(depths, default=0) < 1:
        raise InputError(f"stages.depths is {list(depths)}: each stage needs at least 1 block")
    if stages.shared + max(depths) != depth:
        raise InputError(
            f"model.depth is {depth}, but the deepest stage has {stages.shared} shared and "
            f"{max(depths)} own blocks: make model.depth {stages.shared + max(depths)}"
        )


def _bound(
    config: RunConfig, names: Sequence[str], holds: Callable[[float], bool], rule: str
) -> None:
    for name in names:
        section, key = name.split(".")
        owner = getattr(config, section)
        if owner is not None and not holds(getattr(owner, key)):
            raise InputError(f"{name} is {getattr(owner, key)}: it {rule}")
