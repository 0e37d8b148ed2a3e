"""U-Nets, as an encoder part and decoder parts.

    encoder   stem, then for each level, whose sides are half those of the level before:
              [down, + pyramid], n blocks. Every output is kept for the decoder.
    middle    a block with attention, a block; shared, or each decoder's own
    decoder   for each level, the smallest sides first: n + 1 blocks, each on h beside the newest
              output of the encoder not yet used, [up]. Then norm, silu, convolution.

`Style` makes it DDPM++, NCSN++, ADM or LDM's U-Net. One encoder with one
decoder is the published network; with a decoder per stage it is the multi-decoder form (arXiv
2312.09181, section 4): no adapter between their widths is needed, for the first convolution of a
block takes what it is given. So even a thin decoder reads the encoder's full width.

The network knows no schedule: `time` is a number per image, and what the output means is the
caller's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from stratagem.errors import InputError
from stratagem.nets.unet_blocks import (
    ConvResample,
    Pyramid,
    UNetBlock,
    UNetCondition,
    Way,
    group_norm,
    scaled_sum,
)
from stratagem.nets.unet_style import Style

__all__ = ["UNetConfig", "UNetDecoder", "UNetEncoder", "UNetFeatures"]


@dataclass(frozen=True)
class UNetConfig:
    """What the encoder and all decoders of a U-Net agree upon.

    Attributes:
        image_size: Height and width of x_t, a multiple of 2^(levels - 1).
        channels: Channels of x_t.
        width: Channels of the stem, a multiple of 4.
        mults: Channels of each level over the width, in encoder and decoders.
        blocks: Blocks of an encoder's level; a decoder's has one more.
        attention: Sides at which blocks attend.
        style: The family.
        num_classes: Classes of the label; 0 for a network without one.
        memory_dim: Length of a memory vector; 0 for a network without one.
        condition_mult: Width of the condition over the encoder's.
        shared_middle: Whether the middle is the encoder's, or each decoder has its own.
        dropout: Rate in the blocks in training.
        time_scale: Factor on the time before its sinusoids.
        memory_scale: Factor on the memory vector, as in `TransformerConfig`.
        null_memory: Whether the absence of memory has a learned embedding of its own.

    Raises:
        InputError: If sizes do not divide each other, or attention is at sides that never occur.
    """

    image_size: int
    channels: int
    width: int
    mults: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 4
    attention: tuple[int, ...] = (16,)
    style: Style = Style()  # noqa: RUF009 (frozen)
    num_classes: int = 0
    memory_dim: int = 0
    condition_mult: int = 4
    shared_middle: bool = True
    dropout: float = 0.0
    time_scale: float = 1.0
    memory_scale: float = 1.0
    null_memory: bool = False

    def __post_init__(self) -> None:
        if not self.mults or min(self.mults) < 1:
            raise InputError(f"mults {self.mults}: give a factor of at least 1 for each level")
        if self.image_size % 2 ** (len(self.mults) - 1):
            raise InputError(
                f"image_size {self.image_size} cannot be halved {len(self.mults) - 1} times: "
                "give fewer mults or other images"
            )
        if self.width < 1 or self.width % 4:
            raise InputError(f"width {self.width} must be a multiple of 4")
        if self.blocks < 0 or self.condition_mult < 1 or not 0 <= self.dropout < 1:
            raise InputError(
                f"blocks {self.blocks}, condition_mult {self.condition_mult}, dropout "
                f"{self.dropout}: give at least 0, at least 1, and a rate in [0, 1)"
            )
        _require_sides("attention", self.attention, self.sides)

    @property
    def sides(self) -> tuple[int, ...]:
        """Height and width of each level."""
        return tuple(self.image_size >> level for level in range(len(self.mults)))

    def widths(self, width: int | None = None) -> list[int]:
        """Returns the channels of each level, of the encoder or of a decoder of another width."""
        own = self.width if width is None else width
        if own < 1:
            raise InputError(f"the width of a decoder must be at least 1: {own}")
        return [own * mult for mult in self.mults]


def _require_sides(name: str, sides: Sequence[int], possible: Sequence[int]) -> None:
    if odd := set(sides) - set(possible):
        raise InputError(
            f"{name} at sides {sorted(odd)} has no effect: the levels have {list(possible)}"
        )


class UNetFeatures(NamedTuple):
    """What an encoder hands to a decoder.

    Attributes:
        hidden: (B, C, h, w), of the last level.
        skips: One (B, C_i, h_i, w_i) for each block of the decoder, the last one first used.
        condition: silu(c), (B, K).
    """

    hidden: Tensor
    skips: tuple[Tensor, ...]
    condition: Tensor


def _resampler(cfg: UNetConfig, way: Way, width: int) -> nn.Module:
    if cfg.style.resample == "convolution":
        return ConvResample(way, width)
    return _block(cfg, width, width, way=way)


def _block(
    cfg: UNetConfig, width_in: int, width: int, *, attend: bool = False, way: Way | None = None
) -> UNetBlock:
    condition = cfg.condition_mult * cfg.width
    return UNetBlock(
        cfg.style, width_in, width, condition, attend=attend, way=way, dropout=cfg.dropout
    )


def _middle(cfg: UNetConfig, present: bool) -> nn.ModuleList:
    width = cfg.widths()[-1]
    return nn.ModuleList(_block(cfg, width, width, attend=a) for a in (True, False) if present)


class UNetEncoder(nn.Module):
    """The shared part: condition, stem, the way down and, if it is shared, the middle.

    Args:
        cfg: What encoder and decoders agree upon.

    Raises:
        InputError: If groups or heads do not divide a width.
    """

    def __init__(self, cfg: UNetConfig) -> None:
        super().__init__()
        widths, style = cfg.widths(), cfg.style
        before = [cfg.width, *widths]  # of level l, the width of what comes in
        self.scale = style.scale
        self.condition = UNetCondition(
            style,
            style.time_features * cfg.width,
            cfg.condition_mult * cfg.width,
            cfg.num_classes,
            cfg.memory_dim,
            cfg.time_scale,
            cfg.memory_scale,
            cfg.null_memory,
        )
        self.stem = nn.Conv2d(cfg.channels, cfg.width, 3, padding=1)
        self.blocks = nn.ModuleList()
        for side, width_in, width in zip(cfg.sides, before, widths, strict=False):
            incoming = [width_in] + [width] * (cfg.blocks - 1)
            attend = side in cfg.attention
            level = (_block(cfg, w, width, attend=attend) for w in incoming[: cfg.blocks])
            self.blocks.append(nn.ModuleList(level))
        self.down = nn.ModuleList(_resampler(cfg, "down", w) for w in widths[:-1])
        steps = zip([cfg.channels, *widths], widths[:-1], strict=False) if style.pyramid else ()
        self.pyramid = nn.ModuleList(Pyramid(*step) for step in steps)
        self.middle = _middle(cfg, cfg.shared_middle)
        _initialise(self)

    def forward(self, x_t: Tensor, time: Tensor, **condition: Tensor | None) -> UNetFeatures:
        """Encodes images (B, C, S, S) at times (B,) under memory, label, memory_keep.

        Args:
            x_t: Noisy images.
            time: Times.
            **condition: As `layers.Condition` takes it.

        Raises:
            ValueError: If a condition is given for which the network has no input.
        """
        c_BK = self.condition(time, **condition)
        h = self.stem(x_t)
        skips, copy = [h], x_t
        for level, blocks in enumerate(self.blocks):
            if level:
                h = self.down[level - 1](h, c_BK)
                if self.pyramid:
                    h = copy = scaled_sum(h, self.pyramid[level - 1](copy), self.scale)
                skips.append(h)
            for block in blocks.children():
                h = block(h, c_BK)
                skips.append(h)
        for block in self.middle:
            h = block(h, c_BK)
        return UNetFeatures(h, tuple(skips), c_BK)


class UNetDecoder(nn.Module):
    """The part of a stage: the middle, unless it is shared, the way up and the output.

    Args:
        cfg: What encoder and decoders agree upon.
        width: Own width, which `cfg.mults` multiply; None for the encoder's.
        attention: Sides at which its blocks attend; None for the encoder's.

    Raises:
        InputError: If groups or heads do not divide a width, or attention is at sides that never
            occur.
    """

    def __init__(
        self, cfg: UNetConfig, width: int | None = None, attention: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        attention = cfg.attention if attention is None else attention
        _require_sides("attention of a decoder", attention, cfg.sides)
        widths, incoming, skips = cfg.widths(width), cfg.widths()[-1], _skip_widths(cfg)
        self.middle = _middle(cfg, not cfg.shared_middle)
        levels = []
        for side, own in zip(reversed(cfg.sides), reversed(widths), strict=True):
            blocks = nn.ModuleList()
            for i in range(cfg.blocks + 1):
                attend = side in attention and (cfg.style.attend == "each" or i == cfg.blocks)
                blocks.append(_block(cfg, incoming + skips.pop(), own, attend=attend))
                incoming = own
            levels.append(blocks)
        self.blocks = nn.ModuleList(reversed(levels))
        self.up = nn.ModuleList(_resampler(cfg, "up", w) for w in widths[1:])
        self.norm = group_norm(cfg.style, widths[0])
        self.out = nn.Conv2d(widths[0], cfg.channels, 3, padding=1)
        _initialise(self)

    def forward(self, features: UNetFeatures) -> Tensor:
        """Decodes features to images (B, C, S, S)."""
        h, skips, c_BK = features.hidden, list(features.skips), features.condition
        for block in self.middle:
            h = block(h, c_BK)
        for level in reversed(range(len(self.blocks))):
            for block in self.blocks[level].children():
                h = block(torch.cat((h, skips.pop()), dim=1), c_BK)
            if level:
                h = self.up[level - 1](h, c_BK)
        return self.out(functional.silu(self.norm(h)))


def _skip_widths(cfg: UNetConfig) -> list[int]:
    """Channels of what the encoder keeps, in its order: stem, then [down] and blocks of levels."""
    widths = cfg.widths()
    levels = zip([cfg.width, *widths], widths, strict=False)
    return [w for before, own in levels for w in (before, *[own] * cfg.blocks)]


def _initialise(part: nn.Module) -> None:
    """Xavier for every map, 0 for every bias and for the last map of every branch (as DDPM).

    Rows of labels keep torch's N(0, 1).
    """
    for module in part.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    for module in part.modules():
        if isinstance(module, UNetBlock):
            nn.init.zeros_(module.conv_out.weight)
            if module.attention is not None:
                nn.init.zeros_(module.attention.out.weight)
    if isinstance(part, UNetDecoder):
        nn.init.zeros_(part.out.weight)
