"""Line charts as inline SVG that keep their type size at any width, without a line of JavaScript.

The plot area stretches with the page: everything in it has coordinates in percent of its width and
height, and the curves live in a nested SVG whose view box [0, 1000]^2 is stretched without keeping
its proportions, with strokes that do not scale. Text, dots and line widths stay in pixels, so the
same chart reads on a desk and on a telephone. Colours are CSS variables of the page (`page.py`).

Values that cannot be drawn (NaN, infinities, zero on a logarithmic axis) break the line and are
counted in a note below the chart. Values appear on hover through SVG <title>.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Series", "format_number", "line_chart"]

_HEIGHT = 300  # pixels, as in the style sheet of page.py: labels are spread in pixels
_COLOURS = 6
LOOKS = 2 * _COLOURS  # each colour comes dashed, or of points hollow, too
_DOTS = 40  # a curve of more points shows none until the pointer is over it
_TARGETS = 120  # at most so many points of a curve answer the pointer
_LABEL_GAP = 17
_LONGEST = 24  # a longer name goes to the legend, lest it take the room of the curves


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        name: Its label.
        x: Abscissae, increasing.
        y: Ordinates, as many.
        low: Lower edge of a band, as many, or None.
        high: Upper edge of the band.
        scatter: Whether these are points without a line, in any order.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    scatter: bool = False

    def __post_init__(self) -> None:
        for values in (self.y, self.low, self.high):
            if values is not None and len(values) != len(self.x):
                raise ValueError(f"series {self.name!r}: {len(values)} values for {len(self.x)} x")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"series {self.name!r}: a band needs both low and high")


def format_number(value: float) -> str:
    """Writes a number for people: four significant digits, thousands apart, a true minus sign.

    Example:
        >>> [format_number(v) for v in (1797, 12345.6, 3.14159, 0.00002, float("nan"))]
        ['1,797', '12,346', '3.142', '2e-05', 'not finite']
    """
    if not math.isfinite(value):
        return "not finite"
    whole = isinstance(value, int) or abs(value) >= 1000
    text = f"{value:,.0f}" if whole else f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}") if text.startswith("-") else text


# --- axes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """Maps values to [0, 1]; `ticks` are values inside the domain."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        low, high, at = (_scaled(v, self.log) for v in (self.low, self.high, value))
        return (at - low) / (high - low)


def _scaled(value: float, log: bool) -> float:
    return math.log10(value) if log else float(value)


def _drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _axis(values: Sequence[float], log: bool, pad: float) -> _Axis:
    """Chooses the domain of an axis: the range of the values plus `pad` of it at either end."""
    finite = [v for v in values if _drawable(v, log)]
    low, high = (min(finite), max(finite)) if finite else (1.0, 10.0)
    bottom, top = _scaled(low, log), _scaled(high, log)
    if top - bottom <= 1e-12 * max(abs(top), 1.0):  # one value: as much room as it is large
        room = 0.5 if log else 0.5 * abs(top) or 0.5
        bottom, top, pad = bottom - room, top + room, 0.0
    start, stop = bottom - pad * (top - bottom), top + pad * (top - bottom)
    if not log and pad and 0 <= bottom < 0.3 * top:
        start = 0.0  # a range that nearly reaches zero is shown from zero
    low, high = (10**start, 10**stop) if log else (start, stop)
    return _Axis(low, high, log, _log_ticks(low, high) if log else _linear_ticks(low, high))


def _linear_ticks(low: float, high: float) -> tuple[float, ...]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten, at most seven."""
    power = 10 ** math.floor(math.log10((high - low) / 6))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if (high - low) / (m * power) <= 6)
    slack = 1e-9 * step
    first, last = math.ceil((low - slack) / step), math.floor((high + slack) / step)
    return tuple(float(f"{i * step:.10g}") for i in range(first, last + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    """The fewest of: powers of ten (every n-th), 1-3, 1-2-5; linear within a short range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / 6))
    for leads in ((1,), (1, 3), (1, 2, 5)):
        decades = range(first, last + 1, stride if leads == (1,) else 1)
        ticks = tuple(float(f"{m}e{e}") for e in decades for m in leads)
        ticks = tuple(t for t in ticks if low <= t <= high)
        if len(ticks) >= 4 or (stride > 1 and len(ticks) >= 2):
            return ticks
    return _linear_ticks(low, high)


