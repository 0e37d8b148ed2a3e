"""A matrix over two equal axes as inline SVG: one hue, the stronger the larger, on either theme.

A cell is a square of the first curve colour whose opacity is its value, so that the card of the
page shows through and the same picture serves the light and the dark theme. Values appear on hover
through SVG <title>; a matrix of more than 50 x 50 cells is shown by means over square blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from stratagem.report.charts import format_number

__all__ = ["heat_map"]

_SIDE = 400  # of the matrix, in pixels of a wide screen; margins hold the axes
_LEFT, _TOP, _BOTTOM, _RIGHT = 44, 8, 30, 66
_CELLS = 50


def heat_map(
    matrix: Tensor, *, label: str, value: str, title: str | None = None, edges: Sequence[float] = ()
) -> str:
    """Draws a matrix over [0, 1] x [0, 1]; returns an HTML <figure> for `page.page`.

    Row and column k of T stand for the k-th of T equal cells of the axis, which runs to the right
    and upwards. Cells that are not finite stay empty.

    Args:
        matrix: Shape (T, T).
        label: What either axis is.
        value: What a cell is, for the scale.
        title: A line above.
        edges: Where the axis is cut: lines across, and a frame around each block of the diagonal.
    """
    block = math.ceil(len(matrix) / _CELLS)
    pooled = avg_pool2d(matrix.double().cpu()[None, None], block, ceil_mode=True)[0, 0]
    finite = pooled[torch.isfinite(pooled)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    body = [
        _cells(pooled, low, high, block / len(matrix)),
        _edges(edges),
        _axes(),
        _scale(low, high),
    ]
    caption = f"<figcaption>{escape(title)}</figcaption>" if title else ""
    width, height = _LEFT + _SIDE + _RIGHT, _TOP + _SIDE + _BOTTOM
    return (
        f'<figure class="chart">{caption}<svg role="img" aria-label="{escape(title or value)}" '
        f'viewBox="0 0 {width} {height}" class="matrix" style="max-width:{width}px">'
        f"{''.join(body)}</svg><p>{escape(label)} on both axes; shade: {escape(value)}</p></figure>"
    )


def _cells(pooled: Tensor, low: float, high: float, step: float) -> str:
    """The squares; the last row and column may be cut off at the end of the axis."""
    parts = []
    for i, row in enumerate(pooled.tolist()):
        for j, cell in enumerate(row):
            if not math.isfinite(cell):
                continue
            (x0, x1), (y0, y1) = ((k * step, min(k * step + step, 1)) for k in (j, i))
            shade = (cell - low) / (high - low) if high > low else 1.0
            text = f"{_short(x0)}\N{EN DASH}{_short(x1)}, {_short(y0)}\N{EN DASH}{_short(y1)}: "
            parts.append(
                f'<rect x="{_x(x0)}" y="{_y(y1)}" width="{(x1 - x0) * _SIDE:.1f}" '
                f'height="{(y1 - y0) * _SIDE:.1f}" opacity="{shade:.2f}">'
                f"<title>{text}{format_number(cell)}</title></rect>"
            )
    return f'<g style="fill:var(--c1)" shape-rendering="crispEdges">{"".join(parts)}</g>'


def _edges(edges: Sequence[float]) -> str:
    bounds = [0.0, *edges, 1.0]
    frames = "".join(
        f'<rect x="{_x(a)}" y="{_y(b)}" width="{(b - a) * _SIDE:.1f}" '
        f'height="{(b - a) * _SIDE:.1f}" stroke-width="1.5"/>'
        for a, b in pairwise(bounds)
    )
    lines = "".join(
        f'<path d="M{_x(e)} {_y(0)}V{_y(1)}M{_x(0)} {_y(e)}H{_x(1)}" stroke-dasharray="2 4"/>'
        for e in edges
    )
    style = "fill:none;stroke:var(--ink);pointer-events:none"
    return f'<g style="{style}">{lines}{frames if edges else ""}</g>'


def _axes() -> str:
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(
            f'<text x="{_x(tick)}" y="{_TOP + _SIDE + 20}" text-anchor="middle">{tick:g}</text>'
            f'<text x="{_LEFT - 8}" y="{_y(tick)}" text-anchor="end" '
            f'dominant-baseline="central">{tick:g}</text>'
        )
    return f'<g style="fill:var(--soft)">{"".join(parts)}</g>'


def _scale(low: float, high: float) -> str:
    """A bar of shades at the right with its ends in numbers."""
    x, num, tall = _LEFT + _SIDE + 14, 20, _SIDE / 2
    shades = "".join(
        f'<rect x="{x}" y="{_TOP + tall * k / num:.1f}" width="12" height="{tall / num:.1f}" '
        f'opacity="{1 - k / (num - 1):.2f}"/>'
        for k in range(num)
    )
    ends = "".join(
        f'<text x="{x + 17}" y="{y:.0f}">{_short(v)}</text>'
        for v, y in ((high, _TOP + 11), (low, _TOP + tall))
    )
    return f'<g style="fill:var(--c1)">{shades}</g><g style="fill:var(--soft)">{ends}</g>'


def _short(value: float) -> str:
    return f"{value:.2g}".replace("-", "\N{MINUS SIGN}")


def _x(share: float) -> str:
    return f"{_LEFT + share * _SIDE:.1f}"


def _y(share: float) -> str:
    return f"{_TOP + (1 - share) * _SIDE:.1f}"
