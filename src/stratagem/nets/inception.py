"""The Inception-v3 of FID: that of Szegedy et al. 2015 (arXiv:1512.00567), but for three changes.

FID was defined by TensorFlow's graph of 2015-12-05. It differs from the published network in ways
that move the score:

    Mixed_5b .. 5d, 6b .. 6e, 7b   average pools do not count the padding
    Mixed_7c                       pools by maximum
    fc                             1008 outputs

A block is a table: its branches are concatenated, each a chain of steps; a step is a convolution, a
pool, or a fork whose two convolutions are concatenated. Names are those of pytorch-fid's file.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["InceptionNet", "Outputs"]


class Outputs(NamedTuple):
    """What the metrics use of one pass.

    Attributes:
        pooled: Features of FID, shape (B, 2048).
        spatial: Features of sFID, shape (B, 2023), or None where they are not to be had.
        classes: p(class | image) without bias, shape (B, 1008), or None where it was not asked for.
    """

    pooled: Tensor
    spatial: Tensor | None = None
    classes: Tensor | None = None


class Conv(NamedTuple):
    """A convolution by its name in the file; `pad` is None for "same"."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    pad: int | None = None


class Pool(NamedTuple):
    """A 3 x 3 pool."""

    kind: str


class Fork(NamedTuple):
    """Two convolutions of the same input, concatenated."""

    a: Conv
    b: Conv


Step = Conv | Pool | Fork
Branch = tuple[Step, ...]

_AVERAGE, _SAME_MAX, _HALF_MAX = Pool("average"), Pool("max"), Pool("max of stride 2")
_SQUARE, _FIVE, _ROW, _COLUMN = (3, 3), (5, 5), (1, 7), (7, 1)


def _chain(name: str, *specs: tuple[Any, ...]) -> Branch:
    """Convolutions one after another, named name_1, name_2, ...; of each all but its name."""
    return tuple(Conv(f"{name}_{number}", *spec) for number, spec in enumerate(specs, 1))


def _block_a(pool: int) -> tuple[Branch, ...]:
    return (
        (Conv("branch1x1", 64),),
        _chain("branch5x5", (48,), (64, _FIVE)),
        _chain("branch3x3dbl", (64,), (96, _SQUARE), (96, _SQUARE)),
        (_AVERAGE, Conv("branch_pool", pool)),
    )


def _block_b() -> tuple[Branch, ...]:
    return (
        (Conv("branch3x3", 384, _SQUARE, 2, 0),),
        _chain("branch3x3dbl", (64,), (96, _SQUARE), (96, _SQUARE, 2, 0)),
        (_HALF_MAX,),
    )


def _block_c(inner: int) -> tuple[Branch, ...]:
    row, column = (inner, _ROW), (inner, _COLUMN)
    return (
        (Conv("branch1x1", 192),),
        _chain("branch7x7", (inner,), row, (192, _COLUMN)),
        _chain("branch7x7dbl", (inner,), column, row, column, (192, _ROW)),
        (_AVERAGE, Conv("branch_pool", 192)),
    )


def _block_d() -> tuple[Branch, ...]:
    return (
        _chain("branch3x3", (192,), (320, _SQUARE, 2, 0)),
        _chain("branch7x7x3", (192,), (192, _ROW), (192, _COLUMN), (192, _SQUARE, 2, 0)),
        (_HALF_MAX,),
    )


def _block_e(pool: Pool) -> tuple[Branch, ...]:
    def fork(name: str) -> Fork:
        return Fork(Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1)))

    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), fork("branch3x3_2")),
        (Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, _SQUARE), fork("branch3x3dbl_3")),
        (pool, Conv("branch_pool", 192)),
    )


_STEM: dict[str, Conv | Pool] = {
    "Conv2d_1a_3x3": Conv("", 32, _SQUARE, 2, 0),
    "Conv2d_2a_3x3": Conv("", 32, _SQUARE, 1, 0),
    "Conv2d_2b_3x3": Conv("", 64, _SQUARE),
    "pool_1": _HALF_MAX,
    "Conv2d_3b_1x1": Conv("", 80),
    "Conv2d_4a_3x3": Conv("", 192, _SQUARE, 1, 0),
    "pool_2": _HALF_MAX,
}
_BLOCKS: dict[str, tuple[Branch, ...]] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(),
    "Mixed_7b": _block_e(_AVERAGE),
    "Mixed_7c": _block_e(_SAME_MAX),
}


def _pool(h: Tensor, pool: Pool) -> Tensor:
    if pool is _AVERAGE:
        return functional.avg_pool2d(h, 3, stride=1, padding=1, count_include_pad=False)
    if pool is _SAME_MAX:
        return functional.max_pool2d(h, 3, stride=1, padding=1)
    return functional.max_pool2d(h, 3, stride=2)


class _ConvNormRelu(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, num_in: int, spec: Conv) -> None:
        super().__init__()
        tall, wide = spec.kernel
        pad = (tall // 2, wide // 2) if spec.pad is None else spec.pad
        self.conv = nn.Conv2d(num_in, spec.width, spec.kernel, spec.stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(spec.width, eps=1e-3)

    def forward(self, h: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(h)))


class _Mixed(nn.Module):
    """One block: the concatenation of its branches."""

    def __init__(self, num_in: int, branches: tuple[Branch, ...]) -> None:
        super().__init__()
        self.branches = branches
        self.num_out = 0
        for branch in branches:
            width = num_in
            for step in branch:
                if not isinstance(step, Pool):
                    for conv in _convs(step):
                        self.add_module(conv.name, _ConvNormRelu(width, conv))
                    width = sum(conv.width for conv in _convs(step))
            self.num_out += width

    def forward(self, h: Tensor) -> Tensor:
        outs = []
        for branch in self.branches:
            out = h
            for step in branch:
                if isinstance(step, Pool):
                    out = _pool(out, step)
                else:
                    out = torch.cat([self.get_submodule(c.name)(out) for c in _convs(step)], 1)
            outs.append(out)
        return torch.cat(outs, 1)


def _convs(step: Conv | Fork) -> tuple[Conv, ...]:
    return step if isinstance(step, Fork) else (step,)


class InceptionNet(nn.Module):
    """Inception-v3 in its FID variant; parameter names are those of the pytorch-fid file."""

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for name, step in _STEM.items():
            if isinstance(step, Conv):
                self.add_module(name, _ConvNormRelu(width, step))
                width = step.width
        for name, branches in _BLOCKS.items():
            block = _Mixed(width, branches)
            self.add_module(name, block)
            width = block.num_out
        self.fc = nn.Linear(width, 1008)

    def forward(self, h: Tensor) -> Outputs:
        """Images (B, 3, 299, 299), scaled -> all outputs."""
        for name, step in _STEM.items():
            h = _pool(h, step) if isinstance(step, Pool) else self.get_submodule(name)(h)
        spatial = h
        for name in _BLOCKS:
            if name == "Mixed_6d":
                spatial = self.get_submodule("Mixed_6d.branch1x1")(h)[:, :7]
            h = self.get_submodule(name)(h)
        pooled = h.mean((2, 3))
        classes = functional.linear(pooled, self.fc.weight).softmax(1)
        return Outputs(pooled, spatial.permute(0, 2, 3, 1).flatten(1), classes)
