"""Configuration -> network: a transformer or a U-Net, for all stages together or each its own.

    unified     one encoder, one decoder
    tailored    one encoder, a decoder of its own size for each stage; equal: all of one size
    separate    for each stage an encoder and a decoder; what they share only passes its input on

All are a `MultiDecoder`, so training, sampling and costs need not know which one they have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from stratagem.config import RunConfig, UNetModelConfig
from stratagem.errors import InputError
from stratagem.nets.multi_decoder import MultiDecoder, PassOn, Whole
from stratagem.nets.transformer import TransformerConfig, TransformerDecoder, TransformerEncoder
from stratagem.nets.unet import UNetConfig, UNetDecoder, UNetEncoder
from stratagem.nets.unet_style import Style, style

__all__ = ["condition_width", "make_backbone", "unet_style"]

STEPS = 999.0  # the last step of a thousand, counted from 0


class _Kit(NamedTuple):
    """How to make the parts of a network; `decoder` takes the number of its stage."""

    encoder: Callable[[], nn.Module]
    decoder: Callable[[int], nn.Module]

    def join(self, stages: range) -> MultiDecoder:
        """Joins an encoder and the decoders of some stages."""
        return MultiDecoder(self.encoder(), [self.decoder(k) for k in stages])


def make_backbone(run: RunConfig, made: dict[str, Any]) -> MultiDecoder:
    """Builds the network of a configuration for what it is made from, `Parts.description`.

    Raises:
        InputError: If the images are not square, or sizes do not fit them or each other.
    """
    _, height, width = made["shape"]
    if height != width:
        raise InputError(f"images of {height}x{width} are not square: prepare them with --size")
    form = "unified" if run.stages is None else run.stages.form
    num = 1 if form == "unified" else len(made["stages"]) + 1
    kit = _transformer(run, made, num) if run.unet is None else _unet(run, run.unet, made, num)
    if form != "separate":
        return kit.join(range(num))
    return MultiDecoder(PassOn(), [Whole(kit.join(range(k, k + 1))) for k in range(num)])


def condition_width(run: RunConfig) -> int:
    """Returns the width of the condition's embedding."""
    return run.model.width if run.unet is None else run.unet.condition_mult * run.unet.width


def unet_style(unet: UNetModelConfig) -> Style:
    """Returns the style of a configuration: the named one, but for what is given beside it."""
    names = ("time", "modulation", "norm_groups", "head_width")
    own = {name: value for name in names if (value := getattr(unet, name)) is not None}
    if unet.time is not None:
        own["time_features"] = 2 if unet.time == "fourier" else 1
    return replace(style(unet.style), **own)


def _transformer(run: RunConfig, made: dict[str, Any], num: int) -> _Kit:
    model, staged = run.model, run.stages
    sit = model.style == "sit"
    cfg = TransformerConfig(
        patch=model.patch,
        width=model.width,
        heads=model.heads,
        norm=model.norm or ("layer" if sit else "rms"),
        mlp=model.mlp or ("gelu" if sit else "swiglu"),
        rope=not sit if model.rope is None else model.rope,
        qk_norm=model.qk_norm,
        shift=model.shift,
        init=model.init,
        **_common(run, made),
    )
    shared = max(model.depth // 2, run.align.block if run.align is not None else 0)
    if staged is not None and staged.shared is not None:
        shared = staged.shared
    depths = _own(run, "depths", model.depth - shared, num)
    widths = _own(run, "widths", None, num)
    return _Kit(
        lambda: TransformerEncoder(cfg, shared),
        lambda k: TransformerDecoder(cfg, depths[k], widths[k]),
    )


def _unet(run: RunConfig, unet: UNetModelConfig, made: dict[str, Any], num: int) -> _Kit:
    like, edm = unet_style(unet), run.diffusion.parameterization == "edm"
    cfg = UNetConfig(
        width=unet.width,
        mults=unet.mults,
        blocks=unet.blocks,
        attention=unet.attention,
        style=like,
        condition_mult=unet.condition_mult,
        shared_middle=run.stages is None or run.stages.shared_middle,
        dropout=unet.dropout,
        time_scale=1.0 if edm or like.time == "fourier" else STEPS,
        **_common(run, made),
    )
    widths, attention = _own(run, "widths", None, num), _own(run, "attention", None, num)
    return _Kit(lambda: UNetEncoder(cfg), lambda k: UNetDecoder(cfg, widths[k], attention[k]))


def _common(run: RunConfig, made: dict[str, Any]) -> dict[str, Any]:
    """What networks of both kinds are told of images and conditions."""
    scaled = run.memory is not None and run.memory.scale == "unit-variance"
    return {
        "image_size": made["shape"][1],
        "channels": made["shape"][0],
        "num_classes": made["num_classes"],
        "memory_dim": made["memory_dim"],
        "memory_scale": math.sqrt(made["memory_dim"]) if scaled else 1.0,
        "null_memory": run.memory is not None and run.train.condition_dropout > 0,
    }


def _own(run: RunConfig, name: str, default: Any, num: int) -> list[Any]:
    """Returns a setting of each decoder: its own one, or that of the network."""
    staged = run.stages
    if staged is None or staged.form in {"equal", "unified"}:
        return [default] * num
    return list(getattr(staged, name) or [default] * num)
