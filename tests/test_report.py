"""The report: balanced HTML, nothing fetched or run, all text escaped, every curve there."""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from banks import make
from stratagem.memory.store import hold
from stratagem.randomness import uniform
from stratagem.report.bank_map import bank_map
from stratagem.report.charts import Series, format_number, line_chart
from stratagem.report.fronts import front_chart, pareto
from stratagem.report.page import (
    Section,
    image_grid,
    neighbour_grid,
    page,
    save_page,
    table,
)
from stratagem.report.style import STYLE

NAN = float("nan")
VOID = {"meta", "img", "br", "link", "input"}
EVIL = "<script>alert('1')</script> & \"quoted\""


class Reader(HTMLParser):
    """Collects tags and text and checks that every element is closed in its turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # (innermost tag, text)
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def text(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def _pixels(source: str) -> np.ndarray:
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)))


def _images(num: int, channels: int = 3) -> torch.Tensor:
    return (256 * uniform((num, channels, 6, 5), 0, "test")).to(torch.uint8)


def _chart(*series: Series, **options: object) -> Reader:
    return Reader(line_chart(series, x_label="x", y_label="y", **options))  # type: ignore[arg-type]


def _heights(points: str) -> list[tuple[float, float]]:
    pairs = (point.split(",") for point in points.split())
    return [(float(x), float(y)) for x, y in pairs]


@pytest.fixture
def everything() -> str:
    chart = line_chart(
        [Series(EVIL, [1, 10, 100], [3, 2, 1], [2, 1, 0.5], [4, 3, 2]), Series("b", [1], [NAN])],
        title=EVIL,
        x_label=EVIL,
        y_label=EVIL,
        x_log=True,
        y_log=True,
        marks=[(5, EVIL)],
    )
    cells = table([EVIL, "n"], [[EVIL, 1], ["b", NAN]], caption=EVIL, best={1: "min"})
    grids = image_grid(_images(3), caption=EVIL) + neighbour_grid(
        _images(2, 1), _images(2, 1), [0.5, NAN], caption=EVIL
    )
    return page(EVIL, EVIL, [Section(EVIL, EVIL, chart + cells), Section("b", "", grids)], EVIL)


def test_a_page_is_balanced_and_fetches_and_runs_nothing(everything: str) -> None:
    reader = Reader(everything)
    names = {name for name, _ in reader.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attrs in reader.tags:
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "xlink:href", "action"):
            assert (attrs.get(name) or "data:").startswith("data:")
    plain = re.sub(r"data:image/png;base64,[\w+/=]+", "", everything)
    assert not re.search(r"https?:|//\w|@import|url\(", plain)
    policies = [m for m in reader.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in str(policies[0]["content"])


def test_all_text_is_escaped_and_none_is_lost(everything: str) -> None:
    assert "<script" not in everything
    reader = Reader(everything)
    # title of the page, heading, lead, section, its text, footer, and each label of the blocks
    for tag, count in {"h1": 1, "h2": 1, "p": 5, "figcaption": 4, "th": 2, "text": 2}.items():
        assert reader.text(tag).count(EVIL) == count, tag
    assert any(text.startswith(EVIL) for text in reader.text("title"))


def test_both_themes_and_telephones_are_served(everything: str) -> None:
    light, dark = re.findall(r":root\{.*?--c6:#\w+", STYLE, flags=re.S)
    assert "prefers-color-scheme:dark" in STYLE
    assert re.findall(r"--(\w+):#", light) == re.findall(r"--(\w+):#", dark)
    assert "@media (max-width:" in everything
    assert "width=device-width" in everything


def _linear(colour: str) -> np.ndarray:
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def _oklab(linear: np.ndarray) -> np.ndarray:
    """Oklab of linear sRGB (Ottosson 2020)."""
    lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(lab) @ np.cbrt(np.array(lms) @ np.clip(linear, 0, 1))


# Machado, Oliveira & Fernandes 2009, severity 1
SIGHTS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize("sight", SIGHTS)
def test_colours_of_curves_are_told_apart(theme: int, sight: str) -> None:
    root = re.findall(r":root\{.*?--c6:#\w+", STYLE, flags=re.S)[theme]
    colours = dict(re.findall(r"--(\w+):(#\w{6})", root))
    curves = [_linear(colours[f"c{k}"]) for k in range(1, 7)]
    seen = [_oklab(SIGHTS[sight] @ c) for c in curves]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) >= 0.12
    weights = np.array([0.2126, 0.7152, 0.0722])
    ground = weights @ _linear(colours["card"]) + 0.05
    for curve in curves:
        low, high = sorted([ground, weights @ curve + 0.05])
        assert high / low >= 3


# --- charts ------------------------------------------------------------------------------------


def test_a_chart_has_one_polyline_per_series_where_the_values_are() -> None:
    reader = _chart(Series("a", [0, 5, 10], [0, 50, 100]), Series("b", [0, 10], [100, 0]))
    lines = [_heights(str(p["points"])) for p in reader.all("polyline")]
    assert len(lines) == 2
    second, first = lines  # the first series is drawn last, on top
    assert [x for x, _ in first] == [0, 500, 1000]
    (_, bottom), (_, middle), (_, top) = first
    assert bottom > middle > top
    assert middle == pytest.approx((bottom + top) / 2, abs=0.1)
    assert second == [(0, top), (1000, bottom)]
    assert {"a", "b"} <= set(reader.text("text"))
    assert reader.text("li") == ["a", "b"]


def test_equal_ratios_are_equal_steps_on_logarithmic_axes() -> None:
    reader = _chart(Series("a", [1, 10, 100], [5, 50, 500]), x_log=True, y_log=True)
    (x0, y0), (x1, y1), (x2, y2) = _heights(str(reader.all("polyline")[0]["points"]))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert {"1", "10", "100"} <= set(reader.text("text"))


def test_points_tell_their_values() -> None:
    reader = _chart(Series("run", [1000, 2000], [0.5, 1234.5], [0.4, 1000], [0.6, 2000]))
    assert reader.text("title") == [
        "run\ny: 0.5 (0.4 to 0.6)\nx: 1,000",
        "run\ny: 1,234 (1,000 to 2,000)\nx: 2,000",
    ]
    assert len(reader.all("polygon")) == 1


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf, 0.0, -1.0])
def test_undrawable_values_break_the_line_and_are_counted(bad: float) -> None:
    reader = _chart(Series("run", [1, 2, 3, 4, 5], [9, 8, bad, 6, 5]), y_log=True)
    lines = [_heights(str(p["points"])) for p in reader.all("polyline")]
    assert [[x for x, _ in line] for line in lines] == [[0, 250], [750, 1000]]
    assert len(reader.all("circle")) == 4
    assert any("run (1 of 5 points)" in text for text in reader.text("p"))


@pytest.mark.parametrize(
    "series",
    [
        [],
        [Series("a", [], [])],
        [Series("a", [1], [2])],
        [Series("a", [1, 2], [NAN, NAN])],
        [Series("a", [1, 2, 3], [0, 0, 0])],
        [Series("a", [1, 2], [1e-30, 1e30])],
        [Series("a", [1, 2], [1e6, 1e6 + 1e-6])],
        [Series("a", [NAN, 2], [1, 1], [NAN, NAN], [2, 2])],
    ],
)
@pytest.mark.parametrize("log", [False, True])
def test_odd_data_give_a_chart_all_the_same(series: list[Series], log: bool) -> None:
    reader = _chart(*series, x_log=log, y_log=log)
    numbers = re.findall(r"nan|inf", " ".join(str(attrs) for _, attrs in reader.tags))
    assert not numbers


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0, 1, False), (-8, 8, False), (0, 131, False), (3, 4e6, True), (2, 9, True), (1e-9, 1, True)],
)
def test_ticks_are_round_few_and_inside(low: float, high: float, log: bool) -> None:
    reader = _chart(Series("a", [low, high], [1, 2]), x_log=log)
    places = [
        float(str(attrs["x"]).rstrip("%"))
        for tag, attrs in reader.tags
        if tag == "text" and attrs.get("class") == "tick x"
    ]
    assert 3 <= len(places) <= 8
    assert places == sorted(places)
    assert all(0 <= place <= 100 for place in places)


def test_labels_at_the_ends_do_not_touch() -> None:
    reader = _chart(*[Series(f"run {k}", [0, 1], [0, 1 + k / 1000]) for k in range(6)])
    places = sorted(
        3 * float(str(attrs["y"]).rstrip("%"))  # the plot is 300 pixels high
        for tag, attrs in reader.tags
        if tag == "text" and "name" in str(attrs.get("class"))
    )
    assert len(places) == 6
    assert min(b - a for a, b in itertools.pairwise(places)) > 16


def test_marks_are_lines_with_labels_that_do_not_meet() -> None:
    marks = [(4.9, "stage one ends"), (5.1, "stage two ends"), (NAN, "nowhere")]
    reader = _chart(Series("a", [0, 10], [0, 1]), marks=marks)
    lines = [attrs for attrs in reader.all("line") if attrs.get("class") == "mark"]
    assert [line["x1"] for line in lines] == ["49.00%", "51.00%"]
    labels = [a for a in reader.all("text") if "mark" in str(a.get("class"))]
    assert len({label["dy"] for label in labels}) == 2


def test_many_points_stay_few_elements() -> None:
    reader = _chart(Series("loss", list(range(5000)), [1 / (k + 1) for k in range(5000)]))
    assert len(reader.all("circle")) <= 120
    assert len(_heights(str(reader.all("polyline")[0]["points"]))) == 5000


def test_points_without_a_line_are_all_there_and_listed() -> None:
    many = Series("a", list(range(300, 0, -1)), list(range(300)), scatter=True)
    one = Series("b", [5], [7], [6], [9], scatter=True)
    reader = _chart(many, one)
    assert len(reader.all("circle")) == 301
    assert reader.all("polyline") == []
    assert len([a for a in reader.all("line") if a.get("class") == "bar"]) == 1
    assert reader.text("li") == ["a", "b"]
    assert "name" not in {str(a.get("class")).split()[0] for a in reader.all("text")}
    assert _chart(many, one, alike=True).text("li") == []


def test_the_front_is_what_nothing_beats() -> None:
    points = [(5.0, 5.0), (1.0, 9.0), (2.0, 9.0), (3.0, 4.0), (4.0, 4.0), (6.0, 1.0)]
    assert pareto(points) == [(1, 9), (3, 4), (6, 1)]
    beaten = [p for p in points if any(a[0] <= p[0] and a[1] <= p[1] and a != p for a in points)]
    assert set(points) - set(beaten) == set(pareto(points))


def test_a_front_goes_in_steps() -> None:
    runs = [Series("a", [1, 10, 100], [8, 8, 2]), Series("b", [10], [4])]
    reader = Reader(front_chart(runs, x_label="x", y_label="y", title="t"))
    front = next(p for p in reader.all("polyline") if p.get("class") == "front")
    (x0, y0), (x1, y1), (x2, y2), (x3, y3), (x4, y4) = _heights(str(front["points"]))
    assert (x0, x1, x2, x3, x4) == (0, 500, 500, 1000, 1000)
    assert y0 == y1 < y2 == y3 < y4
    assert y2 - y1 == pytest.approx(y4 - y3, abs=0.2)  # 8, 4, 2


def test_a_bank_lies_along_its_components() -> None:
    """Rows in three directions, of lengths that tell the components apart."""
    rows = torch.tensor([[1, 0, 0.1]] * 6 + [[-1, 0, 0.1]] * 6 + [[0, 1, 0.1]] * 3)
    held = hold(torch.nn.functional.normalize(rows, dim=1)[:, None])
    labels = torch.tensor([0] * 6 + [1] * 6 + [-1] * 3)
    bank = make(15, store=held, labels=labels)
    reader = Reader(bank_map(bank, ["left", "right"]))
    assert reader.text("li") == ["no class", "left", "right"]
    dots = [float(str(a["cx"]).rstrip("%")) for a in reader.all("circle")]  # the last class first
    sides = (
        {round(x) for x in dots[:6]},
        {round(x) for x in dots[6:12]},
        {round(x) for x in dots[12:]},
    )
    assert [len(side) for side in sides] == [1, 1, 1]
    (right,), (left,), (middle,) = sides
    assert abs(right - left) > 80
    assert min(left, right) < middle < max(left, right)
    assert "of the variance" in reader.text("p")[0]
    many = make(15, store=held, labels=torch.arange(15))
    assert Reader(bank_map(many)).text("li") == []
    assert "class 14" in bank_map(many)
    assert bank_map(make(2)) == ""


def test_wrong_series_are_refused() -> None:
    with pytest.raises(ValueError, match="3 values for 2 x"):
        Series("a", [1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="both low and high"):
        Series("a", [1, 2], [1, 2], low=[0, 1])


def test_numbers_are_written_for_people() -> None:
    assert format_number(-0.5) == "\N{MINUS SIGN}0.5"
    assert format_number(1_874_211) == "1,874,211"


# --- tables and pictures -----------------------------------------------------------------------


def test_a_table_aligns_and_sets_off_the_best() -> None:
    rows = [["a", 3.42, 12, 0.5], ["b", 17.9, None, NAN], ["c", 11.0, 1234567, 0.25]]
    reader = Reader(table(["run", "FD", "n", "rate"], rows, best={1: "min", 2: "max", 3: "max"}))
    assert reader.text("strong") == ["3.42", "0.50", "1,234,567"]
    assert reader.text("td") == ["12", "17.90", "11.00", "0.25"]
    assert reader.text("span") == ["\N{EN DASH}", "not finite"]
    assert reader.text("th") == ["run", "FD", "n", "rate", "a", "b", "c"]
    assert sum(attrs.get("class") == "number" for attrs in reader.all("td")) == 9


def test_small_and_large_numbers_of_one_column_are_both_legible() -> None:
    reader = Reader(table(["n", "v"], [["a", 0.00001], ["b", 123456.7], ["c", -2.0]]))
    assert reader.text("td") == ["1e-05", "123,457", "\N{MINUS SIGN}2"]


def test_noughts_that_a_whole_column_ends_in_are_left_out() -> None:
    reader = Reader(table(["n", "%", "d"], [["a", 0.1, 2.125], ["b", 1.2, 3.0], ["c", 0.0, 4.5]]))
    assert reader.text("td") == ["0.1", "2.12", "1.2", "3.00", "0.0", "4.50"]


def test_ragged_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="1 cells for 2 headers"):
        table(["a", "b"], [["only"]])


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_embedded_without_loss(channels: int) -> None:
    images = _images(5, channels)
    reader = Reader(image_grid(images, columns=4, scale=3, caption="five"))
    sources = [str(attrs["src"]) for attrs in reader.all("img")]
    assert len(sources) == 5
    for image, source in zip(images, sources, strict=True):
        shown = _pixels(source).reshape(6, 5, channels)
        assert np.array_equal(shown, image.permute(1, 2, 0).numpy())
    assert "--columns:4;--width:15px" in str(reader.all("div")[0]["style"])
    assert "image-rendering:pixelated" in STYLE


def test_neighbours_stand_beside_their_samples() -> None:
    samples, neighbours = _images(4)[:2], _images(4)[2:]
    reader = Reader(neighbour_grid(samples, neighbours, torch.tensor([0.125, NAN])))
    shown = [_pixels(str(attrs["src"])) for attrs in reader.all("img")]
    order = [samples[0], neighbours[0], samples[1], neighbours[1]]
    for pixels, image in zip(shown, order, strict=True):
        assert np.array_equal(pixels, image.permute(1, 2, 0).numpy())
    assert reader.text("span") == ["0.125", "not finite"]


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        image_grid(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="must be uint8"):
        image_grid(torch.zeros(1, 4, 4, 4, dtype=torch.uint8))


def test_a_page_is_saved_whole(tmp_path: Path, everything: str) -> None:
    path = tmp_path / "new" / "report.html"
    save_page(path, "old")
    save_page(path, everything)
    assert path.read_text(encoding="utf-8") == everything
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(UnicodeEncodeError):
        save_page(path, "\ud800")
    assert path.read_text(encoding="utf-8") == everything
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