def _tick_labels(axis: _Axis) -> list[str]:
    """Writes ticks shortly: 20k, 1.5M, 0.25, 1e-5; thousands as k once there are ten of them."""
    short = max((abs(t) for t in axis.ticks), default=0.0) >= 1e4
    return [_tick_label(tick, short) for tick in axis.ticks]


def _tick_label(value: float, short: bool) -> str:
    size = abs(value)
    units = ((1e9, "B"), (1e6, "M"), (1e3, "k")) if short else ()
    unit, letter = next(((u, name) for u, name in units if size >= u), (1.0, ""))
    text = f"{value / unit:,.6g}" if size >= 1e-3 or not size else f"{value:.3g}"
    return text.replace("e-0", "e-").replace("-", "\N{MINUS SIGN}") + letter


# --- the chart ---------------------------------------------------------------------------------


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    title: str | None = None,
    x_log: bool = False,
    y_log: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    front: Sequence[tuple[float, float]] = (),
    alike: bool = False,
) -> str:
    """Draws curves; returns an HTML <figure> for `page.page`.

    Curves are labelled at their ends; on narrow screens, if a name is long, or if there are points
    without a line, by a legend.

    Args:
        series: The curves, the most important first; the first six differ in colour, the next
            six in dashes besides.
        x_label: What the abscissa is, with its unit.
        y_label: What the ordinate is, with its unit.
        title: A line above the chart.
        x_log: Whether the abscissa is logarithmic.
        y_log: Whether the ordinate is logarithmic.
        marks: Vertical lines, (x, label).
        front: Points (x, y), falling, joined by steps behind the curves.
        alike: Draw all series alike, without a legend; their names show on hover.
    """
    spread = [v for s in series for values in (s.y, s.low or (), s.high or ()) for v in values]
    places = [m for m, _ in marks if _drawable(m, x_log)]
    loose = any(s.scatter for s in series)
    x_axis = _axis([v for s in series for v in s.x] + places, x_log, 0.04 * loose)
    y_axis = _axis(spread, y_log, 0.05)
    strip, rows = _marks(marks, x_axis)
    body = [_grid(x_axis, y_axis), strip, _steps(front, x_axis, y_axis)]
    for k, one in reversed(list(enumerate(series))):  # the first lies on top
        look = 0 if alike else k
        body.append("" if one.scatter else _curves(one, look, x_axis, y_axis))
        body.append(_points(one, look, x_axis, y_axis, x_label, y_label))
    left = 12 + 8 * max((len(label) for label in _tick_labels(y_axis)), default=1)
    longest = max((len(s.name) for s in series), default=0)
    listed = loose or longest > _LONGEST
    if not loose:
        body.append(_end_labels(series, y_axis))
    right = 8 if listed else 22 + round(7.4 * longest)
    kind = "chart listed" if listed else "chart"
    caption = f"<figcaption>{escape(title)}</figcaption>" if title else ""
    return (
        f'<figure class="{kind}" style="--left:{left}px;--right:{right}px;--rows:{rows}">{caption}'
        f'{"" if alike else _legend(series)}<p class="y-label">{escape(y_label)}</p>'
        f'<svg class="plot" role="img" aria-label="{escape(title or y_label)}">{"".join(body)}'
        f'</svg><p class="x-label">{escape(x_label)}</p>{_note(series, x_axis, y_axis)}</figure>'
    )


def _look(index: int) -> str:
    """Class names of the curve of that index: a colour, and dashes from the seventh on."""
    return f"c{index % _COLOURS + 1}" + (" dashed" if index >= _COLOURS else "")


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _grid(x_axis: _Axis, y_axis: _Axis) -> str:
    lines = []
    for tick, label in zip(y_axis.ticks, _tick_labels(y_axis), strict=True):
        at = _percent(1 - y_axis(tick))
        lines.append(f'<line class="rule" x1="0" x2="100%" y1="{at}" y2="{at}"/>')
        lines.append(f'<text class="tick y" x="0" dx="-10" y="{at}">{label}</text>')
    lines.append('<line class="base" x1="0" x2="100%" y1="100%" y2="100%"/>')
    for tick, label in zip(x_axis.ticks, _tick_labels(x_axis), strict=True):
        at = _percent(x_axis(tick))
        lines.append(f'<line class="base" x1="{at}" x2="{at}" y1="100%" y2="101.7%"/>')
        lines.append(f'<text class="tick x" x="{at}" y="100%" dy="22">{label}</text>')
    return "".join(lines)


