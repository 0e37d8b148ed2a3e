"""Quality against cost: a dot or a curve per run, and the front of what no other run beats.

p is on the front  <=>  no other point costs at most as much and is at least as good
"""

from __future__ import annotations

from collections.abc import Sequence

from stratagem.report.charts import Series, line_chart

__all__ = ["front_chart", "pareto"]


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points (cost, distance) that no other beats, by cost.

    Example:
        >>> pareto([(3, 1), (1, 5), (2, 5), (2, 4), (4, 2)])
        [(1, 5), (2, 4), (3, 1)]
    """
    front: list[tuple[float, float]] = []
    for cost, distance in sorted(points):
        if not front or distance < front[-1][1]:
            front.append((cost, distance))
    return front


def front_chart(series: Sequence[Series], *, x_label: str, y_label: str, title: str) -> str:
    """Draws runs over cost, both axes logarithmic, and their common front as steps.

    Args:
        series: Cost and distance of each run: its checkpoints, or one point.
        x_label: What the cost is, with its unit.
        y_label: What the distance is.
        title: A line above.
    """
    points = [point for s in series for point in zip(s.x, s.y, strict=True)]
    return line_chart(
        series,
        x_label=x_label,
        y_label=y_label,
        title=title,
        x_log=True,
        y_log=True,
        front=pareto(points),
    )
