"""The heat map: balanced SVG, every cell there with its value, edges where they belong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stratagem.report.agreement import FRAMES, agreement_chart, agreement_map
from stratagem.report.heatmap import heat_map
from test_report import EVIL, Reader


def drawn(matrix: Tensor, **options: object) -> Reader:
    return Reader(heat_map(matrix, label="time", value="agreement", **options))  # type: ignore[arg-type]


def cells(page: Reader) -> list[tuple[float, float, float, float, float]]:
    """x, y, width, height and opacity of the cells; the scale's are 12 wide."""
    names = ("x", "y", "width", "height", "opacity")
    found = [tuple(float(r[n] or 0) for n in names) for r in page.all("rect") if "opacity" in r]
    return [one for one in found if one[2] != 12]  # type: ignore[misc]


def test_cells_lie_where_they_belong() -> None:
    """Column to the right, row upwards; shade and title are the value."""
    page = drawn(torch.tensor([[0.0, 0.5], [1.0, 0.25]]))
    boxes = cells(page)
    assert [box[4] for box in boxes] == [0.0, 0.5, 1.0, 0.25]
    left, right = boxes[0][0], boxes[1][0]
    assert right - left == boxes[0][2] == boxes[0][3] == 200
    assert boxes[0][1] - boxes[2][1] == 200  # the second row lies above the first
    assert page.text("title") == [
        "0\N{EN DASH}0.5, 0\N{EN DASH}0.5: 0",
        "0.5\N{EN DASH}1, 0\N{EN DASH}0.5: 0.5",
        "0\N{EN DASH}0.5, 0.5\N{EN DASH}1: 1",
        "0.5\N{EN DASH}1, 0.5\N{EN DASH}1: 0.25",
    ]


@pytest.mark.parametrize(("num", "blocks"), [(50, 50), (100, 50), (101, 34), (1, 1)])
def test_large_matrices_are_shown_by_block_means(num: int, blocks: int) -> None:
    matrix = torch.arange(num * num, dtype=torch.float64).reshape(num, num)
    page = drawn(matrix)
    boxes = cells(page)
    assert len(boxes) == blocks**2
    side = -(-num // 50)
    assert page.text("title")[0].endswith(f": {matrix[:side, :side].mean():.4g}")
    # They cover the square exactly, the last ones cut off.
    assert sum(w * h for _, _, w, h, _ in boxes) == pytest.approx(400**2, rel=0.01)
    assert max(x + w for x, _, w, _, _ in boxes) == pytest.approx(444, abs=0.2)


def test_edges_frame_the_blocks() -> None:
    page = drawn(torch.eye(4), edges=(0.25, 0.75))
    frames = [r for r in page.all("rect") if "stroke-width" in r]
    assert [float(r["width"] or 0) for r in frames] == [100, 200, 100]
    assert [float(r["x"] or 0) for r in frames] == [44, 144, 344]
    assert [float(r["y"] or 0) for r in frames] == [308, 108, 8]
    assert len(page.all("path")) == 2
    assert not drawn(torch.eye(4)).all("path")


def test_what_is_not_finite_stays_empty_and_text_is_escaped() -> None:
    matrix = torch.tensor([[float("nan"), -1.0], [float("inf"), 3.0]])
    page = drawn(matrix, title=EVIL)
    assert [box[4] for box in cells(page)] == [0.0, 1.0]
    assert not page.all("script")
    assert page.all("svg")[0]["aria-label"] == EVIL
    assert "3" in page.text("text")
    assert "\N{MINUS SIGN}1" in page.text("text")
    assert [box[4] for box in cells(drawn(torch.ones(2, 2)))] == [1.0] * 4
    assert cells(drawn(torch.full((2, 2), float("nan")))) == []


def test_only_colours_of_the_page_are_used() -> None:
    html = heat_map(torch.eye(3), label="time", value="agreement")
    assert "#" not in html
    assert "var(--c1)" in html


def test_agreement_is_shown_as_a_file_of_stages_keeps_it() -> None:
    half = {"times": [0.0, 0.5, 1.0], "to_clean": [1.0, 0.5, 0.0], "to_noise": [0.0, 0.5, 1.0]}
    curves = half | {"to_clean_se": [0.0, 0.1, 0.0], "to_noise_se": [0.0, 0.0, 0.0]}
    html = agreement_chart({"": curves, ", no snippet": curves}, (0.25, 0.75))
    page = Reader(html)
    assert len(page.all("polyline")) == len(page.all("polygon")) == 4
    for words in ("clean end, no snippet", "noise end", "edge 2", "0.5 (0.3 to 0.7)"):
        assert words in html
    frames = Reader(agreement_map(torch.eye(4), (0.25, 0.75), value="cosine", title="Above"))
    assert "shade: cosine" in " ".join(frames.text("p"))
    assert FRAMES.startswith("Frames are the stages")
