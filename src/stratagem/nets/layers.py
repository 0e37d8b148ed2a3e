"""The parts that diffusion transformers are made of.

    modulate(h) = scale-and-shift of a normalised h:   (1 + scale) norm(h) + shift
    block(h)    = h + gate_a attention(modulate(h)),  then  h + gate_m mlp(modulate(h))

Shift, scale and gate come from the condition c (time, label, memory) by one linear map per block:
adaLN (DiT, arXiv 2212.09748, section 3.2). Two families share this block:

    SiT (arXiv 2401.08740)            LayerNorm without weights, GELU, absolute positions
    LightningDiT (arXiv 2501.01423)   RMSNorm, SwiGLU, absolute positions and rotary ones, maybe
                                      normalised queries and keys, maybe no shift

Axes of tensors: B batch, L tokens (row by row), W width, H heads, E width of a head.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "Condition",
    "Norm",
    "SwiGLU",
    "TimeEmbedding",
    "modulate",
    "norm_layer",
    "rotary_table",
    "rotate",
    "sincos_positions",
]

Norm = Literal["layer", "rms"]

NORM_EPS = 1e-6
MAX_PERIOD = 10_000.0
TIME_FEATURES = 256


# --- positions ---------------------------------------------------------------------------------


def sincos_positions(width: int, grid: int) -> Tensor:
    """Returns the fixed 2-D position embedding of a square grid, shape (grid * grid, width).

    The first half of the width codes the column, the second the row; each is (sin, cos) of
    position / 10000^(4 k / width) for k = 0 .. width/4 - 1 (ViT and DiT, arXiv 2212.09748).

    Args:
        width: Width of a token, a multiple of 4.
        grid: Tokens along one side.

    Example:
        >>> sincos_positions(4, 2).sum(1)  # row + column: sin and cos of 0 or 1 each
        tensor([2.0000, 2.3818, 2.3818, 2.7635])
    """
    quarter = width // 4
    omega = MAX_PERIOD ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    line = torch.cat((angle.sin(), angle.cos()), dim=1)
    column, row = line.repeat(grid, 1), line.repeat_interleave(grid, dim=0)
    return torch.cat((column, row), dim=1).float()


def rotary_table(head_width: int, grid: int) -> Tensor:
    """Returns the axial rotary table (cos, signed sin), shape (2, grid * grid, head_width).

    The first half of a head turns by the row, the second by the column; pair k of a half turns by
    position / 10000^(4 k / head_width) (RoPE, arXiv 2104.09864 eq. 34, on each axis). The sine has
    a minus at the first member of each pair, as `rotate` wants it.

    Args:
        head_width: Width of a head, a multiple of 4.
        grid: Tokens along one side.

    Example:
        >>> rotary_table(4, 2)[0, :, 0]  # cosine of the row number
        tensor([1.0000, 1.0000, 0.5403, 0.5403])
    """
    quarter = head_width // 4
    omega = MAX_PERIOD ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    row, column = angle.repeat_interleave(grid, dim=0), angle.repeat(grid, 1)
    angle = torch.cat((row, column), dim=1)
    cos = torch.stack((angle.cos(), angle.cos()), dim=-1).flatten(-2)
    sin = torch.stack((-angle.sin(), angle.sin()), dim=-1).flatten(-2)
    return torch.stack((cos, sin)).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns each adjacent pair (a, b) to (a cos - b sin, b cos + a sin).

    Args:
        x: Queries or keys, shape (..., L, E).
        table: `rotary_table(E, grid)`, shape (2, L, E).

    Example:
        >>> quarter_turn = torch.tensor([[[0, 0, 0, 0]], [[-1, 1, -1, 1]]])
        >>> rotate(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), quarter_turn)
        tensor([[ 0.,  1., -1.,  0.]])
    """
    cos, sin = table
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x * cos + swapped * sin


# --- condition ---------------------------------------------------------------------------------


