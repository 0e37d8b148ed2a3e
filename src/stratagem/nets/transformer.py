"""Diffusion transformers, as an encoder part and decoder parts.

    encoder   tokens = W patches(x_t) + positions, c = condition(time, label, memory), m blocks
    decoder   (h, c) -> d blocks, adaLN norm, linear map, patches back to an image

One encoder with one decoder is the published network: SiT (arXiv 2401.08740) and LightningDiT
(arXiv 2501.01423, the backbone of GMem, arXiv 2412.08781) are options of one configuration. One
encoder with a decoder per stage is the multi-decoder form (arXiv 2312.09181, figure 4): the width
of the residual stream is the encoder's, and stages differ in the depth of their decoders, or in
their width, which costs one linear map for the tokens and one for the condition.

The network knows no schedule: `time` is a number per image, and what the output means is the
caller's affair. Tokens run row by row; within a patch the order is (row, column, channel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from stratagem.errors import InputError
from stratagem.nets.layers import (
    MLP,
    Attention,
    Block,
    Condition,
    Norm,
    SwiGLU,
    TimeEmbedding,
    modulate,
    norm_layer,
    rotary_table,
    sincos_positions,
)

__all__ = [
    "SIZES",
    "Features",
    "Size",
    "TransformerConfig",
    "TransformerDecoder",
    "TransformerEncoder",
    "patchify",
    "size",
    "unpatchify",
]

_Init = Literal["adaln-zero", "gmem"]


class Size(NamedTuple):
    """Width, number of blocks and number of heads of a published network."""

    width: int
    depth: int
    heads: int


SIZES = {
    "S": Size(384, 12, 6),
    "B": Size(768, 12, 12),
    "L": Size(1024, 24, 16),
    "XL": Size(1152, 28, 16),
    "1p0B": Size(1536, 24, 24),
    "1p6B": Size(1792, 28, 28),
}


def size(name: str) -> Size:
    """Returns the published size of a name (DiT, arXiv 2212.09748, table 1; LightningDiT).

    Raises:
        InputError: If there is no such size.

    Example:
        >>> size("B")
        Size(width=768, depth=12, heads=12)
    """
    if name not in SIZES:
        raise InputError(f"unknown network size {name!r}: choose one of {', '.join(SIZES)}")
    return SIZES[name]


@dataclass(frozen=True)
class TransformerConfig:
    """What the encoder and all decoders of a transformer agree upon.

    The defaults are LightningDiT's; SiT is norm="layer", mlp="gelu", rope=False.

    Attributes:
        image_size: Height and width of x_t.
        channels: Channels of x_t.
        patch: Side of a patch, a divisor of image_size.
        width: Width of a token, a multiple of 4.
        heads: Heads of an attention, a divisor of the width.
        num_classes: Classes of the label; 0 for a network without one.
        memory_dim: Length of a memory vector; 0 for a network without one.
        mlp_ratio: Hidden width of the perceptron over the width; SwiGLU takes 2/3 of it.
        norm: RMSNorm or LayerNorm, in the blocks and for queries and keys.
        mlp: SwiGLU or GELU.
        rope: Whether attention rotates queries and keys by their place.
        qk_norm: Whether attention normalises queries and keys.
        shift: Whether the blocks' modulation shifts, or only scales.
        time_scale: Factor on the time before its sinusoids.
        memory_scale: Factor on the memory vector. A unit vector of D numbers is a weak signal
            beside the time; sqrt(D) gives its numbers unit variance. GMem has 1.
        null_memory: Whether the absence of memory has a learned embedding of its own.
        init: "adaln-zero": every block starts as the identity and the output at 0 (DiT). "gmem":
            the modulation and the output start like every other map; only biases are 0.

    Raises:
        InputError: If sizes do not divide each other.
    """

    image_size: int
    channels: int
    patch: int
    width: int
    heads: int
    num_classes: int = 0
    memory_dim: int = 0
    mlp_ratio: float = 4.0
    norm: Norm = "rms"
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    rope: bool = True
    qk_norm: bool = False
    shift: bool = True
    time_scale: float = 1.0
    memory_scale: float = 1.0
    null_memory: bool = False
    init: _Init = "adaln-zero"

    def __post_init__(self) -> None:
        _require_multiple("image_size", self.image_size, "patch", self.patch)
        _require_multiple("width", self.width, "heads", self.heads)
        _require_multiple("width", self.width, "4 (position embedding)", 4)
        if self.rope:
            _require_multiple("width / heads", self.head_width, "4 (rope)", 4)

    @property
    def grid(self) -> int:
        """Tokens along one side of the image."""
        return self.image_size // self.patch

    @property
    def head_width(self) -> int:
        """Width of a head, common to the encoder and all decoders."""
        return self.width // self.heads

    @property
    def patch_width(self) -> int:
        """Numbers in a patch."""
        return self.patch * self.patch * self.channels


def _require_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if divisor < 1 or value < 1 or value % divisor:
        raise InputError(f"{name} {value} must be a multiple of {divisor_name}, here {divisor}")


class Features(NamedTuple):
    """What an encoder hands to a decoder: tokens (B, L, W) and condition (B, W)."""

    hidden: Tensor
    condition: Tensor


def patchify(x: Tensor, patch: int) -> Tensor:
    """Cuts images (B, C, g p, g p) into patches, shape (B, g g, p p C).

    Example:
        >>> import torch
        >>> x = torch.arange(32.0).view(1, 2, 4, 4)
        >>> patchify(x, 2)[0, 0]
        tensor([ 0., 16.,  1., 17.,  4., 20.,  5., 21.])
    """
    rows = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B C g p g p
    return rows.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """Joins the patches of square images, the inverse of `patchify`.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.equal(unpatchify(patchify(x, 4), 4), x)
        True
    """
    grid = round(patches.shape[1] ** 0.5)
    parts = patches.unflatten(1, (grid, grid)).unflatten(3, (patch, patch, -1))  # B g g p p C
    return parts.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3).contiguous()


class _Stack(nn.Module):
    """Blocks one after another, with the rotary table that they share."""

    rotary: Tensor | None

    def __init__(self, cfg: TransformerConfig, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_block(cfg, width) for _ in range(depth))
        # Fixed and recomputed, hence not saved.
        table = rotary_table(cfg.head_width, cfg.grid) if cfg.rope and depth else None
        self.register_buffer("rotary", table, persistent=False)

    def forward(self, h_BLW: Tensor, c_BW: Tensor) -> Tensor:
        """Maps tokens (B, L, W) under silu(condition) (B, W)."""
        for block in self.blocks:
            h_BLW = block(h_BLW, c_BW, self.rotary)
        return h_BLW


def _block(cfg: TransformerConfig, width: int) -> Block:
    hidden = int(width * cfg.mlp_ratio)
    mlp = SwiGLU(width, int(2 / 3 * hidden)) if cfg.mlp == "swiglu" else MLP(width, hidden)
    qk_norm = cfg.norm if cfg.qk_norm else None
    attention = Attention(width, width // cfg.head_width, qk_norm)
    return Block(width, attention, mlp, cfg.norm, cfg.shift)


class TransformerEncoder(nn.Module):
    """The shared part: patch embedding, positions, condition and the first blocks.

    Args:
        cfg: What encoder and decoders agree upon.
        depth: Number of blocks, 0 or more.
    """

    positions: Tensor

    def __init__(self, cfg: TransformerConfig, depth: int) -> None:
        super().__init__()
        self.patch = cfg.patch
        self.embed = nn.Linear(cfg.patch_width, cfg.width)
        self.condition = Condition(
            cfg.width,
            cfg.num_classes,
            cfg.memory_dim,
            cfg.time_scale,
            cfg.memory_scale,
            cfg.null_memory,
        )
        self.stack = _Stack(cfg, cfg.width, depth)
        self.register_buffer("positions", sincos_positions(cfg.width, cfg.grid), persistent=False)
        _initialise(self, cfg.init)

    def forward(self, x_t: Tensor, time: Tensor, **condition: Tensor | None) -> Features:
        """Encodes images (B, C, S, S) at times (B,) under memory, label, memory_keep.

        Args:
            x_t: Noisy images.
            time: Times.
            **condition: As `layers.Condition` takes it.

        Raises:
            ValueError: If a condition is given for which the network has no input.
        """
        c_BW = self.condition(time, **condition)
        h_BLW = self.embed(patchify(x_t, self.patch)) + self.positions
        return Features(self.stack(h_BLW, functional.silu(c_BW)), c_BW)


class TransformerDecoder(nn.Module):
    """The part of a stage: the last blocks, then adaLN norm, linear map and patches to image.

    Args:
        cfg: What encoder and decoders agree upon.
        depth: Number of blocks, 0 or more.
        width: Own width of a token, a multiple of the head's width; None for the encoder's.
            Heads keep their width, so a wider decoder has more of them.

    Raises:
        InputError: If the width is not a multiple of the head's width.
    """

    def __init__(self, cfg: TransformerConfig, depth: int, width: int | None = None) -> None:
        super().__init__()
        width = width or cfg.width
        _require_multiple("decoder width", width, "the width of a head", cfg.head_width)
        self.patch = cfg.patch
        own = width != cfg.width
        self.adapt_hidden = nn.Linear(cfg.width, width) if own else nn.Identity()
        self.adapt_condition = nn.Linear(cfg.width, width) if own else nn.Identity()
        self.stack = _Stack(cfg, width, depth)
        self.norm = norm_layer(cfg.norm, width)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, cfg.patch_width)
        _initialise(self, cfg.init)

    def forward(self, features: Features) -> Tensor:
        """Decodes features to images (B, C, S, S)."""
        c_BW = functional.silu(self.adapt_condition(features.condition))
        h_BLW = self.stack(self.adapt_hidden(features.hidden), c_BW)
        shift, scale = self.modulation(c_BW)[:, None].chunk(2, dim=-1)
        return unpatchify(self.out(modulate(self.norm(h_BLW), scale, shift)), self.patch)


def _initialise(part: nn.Module, init: _Init) -> None:
    """Xavier for every map, 0 for every bias, N(0, 0.02^2) for the embeddings (as DiT)."""
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in part.modules():
        if isinstance(module, TimeEmbedding):
            nn.init.normal_(module.up.weight, std=0.02)
            nn.init.normal_(module.down.weight, std=0.02)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, Block | TransformerDecoder) and init == "adaln-zero":
            nn.init.zeros_(module.modulation.weight)
    if isinstance(part, TransformerDecoder) and init == "adaln-zero":
        nn.init.zeros_(part.out.weight)
