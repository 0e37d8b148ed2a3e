"""Agreement of noise levels, as a file of stages keeps it: its curves, and the whole matrix.

For a finite data set the best possible denoiser is known in closed form. Where its answer at one
noise level agrees with that at another, one decoder can serve both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from stratagem.report.charts import Series, line_chart
from stratagem.report.heatmap import heat_map

__all__ = ["FRAMES", "agreement_chart", "agreement_map"]

FRAMES = "Frames are the stages: what is shared inside one decoder, and what is not."
_TIME, _SHARE = "time t (0 clean, 1 noise)", "share of pixels that agree"


def agreement_chart(curves: Mapping[str, Mapping[str, Any]], edges: Sequence[float]) -> str:
    """Draws agreement with the two ends of the noise axis, with bands of two standard errors.

    Args:
        curves: Words behind the name of a curve -> lists times, to_clean, to_noise, and both with
            _se.
        edges: Times at which the axis is cut.
    """
    series = []
    for note, found in curves.items():
        for key, end in (("to_clean", "clean end"), ("to_noise", "noise end")):
            pairs = list(zip(found[key], found[f"{key}_se"], strict=True))
            low, high = ([mean + side * error for mean, error in pairs] for side in (-2, 2))
            series.append(Series(end + note, found["times"], found[key], low, high))
    marks = [(t, f"edge {k + 1}") for k, t in enumerate(edges)]
    return line_chart(series, x_label=_TIME, y_label=_SHARE, marks=marks)


def agreement_map(
    matrix: Tensor, edges: Sequence[float], *, value: str = _SHARE, title: str | None = None
) -> str:
    """Draws the agreement of each two noise levels, shape (T, T), and the stages as frames."""
    return heat_map(matrix, label=_TIME, value=value, edges=edges, title=title)