def _marks(marks: Sequence[tuple[float, str]], x_axis: _Axis) -> tuple[str, int]:
    """Draws vertical lines; labels that would meet on a telephone go to different rows above."""
    parts: list[str] = []
    ends: list[float] = []  # where the last label of each row ends, as a share of the width
    for value, label in sorted(m for m in marks if _drawable(m[0], x_axis.log)):
        share = x_axis(value)
        half = (len(label) * 6.6 + 10) / 300 / 2  # of a plot 300 pixels wide
        centre = min(max(share, half), max(1 - half, half))
        row = next((r for r, end in enumerate(ends) if centre - half >= end), len(ends))
        ends[row : row + 1] = [centre + half]
        anchor = "start" if share < half else "end" if share > 1 - half else "middle"
        at, dy = _percent(share), -8 - 16 * row
        parts.append(
            f'<line class="mark" x1="{at}" x2="{at}" y1="0" y2="100%"/>'
            f'<text class="mark {anchor}" x="{at}" y="0" dy="{dy}">{escape(label)}</text>'
        )
    return "".join(parts), len(ends)


def _curves(series: Series, index: int, x_axis: _Axis, y_axis: _Axis) -> str:
    """The band and the line of one series, a polyline per unbroken run of points."""
    shapes = []
    if series.low is not None and series.high is not None:
        edges = list(zip(series.low, series.high, strict=True))
        for run in _runs(series.x, edges, x_axis, y_axis):
            there = [(x, high) for x, (_, high) in run]
            back = [(x, low) for x, (low, _) in reversed(run)]
            points = _coordinates([*there, *back], x_axis, y_axis)
            shapes.append(f'<polygon class="band" points="{points}"/>')
    for line in _runs(series.x, [(y,) for y in series.y], x_axis, y_axis):
        lone = line if len(line) == 1 else []  # one point twice has round ends: a dot
        points = _coordinates([(x, y) for x, (y,) in [*line, *lone]], x_axis, y_axis)
        shapes.append(f'<polyline class="line" points="{points}"/>')
    return (
        f'<svg class="{_look(index)}" viewBox="0 0 1000 1000" preserveAspectRatio="none" '
        f'width="100%" height="100%">{"".join(shapes)}</svg>'
    )


def _steps(front: Sequence[tuple[float, float]], x_axis: _Axis, y_axis: _Axis) -> str:
    """Points joined by steps: flat until the next cost, then down to its distance."""
    points = [p for p in front if _drawable(p[0], x_axis.log) and _drawable(p[1], y_axis.log)]
    if len(points) < 2:
        return ""
    corners = [points[0]]
    for x, y in points[1:]:
        corners += [(x, corners[-1][1]), (x, y)]
    return (
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">'
        f'<polyline class="front" points="{_coordinates(corners, x_axis, y_axis)}"/></svg>'
    )


def _runs(
    x: Sequence[float], rows: Sequence[tuple[float, ...]], x_axis: _Axis, y_axis: _Axis
) -> list[list[tuple[float, tuple[float, ...]]]]:
    """Cuts points into runs without an undrawable value."""
    runs: list[list[tuple[float, tuple[float, ...]]]] = [[]]
    for at, row in zip(x, rows, strict=True):
        if _drawable(at, x_axis.log) and all(_drawable(v, y_axis.log) for v in row):
            runs[-1].append((at, row))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _coordinates(points: Sequence[tuple[float, float]], x_axis: _Axis, y_axis: _Axis) -> str:
    return " ".join(f"{1000 * x_axis(x):.1f},{1000 * (1 - y_axis(y)):.1f}" for x, y in points)