class TimeEmbedding(nn.Module):
    """Embeds a time by sinusoids and a two-layer perceptron, (B,) -> (B, width).

    (cos, sin) of scale * t / 10000^(k / 128), k = 0 .. 127. SiT and LightningDiT feed t in [0, 1]
    unscaled; DiT's integer steps correspond to a scale of 1000.
    """

    frequencies: Tensor

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        half = TIME_FEATURES // 2
        omega = scale * MAX_PERIOD ** -(torch.arange(half, dtype=torch.float64) / half)
        self.register_buffer("frequencies", omega.float(), persistent=False)
        self.up = nn.Linear(TIME_FEATURES, width)
        self.down = nn.Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        """Embeds times of shape (B,)."""
        angle = time.to(self.frequencies.dtype)[:, None] * self.frequencies
        return self.down(functional.silu(self.up(torch.cat((angle.cos(), angle.sin()), dim=1))))


class Condition(nn.Module):
    """Joins time, class label and memory into one vector, shape (B, width).

        c = time embedding + label row + (P (s m) + b)

    What is not given is null, and null is a value of its own: `label=None` is the class
    `num_classes` in every row, `memory=None` the zero vector in every row. A zero vector leaves b,
    as in GMem's guidance, which never trained it; with `null_memory` it gives a vector of its own
    instead, learned from rows whose snippet was dropped. So None equals a batch of null rows, and
    a batch may mix rows with and without a condition. Nothing is dropped here: whoever trains with
    dropped conditions passes null rows, or factors `memory_keep`.

    Args:
        width: Width of the network.
        num_classes: Number of classes, 0 for none.
        memory_dim: Length of a memory vector, 0 for none.
        time_scale: Factor on the time.
        memory_scale: Factor s on the memory vector.
        null_memory: Whether a zero memory vector has an embedding of its own.
        time: What embeds the time; None for `TimeEmbedding` with `time_scale`.
    """

    def __init__(
        self,
        width: int,
        num_classes: int = 0,
        memory_dim: int = 0,
        time_scale: float = 1.0,
        memory_scale: float = 1.0,
        null_memory: bool = False,
        time: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.memory_scale = memory_scale
        self.time = TimeEmbedding(width, time_scale) if time is None else time
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.memory = nn.Linear(memory_dim, width) if memory_dim else None
        self.null = nn.Parameter(torch.zeros(width)) if null_memory else None

    def forward(
        self,
        time: Tensor,
        memory: Tensor | None = None,
        label: Tensor | None = None,
        memory_keep: Tensor | None = None,
    ) -> Tensor:
        """Returns c of times (B,), memory (B, D) or None, label (B,) or None.

        Args:
            time: Times.
            memory: Memory vectors; a zero row is null.
            label: Classes; num_classes is null.
            memory_keep: Factors on the embedded memory, (B, width): GMem v1's place of dropout.

        Raises:
            ValueError: If a condition is given for which the network has no input.
        """
        c_BW = self.time(time)
        if self.label is not None:
            rows = self.label.weight[-1] if label is None else self.label(label)
            c_BW = c_BW + rows
        elif label is not None:
            raise ValueError("a label was given to a network built with num_classes=0")
        if self.memory is not None:
            c_BW = c_BW + self._embed_memory(self.memory, memory, memory_keep)
        elif memory is not None:
            raise ValueError("memory was given to a network built with memory_dim=0")
        return c_BW

    def _embed_memory(
        self, projection: nn.Linear, memory: Tensor | None, keep: Tensor | None
    ) -> Tensor:
        if memory is None:
            return projection.bias if self.null is None else self.null
        embedded = projection(self.memory_scale * memory)
        if keep is not None:
            embedded = embedded * keep
        if self.null is None:
            return embedded
        return torch.where((memory == 0).all(1, keepdim=True), self.null, embedded)


# --- block -------------------------------------------------------------------------------------


def norm_layer(kind: Norm, width: int) -> nn.Module:
    """Returns the norm of a token: LayerNorm without weights, or RMSNorm with them; eps 1e-6."""
    if kind == "layer":
        return nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
    return nn.RMSNorm(width, eps=NORM_EPS)


def modulate(h: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """Returns h (1 + scale) + shift; h (B, L, W), scale and shift (B, 1, W).

    Example:
        >>> modulate(torch.ones(1, 1, 2), torch.tensor([[[0.5, -1.0]]]))
        tensor([[[1.5000, 0.0000]]])
    """
    return h * (1 + scale) if shift is None else h * (1 + scale) + shift


class Attention(nn.Module):
    """Multi-head self-attention with one map for queries, keys and values, (B, L, W) -> (B, L, W).

    softmax(q k^T / sqrt(E)) v

    Args:
        width: Width of a token.
        heads: Number of heads, a divisor of the width.
        qk_norm: Norm of each query and key (with weights), or None. LayerNorm keeps torch's
            eps 1e-5 here, as in LightningDiT.
    """

    def __init__(self, width: int, heads: int, qk_norm: Norm | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.q_norm = _head_norm(qk_norm, width // heads)
        self.k_norm = _head_norm(qk_norm, width // heads)

    def forward(self, h_BLW: Tensor, rotary: Tensor | None = None) -> Tensor:
        """Attends; `rotary` is None or `rotary_table`, shape (2, L, E)."""
        qkv = self.qkv(h_BLW).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q_BHLE, k_BHLE, v_BHLE = qkv.unbind(0)
        q_BHLE, k_BHLE = self.q_norm(q_BHLE), self.k_norm(k_BHLE)
        if rotary is not None:
            q_BHLE, k_BHLE = rotate(q_BHLE, rotary), rotate(k_BHLE, rotary)
        # In mixed precision the norm and the rotation leave q and k wider than v.
        q_BHLE, k_BHLE = q_BHLE.to(v_BHLE.dtype), k_BHLE.to(v_BHLE.dtype)
        mixed = functional.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE)
        return self.out(mixed.transpose(1, 2).flatten(2))


def _head_norm(kind: Norm | None, width: int) -> nn.Module:
    if kind is None:
        return nn.Identity()
    return nn.LayerNorm(width) if kind == "layer" else nn.RMSNorm(width, eps=NORM_EPS)


class MLP(nn.Module):
    """Two linear maps with a GELU (tanh form) between, W -> hidden -> W."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, h: Tensor) -> Tensor:
        """Maps tokens (..., W)."""
        return self.down(functional.gelu(self.up(h), approximate="tanh"))


class SwiGLU(nn.Module):
    """down(silu(gate) * value), (gate, value) = up(h) (arXiv 2002.05202 eq. 6), W -> W.

    Args:
        width: Width of a token.
        hidden: Width of the gate and of the value. LightningDiT takes 2/3 of an `MLP`'s, for
            equal parameters.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, h: Tensor) -> Tensor:
        """Maps tokens (..., W)."""
        gate, value = self.up(h).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * value)


class Block(nn.Module):
    """One transformer block under adaLN.

    Args:
        width: Width of a token.
        attention: Maps (tokens, rotary table) to tokens.
        mlp: Maps tokens to tokens.
        norm: Kind of norm.
        shift: Whether the modulation shifts; without, it only scales (LightningDiT "wo_shift").
    """

    def __init__(
        self, width: int, attention: Attention, mlp: MLP | SwiGLU, norm: Norm, shift: bool
    ) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = norm_layer(norm, width), norm_layer(norm, width)
        self.attention, self.mlp = attention, mlp
        self.num_parts = 3 if shift else 2  # of each branch: (shift,) scale, gate
        self.modulation = nn.Linear(width, 2 * self.num_parts * width)

    def forward(self, h_BLW: Tensor, c_BW: Tensor, rotary: Tensor | None = None) -> Tensor:
        """Maps tokens (B, L, W); `c_BW` is silu(condition), computed once for all blocks."""
        for_attention, for_mlp = self.modulation(c_BW)[:, None].chunk(2, dim=-1)
        *shift, scale, gate = for_attention.chunk(self.num_parts, dim=-1)
        h = modulate(self.norm_attention(h_BLW), scale, *shift)
        h_BLW = h_BLW + gate * self.attention(h, rotary)
        *shift, scale, gate = for_mlp.chunk(self.num_parts, dim=-1)
        h = modulate(self.norm_mlp(h_BLW), scale, *shift)
        return h_BLW + gate * self.mlp(h)
