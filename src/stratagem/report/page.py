"""One self-contained HTML page: no script, no request, light and dark, desk and telephone.

    save_page(path, page(title, lead, [Section(title, text, table(...) + line_chart(...))]))

The building blocks return HTML. All text given to them is escaped; only `Section.body` is taken as
it is, for it is made of blocks. Pictures are embedded as lossless PNG and enlarged by the browser
without smoothing, so a pixel stays a pixel. A content security policy forbids the page to fetch
anything, whatever it contains.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from stratagem.artifact import write_bytes
from stratagem.report.charts import format_number
from stratagem.report.style import STYLE

__all__ = ["Section", "image_grid", "neighbour_grid", "page", "save_page", "table"]

Cell = str | int | float | None


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: Its heading.
        text: Plain text; an empty line begins a new paragraph.
        body: HTML made of the blocks of this package.
    """

    title: str
    text: str = ""
    body: str = ""


# --- tables ------------------------------------------------------------------------------------


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    caption: str | None = None,
    best: Mapping[int, Literal["min", "max"]] | None = None,
) -> str:
    """Writes a table; numbers are aligned, those of a column with equally many decimals.

    Args:
        headers: One per column; the first column names the row.
        rows: Cells: text, numbers, or None for nothing. Values that are not finite are shown as
            such and never best.
        caption: A line above it.
        best: Columns whose least or greatest value is to be set off.

    Raises:
        ValueError: If a row has not one cell per header.
    """
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"a row has {len(row)} cells for {len(headers)} headers: {row!r}")
    columns = [[row[k] for row in rows] for k in range(len(headers))]
    winners = {k: _winner(columns[k], goal) for k, goal in (best or {}).items()}
    written = [_column(column, winners.get(k)) for k, column in enumerate(columns)]
    numeric = [any(_is_number(v) for v in column) for column in columns]
    head = "".join(
        f'<th scope="col"{_number_class(numeric[k])}>{escape(h)}</th>'
        for k, h in enumerate(headers)
    )
    lines = [
        "".join(
            f'<th scope="row">{cell}</th>'
            if k == 0
            else f"<td{_number_class(numeric[k])}>{cell}</td>"
            for k, cell in enumerate(cells)
        )
        for cells in zip(*written, strict=True)
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    title = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure class="table">{title}<div class="scroll" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></figure>"
    )


def _number_class(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def _is_number(value: Cell) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(column: Sequence[Cell]) -> list[float]:
    return [v for v in column if isinstance(v, int | float) and _is_number(v) and math.isfinite(v)]


def _winner(column: Sequence[Cell], goal: Literal["min", "max"]) -> float | None:
    finite = _finite(column)
    if not finite:
        return None
    return min(finite) if goal == "min" else max(finite)


def _column(column: Sequence[Cell], winner: float | None) -> list[str]:
    """Writes the cells of a column with equally many decimals."""
    sizes = [abs(v) for v in _finite(column) if v]
    decimals = 0
    if sizes:  # three digits for the least, unless the greatest gets more than five
        least, greatest = (math.floor(math.log10(size)) for size in (min(sizes), max(sizes)))
        decimals = max(min(2 - least, 4 - greatest, 4), 0)
        while decimals and all(round(s, decimals - 1) == round(s, decimals) for s in sizes):
            decimals -= 1  # a nought that all of them end in says nothing
    return [_cell(value, decimals, value == winner and winner is not None) for value in column]


def _cell(value: Cell, decimals: int, best: bool) -> str:
    if value is None:
        return '<span class="none">\N{EN DASH}</span>'
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or not math.isfinite(value):
        text = format_number(value)
    else:
        text = f"{value:,.{decimals}f}"
        if value and not float(text.replace(",", "")):
            text = f"{value:.2g}"
    if not math.isfinite(value):
        return f'<span class="none">{text}</span>'
    text = text.replace("-", "\N{MINUS SIGN}") if text.startswith("-") else text
    return f"<strong>{text}</strong>" if best else text


# --- pictures ----------------------------------------------------------------------------------


def image_grid(
    images: Tensor, *, columns: int = 8, scale: float = 2, caption: str | None = None
) -> str:
    """Shows images in rows.

    Args:
        images: uint8, shape (B, C, H, W), C 1 or 3.
        columns: How many stand side by side; on a narrow screen they shrink.
        scale: Enlargement on a wide screen.
        caption: A line below.
    """
    cells = "".join(_picture(image, f"image {k}") for k, image in enumerate(images))
    return _grid("images", cells, columns, scale * images.shape[-1], caption)


def neighbour_grid(
    samples: Tensor,
    neighbours: Tensor,
    distances: Tensor | Sequence[float],
    *,
    columns: int = 4,
    scale: float = 2,
    caption: str = "Left: a sample. Right: the training image nearest to it, and their distance.",
) -> str:
    """Shows samples side by side with the training images nearest to them.

    Args:
        samples: uint8, shape (B, C, H, W), C 1 or 3.
        neighbours: The nearest training images, like samples.
        distances: Their distances, B numbers.
        columns: How many pairs stand side by side.
        scale: Enlargement on a wide screen.
        caption: A line below.
    """
    pairs = "".join(
        f'<div class="pair">{_picture(a, f"sample {k}")}{_picture(b, f"nearest to sample {k}")}'
        f"<span>{_distance(float(d))}</span></div>"
        for k, (a, b, d) in enumerate(zip(samples, neighbours, distances, strict=True))
    )
    return _grid("pairs", pairs, columns, 2 * scale * samples.shape[-1], caption)


def _distance(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "not finite"


def _grid(kind: str, cells: str, columns: int, width: float, caption: str | None) -> str:
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure class="{kind}"><div class="cells" style="--columns:{columns};'
        f'--width:{width:g}px">{cells}</div>{below}</figure>'
    )


def _picture(image: Tensor, name: str) -> str:
    """Embeds one uint8 image (C, H, W) as PNG."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in {1, 3}:
        raise ValueError(f"an image must be uint8 (1 or 3, H, W), not {tuple(image.shape)}")
    pixels = image.cpu().permute(1, 2, 0).contiguous().numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if image.shape[0] == 1 else pixels).save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    height, width = image.shape[1:]
    return (
        f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" '
        f'alt="{escape(name)}" title="{escape(name)}">'
    )


# --- the page ----------------------------------------------------------------------------------


def page(title: str, lead: str, sections: Sequence[Section], footer: str = "") -> str:
    """Puts a page together: title, leading paragraph, sections, and small print."""
    parts = "".join(
        f"<section><h2>{escape(s.title)}</h2>{_paragraphs(s.text)}{s.body}</section>"
        for s in sections
    )
    end = f"<footer>{_paragraphs(footer)}</footer>" if footer else ""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>"
        f'<header><h1>{escape(title)}</h1><div class="lead">{_paragraphs(lead)}</div></header>\n'
        f"{parts}{end}</main></body></html>\n"
    )


def _paragraphs(text: str) -> str:
    blocks = (block.strip() for block in text.split("\n\n"))
    return "".join(f"<p>{_text(block)}</p>" for block in blocks if block)


def _text(words: str) -> str:
    """Escapes text, and keeps a number and its per cent on one line."""
    return escape(words).replace(" %", "&nbsp;%")


def save_page(path: Path, html: str) -> None:
    """Writes a page; readers never see half of one."""
    write_bytes(path, html.encode())