def _points(
    series: Series, index: int, x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str
) -> str:
    """The dots, visible if they are few, each with its values on hover."""
    drawn = [
        (i, x, y)
        for i, (x, y) in enumerate(zip(series.x, series.y, strict=True))
        if _drawable(x, x_axis.log) and _drawable(y, y_axis.log)
    ]
    kind, radius = ("dot", "3.5") if len(drawn) <= _DOTS else ("dot hidden", "7")
    step = max(1, math.ceil(len(drawn) / _TARGETS))
    if series.scatter:
        kind, radius, step = "dot", "3" if len(drawn) > 1 else "5.5", 1
    dots = []
    for i, x, y in drawn[::step]:
        band = ""
        if series.low is not None and series.high is not None:
            band = f" ({format_number(series.low[i])} to {format_number(series.high[i])})"
            if series.scatter:
                ends = [_percent(1 - y_axis(v)) for v in (series.low[i], series.high[i])]
                at = _percent(x_axis(x))
                dots.append(
                    f'<line class="bar" x1="{at}" x2="{at}" y1="{ends[0]}" y2="{ends[1]}"/>'
                )
        lines = (
            series.name,
            f"{y_label}: {format_number(y)}{band}",
            f"{x_label}: {format_number(x)}",
        )
        dots.append(
            f'<circle class="{kind}" cx="{_percent(x_axis(x))}" cy="{_percent(1 - y_axis(y))}" '
            f'r="{radius}"><title>{escape(chr(10).join(lines))}</title></circle>'
        )
    return f'<g class="{_look(index)}">{"".join(dots)}</g>'


def _end_labels(series: Sequence[Series], y_axis: _Axis) -> str:
    """Names at the right edge, at the height of the last point, moved apart where they meet."""
    last = []
    for index, one in enumerate(series):
        finite = [y for y in one.y if _drawable(y, y_axis.log)]
        if finite:
            last.append(((1 - y_axis(finite[-1])) * _HEIGHT, index))
    last.sort()
    heights = _spread([height for height, _ in last])
    return "".join(
        f'<text class="name {_look(index)}" x="100%" dx="12" y="{_percent(height / _HEIGHT)}">'
        f"{escape(series[index].name)}</text>"
        for height, (_, index) in zip(heights, last, strict=True)
    )


def _spread(heights: Sequence[float]) -> list[float]:
    """Moves sorted heights to at least `_LABEL_GAP` apart, each cluster about its own middle."""
    groups: list[tuple[float, int]] = []  # centre, how many
    for height in heights:
        groups.append((height, 1))
        while len(groups) > 1 and _reach(groups[-1], -1) < _reach(groups[-2], 1):
            (b, m), (a, n) = groups.pop(), groups.pop()
            groups.append(((a * n + b * m) / (n + m), n + m))
    return [c + _LABEL_GAP * (i - (n - 1) / 2) for c, n in groups for i in range(n)]


def _reach(group: tuple[float, int], side: int) -> float:
    return group[0] + side * group[1] * _LABEL_GAP / 2


def _legend(series: Sequence[Series]) -> str:
    looks = (f"{_look(k)}{' loose' * s.scatter}" for k, s in enumerate(series))
    names = (escape(s.name) for s in series)
    items = (f'<li class="{look}"><i></i>{n}</li>' for look, n in zip(looks, names, strict=True))
    return f'<ul class="legend">{"".join(items)}</ul>'


def _note(series: Sequence[Series], x_axis: _Axis, y_axis: _Axis) -> str:
    """Says how many points of which curve are missing."""
    notes = []
    for one in series:
        pairs = zip(one.x, one.y, strict=True)
        bad = sum(not (_drawable(x, x_axis.log) and _drawable(y, y_axis.log)) for x, y in pairs)
        if bad or not one.x:
            what = f"{bad} of {len(one.x)} points" if one.x else "it has no points"
            notes.append(f"{one.name} ({what})")
    if not notes:
        return ""
    cause = "not positive or not finite" if x_axis.log or y_axis.log else "not finite"
    return f'<p class="note">Not drawn, being {cause}: {escape(", ".join(notes))}.</p>'
