"""Reports in a real browser: charts are drawn, nothing complains, nothing sticks out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from banks import flat
from browser import CHROMIUM, Browser
from stratagem.programs.audit import Judge
from stratagem.programs.audit_page import audit_page
from stratagem.programs.audited import Audited
from stratagem.programs.compare import result_sections, speed_sentence
from stratagem.programs.results import Agreement, join_seeds
from stratagem.report.page import Section, page, save_page
from test_audit import dataset, shapes
from test_demo import result

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium"
)
WIDTHS = (1100, 390, 320)
DRAWN = """
[...document.querySelectorAll('svg[role=img]')].map(chart => {
  const box = chart.getBoundingClientRect();
  const shapes = [...chart.querySelectorAll('polyline, circle, rect')];
  const drawn = shapes.filter(s => s.getBoundingClientRect().width > 1);
  return [box.width, box.height, drawn.length];
})"""
UNDER_THE_POINTER = """(() => {
  const dot = document.querySelector('circle.dot');
  dot.scrollIntoView({block: 'center'});
  const box = dot.getBoundingClientRect();
  const at = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
  return at.querySelector('title').textContent;
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A comparison of runs, some of several seeds, with a bank and a heat map; and an audit."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [
        dataclasses.replace(result(f"{name}-{s}", curve), setting=name)
        for name, curve in {
            "plain": {100: 0.9, 200: 0.5},
            "a memory with a rather long name": {100: 0.4, 200: 0.2},
        }.items()
        for s in range(3)
        for curve in [{n: v * (1 + 0.1 * s) for n, v in curve.items()}]
    ]
    agreement = Agreement(torch.eye(20), (0.4,))
    joined = [
        dataclasses.replace(run, bank=flat(), agreement=agreement) for run in join_seeds(runs)
    ]
    lead, sections = speed_sentence(joined), result_sections(joined)
    save_page(folder / "compare.html", page("Runs", lead, sections))
    data = dataset(folder / "data", 300, 0.4)
    judge = Judge(data, (), device=torch.device("cpu"), scratch=folder)
    found = judge.audit(Audited(shapes(80, 1), {"samples": "test"}, bank=flat()))
    save_page(folder / "audit.html", audit_page(found))
    return {"compare": folder / "compare.html", "audit": folder / "audit.html"}


def test_numbers_of_a_matrix_are_legible_on_a_telephone(
    pages: dict[str, Path], browser: Browser
) -> None:
    for width in WIDTHS:
        browser.open(pages["compare"], width)
        height = "document.querySelector('.matrix text').getBoundingClientRect().height"
        assert browser.ask(height) > 10.5


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["compare", "audit"])
def test_pages_are_whole(name: str, width: int, pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages[name], width)
    charts = browser.ask(DRAWN)
    assert len(charts) == {"compare": 1 + 2 + 1 + 1, "audit": 1 + 1}[name]
    for across, down, shapes_drawn in charts:
        assert 200 < across < width
        assert down > 200
        assert shapes_drawn >= 2
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert browser.ask("document.images.length") >= 8
    assert browser.complaints() == []


def test_dots_answer_the_pointer(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["compare"], 1100)
    told = browser.ask(UNDER_THE_POINTER)
    assert "fd_x" in told
    assert "(3 seeds)" in told
    assert " to " in told  # the band


def test_the_theme_follows_the_reader(pages: dict[str, Path], browser: Browser) -> None:
    ground = []
    for dark in (False, True):
        browser.open(pages["audit"], 1100, dark=dark)
        ground.append(browser.ask("getComputedStyle(document.body).backgroundColor"))
    assert ground == ["rgb(250, 250, 248)", "rgb(18, 19, 22)"]


def test_the_checks_see_what_they_are_for(browser: Browser, tmp_path: Path) -> None:
    """A script is refused aloud, a wide picture sticks out, and an empty chart is empty."""
    bad = '<script>1</script><svg role="img"></svg><div style="width:2000px">wide</div>'
    save_page(tmp_path / "bad.html", page("Bad", "", [Section("Bad", "", bad)]))
    browser.open(tmp_path / "bad.html", 390)
    assert "Content Security Policy" in " ".join(browser.complaints())
    assert browser.ask("document.documentElement.scrollWidth") > 390
    assert browser.ask(DRAWN)[0][2] == 0
